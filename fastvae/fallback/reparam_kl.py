"""Sampling and KL in few passes: what the kernel of this name does, for any device."""

from typing import Any

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .._options import Clamp, Noise, PhiloxNoise
from .gaussian import clamped, kl_per_sample, rows, zero_outside
from .philox import philox_normal


def reparam_kl_fwd(
    mu: Tensor,
    logvar: Tensor,
    noise: Noise,
    z: Tensor,
    logvar_clamp: Clamp | None,
    notes: dict[Any, Any],
    *,
    with_kl: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless asked for) and what the backward pass needs.

    notes: the kernels', which plan their launches; here is nothing to plan.
    """
    dtype = compute_dtype(mu, logvar)
    logvar = clamped(logvar.to(dtype), logvar_clamp)
    if isinstance(noise, PhiloxNoise):
        noise = philox_normal(mu.shape, noise.seed, noise.offset, dtype, mu.device)
    spread = torch.mul(logvar, 0.5).exp_().mul_(noise)
    torch.add(mu, spread, out=z)
    if not with_kl:
        return None, (spread,)
    expm1 = torch.expm1(logvar)
    return kl_per_sample(mu.to(dtype), logvar, expm1), (spread, expm1)


def saved_again(mu: Tensor, logvar: Tensor, noise: PhiloxNoise, logvar_clamp: Clamp | None) -> list[Tensor]:
    """What `reparam_kl_fwd` returns for the backward pass, where nobody kept it."""
    dtype = compute_dtype(mu, logvar)
    logvar = clamped(logvar.to(dtype), logvar_clamp)
    normals = philox_normal(mu.shape, noise.seed, noise.offset, dtype, mu.device)
    return [torch.mul(logvar, 0.5).exp_().mul_(normals), torch.expm1(logvar)]


def spread(mu: Tensor, logvar: Tensor, saved: list[Tensor], noise: Noise | None, logvar_clamp: Clamp | None) -> Tensor:
    """sigma * noise, as the forward pass drew it."""
    return saved[0]


def reparam_kl_bwd(
    mu: Tensor,
    logvar: Tensor,
    saved: list[Tensor],
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dlogvar: Tensor | None,
    noise: Noise | None,
    logvar_clamp: Clamp | None,
    notes: dict[Any, Any],
) -> None:
    """Write the gradients that are asked for: dmu = dz + dkl mu; dlogvar = (dz sigma noise + dkl expm1(logvar)) / 2."""
    dtype = compute_dtype(mu, logvar)
    dz = None if dz is None else dz.to(dtype)
    dkl = None if dkl is None else rows(dkl.to(dtype), mu)
    if dmu is not None:
        _combine(dz, None, dkl, mu.to(dtype), 1.0, dmu)
    if dlogvar is not None:
        spread, expm1 = saved[0], saved[1] if dkl is not None else None
        _combine(dz, spread, None if dkl is None else dkl * 0.5, expm1, 0.5, dlogvar)
        zero_outside(dlogvar, logvar, logvar_clamp, dtype)


def _combine(
    dz: Tensor | None, factor: Tensor | None, dkl: Tensor | None, term: Tensor | None, value: float, out: Tensor
) -> None:
    """out = value * dz * factor + dkl * term, rounded once; what is None is left out (a factor of None is 1)."""
    if dkl is None or term is None:
        if dz is None:
            out.zero_()
        elif factor is None:
            out.copy_(dz)
        else:
            torch.mul(dz, factor * value if out.dtype != dz.dtype else factor, out=out)
            if out.dtype == dz.dtype:
                out.mul_(value)
    elif dz is None:
        torch.mul(dkl, term, out=out)
    elif factor is None:
        torch.addcmul(dz, dkl, term, out=out)
    else:
        product = torch.mul(dkl, term, out=out if out.dtype == dz.dtype else None)
        torch.addcmul(product, dz, factor, value=value, out=out)
