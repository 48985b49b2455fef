"""What malloc does with memory that is freed."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_freed_memory_is_kept():
    """Large blocks come from the heap, which does not shrink; in a process whose malloc was told nothing else."""
    program = """
import ctypes, sys
from fastvae.cli.malloc import keep_freed_memory

class Info(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e f g h".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.mallinfo2.restype = ctypes.c_void_p, [ctypes.c_void_p], Info
if sys.argv[1] == "keep":
    keep_freed_memory()
before = libc.mallinfo2()
blocks = [libc.malloc(16_000_000) for _ in range(6)]
during = libc.mallinfo2()
for block in blocks:
    libc.free(block)
after = libc.mallinfo2()
print(during.mapped - before.mapped, after.arena - before.arena)
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}

    def bytes_of(mode):
        """(mapped outside of the heap while in use, left in the heap after they are freed)"""
        output = subprocess.check_output([sys.executable, "-c", program, mode], env=environment, text=True)
        return tuple(map(int, output.split()))

    mapped, kept = bytes_of("keep")
    assert mapped == 0
    assert kept >= 5 * 16_000_000
    mapped, kept = bytes_of("leave")
    assert mapped >= 6 * 16_000_000
    assert kept < 16_000_000
