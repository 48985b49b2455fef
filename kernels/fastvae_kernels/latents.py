"""The KL term on a tile, against N(0, I) or another Gaussian, and its gradients."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tile import element_offsets, load, pack_f64, pointers, unpack_f64
from .gaussian import clamp, exp, expm1, inside, twice_kl_element
from .types import ElboOptions


class Latents(NamedTuple):
    """Tensors of one shape, or their strides. None: not given, or not wanted."""

    mu: Any = None  # read, as are the next four
    logvar: Any = None
    prior_mu: Any = None
    prior_logvar: Any = None
    mask: Any = None
    dmu: Any = None  # written, as are the next three
    dlogvar: Any = None
    dprior_mu: Any = None
    dprior_logvar: Any = None


class Bounds(NamedTuple):
    """float64s packed by `pack_f64`, or None where there is no such bound."""

    low: Any  # of logvar
    high: Any
    free_bits: Any  # of an element
    keeps_free_bits: Any  # constant: a KL below the free bits counts as these, not as 0


@triton.jit
def latent_pointers(latents, geometry, rows, cols):
    mu = latents.mu + element_offsets(rows, cols, geometry.strides.mu, geometry.sizes)
    return Latents(
        mu,
        pointers(latents.logvar, geometry.strides.logvar, geometry, rows, cols, mu),
        pointers(latents.prior_mu, geometry.strides.prior_mu, geometry, rows, cols, mu),
        pointers(latents.prior_logvar, geometry.strides.prior_logvar, geometry, rows, cols, mu),
        pointers(latents.mask, geometry.strides.mask, geometry, rows, cols, mu),
        pointers(latents.dmu, geometry.strides.dmu, geometry, rows, cols, mu),
        pointers(latents.dlogvar, geometry.strides.dlogvar, geometry, rows, cols, mu),
        pointers(latents.dprior_mu, geometry.strides.dprior_mu, geometry, rows, cols, mu),
        pointers(latents.dprior_logvar, geometry.strides.dprior_logvar, geometry, rows, cols, mu),
    )


@triton.jit
def _selected(latents, ptrs, values, mask):
    """The values of elements within the tensors that the latents' mask selects, else 0."""
    if latents.mask is not None:
        values = tl.where(load(ptrs.mask, mask, tl.int1), values, 0.0)
    elif mask is not None:
        values = tl.where(mask, values, 0.0)
    return values


@triton.jit
def kl_tile(latents, ptrs, bounds, mask, DTYPE: tl.constexpr):
    """Twice the KL of each selected element, else 0. `latents` has None for absent tensors, `ptrs` the addresses."""
    mu = load(ptrs.mu, mask, DTYPE)
    logvar = clamp(load(ptrs.logvar, mask, DTYPE), bounds.low, bounds.high, DTYPE)
    if latents.prior_mu is not None:  # the posterior standardized by its prior
        prior_logvar = load(ptrs.prior_logvar, mask, DTYPE)
        mu = (mu - load(ptrs.prior_mu, mask, DTYPE)) * exp(prior_logvar, DTYPE, -0.5)
        logvar -= prior_logvar
    kl = twice_kl_element(mu, logvar, exp(logvar, DTYPE, 0.5), DTYPE)
    return _selected(latents, ptrs, kl, mask)


@triton.jit
def apply_free_bits(latents, ptrs, twice_kl, bounds, mask, DTYPE: tl.constexpr):
    """Twice the KL under free bits of each selected element, else 0."""
    free_bits = 2.0 * unpack_f64(bounds.free_bits, DTYPE)
    least = free_bits if bounds.keeps_free_bits else 0.0
    return _selected(latents, ptrs, tl.where(twice_kl <= free_bits, least, twice_kl), mask)


@triton.jit
def _store(ptrs, gradient, selected, mask):
    gradient = gradient if selected is None else tl.where(selected, gradient, 0.0)
    tl.store(ptrs, gradient.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def latent_gradient_tile(latents, ptrs, bounds, coefficient, free_bits_coefficient, mask, DTYPE: tl.constexpr):
    """Store coefficient times the gradients of the KL plus free_bits_coefficient times those under free bits.

    With m = (mu - prior_mu) / prior_sigma and r = logvar - prior_logvar: m / prior_sigma, expm1(r) / 2, and of the
    prior -m / prior_sigma, -(m^2 + expm1(r)) / 2. What no gradient needs is not read.
    """
    selected = None if latents.mask is None else load(ptrs.mask, mask, tl.int1)
    if latents.prior_mu is not None:
        prior_logvar = load(ptrs.prior_logvar, mask, DTYPE)
        precision = exp(prior_logvar, DTYPE, -0.5)
    # constexpr: a plain variable is a run-time value, under which no variable can be defined
    of_both: tl.constexpr = latents.dprior_logvar is not None or bounds.free_bits is not None
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
    if bounds.free_bits is not None:
        kl = twice_kl_element(mu, logvar, exp(logvar, DTYPE, 0.5), DTYPE)
        free_bits = 2.0 * unpack_f64(bounds.free_bits, DTYPE)
        # where both are equal, as torch.clamp's gradient
        below = kl < free_bits if bounds.keeps_free_bits else kl <= free_bits
        coefficient += tl.where(below, 0.0, free_bits_coefficient)
    if latents.dmu is not None or latents.dprior_mu is not None:
        dmu = coefficient * mu if latents.prior_mu is None else coefficient * mu * precision
        if latents.dmu is not None:
            _store(ptrs.dmu, dmu, selected, mask)
        if latents.dprior_mu is not None:
            _store(ptrs.dprior_mu, -dmu, selected, mask)
    if latents.dlogvar is not None:
        _store(ptrs.dlogvar, inside(raw, bounds.low, bounds.high, 0.5 * coefficient * slope, DTYPE), selected, mask)
    if latents.dprior_logvar is not None:
        _store(ptrs.dprior_logvar, -0.5 * coefficient * (mu * mu + slope), selected, mask)


def bounds_of(options: ElboOptions) -> Bounds:
    low, high = options.logvar_clamp or (None, None)
    nats, mode = options.element_free_bits or (None, None)
    return Bounds(pack_f64(low), pack_f64(high), pack_f64(nats), tl.constexpr(mode == "dim"))
