"""Losses with options that act on samples, forward: sums of each sample, then their terms.

These two launches take the place of the fold behind the launch that reads images and latents.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold
from ._tile import NUM_WARPS, pack_all, unpack_f64
from .plan import ElboPlan
from .samples import BLOCK, N_STATE, ImagePartials, Samples, sample_terms, sample_weights
from .types import ElboNumbers


@triton.jit(do_not_specialize=["n_elements"])
def _sample_sums_kernel(
    partials,  # ImagePartials, [n_rows, n_recon_partials], read; no counts: all elements count
    kl_partials_ptr,  # [n_rows, n_kl_partials], read; None: no KL
    free_bits_partials_ptr,  # [n_rows, n_kl_partials], read; None: no free bits by element
    sums_ptr,  # [4 or 6, n_rows] float64, written: see `sample_terms`
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
    errors = fold(partials.errors, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    counts = tl.zeros([BLOCK_ROWS], tl.float64) + unpack_f64(n_elements, tl.float64)
    if partials.counts is not None:
        counts = fold(partials.counts, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    kl = fold(kl_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS)
    regularized = kl
    if free_bits_partials_ptr is not None:
        regularized = fold(free_bits_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS)
    tl.store(sums_ptr + rows, errors, mask=mask)
    tl.store(sums_ptr + n_rows + rows, counts, mask=mask)
    tl.store(sums_ptr + 2 * n_rows + rows, kl, mask=mask)
    tl.store(sums_ptr + 3 * n_rows + rows, regularized, mask=mask)
    if partials.weights is not None:
        weighed = fold(partials.weighed, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
        weights = fold(partials.weights, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
        tl.store(sums_ptr + 4 * n_rows + rows, weighed, mask=mask)
        tl.store(sums_ptr + 5 * n_rows + rows, weights, mask=mask)


@triton.jit(do_not_specialize=["recon_normalizer", "kl_normalizer"])
def _sample_terms_kernel(
    sums_ptr,  # [4 or 6, n_rows] float64, read
    samples,  # Samples
    sample_options,  # SampleOptions
    numbers,  # ElboNumbers: bits of float64s, or pointers
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
    weigheds = tl.zeros([BLOCK], tl.float64)
    kls = tl.zeros([BLOCK], tl.float64)
    regularizeds = tl.zeros([BLOCK], tl.float64)
    n_selected = tl.zeros([BLOCK], tl.float64)
    for block in range(n_blocks):
        rows = (pid * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        weight = sample_weights(samples, rows, mask)
        terms = sample_terms(sums_ptr, samples, sample_options, capacity, rows, n_rows)
        recons += tl.where(mask & (terms.counts != 0), weight * terms.recon, 0.0)
        weigheds += tl.where(mask & (terms.counts != 0), weight * terms.weighed, 0.0)
        kls += tl.where(mask, weight * terms.kl, 0.0)
        regularizeds += tl.where(mask, weight * terms.beta * terms.regularized, 0.0)
        n_selected += tl.where(mask, terms.counts, 0.0)
    if PER_SAMPLE:
        rows = pid * BLOCK + tl.arange(0, BLOCK)
        mask = rows < n_rows
        tl.store(loss_ptr + rows, (recon_weight * weigheds + beta * regularizeds).to(dtype), mask=mask)
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
        tl.store(loss_ptr, (recon_weight * tl.sum(weigheds) * normalizer + beta * regularized_term).to(dtype))
        tl.store(recon_ptr, recon_term.to(dtype))
        tl.store(kl_ptr, (tl.sum(kls) * kl_factor).to(dtype))
    if pid == 0:
        tl.store(state_ptr, recon_weight)
        tl.store(state_ptr + 1, beta)
        tl.store(state_ptr + 2, capacity)
        tl.store(state_ptr + 3, normalizer)
        tl.store(state_ptr + 4, recon_term)
        tl.store(state_ptr + 5, excess)


def sample_terms_fwd(
    plan: ElboPlan,
    partials: tuple[ImagePartials, Tensor | None, Tensor | None],
    samples: Samples,
    numbers: Sequence[Any],
    loss: Tensor,
    recon_term: Tensor,
    kl_term: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the terms; return the sums of each sample and the state, which the backward pass needs.

    Args:
        partials: Partial sums of the images, of the KL, and of the KL under free bits of each sample.
    """
    assert plan.sample_options is not None
    n_rows, per_sample = plan.fold[0], plan.shape != ()
    sums = loss.new_empty((4 if partials[0].weights is None else 6, n_rows), dtype=torch.float64)
    state = loss.new_empty(N_STATE, dtype=torch.float64)
    if plan.fold_programs:
        _sample_sums_kernel[(plan.fold_programs,)](
            *partials, sums, plan.sample_options.n_elements, *plan.fold, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    n_blocks = triton.cdiv(n_rows, BLOCK)
    _sample_terms_kernel[(n_blocks if per_sample else 1,)](
        sums_ptr=sums,
        samples=samples,
        sample_options=plan.sample_options,
        numbers=ElboNumbers(*pack_all(*numbers)),
        loss_ptr=loss,
        recon_ptr=recon_term,
        kl_ptr=kl_term,
        state_ptr=state,
        recon_normalizer=plan.recon_normalizer,
        kl_normalizer=plan.factors[2],
        n_rows=n_rows,
        n_blocks=1 if per_sample else n_blocks,
        MASK_NORMALIZE=plan.mask_normalize,
        PER_SAMPLE=per_sample,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return sums, state
