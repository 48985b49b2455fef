"""Sampling and KL in few passes over memory, on any device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, PhiloxNoise, TensorMeta, compute_dtype

from .gaussian import clamped, kl_per_sample, rows, zero_outside
from .philox import philox_normal

Noise = PhiloxNoise | Tensor


class ReparamKLPlan(NamedTuple):
    """The options of calls with equal signatures."""

    dtype: torch.dtype  # of arithmetic
    logvar_clamp: Clamp | None
    with_kl: bool


def plan_reparam_kl(
    mu: TensorMeta,
    logvar: TensorMeta,
    z: TensorMeta,
    dmu: TensorMeta,
    dlogvar: TensorMeta,
    logvar_clamp: Clamp | None,
    with_kl: bool,
    prior: Sequence[TensorMeta] = (),
) -> ReparamKLPlan:
    """See `fastvae_kernels.reparam_kl`."""
    return ReparamKLPlan(compute_dtype(mu, logvar, *prior), logvar_clamp, with_kl)


def reparam_kl_fwd(
    plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: Noise, z: Tensor, prior: Sequence[Tensor] = ()
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless the plan has it) and what the backward pass needs."""
    logvar = clamped(logvar.to(plan.dtype), plan.logvar_clamp)
    if isinstance(noise, PhiloxNoise):
        noise = philox_normal(mu.shape, noise.seed, noise.offset, plan.dtype, mu.device)
    scaled_noise = torch.mul(logvar, 0.5).exp_().mul_(noise)
    torch.add(mu, scaled_noise, out=z)
    if not plan.with_kl:
        return None, (scaled_noise,)
    mu, logvar, *precision = _relative(plan, mu, logvar, prior)
    expm1 = torch.expm1(logvar)
    # for the backward pass the distance from the prior, (mu - mu_p) / sigma_p, too
    return kl_per_sample(mu, logvar, expm1), (scaled_noise, expm1, *([mu, *precision] if prior else []))


def _relative(plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, prior: Sequence[Tensor]) -> Sequence[Tensor]:
    """mu and logvar, or (mu - mu_p) / sigma_p, logvar - logvar_p and 1 / sigma_p, in the dtype of arithmetic."""
    mu = mu.to(plan.dtype)
    if not prior:
        return mu, logvar
    prior_mu, prior_logvar = (t.to(plan.dtype) for t in prior)
    precision = torch.exp(-0.5 * prior_logvar)
    return (mu - prior_mu).mul_(precision), logvar - prior_logvar, precision


def recompute_saved(
    plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: PhiloxNoise, prior: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """What `reparam_kl_fwd` returns for the backward pass."""
    logvar = clamped(logvar.to(plan.dtype), plan.logvar_clamp)
    normals = philox_normal(mu.shape, noise.seed, noise.offset, plan.dtype, mu.device)
    scaled_noise = torch.mul(logvar, 0.5).exp_().mul_(normals)
    mu, logvar, *precision = _relative(plan, mu, logvar, prior)
    return scaled_noise, torch.expm1(logvar), *([mu, *precision] if prior else [])


def scaled_noise(
    mu: Tensor, logvar: Tensor, saved: tuple[Tensor, ...], noise: Noise | None, logvar_clamp: Clamp | None
) -> Tensor:
    """sigma * noise, as the forward pass drew it."""
    return saved[0]


def reparam_kl_bwd(
    plan: ReparamKLPlan,
    mu: Tensor,
    logvar: Tensor,
    saved: tuple[Tensor, ...],
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dlogvar: Tensor | None,
    noise: Noise | None,
    prior: Sequence[Tensor] = (),
    dprior: Sequence[Tensor | None] = (),
) -> None:
    """As the function of this name of the kernels."""
    dtype = plan.dtype
    dz = None if dz is None else dz.to(dtype)
    dkl = None if dkl is None else rows(dkl.to(dtype), mu)
    slope = None
    if dkl is not None:
        slope = saved[2] * saved[3] if prior else mu.to(dtype)
    if dmu is not None:
        _combine(dz, None, dkl, slope, 1.0, dmu)
    for buffer, by_prior in zip(dprior, ("mu", "logvar"), strict=True) if prior else ():
        if buffer is None:
            continue
        if dkl is None or slope is None:
            buffer.zero_()
        elif by_prior == "mu":
            torch.mul(slope, -dkl, out=buffer)
        else:
            torch.mul(torch.addcmul(saved[1], saved[2], saved[2]), dkl * -0.5, out=buffer)
    if dlogvar is not None:
        scaled_noise, expm1 = saved[0], saved[1] if dkl is not None else None
        _combine(dz, scaled_noise, None if dkl is None else dkl * 0.5, expm1, 0.5, dlogvar)
        zero_outside(dlogvar, logvar, plan.logvar_clamp, dtype)


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
