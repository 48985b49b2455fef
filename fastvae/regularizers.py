"""What a loss makes of the KL before beta: `vae_loss(..., free_bits=, capacity=)`, and the KL from two sides.

All are defined in nats a sample. Under reduction="sum" the regularised term is times the batch size, under "mean" it is
divided by the number of latents of a sample. Means over the batch are over the local batch of a rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _checks, _numbers

FREE_BITS_MODES = ("dim", "dim_batch", "dim_mask", "sample")
CAPACITY_MODES = ("sample", "batch")


@dataclass(frozen=True)
class FreeBits:
    """KL that costs nothing. k is the KL of one latent dimension (every element but the batch's) of one sample.

        "dim"        sum of max(nats, k)
        "dim_batch"  sum of max(nats, mean of k over the batch), with "none" reduction undefined
        "dim_mask"   sum of k where k > nats, 0 elsewhere
        "sample"     max(sum of k, nats)

    The gradient where both are equal is as torch.clamp's: that of k; of the mask, 0.

    Args:
        nats: 0 or more.
        mode: As above.

    Raises:
        ValueError: nats is negative or not a number; unknown mode.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, arXiv:1606.04934,
    appendix C.8 ("dim_batch"); Li et al., Optimus, arXiv:2004.04092 ("dim_mask"); Ha & Schmidhuber, World Models,
    arXiv:1803.10122 ("sample").
    """

    nats: float
    mode: Literal["dim", "dim_batch", "dim_mask", "sample"] = "dim"

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, FREE_BITS_MODES)
        object.__setattr__(self, "nats", _numbers.not_negative("nats", self.nats))


@dataclass(frozen=True)
class Capacity:
    """|KL - nats| in place of the KL: beta holds it at a capacity that grows in the course of training.

        "sample"  mean over the batch of |KL of the sample - nats|
        "batch"   |mean over the batch of the KL - nats|, with "none" reduction undefined

    Args:
        nats: A float, a 0-d tensor on the inputs' device or, in `VAELoss`, a schedule.
        mode: As above.

    Raises:
        ValueError: nats is a number below 0 or not finite; unknown mode.

    Source: Burgess et al., Understanding disentangling in beta-VAE, arXiv:1804.03599, eq. 8.
    """

    nats: float | Tensor
    mode: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, CAPACITY_MODES)
        if not isinstance(self.nats, Tensor | torch.nn.Module):
            object.__setattr__(self, "nats", _numbers.not_negative("nats", self.nats))


def balance(
    mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor], weight: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """KL balancing: the prior learns `weight` of the KL's gradient, the posterior the rest; the value stays.

        weight * KL(stop_gradient(q) || p) + (1 - weight) * KL(q || stop_gradient(p))

    Args:
        mu, logvar: The posterior q.
        prior: (mu, logvar) of p.
        weight: Between 0 and 1; 0.8 in the source.

    Returns:
        (mu, logvar, prior): the same numbers with scaled gradients; hand them to `vae_loss` or `gaussian_kl`.

    Raises:
        ValueError: weight is not within [0, 1].

    Source: Hafner et al., Mastering Atari with Discrete World Models, arXiv:2010.02193, section 2.2.
    """
    weight = _numbers.fraction("weight", weight)
    prior_mu, prior_logvar = prior
    q = _scaled_gradient(mu, 1.0 - weight), _scaled_gradient(logvar, 1.0 - weight)
    return *q, (_scaled_gradient(prior_mu, weight), _scaled_gradient(prior_logvar, weight))


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x, bit for bit, with its gradient times `factor`."""
    return torch.lerp(x.detach(), x, factor)
