"""What the ops hand down to a backend, in one piece."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Clamp = tuple[float, float]


class ElboOptions(NamedTuple):
    """Constants of one loss call. The kernels read the same fields.

    The terms are `recon = recon_scale * sum(error)` and `kl = kl_scale * sum(KL)`, over each row if `per_sample` and
    over everything otherwise; `loss = recon_weight * recon + beta * kl`.
    """

    beta: float | Tensor = 1.0
    recon_weight: float | Tensor = 1.0
    recon_scale: float = 1.0
    kl_scale: float = 1.0
    per_sample: bool = False
    logvar_clamp: Clamp | None = None


@dataclass(frozen=True, slots=True)
class PhiloxNoise:
    """Standard normals as a function of (seed, element): normal number `offset + i` belongs to element i in C order."""

    seed: int | Tensor  # an int in [-2^63, 2^63) or a one-element int64 tensor
    offset: int


# a tensor is noise that was drawn beforehand
Noise = PhiloxNoise | Tensor
