"""Each preset against its project's own formula: the loss, the terms it reports, and every gradient."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastvae
from fastvae.likelihoods import L2, Gaussian, Scaled
from fastvae.parametrizations import logvar_from_std
from fastvae.presets import PRESETS, preset_options
from fastvae.regularizers import Capacity, FreeBits
from tests.helpers import peers_formulas as peers

VECTORS, MAPS = (3, 6), (3, 2, 2, 3)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Case(NamedTuple):
    """How a project is compared: it reports recon_unit * recon and kl_unit * kl; None: something else than we do."""

    latents: tuple[int, ...] = VECTORS
    probabilities: bool = False
    recon_unit: float | None = 1.0
    kl_unit: float | None = 1.0
    learned: tuple[str, ...] = ()  # arguments of the formula that are parameters of the loss
    constant: float = 0.0  # what the project adds to its loss and its reconstruction term
    criterion: Callable[..., nn.Module] | None = None  # of a project without a preset


CASES = {
    "pytorch_examples": Case(probabilities=True),
    "pythae": Case(),
    "pythae_bce": Case(probabilities=True),
    "pytorch_vae": Case(kl_unit=-1.0),
    "ldm": Case(MAPS, learned=("log_scale",)),
    "diffusers": Case(MAPS),
    "disvae_bernoulli": Case(probabilities=True),
    "disvae_gaussian": Case(recon_unit=255.0),
    "disvae_laplace": Case(recon_unit=3.0),
    "sigma_vae": Case(),
    "sigma_vae_optimal": Case(),
    "pyro": Case(probabilities=True),
    "lightning_bolts": Case(kl_unit=0.1),
    "monai": Case(MAPS),
    "beta_vae": Case(
        criterion=lambda **more: fastvae.VAELoss(
            1000.0, L2(from_logits=True), capacity=Capacity(25.0, mode="batch"), **more
        )
    ),
    "generative_models": Case(
        MAPS, learned=("log_scale",), criterion=lambda **more: fastvae.VAELoss.preset("ldm", beta=1.0, **more)
    ),
    "world_models": Case(
        kl_unit=None,  # reports it under its free bits
        criterion=lambda **more: fastvae.VAELoss(free_bits=FreeBits(0.5 * 6, mode="sample"), **more),
    ),
    "mosaic_diffusion": Case(
        MAPS,
        learned=("log_scale",),
        constant=2.0,
        criterion=lambda **more: fastvae.VAELoss(
            12 / 40, Scaled("l1", nn.Parameter(torch.zeros(()))), reduction="mean", **more
        ),
    ),
}


def loss_of(name, dtype, **overrides):
    make = CASES[name].criterion
    overrides["return_terms"] = True
    criterion = fastvae.VAELoss.preset(name, **overrides) if make is None else make(**overrides)
    for parameter in criterion.parameters():
        nn.init.constant_(parameter, 0.25)  # trained for a while
    return criterion.to(dtype)


def inputs_of(name, dtype):
    case = CASES[name]
    recon = torch.rand(3, 2, 4, 5) * 0.9 + 0.05 if case.probabilities else torch.randn(3, 2, 4, 5)
    mu, logvar = torch.randn(case.latents), torch.randn(case.latents)
    mu[0], logvar[0] = 0.1 * mu[0], 0.1 * logvar[0]  # a sample below any free bits
    named = {"recon": recon, "target": torch.rand_like(recon), "mu": mu, "logvar": logvar}
    return {key: tensor.to(dtype).requires_grad_(key != "target") for key, tensor in named.items()}


def in_float64(tensors):
    return {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in tensors.items()}


def gradients(loss, tensors):
    leaves = {key: t for key, t in tensors.items() if t.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), retain_graph=True), strict=True))


def assert_equal(actual, expected, dtype):
    assert actual.dtype == dtype
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    atol = 0.1 * rtol * expected.abs().max().item()  # of elements that cancel to almost 0
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def compare(name, criterion, tensors, dtype, ours=(), theirs=()):
    """The loss and all gradients, under the keywords of either side; the project's in float64, of the same values."""
    case = CASES[name]
    parameters = dict(zip(case.learned, criterion.parameters(), strict=True))
    wide, wide_parameters = in_float64(tensors), in_float64(parameters)
    wide_theirs = {key: t.detach().double() if isinstance(t, torch.Tensor) else t for key, t in dict(theirs).items()}
    expected = getattr(peers, name)(**wide, **wide_parameters, **wide_theirs)
    actual = criterion(**tensors, **dict(ours))
    assert_equal(actual.loss + case.constant, expected.loss, dtype)
    expected_gradients = gradients(expected.loss, wide | wide_parameters)
    for key, gradient in gradients(actual.loss, tensors | parameters).items():
        assert_equal(gradient, expected_gradients[key], dtype)
    return actual, expected


