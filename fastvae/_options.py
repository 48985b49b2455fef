"""What the ops hand down to a backend, in one piece."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

Clamp = tuple[float, float]


class ErrorOptions(NamedTuple):
    """Which error of an element: the pair of this name in a backend's `likelihoods`, and its constants."""

    name: str = "l2"
    parameter: float = 1.0
    target_scale: float = 1 / 255  # of a uint8 target alone, as is the shift
    target_shift: float = 0.0


class FloorOptions(NamedTuple):
    """Free bits by element: the KL of a dimension below `nats` counts as `nats` ("dim") or as 0 ("dim_mask")."""

    nats: float
    mode: Literal["dim", "dim_mask"]


class ElboTensors(NamedTuple):
    """What a loss reads; in the same places, buffers for the gradients of it. None: not there, or not wanted."""

    recon: Tensor | None = None
    target: Tensor | None = None
    log_scale: Tensor | None = None  # of every element: its error e becomes e exp(-log_scale) + log_scale
    mu: Tensor | None = None
    logvar: Tensor | None = None
    prior_mu: Tensor | None = None
    prior_logvar: Tensor | None = None
    kl: Tensor | None = None  # [B], measured already: replaces mu and logvar
    mask: Tensor | None = None  # bool; elements outside count as 0, whatever they hold; has no gradient


class ElboOptions(NamedTuple):
    """Constants of one loss call. The kernels read the same fields.

    The terms are `recon = recon_scale * sum(error) + recon_constant` and `kl = kl_scale * sum(KL)`, over each row if
    `per_sample` and over everything otherwise; `loss = recon_weight * recon + beta * kl`, where the KL of each element
    is first raised to the `floor`, if there is one.
    """

    beta: float | Tensor = 1.0
    recon_weight: float | Tensor = 1.0
    recon_scale: float = 1.0
    recon_constant: float = 0.0
    kl_scale: float = 1.0
    per_sample: bool = False
    logvar_clamp: Clamp | None = None
    error: ErrorOptions = ErrorOptions()
    floor: FloorOptions | None = None
    one_pass: bool = False
    inplace: bool = False
    # [B]: what one_pass multiplies the gradient of each sample's error by, where it is not one number for all
    row_weight: Tensor | None = None

    @property
    def constants(self) -> tuple[Any, ...]:
        """What no call changes: recon_scale to floor."""
        return self[2:9]


class PhiloxNoise(NamedTuple):
    """Standard normals as a function of (seed, element): normal number `offset + i` belongs to element i in C order."""

    seed: int | Tensor  # an int in [-2^63, 2^63) or a one-element int64 tensor
    offset: int


# a tensor is noise that was drawn beforehand
Noise = PhiloxNoise | Tensor
