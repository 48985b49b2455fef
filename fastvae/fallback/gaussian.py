"""The KL of a diagonal Gaussian, for the ops that need it."""

import torch
from torch import Tensor

from .._options import Clamp


def clamped(logvar: Tensor, bounds: Clamp | None) -> Tensor:
    return logvar if bounds is None else logvar.clamp(*bounds)


def rows(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with the rank of `like`."""
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))


def sum_by_sample(elements: Tensor) -> Tensor:
    """[B, ...] -> [B]; may return `elements` itself."""
    return elements if elements.ndim == 1 else elements.sum(1 if elements.ndim == 2 else tuple(range(1, elements.ndim)))


def kl_per_sample(mu: Tensor, logvar: Tensor, expm1: Tensor) -> Tensor:
    """[B]: sum of (mu^2 + expm1(logvar) - logvar) / 2 over each sample; all three already in the dtype of
    arithmetic.
    """
    elements = torch.sub(expm1, logvar).addcmul_(mu, mu)
    return sum_by_sample(elements).mul_(0.5)
