"""Sampling and KL in few passes: what the kernel of this name does, for any device."""

import torch
from torch import Tensor

from .._options import Clamp, Noise, PhiloxNoise
from ..reference import compute_dtype
from .gaussian import clamped, kl_per_sample, rows
from .philox import philox_normal


def reparam_kl_fwd(
    mu: Tensor, logvar: Tensor, noise: Noise, z: Tensor, logvar_clamp: Clamp | None, *, with_kl: bool
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless asked for) and what the backward pass needs."""
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
) -> None:
    """Write the gradients that are asked for: dmu = dz + dkl mu; dlogvar = (dz sigma noise + dkl expm1(logvar)) / 2."""
    dtype = compute_dtype(mu, logvar)
    dz = None if dz is None else dz.to(dtype)
    dkl = None if dkl is None else rows(dkl.to(dtype), mu)
    _gradient(dmu, dz, None, dkl, mu.to(dtype))
    if dlogvar is not None:
        _gradient(dlogvar, dz, saved[0], dkl, saved[1] if dkl is not None else None, scale=0.5)
        if logvar_clamp is not None:
            dlogvar.masked_fill_((logvar < logvar_clamp[0]) | (logvar > logvar_clamp[1]), 0)


def _gradient(
    out: Tensor | None,
    dz: Tensor | None,
    factor: Tensor | None,
    dkl: Tensor | None,
    term: Tensor | None,
    scale: float = 1.0,
) -> None:
    """out = scale * (dz * factor + dkl * term); what is None is left out (a factor of None is 1)."""
    if out is None:
        return
    total: Tensor | None = None
    if dz is not None:
        total = dz if factor is None else dz * factor
    if dkl is not None and term is not None:
        total = dkl * term if total is None else torch.addcmul(total, dkl.expand_as(term), term)
    if total is None:
        out.zero_()
    else:
        torch.mul(total, scale, out=out)
