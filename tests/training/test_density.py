"""Bounds on the log-likelihood, against a linear model whose likelihood is known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import fastvae
from fastvae import data
from fastvae.evaluation.density import Density, bits_per_dim
from fastvae.evaluation.likelihood_bounds import importance_weighted_nats
from fastvae.likelihoods import L1, L2, Gaussian, Huber, LogCosh, Scaled, SmoothL1
from fastvae.models import VAE, VAEConfig
from fastvae.training import Objective

N_LATENTS, SIDE = 3, 4


class Linear(nn.Module):
    """x' = W z + b, W with orthogonal columns, and its exact posterior, whose variance is multiplied by `widened`."""

    def __init__(self, variance, widened):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(SIDE * SIDE, N_LATENTS, generator=draw, dtype=torch.float64))
        self.weight = nn.Parameter((q * torch.tensor([0.5, 1.0, 1.5])).float())
        self.bias = nn.Parameter(torch.rand(SIDE * SIDE, generator=draw))
        self.variance, self.widened = variance, widened

    def encoder(self, images):
        squares = self.weight.square().sum(0)
        mu = (images.flatten(1) - self.bias) @ self.weight / (squares + self.variance)
        logvar = torch.log(self.widened * self.variance / (squares + self.variance)).expand_as(mu)
        return torch.cat([mu, logvar], dim=1)

    def decoder(self, z):
        return (z @ self.weight.T + self.bias).reshape(-1, 1, SIDE, SIDE)

    def log_likelihood(self, images):
        weight = self.weight.double()
        covariance = weight @ weight.T + self.variance * torch.eye(len(weight), dtype=torch.float64)
        return MultivariateNormal(self.bias.double(), covariance).log_prob(images.flatten(1).double())


class Wrapped(nn.Module):
    def __init__(self, function, owner):
        super().__init__()
        self.function, self.owner = function, owner

    def forward(self, x):
        return self.function(x)


def linear_objective(likelihood, variance, widened=1.0):
    model = VAE(VAEConfig(image_size=(SIDE, SIDE), backbone="mlp", latent_dim=N_LATENTS, hidden=4))
    linear = Linear(variance, widened)
    model.encoder, model.decoder = Wrapped(linear.encoder, linear), Wrapped(linear.decoder, linear)
    return Objective(model, fastvae.VAELoss(likelihood=likelihood, return_terms=True)), linear


IMAGES = torch.rand(7, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("likelihood", "variance"),
    [
        ("l2", 0.5),
        (Gaussian(math.log(0.3)), 0.3),
        (Gaussian(math.log(0.3), full=True), 0.3),
        (Scaled("l2", -1.0), math.exp(-1) / 2),
    ],
    ids=["l2", "gaussian", "full", "scaled"],
)
def test_the_bound_is_the_likelihood_where_the_posterior_is_exact(likelihood, variance):
    """Whatever the sample: p(x | z) p(z) / q(z | x) = p(x)."""
    objective, linear = linear_objective(likelihood, variance)
    bounds = importance_weighted_nats(objective, data.ArrayImages(IMAGES), samples=2)
    torch.testing.assert_close(bounds, -linear.log_likelihood(IMAGES).detach(), rtol=1e-5, atol=1e-5)


