"""Arguments with one value per sample, channel or batch: their dtype, their gradients, and how they are held."""

import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits

IMAGE, LATENT = (2, 3, 20, 20), (2, 5)
ROWS = IMAGE[:1]

# name: shape, and the options of `vae_loss` that a tensor of this shape makes
ARGUMENTS = {
    "weight": (ROWS, lambda t: {"weight": t}),
    "extra": (ROWS, lambda t: {"extra": t}),
    "extra within a scale": (ROWS, lambda t: {"extra": t, "likelihood": Gaussian(torch.full(IMAGE[1:], 0.3))}),
    "beta": ((), lambda t: {"beta": t}),
    "beta, weighed": ((), lambda t: {"beta": t, "weight": torch.tensor([0.3, 2.0])}),
    "recon_weight": ((), lambda t: {"recon_weight": t}),
    "recon_weight, weighed": ((), lambda t: {"recon_weight": t, "weight": torch.tensor([0.3, 2.0])}),
    "kl": (ROWS, lambda t: {"kl": t}),
    "kl, regularised": (ROWS, lambda t: {"kl": t, "free_bits": FreeBits(0.1, "sample"), "capacity": Capacity(0.7)}),
    "capacity": ((), lambda t: {"capacity": Capacity(t)}),
    "capacity of the batch": ((), lambda t: {"capacity": Capacity(t, "batch")}),
    "log scale": ((), lambda t: {"likelihood": Gaussian(t, full=True)}),
    "log scale of samples": (ROWS, lambda t: {"likelihood": Scaled("l1", t)}),
    "log scale of samples, bounded": (ROWS, lambda t: {"likelihood": Gaussian(t, softclip=-0.2)}),
    "log scale of channels": ((3, 1, 1), lambda t: {"likelihood": Scaled("log_cosh", t)}),
    "log scale of channels, bounded": ((3, 1, 1), lambda t: {"likelihood": Gaussian(t, softclip=-0.2)}),
    "log scale of channels, with extra": (
        (3, 1, 1),
        lambda t: {"likelihood": Scaled("l2", t), "extra": torch.tensor([0.5, 70.0])},
    ),
    "log scale of elements, bounded": (IMAGE, lambda t: {"likelihood": Gaussian(t, softclip=-0.2)}),
    "prior": ((2, 5), lambda t: {"prior": t.unbind()}),
    "prior, free bits": ((2, 5), lambda t: {"prior": t.unbind(), "free_bits": FreeBits(0.2, "dim_batch")}),
}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (IMAGE, IMAGE, LATENT, LATENT)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def loss(name, argument, reduction, dtype=torch.float32):
    recon, target, mu, logvar = inputs(dtype)
    options = ARGUMENTS[name][1](argument)
    latents = {} if "kl" in options else {"logvar": logvar}
    return fastvae.vae_loss(recon, target, mu, **latents, reduction=reduction, **options)


def values(name, dtype):
    """Of an argument; such as a product in its own 16 bits would round or take beyond float16."""
    shape = ARGUMENTS[name][0]
    return torch.linspace(0.37, 0.93, math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype) + (
        70 if name == "extra" else 0
    )


REDUCTIONS = ["batchmean", "sum", "mean", "none"]


def allowed(name, reduction):
    of_batch = "batch" in name or name == "prior, free bits"
    return not (of_batch and reduction == "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arithmetic_is_float32_for_arguments_of_16_bits(backend, name, dtype, reduction):
    """The same bits as with the argument in float32; its gradient is that one's, rounded once."""
    if not allowed(name, reduction):
        return
    narrow = values(name, dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    found, expected = (loss(name, argument, reduction) for argument in (narrow, wide))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert b.isfinite().all()
    for terms, argument in ((found, narrow), (expected, wide)):
        terms.loss.sum().backward()
        assert argument.grad.dtype == argument.dtype
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_float64_argument_makes_all_results_float64(backend, name, reduction):
    if not allowed(name, reduction):
        return
    argument = values(name, torch.float64).requires_grad_()
    exact = argument.detach().clone().requires_grad_()
    found, expected = loss(name, argument, reduction), loss(name, exact, reduction, torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    for terms in (found, expected):
        terms.loss.sum().backward()
    torch.testing.assert_close(argument.grad, exact.grad, rtol=1e-5, atol=1e-5)


def test_a_float64_beta_counts_at_every_call(backend):
    """The second call finds a cached plan."""
    for beta in (0.5, torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5), 0.5):
        wide = isinstance(beta, torch.Tensor) and beta.dtype == torch.float64
        for _ in range(2):
            terms = fastvae.vae_loss(*inputs(), beta=beta)
            assert {t.dtype for t in terms} == {torch.float64 if wide else torch.float32}


def test_extra_of_large_images_stays_finite(backend):
    image = torch.zeros(1, 3, 256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        extra = torch.tensor([0.5], dtype=dtype)
        assert fastvae.reconstruction_loss(image, image, likelihood="l1", extra=extra) == 98304


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_weights_of_a_loss_survive_a_cast_to_16_bits(cast):
    """On their own, and as parts of a model that is cast."""
    tiny = torch.tensor(1e-8)
    criterion = fastvae.VAELoss(
        tiny.clone(),
        Gaussian(tiny.clone()),
        recon_weight=tiny.clone(),
        capacity=Capacity(tiny.clone()),
    )
    for module in (criterion, torch.nn.Sequential(torch.nn.Linear(1, 1), criterion)):
        CASTS[cast](module)
        held = {"beta", "recon_weight", "capacity_nats", "likelihood.log_scale"}
        assert set(criterion.state_dict()) == held
        for name, value in criterion.state_dict().items():
            assert value.dtype == torch.float32, name
            assert value == tiny, name
    assert module[0].weight.dtype in (torch.float16, torch.bfloat16)
    criterion.beta.fill_(0.5)  # is still the tensor that the loss reads
    assert torch.equal(criterion(*inputs()), fastvae.vae_loss(*inputs(), beta=0.5, **options_of(criterion)).loss)
    assert criterion.double().beta.dtype == torch.float64


def options_of(criterion):
    return {
        "likelihood": criterion.likelihood,
        "recon_weight": criterion.recon_weight,
        "capacity": criterion.capacity,
    }


@pytest.mark.parametrize("kind", [torch.tensor, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_micro_batches_divide_a_weight_in_float32(kind):
    for name in ("beta", "recon_weight"):
        weight = torch.tensor(0.7001953125, dtype=torch.bfloat16)
        weight = weight if kind is torch.tensor else kind(weight)
        options = {name: weight}
        found = fastvae.VAELoss(accumulate=3, return_terms=True, **options)(*inputs()).loss
        exact = fastvae.VAELoss(accumulate=3, return_terms=True, **{name: float(weight.detach())})(*inputs()).loss
        torch.testing.assert_close(found, exact, rtol=3e-7, atol=0)
