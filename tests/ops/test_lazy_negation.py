"""torch negates some tensors only when they are read (`x.conj().imag`): what is read has to be what they stand for."""

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits

IMAGE, LATENT = (2, 3, 4), (2, 5)


def negated(t):
    """The values of `t` as a view of the negated ones."""
    lazy = torch._neg_view(t.detach().neg())
    assert lazy.is_neg()
    assert torch.equal(lazy, t)
    return lazy


def conjugated(t):
    lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert lazy.is_neg()
    assert torch.equal(lazy, t)
    return lazy


def loss(t, name):
    latents = {"kl": t["kl"]} if name == "kl" else {"mu": t["mu"], "logvar": t["logvar"]}
    options = ARGUMENTS[name](t[name]) if name in ARGUMENTS else {}
    return fastvae.vae_loss(t["recon"], t["target"], **latents, **options)


ARGUMENTS = {
    "beta": lambda t: {"beta": t},
    "recon_weight": lambda t: {"recon_weight": t},
    "weight": lambda t: {"weight": t},
    "extra": lambda t: {"extra": t},
    "capacity": lambda t: {"capacity": Capacity(t)},
    "prior": lambda t: {"prior": t.unbind()},
    "prior of the batch": lambda t: {"prior": t.unbind(), "free_bits": FreeBits(0.1, "dim_batch")},
    "scale": lambda t: {"likelihood": Gaussian(t)},
    "scale of samples": lambda t: {"likelihood": Scaled("l1", t)},
    "scale of elements": lambda t: {"likelihood": Scaled("l1", t)},
}
SHAPES = {
    **dict.fromkeys(["recon", "target", "scale of elements"], IMAGE),
    **dict.fromkeys(["mu", "logvar"], LATENT),
    **dict.fromkeys(["kl", "weight", "extra", "scale of samples"], IMAGE[:1]),
    **dict.fromkeys(["beta", "recon_weight", "capacity", "scale"], ()),
    **dict.fromkeys(["prior", "prior of the batch"], (2, *LATENT)),
}


def tensors():
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(shape, generator=generator) + 0.2 for name, shape in SHAPES.items()}


@pytest.mark.parametrize("lazily", [negated, conjugated])
@pytest.mark.parametrize("name", SHAPES)
def test_arguments_of_a_loss(backend, name, lazily):
    for wants_gradient in (True, False, True):  # the second call finds a cached plan
        results = []
        for lazy in (False, True):
            given = tensors()
            if lazy:
                given[name] = lazily(given[name])
            leaves = [given[n].requires_grad_(wants_gradient) for n in dict.fromkeys(["recon", "mu", name])]
            terms = loss(given, name)
            gradients = ()
            if wants_gradient:
                gradients = torch.autograd.grad(terms.loss, leaves, allow_unused=True)
            results.append([*terms, *gradients])
        for found, expected in zip(*results, strict=True):
            assert (found is None and expected is None) or torch.equal(found, expected)


def test_usual_calls_with_tensor_weights(backend):
    """Options of nothing but numbers, then tensors in their places."""
    given = tensors()
    images_and_latents = [given[name] for name in ("recon", "target", "mu", "logvar")]
    lazy = negated(torch.tensor(0.5))
    for beta, recon_weight in ((0.5, 0.5), (lazy, lazy), (lazy, lazy), (0.5, lazy)):
        found = fastvae.vae_loss(*images_and_latents, beta=beta, recon_weight=recon_weight)
        torch.testing.assert_close(found, fastvae.vae_loss(*images_and_latents, beta=0.5, recon_weight=0.5))


def test_a_lazily_negated_beta_is_differentiated(backend):
    """The gradient by what the view was made of has the sign of the view."""
    given = tensors()
    base = torch.tensor(-0.5, requires_grad=True)
    terms = fastvae.vae_loss(*(given[n] for n in ("recon", "target", "mu", "logvar")), beta=torch._neg_view(base))
    (gradient,) = torch.autograd.grad(terms.loss, base)
    torch.testing.assert_close(gradient, -terms.kl)


@pytest.mark.parametrize("name", ["mu", "logvar", "both"])
def test_samples_and_statistics(backend, name):
    given = tensors()
    mu, logvar = (negated(given[n]) if name in (n, "both") else given[n] for n in ("mu", "logvar"))
    functions = {
        "sample": lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, seed=3),
        "kl": fastvae.gaussian_kl,
        "stats": fastvae.latent_stats,
        "posterior": lambda mu, logvar: fastvae.DiagonalGaussian(mu, logvar).kl(),
    }
    for function in functions.values():
        torch.testing.assert_close(function(mu, logvar), function(given["mu"], given["logvar"]), rtol=0, atol=0)


def test_packed_moments(backend):
    packed = torch.rand(2, 6)
    found, expected = (fastvae.DiagonalGaussian.from_moments(t).rsample_kl(seed=1) for t in (negated(packed), packed))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_seeds(backend):
    seed = torch.tensor([7])
    mu = torch.zeros(2, 3)
    for function in (
        lambda seed: fastvae.philox_normal(5, seed=seed),
        lambda seed: fastvae.reparameterize(mu, mu, seed=seed),
        lambda seed: fastvae.reparameterize_kl(mu, mu, seed=seed)[0],
    ):
        assert torch.equal(function(negated(seed)), function(seed))


def test_masks(backend):
    """A bool has no negation; its other views are read as they are."""
    given = tensors()
    mask = torch.tensor([[True, False, True, False], [False, True, True, False], [True, True, False, True]])
    for view in (mask.t().contiguous().t(), mask.expand(2, 3, 4), mask[None]):
        found, expected = (
            fastvae.reconstruction_loss(given["recon"], given["target"], mask=m) for m in (view, mask.clone())
        )
        assert torch.equal(found, expected)


def test_upstream_gradients(backend):
    given = tensors()
    recon = given["recon"].requires_grad_()
    terms = fastvae.vae_loss(recon, given["target"], given["mu"], given["logvar"], reduction="none")
    upstream = torch.tensor([0.5, 3.0])
    found, expected = (
        torch.autograd.grad(terms.loss, recon, grad, retain_graph=True)[0] for grad in (negated(upstream), upstream)
    )
    torch.testing.assert_close(found, expected)
