"""Weights of the reconstruction and of the KL by sample and by element, and extra errors by element."""

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian, LogCosh, Scaled
from fastvae.regularizers import Capacity, FreeBits
from tests.conftest import INTERPRETED
from tests.helpers import loss_truth, oracle
from tests.helpers.oracle import assert_near

B, IMAGE, LATENT = 3, (3, 2, 4, 9), (3, 5)
SHAPES = {"per sample": (3,), "with dimensions": (3, 1, 1, 1), "map": IMAGE, "channels": (2, 1, 1), "columns": (9,)}


@pytest.fixture
def inputs():
    recon, mu, logvar = (torch.rand(shape).requires_grad_() for shape in (IMAGE, LATENT, LATENT))
    return recon, torch.rand(IMAGE), mu, logvar


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms_are_the_same_without_a_weight_and_the_loss_is_weighed(backend, inputs, shape):
    weight = torch.rand(shape)
    terms = fastvae.vae_loss(*inputs, recon_weight=weight)
    without = fastvae.vae_loss(*inputs)
    torch.testing.assert_close(terms[1:], without[1:])
    recon, target = inputs[0].detach(), inputs[1]
    weight = weight.reshape(3, 1, 1, 1) if shape == (3,) else weight
    expected = (weight * (recon - target).square()).sum() / B + without.kl
    torch.testing.assert_close(terms.loss, expected)


@pytest.mark.parametrize("upstream", ["loss", "3 loss", "recon", "both", "twice"])
@pytest.mark.parametrize("shape", [(3,), IMAGE], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradients_of_the_weighed_loss_and_of_the_plain_term(backend, inputs, shape, reduction, upstream):
    """The forward pass writes the gradient of the loss; one of the reconstruction term is no multiple of it."""
    recon, target, mu, logvar = inputs
    weight = torch.rand(shape)
    weight.view(-1)[0] = 0.0  # by which nothing may be divided
    factors = {"loss": (1.0, 0.0), "3 loss": (3.0, 0.0), "recon": (0.0, 2.0), "both": (1.0, 0.5), "twice": (1.0, 0.5)}

    def gradient(terms, leaf):
        parts = [(t, torch.full_like(t, f)) for t, f in zip(terms[:2], factors[upstream], strict=True) if f]
        if upstream == "twice":
            return sum(torch.autograd.grad(t, leaf, u, retain_graph=True)[0] for t, u in parts)
        return torch.autograd.grad([t for t, _ in parts], leaf, [u for _, u in parts])[0]

    found = gradient(fastvae.vae_loss(*inputs, recon_weight=weight, reduction=reduction), recon)
    leaf = oracle.leaf(recon)
    true = loss_truth.vae_loss(
        leaf,
        target.double(),
        mu.detach().double(),
        logvar.detach().double(),
        recon_weight=weight.double(),
        reduction=reduction,
    )
    expected = gradient(fastvae.VAELossTerms(*true), leaf)
    assert_near(found, expected, expected.abs() + expected.abs().max())


def test_weights_of_elements_outside_the_mask_may_be_nan(backend, inputs):
    mask = torch.rand(IMAGE) > 0.5
    weight, extra = torch.rand(IMAGE), torch.rand(IMAGE)
    results = []
    for filling in (0.5, torch.nan):
        options = {"recon_weight": weight.masked_fill(~mask, filling), "extra": extra.masked_fill(~mask, filling)}
        loss = fastvae.vae_loss(*inputs, mask=mask, **options).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs[0])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_weight_per_element_that_is_learned(backend, inputs):
    weight = torch.rand(IMAGE, requires_grad=True)
    terms = fastvae.vae_loss(*inputs, recon_weight=weight, likelihood=Gaussian(0.3, full=True))
    by_weight, by_recon = torch.autograd.grad(terms.loss, (weight, inputs[0]))
    error = (inputs[0] - inputs[1]).detach()
    scale = torch.tensor(0.3)
    expected = 0.5 * (error.square() * torch.exp(-scale) + scale + torch.log(torch.tensor(2 * torch.pi))) / B
    torch.testing.assert_close(by_weight, expected)
    torch.testing.assert_close(by_recon, weight.detach() * error * torch.exp(-scale) / B)


