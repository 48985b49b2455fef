"""Every option of the loss: value and gradients against the truth, on both backends, and that it is not ignored."""

import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import (
    L1,
    L2,
    NAMED,
    Gaussian,
    Huber,
    LogCosh,
    Scaled,
    SmoothL1,
)
from fastvae.regularizers import Capacity, FreeBits
from tests.helpers import loss_truth, oracle
from tests.helpers.loss_truth import LOG_2PI
from tests.helpers.oracle import DTYPES, assert_near

F64 = torch.float64
IMAGE, LATENT = (3, 2, 4, 9), (3, 5)


class Case:
    """fastvae's arguments and the truth's. Tensors in `tensors` get gradients; each side builds its options of them.

    Args:
        options: tensors -> arguments of `fastvae.vae_loss`.
        truth: tensors in float64 -> arguments of `loss_truth.vae_loss`.
        tensors: Shapes of option tensors; their values are drawn in [0.5, 1.5).
        terms: Which of (loss, recon, kl) the option changes.
        reductions: Those that give it a meaning.
    """

    def __init__(self, options, truth, tensors=None, *, terms="lr", reductions=("batchmean", "sum", "mean", "none")):
        self.options, self.truth, self.tensors = options, truth, tensors or {}
        self.terms, self.reductions = terms, reductions


def likelihood(built, **truth):
    return Case(lambda t: {"likelihood": built}, lambda t: truth)


def half(**truth):
    return {"share": 0.5, "constant": 0.0} | truth


PRIOR = {"prior_mu": LATENT, "prior_logvar": LATENT}
NORMALIZED = ("batchmean", "mean")
MASK = torch.rand(IMAGE, generator=torch.Generator().manual_seed(3)) > 0.4
ROW_MASK = MASK[:, :1, :, :1]
WEIGHTS = 0.2 + torch.rand(IMAGE, generator=torch.Generator().manual_seed(4))

