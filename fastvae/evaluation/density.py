"""The density of images that a likelihood stands for, and its bits per element."""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

import fastvae
from fastvae.likelihoods import L1, L2, Bernoulli, BernoulliProbs, Custom, Elementwise, Gaussian, Likelihood, Scaled

# of the integral over distances, scale * sinh(u), whose steps grow with the distance
_FURTHEST, _N_POINTS = 25.0, 100_001


class Density(NamedTuple):
    """What turns a likelihood's nats into -log p(x | z).

    Attributes:
        constant: Nats of each element that the loss leaves out.
        discrete: A probability of binary images, not a density; of gray ones it is a cross entropy.
    """

    constant: float
    discrete: bool

    @classmethod
    def of(cls, likelihood: Likelihood) -> "Density":
        """p(x | x') = exp(-e / exp(s)) / Z, e the likelihood's error of an element; the constant is what log Z has more
        than the loss.

        "l2" is a Gaussian of variance 1/2, "l1" a Laplace of scale 1. The constant of a Gaussian does not depend on its
        variance. Otherwise Z is integrated over all real x in float64; of a likelihood that is a function, the constant
        is unknown: NaN.

        Raises:
            ValueError: a `Scaled` with a scale of each sample or element, or of a Bernoulli likelihood.
        """
        if isinstance(likelihood, Gaussian):
            return cls(0.5 * math.log(2 * math.pi) - likelihood.constant, False)
        base = likelihood.base if isinstance(likelihood, Scaled) else likelihood
        if isinstance(base, Bernoulli | BernoulliProbs):
            if isinstance(likelihood, Scaled):
                raise ValueError("a Bernoulli likelihood with a scale is no probability. Choose another likelihood.")
            return cls(0.0, True)
        if isinstance(base, Custom) or not isinstance(base, Elementwise):
            return cls(math.nan, False)
        if not isinstance(likelihood, Scaled):
            return cls(_log_normalizer(of_means(base), 0.0), False)
        scale = torch.as_tensor(likelihood.log_scale, dtype=torch.float64, device="cpu")
        if scale.numel() != 1:
            raise ValueError(f"the likelihood must have one scale; got a tensor of shape {tuple(scale.shape)}.")
        log_scale = float(scale.detach())
        return cls(_log_normalizer(of_means(base), log_scale) - log_scale, False)

    def nll(self, nats: float, dimensions: int) -> float:
        """-log p(x | z) of an image of so many elements, of which the loss counts `nats`."""
        return nats + dimensions * self.constant

    def bits_per_dim(self, nats: float, dimensions: int) -> float:
        """`bits_per_dim` of an image of so many elements, of which the loss counts `nats`."""
        return bits_per_dim(self.nll(nats, dimensions), dimensions, discrete=self.discrete)


def bits_per_dim(nll: float, dimensions: int, *, discrete: bool = False) -> float:
    """Bits for each element of an 8-bit image: (nll / D + log 256) / log 2.

    The probability of one of 256 levels is its density, of values in [0, 1], times its width of 1/256.

    Args:
        nll: -log p(x) in nats, or a bound on it, with all constants.
        dimensions: D, elements of an image: channels * height * width.
        discrete: `nll` is of a probability of binary images, which needs no width: nll / (D log 2).
    """
    return nll / (dimensions * math.log(2)) + (0.0 if discrete else 8.0)


def of_means(likelihood: Likelihood) -> Likelihood:
    """The same error of an image's mean instead of its logits."""
    if isinstance(likelihood, Bernoulli):
        return BernoulliProbs()
    if isinstance(likelihood, L1 | L2):
        return replace(likelihood, from_logits=False)
    return likelihood


@lru_cache(maxsize=16)
def _log_normalizer(base: Likelihood, log_scale: float) -> float:
    """Log of the integral of exp(-e(d) / exp(log_scale)) over all distances d."""
    u = torch.linspace(-_FURTHEST, _FURTHEST, _N_POINTS, dtype=torch.float64, device="cpu")
    scale = math.exp(log_scale)
    errors = fastvae.reconstruction_loss(scale * u.sinh(), torch.zeros_like(u), likelihood=base, reduction="none")
    return math.log(torch.trapezoid(torch.exp(-errors / scale) * scale * u.cosh(), u))
