"""Likelihoods and regularisers at their edges: extreme values, masks over NaN, equality, second derivatives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastvae
from fastvae.likelihoods import L1, L2, BernoulliProbs, Gaussian, Huber, LogCosh, Scaled
from fastvae.regularizers import Capacity, FreeBits, balance

F64 = torch.float64


def value_and_gradient(recon, target, likelihood):
    recon = recon.clone().requires_grad_()
    value = fastvae.reconstruction_loss(recon, target, likelihood=likelihood, reduction="none")
    value.sum().backward()
    return value.detach(), recon.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_cosh_is_finite_where_its_textbook_form_overflows(backend, dtype):
    recon = torch.tensor([-300.0, -1.0, 0.0, 1.0, 300.0], dtype=dtype)
    value, gradient = value_and_gradient(recon, torch.zeros(5), LogCosh(100.0))
    distance = recon.double().abs()
    expected = (distance + (-200 * distance).exp().log1p() / 100 - math.log(2) / 100).float()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    assert gradient.tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_bernoulli_on_extreme_logits(backend, target):
    logits = torch.tensor([-1e4, -100.0, -30.0, -1e-4, 0.0, 1e-4, 16.0, 30.0, 100.0, 1e4])
    value, gradient = value_and_gradient(logits, torch.full((10,), target), "bernoulli")
    exact = logits.double()
    expected = exact.clamp(min=0) - exact * target + (-exact.abs()).exp().log1p()
    torch.testing.assert_close(value, expected.float(), rtol=2e-6, atol=1e-40)
    torch.testing.assert_close(gradient, (exact.sigmoid() - target).float(), rtol=1e-6, atol=6e-8)


def test_bernoulli_of_certain_probabilities_is_as_torch(backend):
    probabilities = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-30, 1 - 1e-7, 1e-7, 0.5])
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.3])
    value, gradient = value_and_gradient(probabilities, target, "bernoulli_probs")
    ours = probabilities.clone().requires_grad_()
    expected = F.binary_cross_entropy(ours, target, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, ours.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_bernoulli_of_probabilities_of_every_magnitude(backend, target):
    small = 2.0 ** torch.arange(-149, 0, dtype=F64)
    zeros, near_one = torch.tensor([-0.0, 0.0]), torch.cat([small[125:], 1.4 * small[126:-1]])
    exact = torch.cat([zeros, small, 1.4 * small[30:], 1 - near_one]).float().double()
    value, _ = value_and_gradient(exact.float(), torch.full(exact.shape, target), "bernoulli_probs")
    target = torch.full(exact.shape, target).double()
    expected = -(target * exact.log().clamp(min=-100) + (1 - target) * (-exact).log1p())
    torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=1e-40)


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_what_is_no_probability_has_no_likelihood(backend, wrong, target):
    with np.errstate(invalid="ignore"):  # of the interpreter
        value, _ = value_and_gradient(torch.tensor([wrong, 0.5]), torch.full((2,), target), "bernoulli_probs")
    assert value.isnan().tolist() == [True, False]


def test_infinite_logits_are_certain(backend):
    """An infinite error where the target is not certain too, as torch's; the gradient is finite."""
    logits = torch.tensor([math.inf, math.inf, math.inf, -math.inf, -math.inf, 1e38, -1e38])
    target = torch.tensor([0.0, 0.5, 0.25, 1.0, 0.5, 1.0, 0.0])
    value, gradient = value_and_gradient(logits, target, "bernoulli")
    assert value.tolist() == [math.inf] * 5 + [0.0, 0.0]
    torch.testing.assert_close(gradient, torch.sigmoid(logits) - target)


@pytest.mark.parametrize("likelihood", ["l1", "huber", "smooth_l1", "log_cosh", "l2"])
def test_gradient_is_zero_where_nothing_differs_and_nan_where_it_is_nan(backend, likelihood):
    x = torch.tensor([0.3, 0.3, math.nan])
    value, gradient = value_and_gradient(x, torch.tensor([0.3, math.nan, 0.3]), likelihood)
    assert value[0].abs() < 1e-7
    assert value[1:].isnan().all()
    assert gradient[0] == 0
    assert gradient[1:].isnan().all()


