"""The KL term on a tile, against N(0, I) or another Gaussian, and its gradients."""

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tile import element_offsets, host_scalar, load, pointers, scalar
from .gaussian import clamp, exp, expm1, inside, twice_kl_element


class Latents(NamedTuple):
    """Tensors, or strides, of one shape. None: not there, or not wanted."""

    mu: Any = None  # read, as are the next three
    logvar: Any = None
    prior_mu: Any = None
    prior_logvar: Any = None
    dmu: Any = None  # written, as are the next three
    dlogvar: Any = None
    dprior_mu: Any = None
    dprior_logvar: Any = None


class Bounds(NamedTuple):
    """Bits of float64s, or None where there is no such bound."""

    low: Any  # of logvar
    high: Any
    floor: Any  # of an element's KL: free bits
    floor_keeps: Any  # constant: below it the KL counts as the floor, not as 0


@triton.jit
def latent_pointers(latents, at, rows, cols):
    mu = latents.mu + element_offsets(rows, cols, at.strides.mu, at.sizes)
    return Latents(
        mu,
        pointers(latents.logvar, at.strides.logvar, at, rows, cols, mu),
        pointers(latents.prior_mu, at.strides.prior_mu, at, rows, cols, mu),
        pointers(latents.prior_logvar, at.strides.prior_logvar, at, rows, cols, mu),
        pointers(latents.dmu, at.strides.dmu, at, rows, cols, mu),
        pointers(latents.dlogvar, at.strides.dlogvar, at, rows, cols, mu),
        pointers(latents.dprior_mu, at.strides.dprior_mu, at, rows, cols, mu),
        pointers(latents.dprior_logvar, at.strides.dprior_logvar, at, rows, cols, mu),
    )


@triton.jit
def kl_tile(latents, ptrs, bounds, mask, DTYPE: tl.constexpr):
    """Twice the KL of each element, 0 in lanes outside. `latents` tells what there is, `ptrs` where."""
    mu = load(ptrs.mu, mask, DTYPE)
    logvar = clamp(load(ptrs.logvar, mask, DTYPE), bounds.low, bounds.high, DTYPE)
    if latents.prior_mu is not None:  # the posterior as its prior sees it
        prior_logvar = load(ptrs.prior_logvar, mask, DTYPE)
        mu = (mu - load(ptrs.prior_mu, mask, DTYPE)) * exp(-0.5 * prior_logvar, DTYPE)
        logvar -= prior_logvar
    kl = twice_kl_element(mu, logvar, exp(0.5 * logvar, DTYPE), DTYPE)
    return kl if mask is None else tl.where(mask, kl, 0.0)


@triton.jit
def floored(twice_kl, bounds, mask, DTYPE: tl.constexpr):
    """Twice the KL under free bits; 0 in lanes outside."""
    floor = 2.0 * scalar(bounds.floor, DTYPE)
    least = floor if bounds.floor_keeps else 0.0
    kl = tl.where(twice_kl <= floor, least, twice_kl)
    return kl if mask is None else tl.where(mask, kl, 0.0)


@triton.jit
def _store(ptrs, gradient, mask):
    tl.store(ptrs, gradient.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def latent_gradient_tile(latents, ptrs, bounds, coefficient, floored_coefficient, mask, DTYPE: tl.constexpr):
    """Store coefficient times the gradients of the KL, plus floored_coefficient times those of the KL under the floor.

    With m = (mu - prior_mu) / prior_sigma and r = logvar - prior_logvar: m / prior_sigma, expm1(r) / 2, and of the
    prior -m / prior_sigma, -(m^2 + expm1(r)) / 2. What no gradient needs is not read.
    """
    if latents.prior_mu is not None:
        prior_logvar = load(ptrs.prior_logvar, mask, DTYPE)
        precision = exp(-0.5 * prior_logvar, DTYPE)
    # constants, because what a branch at run time assigns is unknown after it
    of_both: tl.constexpr = latents.dprior_logvar is not None or bounds.floor is not None
    if of_both or latents.dmu is not None or latents.dprior_mu is not None:
        mu = load(ptrs.mu, mask, DTYPE)
        if latents.prior_mu is not None:
            mu = (mu - load(ptrs.prior_mu, mask, DTYPE)) * precision
    if of_both or latents.dlogvar is not None:
        raw = load(ptrs.logvar, mask, DTYPE)
        logvar = clamp(raw, bounds.low, bounds.high, DTYPE)
        if latents.prior_mu is not None:
            logvar -= prior_logvar
        slope = expm1(logvar, DTYPE)
    if bounds.floor is not None:
        kl = twice_kl_element(mu, logvar, exp(0.5 * logvar, DTYPE), DTYPE)
        floor = 2.0 * scalar(bounds.floor, DTYPE)
        # where both are equal, as torch.clamp's gradient
        below = kl < floor if bounds.floor_keeps else kl <= floor
        coefficient += tl.where(below, 0.0, floored_coefficient)
    if latents.dmu is not None or latents.dprior_mu is not None:
        dmu = coefficient * mu if latents.prior_mu is None else coefficient * mu * precision
        if latents.dmu is not None:
            _store(ptrs.dmu, dmu, mask)
        if latents.dprior_mu is not None:
            _store(ptrs.dprior_mu, -dmu, mask)
    if latents.dlogvar is not None:
        _store(ptrs.dlogvar, inside(raw, bounds.low, bounds.high, 0.5 * coefficient * slope, DTYPE), mask)
    if latents.dprior_logvar is not None:
        _store(ptrs.dprior_logvar, -0.5 * coefficient * (mu * mu + slope), mask)


@lru_cache
def bounds_of(logvar_clamp: tuple[float, float] | None, floor_options: Any) -> Bounds:
    """What kernels take for bounds of logvar and free bits (.nats, .mode)."""
    low, high = logvar_clamp or (None, None)
    floor, keeps = (None, None) if floor_options is None else (floor_options.nats, floor_options.mode == "dim")
    return Bounds(host_scalar(low), host_scalar(high), host_scalar(floor), tl.constexpr(keeps))