CASES = {
    # likelihoods
    **{name: likelihood(name, error=name) for name in NAMED if name != "l2"},
    "huber of 0.3": likelihood(Huber(0.3), error="huber", parameter=0.3),
    "smooth_l1 of 0.3": likelihood(SmoothL1(0.3), error="smooth_l1", parameter=0.3),
    "smooth_l1 of 0": likelihood(SmoothL1(0.0), error="l1"),
    "log_cosh of 3": likelihood(LogCosh(3.0), error="log_cosh", parameter=3.0),
    "l2 of logits": likelihood(L2(from_logits=True), error="l2_of_logits"),
    "l1 of logits": likelihood(L1(from_logits=True), error="l1_of_logits"),
    "gaussian": likelihood(Gaussian(), log_scale=0.0, share=0.5),
    "gaussian full": likelihood(Gaussian(0.7, full=True), log_scale=0.7, **half(constant=0.5 * LOG_2PI)),
    "gaussian softclip": likelihood(Gaussian(-8.0, softclip=-3.0), log_scale=-8.0, softclip=-3.0, share=0.5),
    "gaussian of logits": likelihood(Gaussian(0.7, from_logits=True), error="l2_of_logits", log_scale=0.7, share=0.5),
    "gaussian learned": Case(
        lambda t: {"likelihood": Gaussian(t["s"], full=True)},
        lambda t: half(log_scale=t["s"], constant=0.5 * LOG_2PI),
        {"s": ()},
    ),
    "gaussian learned softclip": Case(
        lambda t: {"likelihood": Gaussian(t["s"], softclip=0.5)},
        lambda t: half(log_scale=t["s"], softclip=0.5),
        {"s": ()},
    ),
    "gaussian per sample": Case(
        lambda t: {"likelihood": Gaussian(t["s"])}, lambda t: half(log_scale=t["s"]), {"s": (3,)}
    ),
    "gaussian per sample with dimensions": Case(
        lambda t: {"likelihood": Gaussian(t["s"])}, lambda t: half(log_scale=t["s"]), {"s": (3, 1, 1, 1)}
    ),
    "gaussian per element": Case(
        lambda t: {"likelihood": Gaussian(t["s"], full=True)},
        lambda t: half(log_scale=t["s"], constant=0.5 * LOG_2PI),
        {"s": IMAGE},
    ),
    "gaussian per channel": Case(
        lambda t: {"likelihood": Gaussian(t["s"])}, lambda t: half(log_scale=t["s"]), {"s": (2, 1, 1)}
    ),
    "gaussian optimal": Case(
        lambda t: {"likelihood": Gaussian("optimal", full=True)},
        lambda t: half(log_scale="optimal", constant=0.5 * LOG_2PI),
    ),
    "gaussian optimal softclip": Case(
        lambda t: {"likelihood": Gaussian("optimal", softclip=-0.2)},
        lambda t: half(log_scale="optimal", softclip=-0.2),
    ),
    "gaussian optimal masked": Case(
        lambda t: {"likelihood": Gaussian("optimal"), "mask": MASK},
        lambda t: half(log_scale="optimal", mask=MASK),
    ),
    "scaled": likelihood(Scaled("l1", 0.4), error="l1", log_scale=0.4),
    "scaled learned": Case(
        lambda t: {"likelihood": Scaled("l1", t["s"])}, lambda t: {"error": "l1", "log_scale": t["s"]}, {"s": ()}
    ),
    "scaled per element": Case(
        lambda t: {"likelihood": Scaled(SmoothL1(0.3), t["s"])},
        lambda t: {"error": "smooth_l1", "parameter": 0.3, "log_scale": t["s"]},
        {"s": IMAGE},
    ),
    "scaled, smooth, learned": Case(
        lambda t: {"likelihood": Scaled(SmoothL1(0.3), t["s"]), "extra": t["extra"]},
        lambda t: {"error": "smooth_l1", "parameter": 0.3, "log_scale": t["s"], "extra": t["extra"]},
        {"s": (), "extra": (3,)},
    ),
    # what weighs elements and samples
    "weight": Case(lambda t: {"weight": t["w"]}, lambda t: {"weight": t["w"]}, {"w": (3,)}, terms="lrk"),
    "mask": Case(lambda t: {"mask": MASK}, lambda t: {"mask": MASK}),
    "mask of rows": Case(lambda t: {"mask": ROW_MASK}, lambda t: {"mask": ROW_MASK}),
    "mask of bernoulli": Case(
        lambda t: {"mask": MASK, "likelihood": "bernoulli"}, lambda t: {"mask": MASK, "error": "bernoulli"}
    ),
    "mask normalised": Case(
        lambda t: {"mask": MASK, "likelihood": L1(mask_normalize=True)},
        lambda t: {"mask": MASK, "error": "l1", "mask_normalize": True},
        reductions=NORMALIZED,
    ),
    "mask with constants": Case(
        lambda t: {"mask": MASK, "likelihood": Gaussian(0.3, full=True)},
        lambda t: half(mask=MASK, log_scale=0.3, constant=0.5 * LOG_2PI),
    ),
    "mask, scale per element": Case(
        lambda t: {"mask": MASK, "likelihood": Gaussian(t["s"])},
        lambda t: half(mask=MASK, log_scale=t["s"]),
        {"s": IMAGE},
    ),
    "extra": Case(lambda t: {"extra": t["extra"]}, lambda t: {"extra": t["extra"]}, {"extra": (3,)}),
    "extra, masked, scaled per element": Case(
        lambda t: {"extra": t["extra"], "mask": MASK, "likelihood": Scaled("l2", t["s"])},
        lambda t: {"extra": t["extra"], "mask": MASK, "log_scale": t["s"]},
        {"extra": (3,), "s": IMAGE},
    ),
    "extra, weighed, scaled": Case(
        lambda t: {"extra": t["extra"], "weight": t["w"], "likelihood": Scaled("l1", t["s"])},
        lambda t: {"extra": t["extra"], "weight": t["w"], "error": "l1", "log_scale": t["s"]},
        {"extra": (3,), "w": (3,), "s": ()},
        terms="lrk",
    ),
    "recon_weight": Case(lambda t: {"recon_weight": 1.7}, lambda t: {"recon_weight": 1.7}, terms="l"),
    "recon_weight learned": Case(
        lambda t: {"recon_weight": t["w"], "likelihood": Gaussian(t["s"])},
        lambda t: half(recon_weight=t["w"], log_scale=t["s"]),
        {"w": (), "s": ()},
    ),
    "recon_weight per sample": Case(
        lambda t: {"recon_weight": t["w"], "likelihood": Gaussian(t["s"]), "extra": t["extra"]},
        lambda t: half(recon_weight=t["w"], log_scale=t["s"], extra=t["extra"]),
        {"w": (3,), "s": (), "extra": (3,)},
    ),
    "recon_weight per sample with dimensions": Case(
        lambda t: {"recon_weight": t["w"]}, lambda t: {"recon_weight": t["w"]}, {"w": (3, 1, 1, 1)}, terms="l"
    ),
    **{
        f"recon_weight {name}": Case(
            lambda t: {"recon_weight": t["w"]}, lambda t: {"recon_weight": t["w"]}, {"w": shape}, terms="l"
        )
        for name, shape in {"per element": IMAGE, "per channel": (2, 1, 1), "per column": (9,)}.items()
    },
    "recon_weight per element, fixed, with constants": Case(
        lambda t: {
            "recon_weight": WEIGHTS,
            "likelihood": Gaussian(t["s"], full=True),
            "mask": MASK,
            "extra": t["extra"],
            "weight": t["w"],
        },
        lambda t: half(
            recon_weight=WEIGHTS.double(),
            log_scale=t["s"],
            constant=0.5 * LOG_2PI,
            mask=MASK,
            extra=t["extra"],
            weight=t["w"],
        ),
        {"s": (3,), "extra": (3,), "w": (3,)},
        terms="lrk",
    ),
    "recon_weight per element, fixed, scale per element": Case(
        lambda t: {"recon_weight": WEIGHTS, "likelihood": Gaussian(t["s"]), "extra": t["extra"]},
        lambda t: half(recon_weight=WEIGHTS.double(), log_scale=t["s"], extra=t["extra"]),
        {"s": IMAGE, "extra": (2, 1, 9)},
    ),
    "recon_weight per element, optimal scale": Case(
        lambda t: {"recon_weight": WEIGHTS, "likelihood": Gaussian("optimal", full=True)},
        lambda t: half(recon_weight=WEIGHTS.double(), log_scale="optimal", constant=0.5 * LOG_2PI),
    ),
    "recon_weight per sample, optimal scale": Case(
        lambda t: {"recon_weight": t["w"], "likelihood": Gaussian("optimal")},
        lambda t: half(recon_weight=t["w"], log_scale="optimal"),
        {"w": (3,)},
    ),
    **{
        f"extra {name}": Case(
            lambda t: {"extra": t["extra"], "likelihood": LogCosh(3.0)},
            lambda t: {"extra": t["extra"], "error": "log_cosh", "parameter": 3.0},
            {"extra": shape},
        )
        for name, shape in {"with dimensions": (3, 1, 1, 1), "per element": IMAGE, "per row": (1, 4, 1)}.items()
    },
    "extra per element, scaled": Case(
        lambda t: {"extra": t["extra"], "likelihood": Scaled(SmoothL1(0.3), t["s"])},
        lambda t: {"extra": t["extra"], "error": "smooth_l1", "parameter": 0.3, "log_scale": t["s"]},
        {"s": IMAGE, "extra": IMAGE},
    ),
    # what becomes of the KL
    "beta per sample": Case(
        lambda t: {"beta": t["b"], "capacity": Capacity(2.6), "weight": t["w"]},
        lambda t: {"beta": t["b"], "capacity": (2.6, "sample"), "weight": t["w"]},
        {"b": (3,), "w": (3,)},
        terms="lrk",
    ),
    "beta and recon_weight per sample": Case(
        lambda t: {"beta": t["b"], "recon_weight": t["w"], "free_bits": FreeBits(0.3)},
        lambda t: {"beta": t["b"], "recon_weight": t["w"], "free_bits": (0.3, "dim")},
        {"b": (3,), "w": (3,)},
        terms="l",
    ),
    "beta": Case(lambda t: {"beta": 0.3}, lambda t: {"beta": 0.3}, terms="l"),
    "beta learned": Case(lambda t: {"beta": t["b"]}, lambda t: {"beta": t["b"]}, {"b": ()}, terms="l"),
    "clamp": Case(lambda t: {"logvar_clamp": (-0.4, 0.3)}, lambda t: {"logvar_clamp": (-0.4, 0.3)}, terms="lk"),
    "prior": Case(
        lambda t: {"prior": (t["prior_mu"], t["prior_logvar"])},
        lambda t: {"prior": (t["prior_mu"], t["prior_logvar"])},
        PRIOR,
        terms="lk",
    ),
    "prior, broadcast": Case(
        lambda t: {"prior": (t["prior_mu"], t["prior_logvar"]), "logvar_clamp": (-0.4, 0.3)},
        lambda t: {"prior": (t["prior_mu"], t["prior_logvar"]), "logvar_clamp": (-0.4, 0.3)},
        {"prior_mu": (5,), "prior_logvar": (1, 5)},
        terms="lk",
    ),
    **{
        f"free bits {mode}": Case(
            lambda t, mode=mode: {"free_bits": FreeBits(0.3 if mode != "sample" else 2.5, mode), "beta": 0.7},
            lambda t, mode=mode: {"free_bits": (0.3 if mode != "sample" else 2.5, mode), "beta": 0.7},
            terms="l",
            reductions=("batchmean", "sum", "mean") if mode == "dim_batch" else ("batchmean", "sum", "mean", "none"),
        )
        for mode in ("dim", "dim_batch", "dim_mask", "sample")
    },
    "free bits dim, prior, beta learned": Case(
        lambda t: {"free_bits": FreeBits(0.3), "prior": (t["prior_mu"], t["prior_logvar"]), "beta": t["b"]},
        lambda t: {"free_bits": (0.3, "dim"), "prior": (t["prior_mu"], t["prior_logvar"]), "beta": t["b"]},
        PRIOR | {"b": ()},
        terms="lk",
    ),
    "free bits dim, weighed": Case(
        lambda t: {"free_bits": FreeBits(0.3), "weight": t["w"]},
        lambda t: {"free_bits": (0.3, "dim"), "weight": t["w"]},
        {"w": (3,)},
        terms="lrk",
    ),
    "free bits dim_batch, weighed": Case(
        lambda t: {"free_bits": FreeBits(0.3, "dim_batch"), "weight": t["w"]},
        lambda t: {"free_bits": (0.3, "dim_batch"), "weight": t["w"]},
        {"w": (3,)},
        terms="lrk",
        reductions=("batchmean", "sum", "mean"),
    ),
    "capacity sample": Case(lambda t: {"capacity": Capacity(2.6)}, lambda t: {"capacity": (2.6, "sample")}, terms="l"),
    "capacity batch": Case(
        lambda t: {"capacity": Capacity(9.0, "batch"), "beta": 0.7},
        lambda t: {"capacity": (9.0, "batch"), "beta": 0.7},
        terms="l",
        reductions=("batchmean", "sum", "mean"),
    ),
    "capacity of a tensor": Case(
        lambda t: {"capacity": Capacity(t["c"])}, lambda t: {"capacity": (t["c"], "sample")}, {"c": ()}, terms="l"
    ),
    "capacity, free bits dim_batch": Case(
        lambda t: {"free_bits": FreeBits(0.3, "dim_batch"), "capacity": Capacity(9.0, "batch")},
        lambda t: {"free_bits": (0.3, "dim_batch"), "capacity": (9.0, "batch")},
        terms="l",
        reductions=("batchmean", "sum", "mean"),
    ),
    "capacity, free bits sample, weighed": Case(
        lambda t: {"free_bits": FreeBits(2.5, "sample"), "capacity": Capacity(2.0), "weight": t["w"]},
        lambda t: {"free_bits": (2.5, "sample"), "capacity": (2.0, "sample"), "weight": t["w"]},
        {"w": (3,)},
        terms="lrk",
    ),
}


