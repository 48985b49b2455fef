"""What a loss costs the host: Python, checks, autograd and dispatcher, without the work of a device.

On a GPU this is how long a step of a small batch takes, whatever the kernels do. Here fastvae's kernels are not
launched, and torch's compute 128 elements, whose arithmetic weighs next to nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastvae

from .conftest import COMPILER
from .providers import COMPILED, EAGER, FALLBACK, KERNELS, function_of


def nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a launch; a MagicMock takes as long as one."""


@contextmanager
def no_launches() -> Iterator[None]:
    """CPU tensors are served by the Triton backend, without its launches."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    with (
        mock.patch("fastvae._backend._triton_obstacle", nothing),
        mock.patch.object(triton.JITFunction, "run", nothing),
        fastvae.use_backend("triton"),
    ):
        yield


@pytest.mark.filterwarnings(*COMPILER)
@pytest.mark.parametrize("provider", [EAGER, COMPILED, KERNELS, FALLBACK])
@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def bench_host_time(benchmark: Any, phase: str, provider: str) -> None:
    whole, shape = function_of(provider, "whole"), (128, 1)
    recon, target, mu, logvar = (torch.rand(shape).requires_grad_(i != 1) for i in range(4))
    upstream = torch.ones(()), torch.ones(shape)

    def step() -> tuple[Tensor, ...]:
        outputs = whole(recon, target, mu, logvar)
        return outputs if phase == "forward" else torch.autograd.grad(outputs, [recon, mu, logvar], upstream)

    benchmark.group = f"host time, {phase}"
    with no_launches() if provider == KERNELS else fastvae.use_backend("torch"):
        step()
        benchmark.pedantic(step, rounds=50, iterations=20, warmup_rounds=2)
