"""Interpreted kernels on more than 2^31 elements, or strides that 32 bits do not hold; few of them have memory."""

import pytest
import torch

import fastvae
from tests.support.vast import last_programs, promised

from .conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)"),
    pytest.mark.usefixtures("interpreted_kernels"),
]
BF16, U8 = torch.bfloat16, torch.uint8


@pytest.fixture
def interpreted_kernels():
    with fastvae.use_backend("triton"):
        yield


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (2**31 + 8, 2), (1, 2**30 + 4)], ids=str)
def test_strides_beyond_32_bits(strides):
    """In the middle of memory, so that an address of 32 bits would find zeros."""
    shape = (2, 300) if strides[0] > 1 else (300, 3)
    held = promised((2**32 + 4096,), BF16)
    far = held.as_strided(shape, strides, 2**31)
    near = torch.rand(shape).to(BF16)
    far.copy_(near)
    for op in (
        lambda x: fastvae.reparameterize_kl(x, x, seed=1),
        lambda x: fastvae.vae_loss(x, x.detach().flip(0), x, x, reduction="none"),
    ):
        x, y = far.detach().requires_grad_(), near.clone().requires_grad_()
        with last_programs(None):
            outputs = op(x)
            gradient = torch.autograd.grad(outputs, x, [torch.full_like(t, 3.0) for t in outputs])
        expected = op(y)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected, y, [torch.full_like(t, 3.0) for t in expected])
        )


N_HUGE = 2**31 + 1001


@pytest.fixture
def _untouched(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.usefixtures("_untouched")
def test_the_last_of_more_than_2_31_latents():
    mu, logvar = (promised((N_HUGE,), BF16).requires_grad_() for _ in range(2))
    with torch.no_grad():
        mu[-1000:] = torch.randn(1000)
        logvar[-1000:] = torch.randn(1000)
    with last_programs(2):
        z = fastvae.reparameterize(mu, logvar, seed=3)
        gradients = torch.autograd.grad(z, (mu, logvar), torch.ones((), dtype=BF16).expand(N_HUGE))
    mu, logvar = (t.detach()[-1000:].clone().requires_grad_() for t in (mu, logvar))
    with fastvae.use_backend("torch"):
        expected = fastvae.reparameterize(mu, logvar, seed=3, offset=N_HUGE - 1000)
        expected_gradients = torch.autograd.grad(expected.sum(), (mu, logvar))
    torch.testing.assert_close(z[-1000:], expected)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual[-1000:], expected)


@pytest.mark.usefixtures("_untouched")
def test_the_last_of_more_than_2_31_pixels(monkeypatch):
    monkeypatch.setattr("fastvae_kernels.elbo_bwd._MAX_IMAGE_PROGRAMS", 2**16)  # short walks: quicker to interpret
    recon, target = promised((1, N_HUGE), BF16).requires_grad_(), promised((1, N_HUGE), U8)
    with torch.no_grad():
        recon[0, -1000:] = torch.rand(1000)
        target[0, -1000:] = torch.randint(256, (1000,), dtype=U8)
    with last_programs(1):
        loss = fastvae.reconstruction_loss(recon, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, recon, torch.tensor(2.0))
    expected = 4 * (recon.detach()[0, -1000:].float() - target[0, -1000:] / 255)
    torch.testing.assert_close(gradient[0, -1000:], expected.to(BF16))