class Inputs:
    def __init__(self, dtype, tensors, target_dtype=None):
        def draw(shape, low, high):
            return (low + (high - low) * torch.rand(shape, dtype=F64)).to(dtype).requires_grad_()

        target = torch.rand(IMAGE, dtype=F64)
        self.images = {"recon": draw(IMAGE, 0.05, 0.95)}
        self.target = (target * 255).byte() if target_dtype == torch.uint8 else target.to(dtype)
        self.latents = {"mu": draw(LATENT, -1.5, 1.5), "logvar": draw(LATENT, -1.5, 1.5)}
        # scalars and vectors in the dtype that arithmetic has
        wide = F64 if dtype == F64 else torch.float32
        self.options = {
            name: draw(shape, 0.5, 1.5).to(dtype if shape in (IMAGE, LATENT) else wide).detach().requires_grad_()
            for name, shape in tensors.items()
        }
        self.leaves = self.images | self.latents | self.options
        self.doubles = {name: oracle.leaf(t) for name, t in self.leaves.items()}

    def actual(self, case, **more):
        options = case.options(self.leaves) | more
        return fastvae.vae_loss(self.images["recon"], self.target, *self.latents.values(), **options)

    def true(self, case, **more):
        t = self.doubles
        target = self.target if self.target.dtype == torch.uint8 else self.target.double()
        return loss_truth.vae_loss(t["recon"], target, t["mu"], t["logvar"], **(case.truth(t) | more))


