"""The CPU fallback's passes over images: bits that do not depend on threads, and buffers shared by pieces."""

import pytest
import torch

import fastvae
from fastvae.fallback import elbo as fallback_elbo
from fastvae.likelihoods import NAMED


@pytest.fixture(autouse=True)
def fallback():
    with fastvae.use_backend("torch"):
        yield


def images(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    recon, target = (torch.rand(shape, generator=generator) for _ in range(2))
    return recon.mul_(0.9).add_(0.05).requires_grad_(), target


@pytest.mark.parametrize("likelihood", NAMED)
def test_bits_do_not_depend_on_the_number_of_threads(likelihood):
    recon, target = images((301, 1111))
    kl = torch.zeros(301)
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            terms = fastvae.vae_loss(recon, target, kl=kl, likelihood=likelihood)
            (gradient,) = torch.autograd.grad(terms.loss, recon)
            results.append((terms.loss.detach(), gradient))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("likelihood", NAMED)
@pytest.mark.parametrize("shape", [(5,), (5, 7), (300_000,)])
def test_results_do_not_change_with_the_next_call(likelihood, shape):
    kl = torch.zeros(shape[0])

    def loss_of(seed, **options):
        recon, target = images(shape, seed)
        mask = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 3 != 0
        terms = fastvae.vae_loss(recon, target, kl=kl, likelihood=likelihood, mask=mask, **options)
        return terms.recon.detach(), torch.autograd.grad(terms.loss.sum(), recon)[0]

    for reduction in ("none", "sum"):
        first = loss_of(1, reduction=reduction)
        copies = [t.clone() for t in first]
        loss_of(2, reduction=reduction)
        assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


@pytest.mark.parametrize(
    ("dtype", "upstream", "recomputed"),
    [(torch.float32, 3.0, False), (torch.bfloat16, 2.0, False), (torch.bfloat16, 3.0, True)],
)
def test_gradient_of_the_forward_pass_serves_per_sample_losses(monkeypatch, dtype, upstream, recomputed):
    """Unless a 16-bit gradient would be rounded twice."""
    calls = []
    write = fallback_elbo.write_gradients
    monkeypatch.setattr(fallback_elbo, "write_gradients", lambda *a: (calls.append(1), write(*a)))
    recon, target = images((4, 9))
    recon = recon.detach().to(dtype).requires_grad_()
    loss = fastvae.vae_loss(recon, target, kl=torch.zeros(4), likelihood="l1", reduction="none").loss
    loss.backward(torch.tensor([1.0, upstream, 1.0, 0.25]))
    assert bool(calls) == recomputed
    exact = torch.sign(recon.detach().double() - target) * torch.tensor([1.0, upstream, 1.0, 0.25])[:, None]
    assert torch.equal(recon.grad.double(), exact)
