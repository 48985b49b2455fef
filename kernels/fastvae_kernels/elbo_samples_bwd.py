"""Losses with options that act on samples, backward: one launch before the one that writes the gradients of images and
latents.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, load, unpack_f64
from .plan import ElboPlan
from .samples import BLOCK, Samples, sample_terms, sample_weights, sign
from .types import ElboNumbers


class SampleCoefficients(NamedTuple):
    """What multiplies the gradients of each row's elements: pointers to [n_rows], or None where rows are alike."""

    error: Any = None
    held: Any = None  # of gradients that the forward pass wrote
    kl: Any = None
    free_bits: Any = None
    weighed: Any = None  # of errors, times the weight of each element, where elements have weights


@triton.jit
def _upstream(ptr, rows, mask, PER_SAMPLE: tl.constexpr):
    """Gradient of an output for each row; 0 where none was given."""
    if ptr is None:
        value = tl.zeros(rows.shape, tl.float64)
    elif PER_SAMPLE:
        value = load(ptr + rows, mask, tl.float64)
    else:
        value = tl.zeros(rows.shape, tl.float64) + tl.load(ptr).to(tl.float64)
    return value


@triton.jit
def _stored(value, ptr):
    """A float64 in the pointer's dtype; to 16 bits by way of float32, as the results of 16-bit inputs are."""
    if ptr.dtype.element_ty.primitive_bitwidth < 32:
        value = value.to(tl.float32)
    return value.to(ptr.dtype.element_ty)


@triton.jit
def _store(ptr, value, rows, mask):
    if ptr is not None:
        tl.store(ptr + rows, _stored(value, ptr), mask=mask)


@triton.jit
def _store_number(ptr, value):
    if ptr is not None:
        tl.store(ptr, _stored(value, ptr))


@triton.jit
def _store_number_gradients(
    gradients,  # ElboNumbers, written
    dloss_ptr,
    sums,  # over the rows of this program, of gradients by the numbers in their order
    batch,  # reconstruction term; KL term and its derivative under a capacity of the batch; beta; capacity's factor
    BATCH_CAPACITY: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):
    dbetas, drecon_weights, dcapacities = sums
    recon_term, excess, batch_sign, beta, capacity_factor = batch
    if PER_SAMPLE:
        _store_number(gradients.beta, tl.sum(dbetas))
        _store_number(gradients.recon_weight, tl.sum(drecon_weights))
        _store_number(gradients.capacity, tl.sum(dcapacities))
    else:
        dloss = tl.load(dloss_ptr).to(tl.float64)
        _store_number(gradients.beta, dloss * (excess * batch_sign))
        _store_number(gradients.recon_weight, dloss * recon_term)
        if BATCH_CAPACITY:
            _store_number(gradients.capacity, -dloss * beta * batch_sign * capacity_factor)
        else:
            _store_number(gradients.capacity, tl.sum(dcapacities))