def gradients(terms, upstream, leaves):
    used = [(t, u.to(t.dtype)) for t, u in zip(terms, upstream, strict=True) if t.requires_grad]
    return torch.autograd.grad([t for t, _ in used], leaves, [u for _, u in used], allow_unused=True)


MATRIX = [
    (name, dtype, reduction)
    for name, case in CASES.items()
    for dtype in DTYPES
    for reduction in case.reductions
    if dtype.itemsize > 2 or reduction in ("batchmean", "none")
]


@pytest.mark.parametrize(("name", "dtype", "reduction"), MATRIX, ids=[f"{n}-{d}-{r}" for n, d, r in MATRIX])
def test_value_and_gradients(backend, name, dtype, reduction):
    case = CASES[name]
    inputs = Inputs(dtype, case.tensors)
    actual, true = inputs.actual(case, reduction=reduction), inputs.true(case, reduction=reduction)
    size = 2 * (math.prod(IMAGE) + math.prod(LATENT))
    for term, value in zip(actual, true, strict=True):
        assert term.dtype == (F64 if dtype == F64 else torch.float32)
        assert term.shape == value.shape
        assert_near(term.detach(), value.detach(), value.detach().abs() + (size if reduction != "mean" else 2), ulps=4)
    upstream = [torch.rand(value.shape, dtype=F64) + 0.5 for value in true]
    leaves, doubles = inputs.leaves.values(), inputs.doubles.values()
    found, expected = gradients(actual, upstream, leaves), gradients(true, upstream, doubles)
    for leaf_name, gradient, value in zip(inputs.leaves, found, expected, strict=True):
        assert (gradient is None) == (value is None), leaf_name
        if gradient is not None:
            assert gradient.dtype == inputs.leaves[leaf_name].dtype
            assert_near(gradient, value, value.abs() + value.abs().max(), ulps=16)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_alone_goes_the_one_pass_way(backend, name):
    """backward() of the loss: what the forward pass wrote is what is handed out, and it is right."""
    case = CASES[name]
    inputs = Inputs(torch.float32, case.tensors)
    loss = inputs.actual(case).loss
    found = torch.autograd.grad(loss, list(inputs.leaves.values()), allow_unused=True)
    two_passes = torch.autograd.grad(
        inputs.actual(case, one_pass=False).loss, inputs.leaves.values(), allow_unused=True
    )
    expected = torch.autograd.grad(inputs.true(case)[0], inputs.doubles.values(), allow_unused=True)
    for gradient, other, value in zip(found, two_passes, expected, strict=True):
        assert (gradient is None) == (other is None) == (value is None)
        if gradient is not None:
            assert_near(gradient, value, value.abs() + value.abs().max(), ulps=16)
            assert_near(other, value, value.abs() + value.abs().max(), ulps=16)


