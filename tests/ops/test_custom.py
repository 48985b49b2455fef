"""A likelihood whose error the caller writes, with every other option."""

import math

import pytest
import torch
import torch.nn.functional as F

import fastvae
from fastvae.likelihoods import L1, L2, Custom, LogCosh, Scaled
from fastvae.regularizers import Capacity, FreeBits

IMAGE, LATENT = (3, 2, 4, 9), (3, 5)


def squared(recon, target):
    return (recon - target) ** 2


def per_sample():
    return 0.5 + torch.rand(3)


OPTIONS = {
    "none": dict,
    "reduction none": lambda: {"reduction": "none"},
    "mean": lambda: {"reduction": "mean"},
    "mask": lambda: {"mask": torch.rand(IMAGE) > 0.5},
    "weight": lambda: {"weight": per_sample()},
    "extra": lambda: {"extra": per_sample()},
    "extra map": lambda: {"extra": torch.rand(IMAGE)},
    "recon_weight": lambda: {"recon_weight": per_sample()},
    "recon_weight map": lambda: {"recon_weight": torch.rand(2, 1, 1)},
    "beta": lambda: {"beta": per_sample()},
    "free bits": lambda: {"free_bits": FreeBits(0.3)},
    "capacity": lambda: {"capacity": Capacity(2.0)},
    "clamp and prior": lambda: {"logvar_clamp": (-0.5, 0.5), "prior": (torch.rand(5), torch.rand(5))},
    "two passes": lambda: {"one_pass": False},
}


@pytest.fixture
def inputs():
    recon, mu, logvar = (torch.rand(shape).requires_grad_() for shape in (IMAGE, LATENT, LATENT))
    return recon, torch.rand(IMAGE), mu, logvar


def step(inputs, **options):
    terms = fastvae.vae_loss(*inputs, **options)
    leaves = [x for x in inputs if x.requires_grad]
    upstream = [torch.full_like(terms.loss, 3.0), torch.full_like(terms.recon, 0.5)]
    return *terms, *torch.autograd.grad(terms[:2], leaves, upstream)


@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_likelihood_that_it_writes(backend, inputs, name):
    options = OPTIONS[name]()
    for found, expected in zip(
        step(inputs, likelihood=squared, **options), step(inputs, likelihood="l2", **options), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)


def test_scales_and_normalizers(backend, inputs):
    scale = torch.tensor(0.3, requires_grad=True)
    mask = torch.rand(IMAGE) > 0.5
    for ours, theirs, options in (
        (Scaled(torch.nn.L1Loss(reduction="none"), scale), Scaled("l1", scale), {}),
        (Custom(squared, mask_normalize=True), L2(mask_normalize=True), {"mask": mask}),
        (lambda x, t: torch.log(torch.cosh(3 * (x - t))) / 3, LogCosh(3.0), {"extra": torch.rand(IMAGE)}),
    ):
        found, expected = (step(inputs, likelihood=likelihood, **options) for likelihood in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_in_float32_at_least_and_gradients_in_the_dtype_of_recon(backend, dtype):
    seen = []

    def error(recon, target):
        seen.extend((recon.dtype, target.dtype))
        return squared(recon, target)

    recon = torch.rand(IMAGE).to(dtype).requires_grad_()
    target = torch.randint(256, IMAGE, dtype=torch.uint8)
    value = fastvae.reconstruction_loss(recon, target, likelihood=error)
    (gradient,) = torch.autograd.grad(value, recon)
    wide = torch.promote_types(dtype, torch.float32)
    assert seen == [wide, wide]
    assert (value.dtype, gradient.dtype) == (wide, dtype)
    exact = recon.detach().double() - target.double() / 255
    torch.testing.assert_close(value.double(), exact.square().sum() / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, (2 * exact / 3).to(dtype))


def test_nan_outside_the_mask_touches_nothing(backend, inputs):
    recon, target, mu, logvar = inputs
    mask = torch.rand(IMAGE) > 0.5
    results = []
    for filling in (0.5, math.nan):
        filled = recon.detach().masked_fill(~mask, filling).requires_grad_()
        images = filled, target.masked_fill(~mask, filling)
        results.append(step((*images, mu, logvar), likelihood=squared, mask=mask))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[1][3][~mask] == 0).all()


def test_gradients_of_gradients(backend, inputs):
    recon = inputs[0].detach().double().requires_grad_()
    target = inputs[1].double()

    def loss(x):
        return fastvae.reconstruction_loss(x, target, likelihood=lambda a, b: (a - b) ** 4)

    (gradient,) = torch.autograd.grad(loss(recon), recon, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), recon)
    torch.testing.assert_close(second, 12 * (recon - target).detach() ** 2 / 3)


def test_a_module_is_a_submodule_of_the_loss(inputs):
    class Weighed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2, 1, 1))

        def forward(self, recon, target):
            return self.scale * squared(recon, target)

    criterion = fastvae.VAELoss(likelihood=Weighed())
    assert [name for name, _ in criterion.named_parameters()] == ["likelihood.scale"]
    criterion(*inputs).backward()
    assert criterion.likelihood.scale.grad.shape == (2, 1, 1)
    torch.testing.assert_close(criterion(*inputs), fastvae.VAELoss()(*inputs))


def test_compiled(inputs):
    def loss(*inputs):
        return fastvae.vae_loss(*inputs, likelihood=squared).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    found, expected = (torch.autograd.grad(f(*inputs), inputs[0]) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


MISTAKES = {
    "a reduced error": ({"likelihood": F.mse_loss}, ValueError, r"mse_loss returned \(\)\. Leave out its reduction"),
    "another shape": ({"likelihood": lambda x, t: x.flatten(1)}, ValueError, r"of shape \(3, 2, 4, 9\)"),
    "no tensor": ({"likelihood": lambda x, t: 0.5}, TypeError, "floating point tensor; <lambda> returned float"),
    "whole numbers": ({"likelihood": lambda x, t: (x > t).long()}, TypeError, r"returned torch\.int64"),
    "a class": ({"likelihood": L1}, TypeError, r"got the class L1, not an object of it\. Pass L1\(\.\.\.\)"),
    "in place": ({"likelihood": squared, "inplace": True}, ValueError, "got a function"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(inputs, name):
    options, error, message = MISTAKES[name]
    recon, *rest = inputs
    with pytest.raises(error, match=message):
        fastvae.vae_loss(recon * 1, *rest, **options)


def test_images_are_checked_before_the_function_is_called(inputs):
    recon, target, *latents = inputs
    with pytest.raises(ValueError, match="recon and target must have one shape"):
        fastvae.vae_loss(recon, target[:1], *latents, likelihood=squared)


def test_checks_of_inputs_and_bounds_of_densities(inputs):
    assert fastvae.check_inputs(*inputs, likelihood=squared).ok
    with pytest.raises(ValueError, match="must be a normalized density; got function"):
        fastvae.iwae_loss(inputs[1], *inputs[2:], lambda z: z, samples=2, likelihood=squared)