def test_every_preset_is_compared():
    assert set(PRESETS) == {name for name, case in CASES.items() if case.criterion is None}


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_same_number_as(name, dtype, backend):
    case = CASES[name]
    actual, expected = compare(name, loss_of(name, dtype), inputs_of(name, dtype), dtype)
    if expected.recon is not None and case.recon_unit is not None:
        assert_equal(case.recon_unit * actual.recon + case.constant, expected.recon, dtype)
    if expected.kl is not None and case.kl_unit is not None:
        assert_equal(case.kl_unit * actual.kl, expected.kl, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("name", "overrides", "theirs"),
    [
        ("pytorch_vae", {"beta": 1.0}, {"kld_weight": 1.0}),  # its validation
        ("diffusers", {"likelihood": "l1"}, {"rec_loss": "l1"}),
        ("disvae_bernoulli", {"beta": 4.0}, {"beta": 4.0}),
        ("disvae_gaussian", {"beta": 100.0, "capacity": Capacity(25.0, "batch")}, {"beta": 100.0, "capacity": 25.0}),
        ("disvae_laplace", {"beta": 100.0, "capacity": Capacity(1.0, "batch")}, {"beta": 100.0, "capacity": 1.0}),
        ("lightning_bolts", {"beta": 1.0}, {"kl_coeff": 1.0}),
        ("monai", {"beta": 0.01}, {"kl_weight": 0.01}),
    ],
)
def test_overrides_are_the_projects_options(name, overrides, theirs, dtype, backend):
    compare(name, loss_of(name, dtype, **overrides), inputs_of(name, dtype), dtype, theirs=theirs)


