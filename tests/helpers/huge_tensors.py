"""Tensors of more than 2^31 elements on a small machine: sparse memory, and launches that run their last programs."""

import math
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


def sparse_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in a sparse file, which take no memory until they are written."""
    with tempfile.TemporaryFile() as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype).view(shape)


@contextmanager
def last_programs(count: int | None) -> Iterator[None]:
    """Interpreted launches run the last `count` programs of their grid alone, in place; None: all, in place.

    The interpreter copies every argument onto itself after a launch, which would allocate all of a sparse tensor.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    call, set_program = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    skipped = 0

    def run_last(executor: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal skipped
        (programs,) = executor.grid
        executor.grid = (min(programs, count or programs),)
        skipped = programs - executor.grid[0]
        with np.errstate(all="ignore"):  # partial sums that no program wrote
            call(executor, *args, **kwargs)

    def shifted(builder: Any, x: int, y: int, z: int) -> None:
        builder.grid_dim = (skipped + builder.grid_dim[0], 1, 1) if x == 0 else builder.grid_dim
        set_program(builder, skipped + x, y, z)

    with (
        mock.patch.object(GridExecutor, "__call__", run_last),
        mock.patch.object(GridExecutor, "_restore_args_dev"),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", shifted),
    ):
        yield
