"""Runs what the library launches as a GPU would: compiled, and then executed as PTX on the CPU.

with executed("sm_90"):
    fastvae.vae_loss(recon, target, mu, logvar).loss.backward()
"""

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

import fastvae
from tests.helpers.aot import DryLaunch, DryRun
from tests.helpers.ptx import execute, parse


@contextmanager
def executed(target: str, *, skew: float = 0.0, edit: Callable[[str], str] = str) -> Iterator[list[DryLaunch]]:
    """Launches of CPU tensors compile for `target`, are edited, and run; yields them. skew: see `ptx_arithmetic`."""

    def run(launch: DryLaunch) -> None:
        signature = launch.kernel.src.signature
        arguments, buffers = [], {}
        for kind, value in _flat(signature.values(), [launch.arguments[name] for name in signature]):
            if isinstance(value, torch.Tensor):
                start, size = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
                buffers[start] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
                value = value.data_ptr()
            elif kind == "fp32":
                (value,) = struct.unpack("<I", struct.pack("<f", value))
            arguments.append(int(value) % 2**64)
        program = parse(edit(launch.kernel.asm["ptx"]), skew)
        assert set(launch.grid[1:]) <= {1}
        arguments += [0, 0]  # pointers to scratch memory
        execute(program, launch.grid[0], arguments, [*buffers.items()], launch.kernel.metadata.shared)

    obstacle = mock.patch("fastvae._backend._triton_obstacle", return_value=None)
    with obstacle, fastvae.use_backend("triton"), DryRun(target, run) as dry:
        yield dry.launches


def _flat(kinds, values):
    """Types and values of the parameters of a compiled kernel: no constants, and tuples one by one."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value