@pytest.mark.parametrize("likelihood", ["l2", LogCosh(3.0), Scaled("l1", 0.3)], ids=["l2", "factor", "scale"])
def test_an_extra_error_that_counts_once(backend, inputs, likelihood):
    """extra / D adds the value to the loss of each sample, within the scale of the likelihood."""
    once = torch.rand(B)
    terms = fastvae.vae_loss(*inputs, likelihood=likelihood, extra=once / inputs[0][0].numel(), reduction="none")
    without = fastvae.vae_loss(*inputs, likelihood=likelihood, reduction="none")
    scale = torch.exp(torch.tensor(-0.3)) if isinstance(likelihood, Scaled) else 1.0
    torch.testing.assert_close(terms.loss - without.loss, once * scale, rtol=1e-4, atol=1e-5)


def test_reconstruction_loss_takes_a_map(backend, inputs):
    recon, target = inputs[:2]
    extra = torch.rand(2, 1, 1, requires_grad=True)
    value = fastvae.reconstruction_loss(recon, target, extra=extra)
    torch.testing.assert_close(value, ((recon - target).square() + extra).sum() / B)
    (gradient,) = torch.autograd.grad(value, extra)
    torch.testing.assert_close(gradient, torch.full((2, 1, 1), 36.0))


def test_the_module_holds_weights_and_takes_others(backend, inputs):
    channels, beta = torch.rand(2, 1, 1), torch.rand(B)
    criterion = fastvae.VAELoss(recon_weight=channels, accumulate=2)
    assert set(criterion.state_dict()) == {"recon_weight"}
    assert "recon_weight=tensor" in repr(criterion)
    plain = fastvae.vae_loss(*inputs, recon_weight=channels).loss
    torch.testing.assert_close(criterion(*inputs), plain / 2)
    other = fastvae.vae_loss(*inputs, recon_weight=0.5, beta=beta).loss
    torch.testing.assert_close(criterion(*inputs, recon_weight=0.5, beta=beta), other / 2)
    torch.testing.assert_close(fastvae.VAELoss(beta)(*inputs), fastvae.vae_loss(*inputs, beta=beta).loss)


def test_a_step_in_place_between_the_passes_is_noticed(backend, inputs):
    weight = torch.rand(B)
    loss = fastvae.vae_loss(*inputs, recon_weight=weight).loss
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss * 3, inputs[0])


