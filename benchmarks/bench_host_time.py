"""What a loss costs the host: Python, checks, autograd and dispatcher, without the work of a device.

On a GPU this is how long a step of a small batch takes, whatever the kernels do. Kernels are not launched here (for the
fused ones nothing is; torch's run on batches of 128 single elements, whose arithmetic weighs next to nothing), so it
says nothing about devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

SHAPE = (128, 1)
PROVIDERS = ("eager", "torch.compile", "fastvae kernels", "fastvae fallback")


def textbook(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(recon, target, reduction="sum") + kl) / recon.shape[0], z


def fused(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z, kl = fastvae.reparameterize_kl(mu, logvar)
    return fastvae.vae_loss(recon, target, kl=kl).loss, z


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a launch."""


@contextmanager
def no_launches() -> Iterator[None]:
    """CPU tensors take the way of the Triton kernels, up to the launches."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    with (
        mock.patch("fastvae._backend._triton_obstacle", _nothing),
        # a MagicMock takes as long as a launch
        mock.patch.object(triton.JITFunction, "run", _nothing),
        fastvae.use_backend("triton"),
    ):
        yield


@contextmanager
def fallback() -> Iterator[None]:
    with fastvae.use_backend("torch"):
        yield


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("phase", ["forward", "forward + backward"])
def bench_host_time(benchmark: Any, phase: str, provider: str) -> None:
    function = {"eager": textbook, "torch.compile": torch.compile(textbook)}.get(provider, fused)
    recon, target, mu, logvar = (
        torch.rand(SHAPE).requires_grad_(name != "target") for name in ("x'", "target", "", "")
    )
    upstream = torch.ones(()), torch.ones(SHAPE)

    def step() -> None:
        outputs = function(recon, target, mu, logvar)
        if phase != "forward":
            torch.autograd.grad(outputs, [recon, mu, logvar], upstream)

    benchmark.group = f"host time, {phase}"
    with no_launches() if provider == "fastvae kernels" else fallback():
        step()
        benchmark.pedantic(step, rounds=50, iterations=20, warmup_rounds=2)
