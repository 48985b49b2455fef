"""Presets and the importance-weighted bound of likelihoods of counts."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastvae
from fastvae.likelihoods import Multinomial, NegativeBinomial, Poisson
from tests.helpers import count_truth

B, G, L = 5, 12, 3


def log_nb_positive(x, mu, theta, eps=1e-8):
    """scverse/scvi-tools 1.4.2, src/scvi/distributions/_negative_binomial.py:105-141."""
    log_theta_mu_eps = torch.log(theta + mu + eps)
    likelihood = theta * (torch.log(theta + eps) - log_theta_mu_eps) + x * (torch.log(mu + eps) - log_theta_mu_eps)
    return likelihood + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(2 * torch.rand(B, G, generator=generator), generator=generator).double()
    logits, mu, logvar = (torch.randn(B, n, generator=generator, dtype=torch.float64) for n in (G, L, L))
    return x, logits.requires_grad_(), mu.requires_grad_(), logvar.requires_grad_()


def test_scvi():
    x, logits, mu, logvar = batch()
    px_r = torch.randn(G, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    library = x.sum(1, keepdim=True).log()
    criterion = fastvae.VAELoss.preset("scvi").double()
    kl = kl_divergence(Normal(mu, logvar.exp().sqrt()), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)
    for epoch in range(4):
        ours = criterion(logits, x, mu, logvar, likelihood_args={"log_theta": px_r, "log_library": library})
        reconstruction = -log_nb_positive(x, library.exp() * logits.softmax(-1), px_r.exp()).sum(-1)
        theirs = torch.mean(reconstruction + min(1.0, epoch / 400) * kl)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        inputs = logits, mu, logvar, px_r
        found, truth = (torch.autograd.grad(t, inputs, retain_graph=True, allow_unused=True) for t in (ours, theirs))
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        criterion.beta.step()
    assert criterion.beta.value_at(400) == 1.0


def test_multvae():
    x, logits, mu, logvar = batch()
    criterion = fastvae.VAELoss.preset("multvae").double()
    for update in range(3):
        ours = criterion(logits, x, mu, logvar)
        anneal = min(0.2, update / 200_000)
        kl = (0.5 * (-logvar + logvar.exp() + mu**2 - 1)).sum(1).mean()
        theirs = -(logits.log_softmax(-1) * x).sum(-1).mean() + anneal * kl
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
        criterion.beta.step()
    assert criterion.beta.value_at(40_000) == 0.2


FAMILIES = ["nb", "zinb", "poisson", "multinomial"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 3])
def test_importance_weighted_bound(family, chunk):
    """Against the definition, sample by sample, all constants counted."""
    x, _, mu, logvar = batch()
    generator = torch.Generator().manual_seed(2)
    weight, inflation = (torch.randn(L, G, generator=generator, dtype=torch.float64) for _ in range(2))
    log_theta, library = torch.randn(G, generator=generator, dtype=torch.float64), x.sum(1).log()
    likelihood, arguments = Multinomial(), None
    if family == "poisson":
        likelihood, arguments = Poisson(), {"log_library": library}
    elif family != "multinomial":
        likelihood, arguments = NegativeBinomial(log_theta), {"log_library": library}

    def decode(z):
        return (z @ weight, {"zero_logits": z @ inflation}) if family == "zinb" else z @ weight

    options = {"samples": 4, "chunk": chunk, "likelihood": likelihood, "likelihood_args": arguments, "seed": 5}
    found = fastvae.iwae_loss(x, mu, logvar, decode, **options)
    noise = fastvae.philox_normal((4, B, L), seed=5, dtype=torch.float64)
    weights = []
    for k in range(4):
        z = mu + (logvar / 2).exp() * noise[k]
        arguments_of_truth = {"log_theta": log_theta, "zero_logits": z @ inflation, "log_library": library}
        nats = count_truth.elements(family, z @ weight, x, **arguments_of_truth).sum(1)
        if family == "multinomial":
            nats = -torch.stack(
                [
                    torch.distributions.Multinomial(int(row.sum()), logits=y).log_prob(row)
                    for row, y in zip(x, z @ weight, strict=True)
                ]
            )
        ratio = Normal(0.0, 1.0).log_prob(z) - Normal(mu, (logvar / 2).exp()).log_prob(z)
        weights.append(ratio.sum(1) - nats)
    truth = (math.log(4) - torch.stack(weights).logsumexp(0)).mean()
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    found_gradient, gradient = (torch.autograd.grad(t, mu, retain_graph=True)[0] for t in (found, truth))
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-5, atol=1e-7)


def test_bound_of_other_likelihoods_takes_no_arguments():
    x, _, mu, logvar = batch()
    with pytest.raises(ValueError, match="likelihood_args are for likelihoods of counts"):
        fastvae.iwae_loss(x, mu, logvar, lambda z: x, samples=1, likelihood="l2", likelihood_args={})