def test_more_samples_come_closer_to_the_likelihood_from_above():
    objective, linear = linear_objective("l2", 0.5, widened=2.0)
    many_images = torch.rand(300, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    images = data.ArrayImages(many_images)
    truth = -linear.log_likelihood(many_images).mean().item()
    one, ten, many = (importance_weighted_nats(objective, images, samples=k).mean().item() for k in (1, 10, 500))
    assert one > ten > many > truth - 0.01
    assert many == pytest.approx(truth, abs=0.01)
    assert one > truth + 0.2


def test_no_figure_depends_on_batch_or_chunk():
    objective, _ = linear_objective("l2", 0.5, widened=2.0)
    objective.train()
    images = data.ArrayImages(IMAGES)
    whole = importance_weighted_nats(objective, images, samples=5, chunk=5)
    pieces = importance_weighted_nats(objective, images, samples=5, chunk=2, batch_size=3)
    torch.testing.assert_close(whole, pieces, rtol=1e-6, atol=1e-6)
    assert objective.model.training


def student(alpha):
    """Integral of cosh(alpha d)^(-1 / alpha): sqrt(pi) Gamma(1 / 2 alpha) / (alpha Gamma(1 / 2 alpha + 1 / 2))."""
    return 0.5 * math.log(math.pi) + math.lgamma(0.5 / alpha) - math.log(alpha) - math.lgamma(0.5 / alpha + 0.5)


@pytest.mark.parametrize(
    ("likelihood", "log_normalizer"),
    [
        (L2(), 0.5 * math.log(math.pi)),
        (L1(), math.log(2)),
        (L1(from_logits=True), math.log(2)),
        (
            Huber(0.5),
            math.log(math.sqrt(2 * math.pi) * math.erf(0.5 / math.sqrt(2)) + 2 / 0.5 * math.exp(-0.125)),
        ),
        (SmoothL1(0.5), math.log(math.sqrt(math.pi) * math.erf(0.5) + 2 * math.exp(-0.25))),
        (LogCosh(2.0), student(2.0)),
        (Gaussian(-3.0), 0.5 * math.log(2 * math.pi)),
        (Gaussian(2.0, full=True), 0.0),
        (Gaussian("optimal"), 0.5 * math.log(2 * math.pi)),
        (Gaussian(torch.zeros(3)), 0.5 * math.log(2 * math.pi)),
        (Gaussian(-9.0, softclip=-1.0), 0.5 * math.log(2 * math.pi)),
        (Scaled("l1", torch.tensor(-2.0)), math.log(2)),
        (Scaled("l2", 0.5), 0.5 * math.log(math.pi) - 0.25),
    ],
    ids=str,
)
def test_constants_make_densities_of_likelihoods(likelihood, log_normalizer):
    """Closed forms of the integrals, less what the loss counts itself."""
    density = Density.of(likelihood)
    assert not density.discrete
    assert density.constant == pytest.approx(log_normalizer, abs=1e-6)


def test_the_constant_of_a_function_is_unknown():
    assert math.isnan(Density.of(lambda recon, target: (recon - target).abs()).constant)
    assert math.isnan(Density.of(Scaled(lambda recon, target: (recon - target).abs(), 0.0)).constant)


def test_probabilities_need_no_constant():
    assert Density.of(fastvae.likelihoods.Bernoulli()) == (0.0, True)
    assert bits_per_dim(math.log(2) * 10, 10, discrete=True) == pytest.approx(1)
    # a density of 1 on [0, 1]: each of 256 levels equally likely
    assert bits_per_dim(0.0, 10) == pytest.approx(8)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (Scaled("l1", torch.zeros(3)), "must have one scale; got a tensor of shape"),
        (Scaled("bernoulli", 0.0), "a Bernoulli likelihood with a scale"),
    ],
    ids=["by sample", "bernoulli"],
)
def test_likelihoods_without_a_density(likelihood, message):
    with pytest.raises(ValueError, match=message):
        Density.of(likelihood)


def test_a_bound_needs_a_scale_of_its_own():
    objective, _ = linear_objective(Gaussian("optimal"), 0.3)
    with pytest.raises(ValueError, match="an optimal scale is known only after"):
        importance_weighted_nats(objective, data.ArrayImages(IMAGES))


@pytest.mark.parametrize(
    ("likelihood", "variance"),
    [("l2", 0.5), (Gaussian(-3.0), math.exp(-3)), (Gaussian(torch.tensor(-3.0), full=True), math.exp(-3))],
    ids=["l2", "gaussian", "full"],
)
def test_bits_per_dim_are_those_of_8_bit_images(likelihood, variance):
    """-log2 of the probability of a level: a normal density at the level, times the width 1/256 of a level."""
    recon, levels = torch.rand(2, 1, 4, 5), torch.randint(0, 256, (2, 1, 4, 5), dtype=torch.uint8)
    nats = fastvae.reconstruction_loss(recon, levels, likelihood=likelihood).item()
    probability = torch.distributions.Normal(recon, variance**0.5).log_prob(levels / 255) - math.log(256)
    expected = -probability.mean().item() / math.log(2)
    assert Density.of(fastvae.likelihoods.resolve(likelihood)).bits_per_dim(nats, 20) == pytest.approx(
        expected, rel=1e-5
    )