@pytest.mark.parametrize("shape", [(3,), IMAGE], ids=str)
def test_compiled(inputs, shape):
    weight, beta = torch.rand(shape), torch.rand(B)

    def loss(*inputs):
        return fastvae.vae_loss(*inputs, recon_weight=weight, beta=beta, extra=weight).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    found, expected = (torch.autograd.grad(f(*inputs), inputs[0]) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


MISTAKES = {
    "extra of the wrong size": (
        {"extra": torch.rand(4)},
        ValueError,
        r"\[B\] = \(3,\), one value per sample, or broad",
    ),
    "extra of whole numbers": ({"extra": torch.ones(3, dtype=torch.int64)}, TypeError, r"extra must be one of .*int64"),
    "extra that is a number": ({"extra": 0.5}, TypeError, "extra must be a torch.Tensor; got float"),
    "extra of no dimension": ({"extra": torch.tensor(0.5)}, ValueError, r"Pass extra\.expand\(3\)"),
    "recon_weight of the wrong size": ({"recon_weight": torch.rand(5)}, ValueError, r"recon_weight must .*got \(5,\)"),
    "recon_weight with too many dimensions": (
        {"recon_weight": torch.rand(1, *IMAGE)},
        ValueError,
        "broadcast to recon",
    ),
    "recon_weight that is a mask": ({"recon_weight": torch.ones(3) > 0}, TypeError, "got bool"),
    "beta of the wrong size": ({"beta": torch.rand(5)}, ValueError, r"beta must be a number.* \[B\] = \(3,\)"),
    "beta by latent": ({"beta": torch.rand(LATENT)}, ValueError, r"of shape \[B\]"),
    "beta under a capacity of the batch": (
        {"beta": torch.rand(3), "capacity": Capacity(1.0, "batch")},
        ValueError,
        "beta of each sample has no meaning",
    ),
    "beta under free bits of the batch": (
        {"beta": torch.rand(3), "free_bits": FreeBits(0.1, "dim_batch")},
        ValueError,
        "beta of each sample has no meaning",
    ),
    "weight of no dimension": ({"weight": torch.tensor(0.5)}, ValueError, r"weight\.expand\(3\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(inputs, name):
    options, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        fastvae.vae_loss(*inputs, **options)


@pytest.mark.parametrize("name", ["extra", "kl", "weight"])
def test_the_advice_for_a_value_without_dimensions_is_right(inputs, name):
    """What the message says to pass is accepted, and is the value of every sample."""
    recon, target, mu, logvar = inputs
    latents = {} if name == "kl" else {"mu": mu, "logvar": logvar}
    value = torch.tensor(0.5)
    with pytest.raises(ValueError, match=rf"Pass {name}\.expand\(3\)|or pass {name}\.expand\(3\)"):
        fastvae.vae_loss(recon, target, **latents, **{name: value})
    accepted = fastvae.vae_loss(recon, target, **latents, **{name: value.expand(3)})
    expected = fastvae.vae_loss(recon, target, **latents, **{name: torch.full((3,), 0.5)})
    torch.testing.assert_close(accepted, expected)


def test_a_preset_with_bounds_says_how_to_pass_kl(inputs):
    recon, target, mu, logvar = inputs
    _, kl = fastvae.reparameterize_kl(mu, logvar, logvar_clamp=(-30.0, 20.0), seed=1)
    criterion = fastvae.VAELoss.preset("ldm")
    with pytest.raises(ValueError, match=r"Pass logvar_clamp=None here .*bounds to reparameterize_kl"):
        criterion(recon, target, kl=kl)
    expected = criterion(recon, target, mu, logvar)
    torch.testing.assert_close(fastvae.VAELoss.preset("ldm", logvar_clamp=None)(recon, target, kl=kl), expected)


def test_a_frozen_scale_stays_a_parameter():
    scale = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    criterion = fastvae.VAELoss(likelihood=Gaussian(scale))
    assert [name for name, _ in criterion.named_parameters()] == ["likelihood.log_scale"]
    assert not list(criterion.buffers())
    scale.requires_grad_()
    recon = torch.rand(2, 3)
    criterion(recon, torch.rand(2, 3), kl=torch.zeros(2)).backward()
    assert scale.grad is not None


@pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)")
@pytest.mark.parametrize(
    ("option", "bytes_read"),
    [("recon_weight per sample", 0), ("beta", 0), ("extra per sample", 0), ("recon_weight map", 4), ("extra map", 4)],
)
def test_the_images_are_read_and_written_once(option, bytes_read):
    """12 bytes per float32 element at an upstream gradient of 1, and those of a map."""
    from tests.helpers.meter import Meter

    shape = (2, 6272)
    name, kind = option.split()[0], option.split()[-1]
    tensor = torch.rand(shape if kind == "map" else shape[:1])
    recon, target, kl = torch.rand(shape).requires_grad_(), torch.rand(shape), torch.rand(2)
    with fastvae.use_backend("triton"), Meter() as meter:
        fastvae.vae_loss(recon, target, kl=kl, **{name: tensor}).loss.backward()
    expected = (12 + bytes_read) * recon.numel()
    assert abs(meter.total - expected) < 0.02 * expected, meter.table()


IN_PLACE = {
    "extra": lambda: {"extra": torch.rand(5, requires_grad=True)},
    "weight": lambda: {"weight": torch.rand(5, requires_grad=True)},
    "beta": lambda: {"beta": torch.rand(5, requires_grad=True)},
    "capacity": lambda: {"extra": torch.rand(5, requires_grad=True), "capacity": Capacity(1.0, "batch")},
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_gives_the_same_gradients(backend, name):
    """recon is gone when the gradients of the other inputs are computed."""
    options = IN_PLACE[name]()
    recon, target, kl = torch.rand(5, 7), torch.rand(5, 7), torch.rand(5, requires_grad=True)
    asked = [kl, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]

    def gradients(inplace):
        leaf = recon.clone().requires_grad_()
        terms = fastvae.vae_loss(leaf * 1.0, target, kl=kl, inplace=inplace, **options)
        return torch.autograd.grad(terms.loss, [leaf, *asked])

    for found, expected in zip(gradients(inplace=True), gradients(inplace=False), strict=True):
        torch.testing.assert_close(found, expected)
