"""What malloc does with memory that is freed."""

import os
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_freed_memory_is_kept():
    """In a process of its own, whose malloc nobody has told anything."""
    program = """
import ctypes, resource, sys
from fastvae.cli.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
malloc, free, memset = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free", "memset"))
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for _ in range(5):  # as long as malloc takes to learn what it will, left alone
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [malloc(16_000_000) for _ in range(6)]
    for block in blocks:
        memset(block, 1, 16_000_000)
    for block in blocks:
        free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    kept, left_alone = (
        int(subprocess.check_output([sys.executable, "-c", program, mode], env=environment))
        for mode in ("keep", "leave")
    )
    assert kept < 20 < left_alone  # 48 if its pages are large