@pytest.mark.parametrize(("dtype", "shift"), [(torch.float32, 0.25), (torch.bfloat16, 0.25), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("likelihood", [L2, L1, Huber, BernoulliProbs, Gaussian], ids=lambda kind: kind.__name__)
def test_bytes_stand_for_what_the_likelihood_says(backend, likelihood, dtype, shift):
    """In bfloat16 the shift 0.1 is another number: lanes outside the tensors must not count the difference."""
    target = torch.randint(256, (3, 37), dtype=torch.uint8)
    recon = torch.rand(3, 37).to(dtype)
    scaled = likelihood(target_scale=0.5 / 255, target_shift=shift)
    ours = value_and_gradient(recon, target, scaled)
    floats = value_and_gradient(recon, target.float() * (0.5 / 255) + shift, likelihood())
    torch.testing.assert_close(ours, floats)
    # of floats, neither applies
    same = value_and_gradient(recon, target.float() / 255, scaled)
    torch.testing.assert_close(same, value_and_gradient(recon, target.float() / 255, likelihood()))


@pytest.mark.parametrize(
    "likelihood", ["l2", "bernoulli", Gaussian(0.5), "per element", "learned", "optimal"], ids=lambda x: str(x)[:11]
)
def test_masked_elements_may_be_anything(backend, likelihood):
    """NaN outside the mask touches neither values nor gradients, and gets the gradient 0."""
    mask = torch.rand(3, 4, 5) > 0.5
    recon, target, scale = (torch.rand(3, 4, 5) for _ in range(3))
    results = []
    for filling in (0.25, math.nan):
        leaves = [t.masked_fill(~mask, filling).requires_grad_() for t in (recon, scale)]
        s = torch.tensor(0.3, requires_grad=True)
        options = {"per element": Gaussian(leaves[1]), "learned": Gaussian(s), "optimal": Gaussian("optimal")}
        built = options.get(likelihood, likelihood) if isinstance(likelihood, str) else likelihood
        filled = target.masked_fill(~mask, filling)
        value = fastvae.reconstruction_loss(leaves[0], filled, likelihood=built, mask=mask)
        value.backward()
        results.append((value.detach(), leaves[0].grad, leaves[1].grad, s.grad))
    for ordinary, nan in zip(*results, strict=True):
        assert (ordinary is None and nan is None) or torch.equal(ordinary, nan)
    assert (results[1][1][~mask] == 0).all()


@pytest.mark.parametrize("mode", ["dim", "dim_mask"])
def test_free_bits_at_equality_are_as_torchs_clamp(backend, mode):
    """k = mu^2 / 2 at logvar 0: 0.5 exactly at mu = 1."""
    mu = torch.tensor([[0.5, 1.0, 2.0, math.nan]], requires_grad=True)
    logvar = torch.zeros(1, 4)
    terms = fastvae.vae_loss(
        torch.zeros(1, 1), torch.zeros(1, 1), mu[:, :3], logvar[:, :3], free_bits=FreeBits(0.5, mode)
    )
    terms.loss.backward()
    if mode == "dim":
        assert terms.loss == 0.5 + 0.5 + 2.0
        assert mu.grad.tolist() == [[0, 1, 2, 0]]
    else:
        assert terms.loss == 2.0
        assert mu.grad.tolist() == [[0, 0, 2, 0]]
    assert terms.kl == 0.125 + 0.5 + 2.0
    whole = fastvae.vae_loss(torch.zeros(1, 1), torch.zeros(1, 1), mu, logvar, free_bits=FreeBits(0.5, mode))
    assert whole.loss.isnan()


def test_balance_scales_the_gradients_of_both_sides(backend):
    mu, logvar, prior_mu, prior_logvar = leaves = [torch.randn(3, 4, requires_grad=True) for _ in range(4)]
    plain = fastvae.gaussian_kl(mu, logvar, prior=(prior_mu, prior_logvar))
    q_mu, q_logvar, prior = balance(mu, logvar, (prior_mu, prior_logvar), 0.8)
    balanced = fastvae.gaussian_kl(q_mu, q_logvar, prior=prior)
    assert torch.equal(balanced, plain)
    before, after = torch.autograd.grad(plain, leaves), torch.autograd.grad(balanced, leaves)
    for factor, a, b in zip((0.2, 0.2, 0.8, 0.8), before, after, strict=True):
        torch.testing.assert_close(b, factor * a)


def test_kl_to_itself_is_zero_and_near_it_exact(backend):
    """No cancellation: where posterior and prior nearly agree, a difference of large terms would be all rounding."""
    mu, logvar = torch.full((1, 64), 3.0), torch.full((1, 64), 2.0)
    assert fastvae.gaussian_kl(mu, logvar, prior=(mu, logvar)) == 0
    nearby = fastvae.gaussian_kl(mu, logvar + 2**-10, prior=(mu, logvar))
    assert nearby == pytest.approx(64 * 0.5 * (math.expm1(2**-10) - 2**-10), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(0.1)}], ids=["fused", "by sample"])
