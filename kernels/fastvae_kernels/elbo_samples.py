"""Losses with options that act on samples: sums of each sample, then their terms, and the gradients of both.

Two launches after the one that reads images and latents, and one before the one that writes their gradients.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold
from ._tile import NUM_WARPS, load, unpack_f64
from .plan import SamplePlan
from .samples import Samples, pack_numbers, sample_terms, sign
from .types import ElboNumbers

BLOCK = 1024  # samples that a program takes at a time
N_STATE = 6  # numbers that the forward pass leaves for the backward pass


class SampleCoefficients(NamedTuple):
    """What multiplies the gradients of each row's elements: pointers to [n_rows], or None where rows are alike."""

    error: Any = None
    held: Any = None  # of gradients that the forward pass wrote
    kl: Any = None
    free_bits: Any = None


@triton.jit(do_not_specialize=["n_elements"])
def _sample_sums_kernel(
    recon_partials_ptr,  # [n_rows, n_recon_partials], read; None: no images
    count_partials_ptr,  # [n_rows, n_recon_partials], read; None: all elements count
    kl_partials_ptr,  # [n_rows, n_kl_partials], read; None: no KL
    free_bits_partials_ptr,  # [n_rows, n_kl_partials], read; None: no free bits by element
    sums_ptr,  # [4, n_rows] float64, written
    n_elements,  # of a sample: bits of a float64
    n_rows,
    n_recon_partials,
    n_kl_partials,
    BLOCK_ROWS: tl.constexpr,
    RECON_COLS: tl.constexpr,
    KL_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < n_rows
    errors = fold(recon_partials_ptr, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    counts = tl.zeros([BLOCK_ROWS], tl.float64) + unpack_f64(n_elements, tl.float64)
    if count_partials_ptr is not None:
        counts = fold(count_partials_ptr, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    kl = fold(kl_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS)
    regularized = kl
    if free_bits_partials_ptr is not None:
        regularized = fold(free_bits_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS)
    tl.store(sums_ptr + rows, errors, mask=mask)
    tl.store(sums_ptr + n_rows + rows, counts, mask=mask)
    tl.store(sums_ptr + 2 * n_rows + rows, kl, mask=mask)
    tl.store(sums_ptr + 3 * n_rows + rows, regularized, mask=mask)


@triton.jit
def _weights(samples, rows, mask):
    return load(samples.weight + rows, mask, tl.float64) if samples.weight is not None else mask.to(tl.float64)


@triton.jit(do_not_specialize=["recon_normalizer", "kl_normalizer"])
def _sample_terms_kernel(
    sums_ptr,  # [4, n_rows] float64, read
    samples,  # Samples
    sample_options,  # SampleOptions
    numbers,  # Numbers
    loss_ptr,  # 0-d or [n_rows], written, as are the terms
    recon_ptr,
    kl_ptr,
    state_ptr,  # [N_STATE] float64, written: numbers, normalizer of the reconstruction, terms
    recon_normalizer,  # bits of a float64, as is kl_normalizer
    kl_normalizer,
    n_rows,
    n_blocks,  # of rows that a program takes
    MASK_NORMALIZE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    dtype = loss_ptr.dtype.element_ty
    recon_weight, beta = unpack_f64(numbers.recon_weight, tl.float64), unpack_f64(numbers.beta, tl.float64)
    capacity = beta * 0.0
    if numbers.capacity is not None:
        capacity = unpack_f64(numbers.capacity, tl.float64)
    normalizer, kl_factor = unpack_f64(recon_normalizer, tl.float64), unpack_f64(kl_normalizer, tl.float64)
    recons = tl.zeros([BLOCK], tl.float64)
    kls = tl.zeros([BLOCK], tl.float64)
    regularizeds = tl.zeros([BLOCK], tl.float64)
    n_selected = tl.zeros([BLOCK], tl.float64)
    for block in range(n_blocks):
        rows = (pid * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        weight = _weights(samples, rows, mask)
        recon, kl, regularized, counts, _, _, _, _, _ = sample_terms(
            sums_ptr, samples, sample_options, capacity, rows, n_rows
        )
        recons += tl.where(mask & (counts != 0), weight * recon, 0.0)
        kls += tl.where(mask, weight * kl, 0.0)
        regularizeds += tl.where(mask, weight * regularized, 0.0)
        n_selected += tl.where(mask, counts, 0.0)
    if PER_SAMPLE:
        rows = pid * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        tl.store(loss_ptr + rows, (recon_weight * recons + beta * regularizeds).to(dtype), mask=mask)
        tl.store(recon_ptr + rows, recons.to(dtype), mask=mask)
        tl.store(kl_ptr + rows, kls.to(dtype), mask=mask)
        recon_term, excess = recon_weight * 0.0, recon_weight * 0.0
    else:
        if MASK_NORMALIZE:
            n = tl.sum(n_selected)
            # nothing selected: a term of 0, or of NaN where there is nothing to select from
            normalizer = tl.where(n == 0, 0.0 * normalizer, 1.0 / tl.where(n == 0, 1.0, n))
        recon_term = tl.sum(recons) * normalizer
        excess = tl.sum(regularizeds) * kl_factor
        regularized_term = excess
        if numbers.capacity is not None:
            if not sample_options.capacity_per_sample:
                excess -= capacity * (kl_factor * n_rows)
                regularized_term = tl.abs(excess)
        tl.store(loss_ptr, (recon_weight * recon_term + beta * regularized_term).to(dtype))
        tl.store(recon_ptr, recon_term.to(dtype))
        tl.store(kl_ptr, (tl.sum(kls) * kl_factor).to(dtype))
    if pid == 0:
        tl.store(state_ptr, recon_weight)
        tl.store(state_ptr + 1, beta)
        tl.store(state_ptr + 2, capacity)
        tl.store(state_ptr + 3, normalizer)
        tl.store(state_ptr + 4, recon_term)
        tl.store(state_ptr + 5, excess)


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
def _store_sum(ptr, values):
    if ptr is not None:
        tl.store(ptr, _stored(tl.sum(values), ptr))


@triton.jit(do_not_specialize=["kl_normalizer"])
def _sample_gradients_kernel(
    sums_ptr,  # [4, n_rows] float64, read
    samples,  # Samples
    sample_options,  # SampleOptions
    state_ptr,  # [N_STATE] float64, read
    dloss_ptr,  # 0-d or [n_rows], read, as are the next two; None: no gradient was given
    drecon_term_ptr,
    dkl_term_ptr,
    coefficients_ptr,  # [4, n_rows] float64, written: see `SampleCoefficients`
    gradients,  # Samples, written
    dbeta_ptr,  # 0-d, written, as are the next two; None: not wanted
    drecon_weight_ptr,
    dcapacity_ptr,
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
    dlog_scales = tl.zeros([BLOCK], tl.float64)
    dbetas = tl.zeros([BLOCK], tl.float64)
    drecon_weights = tl.zeros([BLOCK], tl.float64)
    dcapacities = tl.zeros([BLOCK], tl.float64)
    for block in range(n_blocks):
        rows = (pid * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        dloss = _upstream(dloss_ptr, rows, mask, PER_SAMPLE)
        drecon_term = _upstream(drecon_term_ptr, rows, mask, PER_SAMPLE)
        dkl_term = _upstream(dkl_term_ptr, rows, mask, PER_SAMPLE)
        weight = _weights(samples, rows, mask)
        recon, kl, regularized, counts, scaled, inverse_scale, slope, passes, capacity_sign = sample_terms(
            sums_ptr, samples, sample_options, capacity, rows, n_rows
        )
        of_recon = (dloss * recon_weight + drecon_term) * normalizer
        of_kl = dkl_term * kl_factor
        of_regularized = dloss * beta * kl_factor * batch_sign
        by_error = tl.where(counts == 0, 0.0, of_recon * weight * inverse_scale)
        through = of_regularized * weight * capacity_sign * passes
        coefficient_kl = of_kl * weight
        if not HAS_ELEMENT_FREE_BITS:
            coefficient_kl += through
        tl.store(coefficients_ptr + rows, by_error * unpack_f64(sample_options.error_weight, tl.float64), mask=mask)
        tl.store(coefficients_ptr + n_rows + rows, dloss + drecon_term / recon_weight, mask=mask)
        tl.store(coefficients_ptr + 2 * n_rows + rows, coefficient_kl, mask=mask)
        tl.store(coefficients_ptr + 3 * n_rows + rows, through, mask=mask)
        _store(gradients.kl, coefficient_kl, rows, mask)
        _store(gradients.weight, of_recon * recon + of_kl * kl + of_regularized * regularized, rows, mask)
        _store(gradients.extra, by_error * counts * unpack_f64(sample_options.extra_weight, tl.float64), rows, mask)
        if gradients.log_scale is not None:
            of_scale = counts * unpack_f64(sample_options.nll_weight, tl.float64) - scaled
            dlog_scale = tl.where((counts == 0) | ~mask, 0.0, of_recon * weight * of_scale * slope)
            dlog_scales += dlog_scale
            if not sample_options.one_scale:
                _store(gradients.log_scale, dlog_scale, rows, mask)
        if PER_SAMPLE:
            dbetas += tl.where(mask, dloss * weight * regularized, 0.0)
            drecon_weights += tl.where(mask, dloss * weight * recon, 0.0)
        dcapacities -= tl.where(mask, of_regularized * weight * capacity_sign, 0.0)
    if sample_options.one_scale:
        _store_sum(gradients.log_scale, dlog_scales)
    if PER_SAMPLE:
        _store_sum(dbeta_ptr, dbetas)
        _store_sum(drecon_weight_ptr, drecon_weights)
        _store_sum(dcapacity_ptr, dcapacities)
    elif dloss_ptr is not None:
        dloss_of_all = tl.load(dloss_ptr).to(tl.float64)
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr, _stored(dloss_of_all * (excess * batch_sign), dbeta_ptr))
        if drecon_weight_ptr is not None:
            tl.store(drecon_weight_ptr, _stored(dloss_of_all * recon_term, drecon_weight_ptr))
        if dcapacity_ptr is not None:
            if BATCH_CAPACITY:
                dcapacity = -dloss_of_all * beta * batch_sign * (kl_factor * n_rows)
                tl.store(dcapacity_ptr, _stored(dcapacity, dcapacity_ptr))
            else:
                _store_sum(dcapacity_ptr, dcapacities)


def sample_terms_fwd(
    plan: SamplePlan,
    partials: tuple[Tensor | None, ...],
    samples: Samples,
    numbers: ElboNumbers,
    loss: Tensor,
    recon_term: Tensor,
    kl_term: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the terms, given partial sums of (errors, selected elements, KL, KL under free bits) of each sample; return
    the sums of each sample and the state, which the backward pass needs.
    """
    sums = loss.new_empty((4, plan.n_rows), dtype=torch.float64)
    state = loss.new_empty(N_STATE, dtype=torch.float64)
    if plan.fold_programs:
        _sample_sums_kernel[(plan.fold_programs,)](
            *partials, sums, plan.options.n_elements, *plan.fold, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    n_blocks = triton.cdiv(plan.n_rows, BLOCK)
    _sample_terms_kernel[(n_blocks if plan.per_sample else 1,)](
        sums_ptr=sums,
        samples=samples,
        sample_options=plan.options,
        numbers=pack_numbers(numbers),
        loss_ptr=loss,
        recon_ptr=recon_term,
        kl_ptr=kl_term,
        state_ptr=state,
        recon_normalizer=plan.normalizers[0],
        kl_normalizer=plan.normalizers[1],
        n_rows=plan.n_rows,
        n_blocks=1 if plan.per_sample else n_blocks,
        MASK_NORMALIZE=plan.mask_normalize,
        PER_SAMPLE=plan.per_sample,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return sums, state


def sample_gradients(
    plan: SamplePlan,
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
    coefficients = torch.empty_like(sums)
    n_blocks = triton.cdiv(plan.n_rows, BLOCK)
    one_program = any(t is not None for t in number_gradients) or (
        gradients.log_scale is not None and gradients.log_scale.ndim == 0
    )
    _sample_gradients_kernel[(1 if one_program else n_blocks,)](
        sums_ptr=sums,
        samples=samples,
        sample_options=plan.options,
        state_ptr=state,
        dloss_ptr=upstream[0],
        drecon_term_ptr=upstream[1],
        dkl_term_ptr=upstream[2],
        coefficients_ptr=coefficients,
        gradients=gradients,
        dbeta_ptr=number_gradients.beta,
        drecon_weight_ptr=number_gradients.recon_weight,
        dcapacity_ptr=number_gradients.capacity,
        kl_normalizer=plan.normalizers[1],
        n_rows=plan.n_rows,
        n_blocks=n_blocks if one_program else 1,
        HAS_ELEMENT_FREE_BITS=plan.element_free_bits,
        BATCH_CAPACITY=plan.batch_capacity,
        PER_SAMPLE=plan.per_sample,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return SampleCoefficients(*coefficients.unbind())