@DTYPES
@pytest.mark.parametrize(("name", "weight"), [("ldm", 1.0), ("generative_models", 0.25), ("diffusers", 0.5)])
def test_perceptual_loss_is_an_extra_of_every_pixel(name, weight, dtype, backend):
    p_loss = torch.rand(3, 1, 1, 1, dtype=dtype, requires_grad=True)
    ours = {"extra": weight * p_loss.flatten()}
    actual, _ = compare(name, loss_of(name, dtype), inputs_of(name, dtype), dtype, ours, {"p_loss": p_loss})
    # each of 40 pixels of each of 3 samples holds it
    scale = torch.tensor(0.25 if CASES[name].learned else 0.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(actual.recon, p_loss)
    assert_equal(gradient, (40 / 3 * weight * torch.exp(-scale)).expand(3, 1, 1, 1), dtype)


@DTYPES
@pytest.mark.parametrize("name", ["ldm", "diffusers", "monai"])
def test_autoencoders_clamp_their_logvar(name, dtype, backend):
    tensors = inputs_of(name, dtype)
    with torch.no_grad():
        tensors["logvar"][0, 0, 0] = torch.tensor([-40.0, 21.0, -31.0])
    actual, expected = compare(name, loss_of(name, dtype), tensors, dtype)
    assert_equal(actual.kl, expected.kl, dtype)
    gradient = gradients(actual.kl, {"logvar": tensors["logvar"]})["logvar"]
    assert (gradient[0, 0, 0] == 0).all()
    assert (gradient[1:] != 0).all()


def test_ldm_weighs_its_discriminator_by_the_gradient_of_the_nll(backend):
    """autograd.grad of the reconstruction term, then backward of the loss, both through one graph."""
    tensors, criterion = inputs_of("ldm", torch.float64), loss_of("ldm", torch.float64)
    (scale,) = criterion.parameters()
    terms, expected = criterion(**tensors), peers.ldm(**tensors, log_scale=scale)
    for actual_term, expected_term in ((terms.recon, expected.recon), (terms.loss, expected.loss)):
        actual = torch.autograd.grad(actual_term, [tensors["recon"], scale], retain_graph=True)
        torch.testing.assert_close(
            actual, torch.autograd.grad(expected_term, [tensors["recon"], scale], retain_graph=True)
        )


@DTYPES
def test_sigma_vae_learns_its_sigma(dtype, backend):
    half = torch.tensor(-5.5, dtype=torch.float64, requires_grad=True)  # log sigma, where the soft bound bends it
    logvar = nn.Parameter((2 * half).detach().to(dtype))
    tensors = inputs_of("sigma_vae", dtype)
    learned = loss_of("sigma_vae", dtype, likelihood=Gaussian(nn.Parameter(torch.zeros(())), full=True, softclip=-6.0))
    nn.init.constant_(next(learned.parameters()), logvar.item())
    actual, expected = learned(**tensors), peers.sigma_vae(**in_float64(tensors), log_sigma=half)
    assert_equal(actual.loss, expected.loss, dtype)
    (actual_gradient,) = torch.autograd.grad(actual.loss, list(learned.parameters()))
    (expected_gradient,) = torch.autograd.grad(expected.loss, half)
    assert_equal(2 * actual_gradient, expected_gradient, dtype)


def test_sigma_vae_bounds_its_sigma(backend):
    """sigma = 1 becomes 1 + e^-6; the optimal one of a perfect reconstruction stays above e^-6."""
    tensors = inputs_of("sigma_vae", torch.float64)
    plain = fastvae.VAELoss(likelihood=Gaussian(full=True), reduction="sum")(**tensors)
    assert (loss_of("sigma_vae", torch.float64)(**tensors).loss - plain).abs() > 1e-2
    with torch.no_grad():
        tensors["recon"].copy_(tensors["target"] + 1e-6 * torch.randn_like(tensors["target"]))
    compare("sigma_vae_optimal", loss_of("sigma_vae_optimal", torch.float64), tensors, torch.float64)


def test_monai_hands_over_sigma():
    tensors = inputs_of("monai", torch.float64)
    sigma = torch.exp(tensors["logvar"].detach() / 2).requires_grad_()
    loss = fastvae.VAELoss.preset("monai")
    actual = loss(tensors["recon"], tensors["target"], tensors["mu"], logvar_from_std(sigma))
    expected = peers.monai(tensors["recon"], tensors["target"], tensors["mu"], 2 * sigma.log())
    torch.testing.assert_close(actual, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(actual, sigma), torch.autograd.grad(expected.loss, sigma))


@pytest.mark.parametrize(("name", "kind"), [("pythae", "mse"), ("pythae_bce", "bce")])
def test_pythae_itself(name, kind, backend):
    models = pytest.importorskip("pythae.models", reason="pythae is not installed")
    tensors = inputs_of(name, torch.float64)
    model = SimpleNamespace(model_config=SimpleNamespace(reconstruction_loss=kind))
    theirs = models.VAE.loss_function(model, *tensors.values(), z=None)
    ours = fastvae.VAELoss.preset(name, return_terms=True)(**tensors)
    torch.testing.assert_close(tuple(ours), theirs)


@pytest.mark.parametrize("name", ["ldm", "diffusers"])
def test_diffusers_posterior_itself(name, backend):
    vae = pytest.importorskip("diffusers.models.autoencoders.vae", reason="diffusers is not installed")
    tensors = inputs_of(name, torch.float64)
    posterior = vae.DiagonalGaussianDistribution(torch.cat([tensors["mu"], 20 * tensors["logvar"]], dim=1))
    criterion = fastvae.VAELoss.preset(name, return_terms=True).double()
    kl = criterion(tensors["recon"], tensors["target"], tensors["mu"], 20 * tensors["logvar"]).kl
    torch.testing.assert_close(kl, posterior.kl().mean())
    # clamping twice is clamping once
    again = criterion(tensors["recon"], tensors["target"], posterior.mean, posterior.logvar).kl
    torch.testing.assert_close(again, kl)


def test_a_clamp_measured_already_is_left_out():
    """With kl= the clamp belongs to where the KL is measured."""
    tensors = inputs_of("diffusers", torch.float64)
    criterion = fastvae.VAELoss.preset("diffusers", logvar_clamp=None)
    bounds = preset_options("diffusers")["logvar_clamp"]
    kl = fastvae.gaussian_kl(tensors["mu"], tensors["logvar"], logvar_clamp=bounds, reduction="none")
    actual = criterion(tensors["recon"], tensors["target"], kl=kl)
    torch.testing.assert_close(actual, peers.diffusers(**tensors).loss)


def test_the_scale_of_ldm_is_learned_by_one_loss_alone():
    first, second = fastvae.VAELoss.preset("ldm"), fastvae.VAELoss.preset("ldm")
    assert list(first.state_dict()) == ["likelihood.log_scale"]
    (a,), (b,) = first.parameters(), second.parameters()
    assert a is not b
    assert a.shape == ()
    assert a == 0


def test_no_other_preset_has_state():
    for name in set(PRESETS) - {"ldm"}:
        assert fastvae.VAELoss.preset(name).state_dict() == {}, name


def test_options_are_the_callers_to_change():
    preset_options("monai")["beta"] = 7.0
    assert preset_options("monai")["beta"] == 1e-6
    assert fastvae.VAELoss.preset("monai", beta=7.0).beta == 7.0


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of .*got 'pytae'\. Did you mean 'pythae'\?"):
        fastvae.VAELoss.preset("pytae")
