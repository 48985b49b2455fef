"""The KL alone, and a mask on latents: padded sequences, models whose reconstruction is computed elsewhere."""

import pytest
import torch

import fastvae
from fastvae.regularizers import Capacity, FreeBits

B, T, L = 4, 5, 3
LENGTHS = torch.tensor([5, 2, 0, 3])
MASK = (torch.arange(T) < LENGTHS[:, None])[..., None]  # [B, T, 1]
SHAPE = (B, T, L)


def inputs(dtype=torch.float64, padding=float("nan"), n=2):
    draw = torch.Generator().manual_seed(3)
    tensors = [0.7 * torch.randn(SHAPE, generator=draw, dtype=torch.float64) for _ in range(n)]
    return [torch.where(MASK, t, padding).to(dtype).requires_grad_() for t in tensors]


def elements(mu, logvar, prior=None):
    """The KL of each element of the clean inputs; 0 in the padding."""
    prior_mu, prior_logvar = prior or (torch.zeros_like(mu), torch.zeros_like(mu))
    ratio = (logvar - prior_logvar).exp()
    kl = 0.5 * ((mu - prior_mu).square() / prior_logvar.exp() + ratio - 1 - (logvar - prior_logvar))
    return torch.where(MASK, kl, 0.0)


def reduced(per_sample, reduction):
    return {
        "none": per_sample,
        "sum": per_sample.sum(),
        "batchmean": per_sample.sum() / B,
        "mean": per_sample.sum() / (B * T * L),
    }[reduction]


OPTIONS = {
    "plain": ({}, lambda k: k.sum((1, 2))),
    "dim": ({"free_bits": FreeBits(0.2, "dim")}, lambda k: torch.where(MASK, k.clamp(min=0.2), 0.0).sum((1, 2))),
    "dim_mask": ({"free_bits": FreeBits(0.2, "dim_mask")}, lambda k: torch.where(k > 0.2, k, 0.0).sum((1, 2))),
    "sample": ({"free_bits": FreeBits(1.5, "sample")}, lambda k: k.sum((1, 2)).clamp(min=1.5)),
    "capacity": ({"capacity": Capacity(1.0, "sample")}, lambda k: (k.sum((1, 2)) - 1.0).abs()),
    "weight": ({"weight": torch.tensor([1.0, 2.0, 3.0, 0.5])}, lambda k: k.sum((1, 2)) * torch.tensor([1, 2, 3, 0.5])),
}


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_values_and_gradients(backend, name, reduction, with_prior):
    options, formula = OPTIONS[name]
    given = inputs(n=4 if with_prior else 2)
    clean = [t.detach().nan_to_num().requires_grad_() for t in given]
    prior = {"prior": tuple(given[2:])} if with_prior else {}
    found = fastvae.gaussian_kl(*given[:2], mask=MASK, reduction=reduction, **prior, **options)
    true = reduced(formula(elements(*clean[:2], tuple(clean[2:]) or None)), reduction)
    torch.testing.assert_close(found, true)
    upstream = torch.rand_like(true)
    gradients = torch.autograd.grad(found, given, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(true, clean, upstream))
    assert all((g.masked_fill(MASK, 0.0) == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_derivatives_and_16_bits(backend, dtype):
    mu, logvar = inputs(dtype)
    kl = fastvae.gaussian_kl(mu, logvar, mask=MASK)
    clean = [t.detach().double().nan_to_num().requires_grad_() for t in (mu, logvar)]
    true = elements(*clean).sum() / B
    torch.testing.assert_close(kl.double(), true, rtol=1e-5, atol=1e-5)
    (first,) = torch.autograd.grad(kl, mu, create_graph=True)
    (second,) = torch.autograd.grad(first.float().square().sum(), mu)
    assert second.isfinite().all()
    assert (second.masked_fill(MASK, 0.0) == 0).all()


@pytest.mark.parametrize("mode", ["batch", "dim_batch"])
def test_regularizers_of_the_batch(backend, mode):
    mu, logvar = inputs()
    clean = [t.detach().nan_to_num().requires_grad_() for t in (mu, logvar)]
    k = elements(*clean)
    if mode == "batch":
        found = fastvae.gaussian_kl(mu, logvar, mask=MASK, capacity=Capacity(3.0, "batch"))
        true = (k.sum() / B - 3.0).abs()
    else:
        found = fastvae.gaussian_kl(mu, logvar, mask=MASK, free_bits=FreeBits(0.1, "dim_batch"))
        true = torch.where(MASK.expand(SHAPE).any(0), k.mean(0).clamp(min=0.1), 0.0).sum()
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(torch.autograd.grad(found, [mu, logvar]), torch.autograd.grad(true, clean))


def test_in_a_loss(backend):
    mu, logvar = inputs(torch.float32)
    recon, target = torch.rand(B, 7, requires_grad=True), torch.rand(B, 7)
    criterion = fastvae.VAELoss(2.0, free_bits=FreeBits(0.2, "dim"), return_terms=True)
    loss, recon_term, kl = criterion(recon, target, mu, logvar, kl_mask=MASK)
    torch.testing.assert_close(kl, fastvae.gaussian_kl(mu, logvar, mask=MASK))
    regularized = fastvae.gaussian_kl(mu, logvar, mask=MASK, free_bits=FreeBits(0.2, "dim"))
    torch.testing.assert_close(loss, recon_term + 2.0 * regularized)
    loss.backward()
    expected = torch.autograd.grad(2.0 * regularized, [mu, logvar])
    torch.testing.assert_close((mu.grad, logvar.grad), expected)


def test_compiled_regions():
    mu, logvar = inputs(torch.float32)
    compiled = torch.compile(fastvae.gaussian_kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(mu, logvar, mask=MASK), fastvae.gaussian_kl(mu, logvar, mask=MASK))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda mu: fastvae.gaussian_kl(mu, mu, mask=torch.ones(B, T, 1)), TypeError, "mask must be a bool tensor"),
        (lambda mu: fastvae.gaussian_kl(mu, mu, mask=MASK[:, :2]), ValueError, "mask must broadcast to mu's shape"),
        (
            lambda mu: fastvae.vae_loss(mu, mu.detach(), kl=torch.rand(B), kl_mask=MASK),
            ValueError,
            "kl_mask cannot act on kl=",
        ),
        (lambda mu: fastvae.gaussian_kl(mu, mu, weight=torch.ones(B, 1)), ValueError, "weight must have shape"),
        (lambda mu: fastvae.gaussian_kl(mu, mu, free_bits=0.5), TypeError, "free_bits must be None or a"),
        (
            lambda mu: fastvae.gaussian_kl(mu, mu, capacity=Capacity(1.0, "batch"), reduction="none"),
            ValueError,
            "no value per sample",
        ),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(SHAPE))


def test_nothing_selected_is_zero(backend):
    """The reconstruction with mask_normalize, whose divisor is then 0, and the KL."""
    recon = torch.rand(B, 6, requires_grad=True)
    mask = torch.zeros(B, 6, dtype=torch.bool)
    likelihood = fastvae.likelihoods.L2(mask_normalize=True)
    loss = fastvae.reconstruction_loss(recon, torch.rand(B, 6), likelihood=likelihood, mask=mask)
    mu = torch.rand(SHAPE, requires_grad=True)
    kl = fastvae.gaussian_kl(mu, mu, mask=torch.zeros(1, dtype=torch.bool))
    (loss + kl).backward()
    assert loss == 0
    assert kl == 0
    assert not recon.grad.any()
    assert not mu.grad.any()
