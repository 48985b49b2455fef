"""Paths between two latents."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

InterpolationMode = Literal["spherical", "linear"]
SMALLEST_SINE = 1e-4  # of the angle: below it spherical weights lose float32 digits, and linear ones differ by 1e-8


def interpolate_latents(a: Tensor, b: Tensor, steps: int, mode: InterpolationMode) -> Tensor:
    """`steps` points from `a` to `b`, both included exactly.

    Args:
        a: [B, L].
        b: [B, L].
        steps: At least 2.
        mode: "spherical" or "linear".

    Returns:
        [B, steps, L].

    Raises:
        ValueError: fewer than two steps, or another mode.
    """
    paths: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"spherical": slerp, "linear": lerp}
    if steps < 2:
        raise ValueError(f"steps must be at least 2, the two ends; got {steps}.")
    if mode not in paths:
        raise ValueError(f"mode must be one of {', '.join(paths)}; got {mode!r}.")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[1:-1, None]
    between = paths[mode](a[:, None], b[:, None], t)
    return torch.cat([a[:, None], between, b[:, None]], dim=1)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(1 - t) a + t b."""
    return (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical path: sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between `a` and `b`.

    A Gaussian's samples lie near a sphere, which the straight line leaves. Where the angle defines no path (a zero
    vector, parallel or opposite ones) the path is straight.

    Source: Shoemake, Animating rotation with quaternion curves (SIGGRAPH 1985); for latents White, arXiv:1609.04468.
    """
    unit_a, unit_b = (torch.nn.functional.normalize(v, dim=-1) for v in (a, b))
    # exact for small angles too, where acos of the dot product is not
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=-1, keepdim=True), (unit_a + unit_b).norm(dim=-1, keepdim=True))
    sine = torch.sin(angle)
    defined = (sine > SMALLEST_SINE) & a.any(dim=-1, keepdim=True) & b.any(dim=-1, keepdim=True)
    spherical = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return torch.where(defined, spherical, lerp(a, b, t))