@triton.jit(do_not_specialize=["kl_normalizer"])
def _sample_gradients_kernel(
    sums_ptr,  # [4 or 6, n_rows] float64, read: see `sample_terms`
    samples,  # Samples
    sample_options,  # SampleOptions
    state_ptr,  # [N_STATE] float64, read
    dloss_ptr,  # 0-d or [n_rows], read, as are the next two; None: no gradient was given
    drecon_term_ptr,
    dkl_term_ptr,
    coefficients_ptr,  # [5, n_rows] float64, written: see `SampleCoefficients`
    gradients,  # Samples, written
    number_gradients,  # ElboNumbers: 0-d, written; None: not wanted
    kl_normalizer,  # bits of a float64
    n_rows,
    n_blocks,
    HAS_ELEMENT_FREE_BITS: tl.constexpr,
    BATCH_CAPACITY: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    recon_weight, beta, capacity = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    normalizer, recon_term, excess = tl.load(state_ptr + 3), tl.load(state_ptr + 4), tl.load(state_ptr + 5)
    kl_factor = unpack_f64(kl_normalizer, tl.float64)
    batch_sign = tl.full([], 1.0, tl.float64)
    if BATCH_CAPACITY:
        batch_sign = sign(excess)
    zeros = tl.zeros([BLOCK], tl.float64)
    dlog_scales, dbetas, drecon_weights, dcapacities = zeros, zeros, zeros, zeros
    for block in range(n_blocks):
        rows = (pid * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        dloss = _upstream(dloss_ptr, rows, mask, PER_SAMPLE)
        drecon_term = _upstream(drecon_term_ptr, rows, mask, PER_SAMPLE)
        dkl_term = _upstream(dkl_term_ptr, rows, mask, PER_SAMPLE)
        weight = sample_weights(samples, rows, mask)
        terms = sample_terms(sums_ptr, samples, sample_options, capacity, rows, n_rows)
        of_loss, of_recon = dloss * recon_weight * normalizer, drecon_term * normalizer
        if not sample_options.weighs_elements:
            of_recon += of_loss * terms.recon_weight
        of_kl, of_regularized = dkl_term * kl_factor, dloss * beta * kl_factor * batch_sign * terms.beta
        empty = terms.counts == 0
        by_error = tl.where(empty, 0.0, of_recon * weight * terms.inverse_scale)
        of_images, of_counts = of_recon * terms.recon, by_error * terms.counts
        nll_weight = unpack_f64(sample_options.nll_weight, tl.float64)
        of_scale = of_recon * (terms.counts * nll_weight - terms.scaled)
        error_weight = unpack_f64(sample_options.error_weight, tl.float64)
        tl.store(coefficients_ptr + rows, by_error * error_weight, mask=mask)
        if sample_options.weighs_elements:
            by_weighed = tl.where(empty, 0.0, of_loss * weight * terms.inverse_scale)
            of_images += of_loss * terms.weighed
            of_counts += by_weighed * terms.weights
            of_scale += of_loss * (terms.weights * nll_weight - terms.weighed_scaled)
            tl.store(coefficients_ptr + 4 * n_rows + rows, by_weighed * error_weight, mask=mask)
        through, coefficient_kl = of_regularized * weight * terms.capacity_sign * terms.passes, of_kl * weight
        if not HAS_ELEMENT_FREE_BITS:
            coefficient_kl += through
        tl.store(coefficients_ptr + n_rows + rows, dloss + drecon_term / recon_weight, mask=mask)
        tl.store(coefficients_ptr + 2 * n_rows + rows, coefficient_kl, mask=mask)
        tl.store(coefficients_ptr + 3 * n_rows + rows, through, mask=mask)
        _store(gradients.kl, coefficient_kl, rows, mask)
        _store(gradients.weight, of_images + of_kl * terms.kl + of_regularized * terms.regularized, rows, mask)
        _store(gradients.extra, of_counts * unpack_f64(sample_options.extra_weight, tl.float64), rows, mask)
        _store(gradients.recon_weight, of_loss * weight * terms.recon, rows, mask)
        _store(gradients.beta, dloss * beta * kl_factor * weight * terms.regularized, rows, mask)
        if gradients.log_scale is not None:
            dlog_scale = tl.where(empty | ~mask, 0.0, of_scale * weight * terms.slope)
            dlog_scales += dlog_scale
            if not sample_options.one_scale:
                _store(gradients.log_scale, dlog_scale, rows, mask)
        if PER_SAMPLE:
            dbetas += tl.where(mask, dloss * weight * terms.regularized, 0.0)
            drecon_weights += tl.where(mask, dloss * weight * terms.recon, 0.0)
        dcapacities -= tl.where(mask, of_regularized * weight * terms.capacity_sign, 0.0)
    if sample_options.one_scale:
        _store_number(gradients.log_scale, tl.sum(dlog_scales))
    if PER_SAMPLE or dloss_ptr is not None:
        sums = (dbetas, drecon_weights, dcapacities)
        batch = (recon_term, excess, batch_sign, beta, kl_factor * n_rows)
        _store_number_gradients(number_gradients, dloss_ptr, sums, batch, BATCH_CAPACITY, PER_SAMPLE)


def sample_gradients(
    plan: ElboPlan,
    samples: Samples,
    saved: tuple[Tensor, ...],
    upstream: tuple[Tensor | None, ...],
    gradients: Samples,
    number_gradients: ElboNumbers,
) -> SampleCoefficients:
    """Write the gradients of what acts on samples; return the coefficients of the gradients of each sample's elements.

    Args:
        saved: Returned by `sample_terms_fwd`.
        upstream: Gradients of (loss, recon term, KL term).
        gradients, number_gradients: Buffers; None where no gradient is wanted.
    """
    sums, state = saved
    n_rows = plan.fold[0]
    coefficients = sums.new_empty((len(SampleCoefficients._fields), n_rows))
    n_blocks = triton.cdiv(n_rows, BLOCK)
    one_program = any(t is not None for t in number_gradients) or (
        gradients.log_scale is not None and gradients.log_scale.ndim == 0
    )
    _sample_gradients_kernel[(1 if one_program else n_blocks,)](
        sums_ptr=sums,
        samples=samples,
        sample_options=plan.sample_options,
        state_ptr=state,
        dloss_ptr=upstream[0],
        drecon_term_ptr=upstream[1],
        dkl_term_ptr=upstream[2],
        coefficients_ptr=coefficients,
        gradients=gradients,
        number_gradients=number_gradients,
        kl_normalizer=plan.factors[2],
        n_rows=n_rows,
        n_blocks=n_blocks if one_program else 1,
        HAS_ELEMENT_FREE_BITS=plan.bounds.free_bits is not None,
        BATCH_CAPACITY=plan.batch_capacity,
        PER_SAMPLE=plan.shape != (),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return SampleCoefficients(*coefficients.unbind())
