"""The importance-weighted loss against its definition in float64, and a linear model whose likelihood is known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, Normal

import fastvae
from fastvae import likelihoods

B, K, LATENT = 4, 6, (3, 2)

# the likelihood, and log p of each element given what the decoder returns
DENSITIES = {
    "l2": ("l2", lambda r: Normal(r, math.sqrt(0.5))),
    "l2 of logits": (likelihoods.L2(from_logits=True), lambda r: Normal(r.sigmoid(), math.sqrt(0.5))),
    "l1": ("l1", lambda r: Laplace(r, 1.0)),
    "scaled l1": (likelihoods.Scaled("l1", 0.3), lambda r: Laplace(r, math.exp(0.3))),
    "gaussian": (likelihoods.Gaussian(-0.4), lambda r: Normal(r, math.exp(-0.2))),
    "full gaussian": (likelihoods.Gaussian(0.6, full=True), lambda r: Normal(r, math.exp(0.3))),
    "a variance each": (
        likelihoods.Gaussian(torch.linspace(-1, 1, B).double()),
        lambda r: Normal(r, torch.linspace(-0.5, 0.5, B).double().exp()[:, None]),
    ),
    "bernoulli": ("bernoulli", lambda r: Bernoulli(logits=r)),
    "bernoulli_probs": ("bernoulli_probs", lambda r: Bernoulli(r)),
}


class Problem:
    def __init__(self, dtype=torch.float64, probabilities=False, learned_prior=False):
        def leaf(*shape):
            return torch.randn(shape, dtype=torch.float64).mul(0.5).to(dtype).requires_grad_()

        self.mu, self.logvar, self.weight = leaf(B, *LATENT), leaf(B, *LATENT), leaf(6, 5)
        self.prior = (leaf(*LATENT), leaf(B, *LATENT)) if learned_prior else None
        self.leaves = (self.mu, self.logvar, self.weight, *(self.prior or ()))
        self.x = (torch.rand(B, 5) > 0.5).to(dtype)
        self.probabilities = probabilities

    def decode(self, z):
        recon = torch.tanh(z.flatten(1)) @ self.weight
        return recon.sigmoid() if self.probabilities else recon

    def loss(self, **options):
        return fastvae.iwae_loss(
            self.x, self.mu, self.logvar, self.decode, **{"samples": K, "seed": 3, "prior": self.prior} | options
        )

    def log_weights(self, density, mu, logvar, q_mu=None, q_logvar=None):
        """[K, B] by torch.distributions, at the noise of seed 3; q_mu, q_logvar: of the posterior's density."""
        q = Normal(*((mu, (logvar / 2).exp()) if q_mu is None else (q_mu, (q_logvar / 2).exp())))
        p = Normal(self.prior[0], (self.prior[1] / 2).exp()) if self.prior else Normal(0.0, 1.0)
        rows = []
        for noise in fastvae.philox_normal((K, B, *LATENT), seed=3, dtype=torch.float64):
            z = mu + (logvar / 2).exp() * noise
            log_p = density(self.decode(z)).log_prob(self.x).sum(1)
            rows.append(log_p + (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(1))
        return torch.stack(rows)


@pytest.mark.parametrize("learned_prior", [False, True])
@pytest.mark.parametrize("name", DENSITIES)
def test_value_and_gradients(backend, name, learned_prior):
    likelihood, density = DENSITIES[name]
    problem = Problem(probabilities=name == "bernoulli_probs", learned_prior=learned_prior)
    loss = problem.loss(likelihood=likelihood)
    weights = problem.log_weights(density, problem.mu, problem.logvar)
    expected = -(weights.logsumexp(0) - math.log(K)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, problem.leaves), torch.autograd.grad(expected, problem.leaves))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("learned_prior", [False, True])
def test_the_doubly_reparameterized_gradient(backend, learned_prior, chunk):
    """sum_k w_k^2 dlog w_k/dz dz/dphi for the encoder, sum_k w_k dlog w_k/dtheta for the rest: eq. 8 of its paper."""
    problem = Problem(learned_prior=learned_prior)
    loss = problem.loss(likelihood="bernoulli", estimator="dreg", chunk=chunk)
    assert torch.equal(loss, problem.loss(likelihood="bernoulli", chunk=chunk))
    mu, logvar = problem.mu, problem.logvar
    weights = problem.log_weights(lambda r: Bernoulli(logits=r), mu, logvar, mu.detach(), logvar.detach())
    share = weights.detach().softmax(0)
    of_encoder = torch.autograd.grad(-(share.square() * weights).sum() / B, (mu, logvar), retain_graph=True)
    of_others = torch.autograd.grad(-(share * weights).sum() / B, problem.leaves[2:])
    torch.testing.assert_close(torch.autograd.grad(loss, problem.leaves), (*of_encoder, *of_others))


