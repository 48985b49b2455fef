"""What acts on samples as a whole: their weights, scales, extra errors, free bits and capacity.

One function computes the terms of a sample from its sums; the forward and the backward kernel both call it.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tile import load, pack_f64, unpack_f64
from .gaussian import exp
from .likelihoods import log1p
from .types import ElboOptions, ElboTensors

BLOCK = 1024  # samples that a program takes at a time
N_STATE = 6  # numbers that the forward pass leaves for the backward pass


class Samples(NamedTuple):
    """Tensors of one value per sample, [B] contiguous, or gradients of them. None: not given, or not wanted."""

    weight: Any = None
    extra: Any = None
    log_scale: Any = None  # or 0-d
    beta: Any = None
    recon_weight: Any = None
    kl: Any = None


class ImagePartials(NamedTuple):
    """Partial sums of images; None: not wanted."""

    errors: Any = None
    counts: Any = None  # of selected elements
    weighed: Any = None  # errors times weights of elements
    weights: Any = None  # of selected elements


class SampleOptions(NamedTuple):
    """Constants of `ElboOptions`, as bits of float64s; None where there is none."""

    error_weight: Any
    extra_weight: Any
    nll_weight: Any
    constant: Any
    softclip: Any
    free_bits: Any  # of a sample
    n_elements: Any  # of a sample
    # constants
    one_scale: Any  # log_scale is 0-d
    capacity_per_sample: Any
    weighs_elements: Any  # by a map of weights of the reconstruction


class SampleTerms(NamedTuple):
    """The terms of each row before its weight, and what their derivatives need; all float64."""

    recon: Any
    weighed: Any  # the reconstruction under the weights that only the loss has
    kl: Any
    regularized: Any  # the KL after free bits and capacity
    counts: Any  # selected elements
    scaled: Any  # the part of recon that is divided by the scale
    weights: Any  # where elements have weights, the sum of the selected ones
    weighed_scaled: Any  # ... and the part of `weighed` that is divided by the scale
    recon_weight: Any  # of the row
    beta: Any
    inverse_scale: Any
    slope: Any  # of the clipped log scale by the given one
    passes: Any  # derivative of the KL after free bits by the KL
    capacity_sign: Any  # ... of the KL after the capacity by the one before


def sample_options(metas: ElboTensors, options: ElboOptions) -> SampleOptions:
    n_elements = 0 if metas.recon is None else math.prod(metas.recon.shape[1:])
    free_bits = options.free_bits
    nats = free_bits.nats if free_bits is not None and free_bits.mode == "sample" else None
    return SampleOptions(
        error_weight=pack_f64(options.error_weight),
        extra_weight=pack_f64(options.extra_weight),
        nll_weight=pack_f64(options.nll_weight),
        constant=pack_f64(options.constant),
        softclip=pack_f64(options.softclip),
        free_bits=pack_f64(nats),
        n_elements=pack_f64(float(n_elements)),
        one_scale=tl.constexpr(metas.sample_log_scale is not None and not metas.sample_log_scale.shape),
        capacity_per_sample=tl.constexpr(options.capacity_mode == "sample"),
        weighs_elements=tl.constexpr(metas.weight_map is not None),
    )


@triton.jit
def sample_weights(samples, rows, mask):
    return load(samples.weight + rows, mask, tl.float64) if samples.weight is not None else mask.to(tl.float64)


@triton.jit
def clipped_log_scale(samples, options, rows, mask, DTYPE: tl.constexpr):
    """The log scale of each row under its soft lower bound, 2 (c + softplus(s / 2 - c)), and its derivative."""
    raw = load(samples.log_scale + (rows * 0 if options.one_scale else rows), mask, DTYPE)
    log_scale, slope = raw, tl.zeros_like(raw) + 1.0
    if options.softclip is not None:
        bound = unpack_f64(options.softclip, DTYPE)
        above = 0.5 * raw - bound
        small = exp(-tl.abs(above), DTYPE)
        log_scale = 2.0 * (bound + (tl.where(above < 0, 0.0, above) + log1p(small)))
        slope = tl.where(above < 0, small, 1.0) / (1.0 + small)
    return log_scale, slope


@triton.jit
def error_factor(samples, options, factor, rows, mask, DTYPE: tl.constexpr):
    """What multiplies the error of each element of a row: factor * weight * recon_weight / exp(log scale)."""
    if samples is not None:
        if samples.weight is not None:
            factor *= load(samples.weight + rows, mask, DTYPE)
        if samples.recon_weight is not None:
            factor *= load(samples.recon_weight + rows, mask, DTYPE)
        if samples.log_scale is not None:
            log_scale, _ = clipped_log_scale(samples, options, rows, mask, DTYPE)
            factor *= exp(-log_scale, DTYPE)
    return factor


@triton.jit
def _reconstruction(errors, counts, empty, samples, options, inverse_scale, log_scale, rows, mask):
    """The reconstruction of each row, and its part that is divided by the scale, of these sums.

    A sample without selected elements has no term, whatever its scale and extra hold.
    """
    scaled = unpack_f64(options.error_weight, tl.float64) * errors
    if samples.extra is not None:
        extra = load(samples.extra + rows, mask, tl.float64)
        scaled += unpack_f64(options.extra_weight, tl.float64) * counts * extra
    scaled = tl.where(empty, 0.0, scaled * inverse_scale)
    per_element = unpack_f64(options.nll_weight, tl.float64) * log_scale + unpack_f64(options.constant, tl.float64)
    return scaled + tl.where(empty, 0.0, counts * per_element), scaled


@triton.jit
def sample_terms(sums_ptr, samples, options, capacity, rows, n_rows):
    """`SampleTerms` of rows.

    sums_ptr: [4, n_rows] float64: errors, selected elements, KL, KL under free bits by element; [6, n_rows] where
        elements have weights: weighed errors, weights of selected elements.
    """
    mask = rows < n_rows
    errors = load(sums_ptr + rows, mask, tl.float64)
    counts = load(sums_ptr + n_rows + rows, mask, tl.float64)
    kl = load(sums_ptr + 2 * n_rows + rows, mask, tl.float64)
    regularized = load(sums_ptr + 3 * n_rows + rows, mask, tl.float64)
    one = tl.zeros_like(errors) + 1.0
    inverse_scale, slope, log_scale = one, one, tl.zeros_like(errors)
    if samples.log_scale is not None:
        log_scale, slope = clipped_log_scale(samples, options, rows, mask, tl.float64)
        inverse_scale = exp(-log_scale, tl.float64)
    empty = counts == 0
    recon, scaled = _reconstruction(errors, counts, empty, samples, options, inverse_scale, log_scale, rows, mask)
    weighed, weights, weighed_scaled, recon_weight, beta = recon, counts, scaled, one, one
    if options.weighs_elements:
        weights = load(sums_ptr + 5 * n_rows + rows, mask, tl.float64)
        weighed, weighed_scaled = _reconstruction(
            load(sums_ptr + 4 * n_rows + rows, mask, tl.float64),
            weights,
            empty,
            samples,
            options,
            inverse_scale,
            log_scale,
            rows,
            mask,
        )
    elif samples.recon_weight is not None:
        recon_weight = tl.where(empty, 0.0, load(samples.recon_weight + rows, mask, tl.float64))
        weighed = recon_weight * recon
    if samples.beta is not None:
        beta = load(samples.beta + rows, mask, tl.float64)
    passes = one
    if options.free_bits is not None:
        nats = unpack_f64(options.free_bits, tl.float64)
        passes = tl.where(kl < nats, 0.0, passes)
        regularized = tl.where(kl < nats, nats, kl)
    capacity_sign = one
    if options.capacity_per_sample:
        excess = regularized - capacity
        capacity_sign = sign(excess)
        regularized = tl.abs(excess)
    return SampleTerms(
        recon,
        weighed,
        kl,
        regularized,
        counts,
        scaled,
        weights,
        weighed_scaled,
        recon_weight,
        beta,
        inverse_scale,
        slope,
        passes,
        capacity_sign,
    )


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))
