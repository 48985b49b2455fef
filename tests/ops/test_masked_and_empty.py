"""What a mask leaves out has no influence, whatever it holds; and losses of nothing at all."""

import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import L1, NAMED, Gaussian, LogCosh, Scaled
from fastvae.regularizers import Capacity, FreeBits

# the interpreter says what a GPU does silently
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

IMAGE = (3, 2, 5)
# sample 1 and channel 1 are left out as wholes, sample 0 has some elements
MASK = torch.tensor([[[1, 0, 1, 1, 0], [0] * 5], [[0] * 5, [0] * 5], [[1] * 5, [0] * 5]]).bool()
SAMPLES, CHANNELS = MASK.flatten(1).any(1), MASK.any(2).any(0)[:, None]

# name: what of it matters, options of the loss that hold it
HOLDERS = {
    "scale of elements": (MASK, lambda t: {"likelihood": Gaussian(t)}),
    "scale of elements, bounded": (MASK, lambda t: {"likelihood": Gaussian(t, softclip=-0.5)}),
    "scale of elements, extra": (MASK, lambda t: {"likelihood": Gaussian(t), "extra": torch.rand(3)}),
    "scale of elements, with a factor": (MASK, lambda t: {"likelihood": Scaled(LogCosh(2.0), t)}),
    "scale of elements, weighed": (MASK, lambda t: {"likelihood": Scaled("l1", t), "weight": torch.rand(3)}),
    "scale of channels": (CHANNELS, lambda t: {"likelihood": Gaussian(t, full=True)}),
    "scale of channels, bounded, extra": (
        CHANNELS,
        lambda t: {"likelihood": Gaussian(t, softclip=-0.5), "extra": torch.rand(3)},
    ),
    "scale of samples": (SAMPLES, lambda t: {"likelihood": Gaussian(t)}),
    "scale of samples, bounded": (SAMPLES, lambda t: {"likelihood": Gaussian(t, softclip=-0.5)}),
    "scale of samples as a column": (SAMPLES[:, None, None], lambda t: {"likelihood": Scaled("l1", t)}),
    "extra": (SAMPLES, lambda t: {"extra": t}),
    "extra, learned scale": (SAMPLES, lambda t: {"extra": t, "likelihood": Gaussian(torch.tensor(0.3))}),
    "extra, scale of elements": (SAMPLES, lambda t: {"extra": t, "likelihood": Gaussian(torch.rand(IMAGE))}),
    "weight": (SAMPLES, lambda t: {"weight": t}),
    "recon": (MASK, lambda t: {"recon": t}),
    "recon, optimal scale": (MASK, lambda t: {"recon": t, "likelihood": Gaussian("optimal"), "extra": torch.rand(3)}),
    "target": (MASK, lambda t: {"target": t}),
}


def value_and_gradients(matters, options, filling, settings, *, create_graph=False):
    generator = torch.Generator().manual_seed(4)
    torch.manual_seed(4)  # of the options' other tensors
    recon, target, held = (torch.rand(shape, generator=generator) for shape in (IMAGE, IMAGE, matters.shape))
    held = held.masked_fill(~matters, filling).requires_grad_()
    given = {"recon": recon.requires_grad_(), "target": target, **options(held)}
    loss = fastvae.reconstruction_loss(**given, mask=MASK, **settings).sum()
    gradients = torch.autograd.grad(loss, [held, given["recon"]], create_graph=create_graph)
    return loss.detach(), *(g.detach() for g in gradients)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", HOLDERS)
def test_what_a_mask_leaves_out_has_no_influence(backend, name, filling, reduction):
    for create_graph in (False, True):
        kwargs = {"settings": {"reduction": reduction}, "create_graph": create_graph}
        ordinary, strange = (value_and_gradients(*HOLDERS[name], x, **kwargs) for x in (0.25, filling))
        for a, b in zip(ordinary, strange, strict=True):
            assert torch.equal(a, b)
            assert b.isfinite().all()
        assert (strange[1][~HOLDERS[name][0]] == 0).all()


def test_normalised_by_the_mask(backend):
    for name in ("extra", "weight", "recon"):
        matters, options = HOLDERS[name]

        def with_mean(t, options=options):
            return {"likelihood": L1(mask_normalize=True), **options(t)}

        ordinary, strange = (value_and_gradients(matters, with_mean, x, {}) for x in (0.25, math.nan))
        for a, b in zip(ordinary, strange, strict=True):
            assert torch.equal(a, b)