@pytest.mark.parametrize("name", CASES)
def test_no_option_is_ignored(name):
    """Each changes the terms that it is there to change, and gradients."""
    case = CASES[name]
    inputs = Inputs(F64, case.tensors)
    plain = Case(lambda t: {}, lambda t: {})
    actual, without = inputs.actual(case), inputs.actual(plain)
    for letter, term, other in zip("lrk", actual, without, strict=True):
        same = torch.allclose(term, other, rtol=1e-6)
        assert same == (letter not in case.terms), letter
    asked = [inputs.images["recon"], *inputs.latents.values()]
    found = torch.autograd.grad(actual.loss, [*asked, *inputs.options.values()])
    before = torch.autograd.grad(without.loss, asked)
    assert all(gradient.any() for gradient in found)
    assert inputs.options or not all(torch.allclose(a, b) for a, b in zip(found, before, strict=True))


@pytest.mark.parametrize("likelihood", NAMED)
def test_the_forward_pass_writes_the_gradient(backend, likelihood):
    """After it, nobody looks at the images again: to change them behind autograd's back has no effect."""

    def gradient(change, **options):
        recon, target = torch.full((3, 40), 0.3, requires_grad=True), torch.full((3, 40), 0.8)
        loss = fastvae.vae_loss(recon, target, kl=torch.ones(3), likelihood=likelihood, **options).loss
        if change:
            target.data.fill_(0.1)
        (found,) = torch.autograd.grad(loss, recon)
        return found

    right = gradient(change=False)
    assert torch.equal(gradient(change=True), right)
    assert not torch.allclose(gradient(change=True, one_pass=False), right)