def test_a_schedule_may_step_before_the_backward_pass(backend, options):
    """The gradient is that of the value which the forward pass saw."""
    mu, beta = torch.randn(3, 4, requires_grad=True), torch.tensor(0.5)
    loss = fastvae.vae_loss(torch.zeros(3, 2), torch.zeros(3, 2), mu, mu, beta=beta, **options).loss
    expected = fastvae.vae_loss(torch.zeros(3, 2), torch.zeros(3, 2), mu, mu, beta=0.5, **options).loss
    beta.fill_(99.0)
    assert torch.equal(*(torch.autograd.grad(x, mu)[0] for x in (loss, expected)))


SECOND = {
    "likelihood": lambda s: {"likelihood": LogCosh(2.0), "recon_weight": 2.0},
    "bernoulli": lambda s: {"likelihood": "bernoulli"},
    "learned": lambda s: {"likelihood": Gaussian(s[0, 0, 0], full=True)},
    "per sample, weighed, extra": lambda s: {
        "likelihood": Scaled("l2", s[:, 0, 0]),
        "weight": s[:, 1, 1],
        "extra": s[:, 0, 1],
    },
    "per element": lambda s: {"likelihood": Gaussian(s)},
    "prior, free bits": lambda s: {"prior": (s[:, 0], s[:, 1]), "free_bits": FreeBits(0.2)},
    "capacity": lambda s: {"capacity": Capacity(s[0, 0, 0])},
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(backend, name):
    recon, target, s = (torch.rand(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(3))
    mu, logvar = (torch.randn(2, 4, dtype=F64, requires_grad=True) for _ in range(2))

    def function(recon, target, mu, logvar, s):
        return fastvae.vae_loss(recon, target, mu, logvar, reduction="none", **SECOND[name](s))

    assert torch.autograd.gradcheck(function, (recon, target, mu, logvar, s))
    assert torch.autograd.gradgradcheck(function, (recon, target, mu, logvar, s))


@pytest.mark.parametrize("options", ["weight", "learned"])
def test_a_weighed_loss_reads_images_once_too(monkeypatch, options):
    """The forward pass foresees the factor of each sample bit for bit: the backward pass does no arithmetic."""
    recon, target = torch.rand(5, 40, requires_grad=True), torch.rand(5, 40)
    given = {
        "weight": {"weight": torch.rand(5) * torch.tensor([1, 0, 1, 1, 1])},
        "learned": {"likelihood": Scaled("l1", torch.randn(5, requires_grad=True)), "weight": torch.rand(5)},
    }[options]
    expected = torch.autograd.grad(fastvae.reconstruction_loss(recon, target, **given), recon)[0]
    terms = fastvae.vae_loss(recon, target, kl=torch.zeros(5), recon_weight=1.3, one_pass=True, **given)
    monkeypatch.setattr("fastvae.fallback.elbo.write_gradients", None)
    monkeypatch.setattr("fastvae.fallback.elbo.rescale", lambda t, factor: None if factor == 1 else 1 / 0)
    (gradient,) = torch.autograd.grad(terms.loss, recon)
    torch.testing.assert_close(gradient, 1.3 * expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_upstream_gradients_of_a_weighed_loss(backend, dtype):
    """A factor per sample, and a sample of weight 0 that another output reaches all the same."""
    recon = torch.rand(4, 300, dtype=F64).to(dtype).requires_grad_()
    target, weight = torch.rand(4, 300), torch.tensor([1.0, 0.0, 3.0, 0.5], requires_grad=True)
    terms = fastvae.vae_loss(recon, target, kl=torch.zeros(4), weight=weight, reduction="none")
    upstream = torch.tensor([1.0, 5.0, 3.0, -2.0])
    drecon, dweight = torch.autograd.grad(terms.loss, [recon, weight], upstream, retain_graph=True)
    difference = recon.detach().double() - target.double()
    expected = 2 * difference * (weight * upstream)[:, None].double()
    torch.testing.assert_close(
        drecon.double(), expected.detach(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    torch.testing.assert_close(dweight.double(), difference.square().sum(1) * upstream.double())
    second = torch.autograd.grad(terms.loss, recon, upstream)[0]
    torch.testing.assert_close(second, drecon)


def test_inplace_of_samples_without_elements(backend):
    recon = torch.rand(2, 3, 0, 4, requires_grad=True)
    terms = fastvae.vae_loss(recon.clone(), torch.rand(2, 3, 0, 4), kl=torch.ones(2), inplace=True)
    (gradient,) = torch.autograd.grad(terms.loss, recon)
    assert terms.loss == 1
    assert gradient.shape == recon.shape
