"""What a batch of latents says of the posterior: for logs and plots, not for training."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp

from . import _backend, _checks
from ._strides import readable
from .fallback import latent_stats as fallback  # a compiler cannot trace the choice of a room

ACTIVE_VARIANCE = 0.01  # of active units, here and where a training counts them


class LatentStats(NamedTuple):
    """Statistics of a batch of latents; the first three by dimension, in the shape of one sample, the others 0-d.

    Attributes:
        kl: Mean over the batch of KL(N(mu, exp(logvar)) || N(0, 1)), in nats.
        mean: Mean of mu over the batch.
        variance: Variance of mu over the batch, unbiased (divided by B - 1); NaN for a batch of one.
        active: int64; dimensions whose variance is at least 0.01.
        nonfinite: int64; elements of mu and of logvar that are NaN or infinite.
        clamped: int64; elements of logvar outside logvar_clamp, infinite ones included; 0 without a clamp.
    """

    kl: Tensor
    mean: Tensor
    variance: Tensor
    active: Tensor
    nonfinite: Tensor
    clamped: Tensor


def latent_stats(mu: Tensor, logvar: Tensor, *, logvar_clamp: Clamp | None = None) -> LatentStats:
    """Measure latents dimension by dimension over the batch, in one pass over memory and without a host sync. On a GPU,
    samples among which a number is not finite are read once more, to count such numbers.

        kl = mean over B of (mu^2 + exp(logvar) - 1 - logvar) / 2
        mean = mean over B of mu;  variance = sum over B of (mu - mean)^2 / (B - 1)
        active = number of dimensions with variance >= 0.01

    Every element of a sample is a dimension. Neither the KL near 0 nor the variance of a large mean cancels. The result
    has no gradient: it is for looking at. The sum of `kl` is the loss's KL per sample ("batchmean").

    Active units are defined over a data set: of a batch the count is an estimate; for more, concatenate batches of mu
    and logvar.

    Args:
        mu: Posterior mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the posterior variance; shape and device of `mu`.
        logvar_clamp: None, or (lo, hi): logvar is clamped before its KL is taken.

    Returns:
        `LatentStats`: kl, mean and variance in the shape of one sample, [...], float64 if an input is, else float32;
        the counts 0-d int64. An empty batch has statistics NaN and counts 0, and NaN in mu or logvar gives NaN in
        its dimension.

    Raises:
        ValueError: shapes or devices differ; bounds out of order.
        TypeError: not a floating point tensor.

    Source: Burda et al., Importance Weighted Autoencoders, arXiv:1509.00519, section 5.2, for active units; unbiased
    as in He et al., Lagging Inference Networks, arXiv:1901.05534 (their released code).
    """
    _checks.gaussian(mu, logvar)
    bounds = _checks.logvar_clamp(logvar_clamp)
    backend = fallback if _backend.is_traced() else _backend.backend_module(mu, "latent_stats")
    with torch.no_grad():
        return LatentStats(*backend.latent_stats(readable(mu), readable(logvar), bounds, ACTIVE_VARIANCE))
