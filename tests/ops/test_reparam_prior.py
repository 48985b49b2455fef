"""Sampling with the KL from a learned prior: values and gradients of all four tensors, in one pass."""

import pytest
import torch

import fastvae
from fastvae import DiagonalGaussian
from tests.helpers import oracle
from tests.helpers.oracle import DTYPES, assert_near

BOUNDS = (-0.5, 0.5)
SHAPES = {"vectors": (5, 7), "images": (3, 4, 5, 6), "one": (1,), "rows of many tiles": (2, 2500)}


def draw(shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(4)]


def true_kl(mu, logvar, prior_mu, prior_logvar, bounds=None):
    logvar = oracle.clamp(logvar, bounds)
    r = logvar - prior_logvar
    return 0.5 * ((mu - prior_mu) ** 2 / prior_logvar.exp() + torch.expm1(r) - r)


def true_step(tensors, noise, bounds=None):
    mu, logvar, *prior = tensors
    return oracle.sample(mu, logvar, noise, bounds), oracle.per_sample(true_kl(mu, logvar, *prior, bounds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["free", "clamped"])
def test_values_and_gradients(backend, dtype, shape, bounds):
    tensors = draw(shape, dtype)
    z, kl = fastvae.reparameterize_kl(tensors[0], tensors[1], prior=tensors[2:], seed=3, logvar_clamp=bounds)
    doubles = [oracle.leaf(t) for t in tensors]
    noise = fastvae.philox_normal(shape, seed=3, dtype=torch.float64)
    true = true_step(doubles, noise, bounds)
    size = kl.detach().abs().max() + tensors[0][0].numel()
    assert z.dtype == dtype
    assert kl.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(z.detach(), true[0].detach(), true[0].detach().abs() + true[0].detach().abs().max())
    assert_near(kl.detach(), true[1].detach(), size, ulps=8)
    upstream = [torch.rand(t.shape, dtype=torch.float64) + 0.5 for t in true]
    upstream = [u.to(t.dtype) for u, t in zip(upstream, (z, kl), strict=True)]
    found = torch.autograd.grad((z, kl), tensors, upstream)
    expected = torch.autograd.grad(true, doubles, [u.double() for u in upstream])
    for gradient, value, tensor in zip(found, expected, tensors, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_near(gradient, value, value.abs() + value.abs().max(), ulps=16)


@pytest.mark.parametrize("used", ["z", "kl", "both"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (2, 3), (0, 3), (0, 1, 2, 3)], ids=str)
def test_any_subset(backend, used, wanted):
    tensors = draw((3, 20))
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    doubles = [t.detach().double().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    outputs = fastvae.reparameterize_kl(*tensors[:2], prior=tuple(tensors[2:]), seed=3)
    true = true_step(doubles, fastvae.philox_normal((3, 20), seed=3, dtype=torch.float64))
    chosen = {"z": [0], "kl": [1], "both": [0, 1]}[used]
    chosen = [i for i in chosen if outputs[i].requires_grad]
    if not any(true[i].requires_grad for i in chosen):
        return
    found, expected = (
        torch.autograd.grad(
            [o[i].sum() for i in chosen if true[i].requires_grad], [x[i] for i in wanted], allow_unused=True
        )
        for o, x in ((outputs, tensors), (true, doubles))
    )
    for gradient, value in zip(found, expected, strict=True):
        value = torch.zeros(3, 20, dtype=torch.float64) if value is None else value
        gradient = torch.zeros(3, 20) if gradient is None else gradient
        assert_near(gradient, value, value.abs() + value.abs().max(), ulps=16)


def test_is_the_sample_without_a_prior_and_the_kl_with_one(backend):
    mu, logvar, *prior = draw((4, 33))
    z, kl = fastvae.reparameterize_kl(mu, logvar, prior=tuple(prior), seed=1)
    assert torch.equal(z, fastvae.reparameterize_kl(mu, logvar, seed=1)[0])
    torch.testing.assert_close(kl, fastvae.gaussian_kl(mu, logvar, prior=tuple(prior), reduction="none"))


def test_a_posterior_at_its_prior_has_no_kl(backend):
    mu, logvar = draw((4, 33))[:2]
    _, kl = fastvae.reparameterize_kl(mu, logvar, prior=(mu, logvar), seed=1)
    assert (kl == 0).all()


@pytest.mark.parametrize("layout", ["broadcast", "transposed", "mixed", "six dimensions", "negated"])
def test_layouts(backend, layout):
    mu, logvar, *_ = draw((4, 6, 5))
    prior = {
        "broadcast": (torch.randn(5), torch.randn(6, 1)),
        "transposed": tuple(torch.randn(5, 6, 4).permute(2, 1, 0) for _ in range(2)),
        "mixed": (torch.randn(4, 6, 5).double(), torch.randn(4, 6, 5).half()),
        "negated": tuple(torch._neg_view(torch.randn(4, 6, 5)) for _ in range(2)),
        "six dimensions": None,
    }[layout]
    if layout == "six dimensions":
        mu, logvar, *prior = (torch.randn(2, 3, 2, 3, 2, 3).permute(5, 3, 1, 0, 2, 4) for _ in range(4))
    leaves = [t.detach().requires_grad_() for t in (mu, logvar, *prior)]
    z, kl = fastvae.reparameterize_kl(*leaves[:2], prior=tuple(leaves[2:]), seed=2)
    doubles = [oracle.leaf(t) for t in leaves]
    true = true_step(doubles, fastvae.philox_normal(mu.shape, seed=2, dtype=torch.float64))
    torch.testing.assert_close(kl.double(), true[1], rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(z.sum() + kl.sum(), leaves)
    expected = torch.autograd.grad(true[0].sum() + true[1].sum(), doubles)
    for gradient, value, leaf in zip(found, expected, leaves, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient.double(), value, rtol=1e-2 if leaf.dtype.itemsize == 2 else 1e-5, atol=1e-4)


def test_gradients_of_gradients(backend):
    tensors = [t.detach().double().requires_grad_() for t in draw((2, 3))]

    def kl_and_sample(mu, logvar, *prior):
        return fastvae.reparameterize_kl(mu, logvar, prior=prior, seed=5)

    assert torch.autograd.gradgradcheck(kl_and_sample, tensors)


def test_a_given_noise_and_an_empty_batch(backend):
    mu, logvar, *prior = draw((4, 5))
    noise = torch.randn(4, 5)
    z, kl = fastvae.reparameterize_kl(mu, logvar, prior=tuple(prior), noise=noise)
    doubles = [oracle.leaf(t) for t in (mu, logvar, *prior)]
    torch.testing.assert_close((z.double(), kl.double()), true_step(doubles, noise.double()), rtol=1e-5, atol=1e-5)
    z, kl = fastvae.reparameterize_kl(*(t[:0] for t in (mu, logvar)), prior=tuple(t[:0] for t in prior), seed=1)
    assert (z.shape, kl.shape) == ((0, 5), (0,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def step(mu, logvar, prior_mu, prior_logvar):
        z, kl = fastvae.reparameterize_kl(mu, logvar, prior=(prior_mu, prior_logvar), seed=3)
        return z.sum() + kl.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        tensors = draw((rows, 7))
        found, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, step))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("with_kl", [True, False])
def test_ops_are_well_defined(backend, with_kl):
    mu, logvar, *prior = draw((3, 4))
    arguments = (mu, logvar, torch.tensor([3]), 2, None, None, with_kl, *prior)
    torch.library.opcheck(torch.ops.fastvae.reparam_kl, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_the_posterior_as_an_object(backend, packed):
    moments, prior = torch.randn(3, 8, 4, requires_grad=True), [torch.randn(3, 4, 4, requires_grad=True) for _ in "ab"]
    posterior = DiagonalGaussian.from_moments(moments) if packed else DiagonalGaussian(*moments.chunk(2, 1))
    z, kl = posterior.rsample_kl(prior=DiagonalGaussian(*prior), seed=1)
    expected = fastvae.reparameterize_kl(*moments.chunk(2, 1), prior=tuple(prior), seed=1)
    torch.testing.assert_close((z, kl), expected)
    torch.testing.assert_close(posterior.rsample_kl(prior=tuple(prior), seed=1), expected)
    found, value = (torch.autograd.grad(a.sum() + b.sum(), [moments, *prior]) for a, b in ((z, kl), expected))
    torch.testing.assert_close(found, value)
    point = DiagonalGaussian.from_moments(moments, deterministic=True)
    assert posterior.rsample_kl(prior=point)[1].isinf().all()
    assert (point.rsample_kl(prior=DiagonalGaussian(*prior))[1] == 0).all()


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (torch.zeros(3, 4), TypeError, "prior must be None or a pair of tensors"),
        ((torch.zeros(3, 4), 0.0), TypeError, "prior's logvar must be a tensor"),
        ((torch.zeros(5), torch.zeros(3, 4)), ValueError, "prior's mu must broadcast to mu's shape"),
    ],
)
def test_mistakes_are_named(prior, error, message):
    with pytest.raises(error, match=message):
        fastvae.reparameterize_kl(torch.zeros(3, 4), torch.zeros(3, 4), prior=prior)