def test_both_estimators_agree_on_average():
    problem = Problem()
    totals = []
    for estimator in ("iwae", "dreg"):
        gradients = [
            torch.autograd.grad(problem.loss(likelihood="l2", estimator=estimator, seed=seed, samples=4), problem.mu)[0]
            for seed in range(150)
        ]
        totals.append(torch.stack(gradients))
    error = (totals[0].var(0) + totals[1].var(0)).div(150).sqrt()
    assert ((totals[0].mean(0) - totals[1].mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(dtype):
    problem = Problem(dtype)
    loss = problem.loss(likelihood="l2")
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, problem.leaves)
    assert [g.dtype for g in gradients] == [dtype] * 3
    problem.leaves = tuple(leaf.detach().double().requires_grad_() for leaf in problem.leaves)
    problem.mu, problem.logvar, problem.weight = problem.leaves
    problem.x = problem.x.double()
    exact = problem.loss(likelihood="l2")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=tolerance)
    for actual, expected in zip(gradients, torch.autograd.grad(exact, problem.leaves), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_chunks_change_nothing(estimator):
    problem = Problem()
    whole = problem.loss(likelihood="l1", estimator=estimator, chunk=K)
    gradients = torch.autograd.grad(whole, problem.leaves)
    for chunk in (None, 1, 4, 100):
        loss = problem.loss(likelihood="l1", estimator=estimator, chunk=chunk)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(torch.autograd.grad(loss, problem.leaves), gradients)


def test_noise_without_a_seed_follows_the_default_generator():
    problem, losses = Problem(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(problem.loss(likelihood="l2", seed=None))
        torch.rand(7)  # between forward and backward pass
        torch.autograd.grad(losses[-1], problem.leaves)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("estimator", ["iwae", "dreg"])
def test_memory_does_not_grow_with_the_samples(estimator):
    def saved(samples):
        """Elements kept for the backward pass, each storage once."""
        mu, logvar, x = (torch.zeros(2, 8, requires_grad=grad) for grad in (True, True, False))
        decoder = nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 8))
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = fastvae.iwae_loss(x, mu, logvar, decoder, samples=samples, likelihood="l2", estimator=estimator)
        loss.backward()
        assert mu.grad.isfinite().all()
        return sum(storages.values())

    per_sample = (saved(33) - saved(1)) / 32
    assert per_sample <= 3 * 2  # log weights of 2 images, and no activation


def linear_model(samples):
    """(loss, exact -log p(x)) of x = W z + b + noise, with a posterior that is not the exact one."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 2, generator=draw, dtype=torch.float64)
    bias = torch.randn(5, generator=draw, dtype=torch.float64)
    x = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    variance = 0.8
    precision = weight.T @ weight / variance + torch.eye(2, dtype=torch.float64)
    mu = (x - bias) @ weight / variance @ precision.inverse() + 0.3
    logvar = (1.3 / precision.diagonal()).log().expand_as(mu)
    covariance = weight @ weight.T + variance * torch.eye(5, dtype=torch.float64)
    likelihood = likelihoods.Gaussian(math.log(variance))
    losses = [
        fastvae.iwae_loss(
            x, mu, logvar, lambda z: z @ weight.T + bias, samples=samples, chunk=512, likelihood=likelihood, seed=seed
        )
        for seed in range(20)
    ]
    return torch.stack(losses).mean(), -MultivariateNormal(bias, covariance).log_prob(x).mean()


def test_the_loss_bounds_the_likelihood_and_converges_to_it():
    one, exact = linear_model(1)
    few, many = linear_model(4)[0], linear_model(1024)[0]
    assert one > few + 0.02
    assert few > exact + 0.02
    torch.testing.assert_close(many, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"likelihood": "huber"}, ValueError, "normalized density; got 'huber'"),
        ({"likelihood": likelihoods.Scaled("l2")}, ValueError, "normalized density; got Scaled of L2"),
        ({"likelihood": likelihoods.Scaled("bernoulli")}, ValueError, "got Scaled of Bernoulli"),
        ({"likelihood": likelihoods.Gaussian("optimal")}, ValueError, "Pass logvar as a float"),
        ({"samples": 0}, ValueError, "samples must be an int of at least 1; got 0"),
        ({"chunk": 0}, ValueError, "chunk must be an int of at least 1; got 0"),
        ({"estimator": "drek"}, ValueError, "Did you mean 'dreg'"),
        ({"decode": 3}, TypeError, "decode must be a function of latents; got int"),
        ({"decode": lambda z: z}, ValueError, r"decode must return \(2, 5\).*got \(2, 3\)"),
        ({"mu": torch.zeros(4, 3)}, ValueError, "mu and logvar must have one shape"),
        ({"x": torch.zeros(3, 5)}, ValueError, "x and mu must have one batch size; got 3 and 2"),
        ({"prior": torch.zeros(2, 3)}, TypeError, "prior must be None or a pair"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_mistakes_are_named(options, error, message):
    latents = torch.zeros(2, 3)
    valid = {"x": torch.zeros(2, 5), "mu": latents, "logvar": latents, "decode": lambda z: torch.zeros(len(z), 5)}
    with pytest.raises(error, match=message):
        fastvae.iwae_loss(**valid | {"samples": 2, "likelihood": "l2"} | options)
