"""Likelihoods of counts: in mpmath for one element, and in float64 with torch.distributions for a batch."""

import mpmath
import torch
from torch.distributions import NegativeBinomial, Poisson

mpmath.mp.dps = 50


def nb(x, mu, theta):
    """(value, d/dlog mu, d/dlog theta), of Python floats."""
    x, mu, theta = mpmath.mpf(x), mpmath.mpf(mu), mpmath.mpf(theta)
    value = theta * mpmath.log1p(mu / theta) + (x * mpmath.log1p(theta / mu) if x else 0)
    value += mpmath.loggamma(theta) + mpmath.loggamma(x + 1) - mpmath.loggamma(theta + x)
    by_mu = theta * (mu - x) / (theta + mu)
    by_theta = theta * (
        mpmath.log1p(mu / theta) - (mu - x) / (theta + mu) + mpmath.digamma(theta) - mpmath.digamma(theta + x)
    )
    return value, by_mu, by_theta


def zinb(x, mu, theta, d):
    """(value, d/dlog mu, d/dlog theta, d/dd)"""
    value, by_mu, by_theta = nb(x, mu, theta)
    d = mpmath.mpf(d)
    sigmoid = 1 / (1 + mpmath.exp(-d))
    softplus = mpmath.log1p(mpmath.exp(d))
    if x > 0:
        return value + softplus, by_mu, by_theta, sigmoid
    h = d + value
    keep = 1 / (1 + mpmath.exp(h))
    return softplus - mpmath.log(mpmath.exp(d) + mpmath.exp(-value)), by_mu * keep, by_theta * keep, sigmoid - 1 + keep


def poisson(x, mu):
    x, mu = mpmath.mpf(x), mpmath.mpf(mu)
    return mu - (x * mpmath.log(mu) if x else 0) + mpmath.loggamma(x + 1), mu - x


def elements(family, logits, counts, log_theta=None, log_library=None, zero_logits=None, head="softmax", mask=None):
    """Of [B, G], float64; 0 where the mask selects nothing."""
    mask = torch.ones_like(counts, dtype=torch.bool) if mask is None else mask
    logits = logits.masked_fill(~mask, -1e4)
    counts = counts.masked_fill(~mask, 0)
    mean = {"softmax": lambda y: y.softmax(1), "exp": torch.exp, "softplus": torch.nn.functional.softplus}[head](logits)
    if log_library is not None:
        mean = mean * log_library.exp().reshape(-1, 1)
    mean = mean.masked_fill(~mask, 1.0)
    if family == "multinomial":
        found = -counts * logits.log_softmax(1)
    elif family == "poisson":
        found = -Poisson(mean, validate_args=False).log_prob(counts)
    else:
        theta = log_theta.exp().expand(counts.shape)
        found = -NegativeBinomial(theta, logits=mean.log() - log_theta, validate_args=False).log_prob(counts)
        if family == "zinb":
            d = zero_logits.masked_fill(~mask, 0)
            softplus = torch.nn.functional.softplus
            found = torch.where(counts == 0, softplus(d) - torch.logaddexp(d, -found), softplus(d) + found)
    return found.masked_fill(~mask, 0)
