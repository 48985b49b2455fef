"""Numbers that a caller passes: of any type that is a number, however large, not negative where that is a mistake."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastvae
from fastvae import parametrizations, schedules
from fastvae.likelihoods import L2, Gaussian, Huber, LogCosh, Scaled, SmoothL1
from fastvae.regularizers import Capacity, FreeBits, balance
from tests.helpers import loss_truth

F32 = torch.float32
# the interpreter says what a GPU does silently
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def inputs(dtype=F32):
    generator = torch.Generator().manual_seed(2)
    shapes = ((3, 6), (3, 6), (3, 4), (3, 4))
    return [torch.rand(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


# options of `vae_loss`, and the same for the formula
HUGE = {
    "beta": ({"beta": 1e300}, {"beta": 1e300}),
    "an int": ({"beta": 10**400}, {"beta": math.inf}),
    "recon_weight": ({"recon_weight": 1e39}, {"recon_weight": 1e39}),
    "both": ({"recon_weight": 1e38, "beta": 1e38}, {"recon_weight": 1e38, "beta": 1e38}),
    "weighed": ({"beta": 1e300, "weight": torch.ones(3)}, {"beta": 1e300}),
    "capacity": ({"capacity": Capacity(1e300)}, {"capacity": (1e300, "sample")}),
    "capacity of the batch": ({"capacity": Capacity(1e300, "batch")}, {"capacity": (1e300, "batch")}),
    **{
        f"free bits, {mode}": ({"free_bits": FreeBits(1e300, mode)}, {"free_bits": (1e300, mode)})
        for mode in ("dim", "dim_batch", "dim_mask", "sample")
    },
    "huber": ({"likelihood": Huber(1e300)}, {"error": "huber", "parameter": 1e300}),
    "smooth_l1": ({"likelihood": SmoothL1(1e300)}, {"error": "smooth_l1", "parameter": 1e300}),
    "tiny variance": ({"likelihood": Gaussian(-1000.0)}, {"log_scale": -1000.0, "share": 0.5}),
    "huge variance": ({"likelihood": Gaussian(1e5)}, {"log_scale": 1e5, "share": 0.5}),
    "tiny scale": ({"likelihood": Scaled("l1", -800)}, {"error": "l1", "log_scale": -800.0}),
    "clamp": ({"logvar_clamp": (-1e300, 1e300)}, {}),
    "clamp from above": ({"logvar_clamp": (-1e300, 0.5)}, {"logvar_clamp": (-1e30, 0.5)}),
}


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "none"])
@pytest.mark.parametrize("name", HUGE)
def test_what_float32_cannot_hold_is_infinite(backend, name, reduction, one_pass):
    options, formula = HUGE[name]
    if reduction == "none" and "batch" in name:
        return
    leaves = inputs()
    terms = fastvae.vae_loss(*leaves, reduction=reduction, one_pass=one_pass, **options)
    expected = loss_truth.vae_loss(*(t.detach().double() for t in leaves), reduction=reduction, **formula)
    for found, exact in zip(terms, expected, strict=True):
        torch.testing.assert_close(found.detach(), exact.float(), rtol=1e-5, atol=0)
    for create_graph in (False, True):
        gradients = torch.autograd.grad(terms.loss.sum(), leaves, retain_graph=True, create_graph=create_graph)
        assert [g.shape for g in gradients] == [t.shape for t in leaves]


def test_a_huge_kl_is_infinite_under_a_number(backend):
    mu, logvar = torch.zeros(4, 2, requires_grad=True), torch.full((4, 2), 85.0, requires_grad=True)
    image = torch.zeros(4, 3)
    terms = fastvae.vae_loss(image, image, mu, logvar, beta=100.0, reduction="sum")
    assert terms.loss == math.inf
    assert terms.kl.isfinite()
    assert (torch.autograd.grad(terms.loss, logvar)[0] == math.inf).all()


def test_a_gradient_beyond_float16_is_infinite(backend):
    kl = torch.ones(3, dtype=torch.float16, requires_grad=True)
    image = torch.zeros(3, 2)
    fastvae.vae_loss(image, image, kl=kl, beta=1e6).loss.backward()
    assert (kl.grad == math.inf).all()


def test_a_target_scaled_beyond_float32_is_infinite(backend):
    recon, target = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, dtype=torch.uint8)
    for likelihood in (L2(target_scale=1e300), L2(target_shift=1e300)):
        loss = fastvae.reconstruction_loss(recon, target, likelihood=likelihood)
        assert loss == math.inf
        torch.autograd.grad(loss, recon)


NUMBERS = {
    "float64": (np.float64, 0.25),
    "float32": (np.float32, 0.25),
    "float16": (np.float16, 0.25),
    "int": (int, 3),
    "int64": (np.int64, 3),
    "uint8": (np.uint8, 3),
    "fraction": (Fraction, 0.25),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numpys_scalars_are_numbers(kind):
    """The results are those of Python's own, bit for bit, wherever a number is taken."""
    make, x = NUMBERS[kind]
    recon, target, mu, logvar = inputs()
    byte = torch.arange(18, dtype=torch.uint8).reshape(3, 6)
    share = make(1) if x > 1 else make(x)

    def results(x, share):
        options = [
            {"beta": x, "recon_weight": x},
            {"free_bits": FreeBits(x), "capacity": Capacity(x)},
            {"free_bits": FreeBits(x, "dim_batch"), "capacity": Capacity(x, "batch")},
            {"likelihood": Huber(x)},
            {"likelihood": SmoothL1(x)},
            {"likelihood": LogCosh(x)},
            {"likelihood": Gaussian(x, softclip=x)},
            {"likelihood": Scaled("l1", x)},
            {"logvar_clamp": (share, 2 * x)},
        ]
        found = [term for given in options for term in fastvae.vae_loss(recon, target, mu, logvar, **given)]
        found.append(fastvae.reconstruction_loss(recon, byte, likelihood=L2(target_scale=x, target_shift=x)))
        module = fastvae.VAELoss(x, recon_weight=x, capacity=Capacity(x), accumulate=3)
        found += [module(recon, target, mu, logvar), module(recon, target, mu, logvar, beta=x)]
        found += balance(mu, logvar, (mu, logvar), share)[:2]
        found += [parametrizations.soft_clamp(mu, x), parametrizations.logvar_from_softplus(mu, x)]
        found += [schedules.Linear(x, 2 * x, 7).value_at(3), schedules.Cyclical(x, x, 7, ratio=share).value_at(3)]
        return [torch.as_tensor(t) for t in found]

    for found, expected in zip(results(make(x), share), results(x, float(share)), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("make", [np.int64, np.int32, np.uint8, np.uint64])
def test_numpys_integers_are_integers(make):
    mu = torch.zeros(3, 4)
    for seed in (5, 2**63 + 1) if make is np.uint64 else (5,):
        expected = fastvae.reparameterize(mu, mu, seed=seed, offset=3)
        assert torch.equal(fastvae.reparameterize(mu, mu, seed=make(seed), offset=make(3)), expected)
        expected = fastvae.philox_normal((2, 3), seed=seed, offset=1)
        assert torch.equal(fastvae.philox_normal((make(2), make(3)), seed=make(seed), offset=make(1)), expected)
        assert fastvae.philox_normal(make(4), seed=0).shape == (4,)
        assert torch.equal(fastvae.NoiseState(make(seed), make(2)).seed, fastvae.NoiseState(seed, 2).seed)
    schedule = schedules.Cyclical(0.0, 1.0, make(6), make(2), delay=make(1))
    assert schedule.value_at(4) == schedules.Cyclical(0.0, 1.0, 6, 2, delay=1).value_at(4)
    assert fastvae.VAELoss(accumulate=make(3)).accumulate == 3


IMAGE, LATENT = torch.ones(2, 3), torch.ones(2, 4)
NEGATIVE = {
    "beta": lambda x: fastvae.VAELoss(beta=x),
    "recon_weight": lambda x: fastvae.VAELoss(recon_weight=x),
    "capacity": lambda x: Capacity(x),
    "nats": lambda x: FreeBits(x),
    "beta of a call": lambda x: fastvae.VAELoss()(IMAGE, IMAGE, LATENT, LATENT, beta=x),
    "beta of micro-batches": lambda x: fastvae.VAELoss(accumulate=2)(IMAGE, IMAGE, LATENT, LATENT, beta=x),
    "beta of the function": lambda x: fastvae.vae_loss(IMAGE, IMAGE, LATENT, LATENT, beta=x),
    "recon_weight of the function": lambda x: fastvae.vae_loss(IMAGE, IMAGE, LATENT, LATENT, recon_weight=x),
    "a schedule's end": lambda x: fastvae.VAELoss(schedules.Linear(1.0, x, 10)),
    "a schedule's start": lambda x: fastvae.VAELoss(capacity=Capacity(schedules.Linear(x, 1.0, 10))),
}


@pytest.mark.parametrize("value", [-1.0, -1, np.float32(-0.5)], ids=repr)
@pytest.mark.parametrize("name", NEGATIVE)
def test_negative_weights_are_mistakes(name, value):
    for _ in range(2):  # whether or not such a call was seen before
        with pytest.raises(ValueError, match="must be 0 or more"):
            NEGATIVE[name](value)
        fastvae.vae_loss(IMAGE, IMAGE, LATENT, LATENT)


def test_a_module_holds_numbers_as_floats():
    assert repr(fastvae.VAELoss(np.float32(2), recon_weight=3)).startswith("VAELoss(beta=2.0,")
    assert fastvae.VAELoss(10**400).beta == math.inf


def test_nan_is_no_weight():
    with pytest.raises(ValueError, match="beta must be 0 or more; got nan"):
        fastvae.VAELoss(beta=math.nan)