def test_a_learned_scale_where_nothing_is_selected(backend):
    recon, s = torch.rand(2, 3), torch.tensor(math.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for likelihood in (Gaussian(s), Gaussian(s, softclip=-1.0), Scaled("l1", s)):
        loss = fastvae.reconstruction_loss(recon, recon, likelihood=likelihood, mask=nothing)
        loss.backward()
        assert loss == 0
        assert s.grad == 0
        s.grad = None
    assert fastvae.reconstruction_loss(recon, recon, likelihood=Gaussian("optimal"), mask=nothing) == 0


def options_for(batch):
    """Every option, alone and in company, for a batch of this size."""
    per_sample = torch.rand(batch)
    return {
        "plain": {},
        "tensor weights": {"beta": torch.tensor(0.5), "recon_weight": torch.tensor(2.0)},
        "weight": {"weight": per_sample},
        "extra": {"extra": per_sample},
        "capacity": {"capacity": Capacity(0.5)},
        "capacity of the batch": {"capacity": Capacity(0.5, "batch")},
        **{
            f"free bits, {mode}": {"free_bits": FreeBits(0.5, mode)}
            for mode in ("dim", "dim_batch", "dim_mask", "sample")
        },
        "all of them": {
            "weight": per_sample,
            "extra": per_sample,
            "capacity": Capacity(0.5, "batch"),
            "free_bits": FreeBits(0.5, "dim_batch"),
        },
        "gaussian": {"likelihood": Gaussian(0.5, full=True)},
        "learned": {"likelihood": Gaussian(torch.tensor(0.5))},
        "per sample": {"likelihood": Scaled("l1", per_sample)},
        "optimal": {"likelihood": Gaussian("optimal", full=True)},
        "two passes": {"one_pass": False},
        "float64": {"beta": torch.tensor(0.5, dtype=torch.float64)},
    }


REDUCTIONS = ["batchmean", "sum", "mean", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", options_for(0))
def test_an_empty_batch(backend, name, masked, reduction):
    """As torch: sums are 0, means NaN, and of each sample there is none."""
    if reduction == "none" and ("batch" in name or name == "all of them"):
        return
    recon, target, mu, logvar = leaves = [
        torch.zeros(0, *rest, requires_grad=True) for rest in ((2, 3),) * 2 + ((4,),) * 2
    ]
    mask = torch.zeros(0, 2, 3, dtype=torch.bool) if masked else None
    terms = fastvae.vae_loss(recon, target, mu, logvar, mask=mask, reduction=reduction, **options_for(0)[name])
    for term in terms:
        assert term.shape == ((0,) if reduction == "none" else ())
        if reduction == "sum":
            assert term == 0
        else:
            assert term.isnan().all()
    for gradient, leaf in zip(torch.autograd.grad(terms.loss.sum(), leaves, allow_unused=True), leaves, strict=True):
        assert gradient is None or gradient.shape == leaf.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", options_for(3))
def test_samples_without_elements(backend, name, masked, reduction):
    """Their errors and their KL are 0; a mean over elements is NaN; regularisers see a KL of 0."""
    if reduction == "none" and ("batch" in name or name == "all of them"):
        return
    options = options_for(3)[name]
    recon, target, mu, logvar = (torch.zeros(3, 0, requires_grad=True) for _ in range(4))
    mask = torch.zeros(3, 0, dtype=torch.bool) if masked else None
    terms = fastvae.vae_loss(recon, target, mu, logvar, mask=mask, reduction=reduction, **options)
    shape = (3,) if reduction == "none" else ()
    assert [term.shape for term in terms] == [shape] * 3
    if reduction == "mean":
        assert all(term.isnan() for term in terms)
        return
    assert (terms.recon == 0).all()
    assert (terms.kl == 0).all()
    regularised = 0.5 * any(kind in name for kind in ("capacity", "sample", "all of them")) * (name != "per sample")
    torch.testing.assert_close(terms.loss, torch.full_like(terms.loss, regularised * (3 if reduction == "sum" else 1)))
    terms.loss.sum().backward()
    assert recon.grad is None or recon.grad.shape == (3, 0)


@pytest.mark.parametrize(
    "likelihood",
    [*NAMED, L1(mask_normalize=True)],
    ids=str,
)
def test_every_likelihood_of_an_empty_batch(backend, likelihood):
    empty = torch.zeros(0, 3)
    mask = torch.zeros(0, 3, dtype=torch.bool) if isinstance(likelihood, L1) else None
    for extra in (None, torch.zeros(0)):
        for reduction in ("batchmean", "mean"):
            options = {"likelihood": likelihood, "mask": mask, "extra": extra, "reduction": reduction}
            assert fastvae.reconstruction_loss(empty, empty, **options).isnan()


def test_samples_and_statistics_of_nothing(backend):
    for shape in ((0, 4), (3, 0)):
        mu = torch.zeros(shape, requires_grad=True)
        z, kl = fastvae.reparameterize_kl(mu, mu, seed=1)
        assert z.shape == shape
        assert kl.tolist() == [0.0] * shape[0]
        kl.sum().backward()
        assert mu.grad.shape == shape
        stats = fastvae.latent_stats(mu.detach(), mu.detach())
        assert stats.kl.shape == shape[1:]
        assert stats.active == 0
