"""Statistics of latents by dimension, over the batch. Each program walks down a range of samples, reading each input
once; where there are several ranges, a small launch merges them.

Squares are summed of distances from a shift near the mean, each range's own: those of mu would cancel where the mean
is large. Ranges are merged in float64. Numbers that are not finite make a sum not finite: only the ranges where that
happened are read again, to count them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, element_offsets, layout, load, on_device, pack_f64, triton_dtype, unpack_f64
from .gaussian import clamp, exp, twice_kl_element
from .types import compute_dtype, meta_of

_LINE_BYTES = 128  # of a cache: rows of a tile are as long where the latents are
_TILE_BYTES = 2048  # four warps of 32 threads with a 16-byte access each: sums of a few columns, and few registers
_ENOUGH_PROGRAMS = 1024
# tiles that a program takes: so many that partial sums are few, so few that float32 sums keep their digits
_FEWEST_STEPS, _MOST_STEPS = 8, 64
_MERGE_ELEMENTS = 1024


class Split(NamedTuple):
    """How [n_rows, n_cols] is cut into tiles, and its rows into ranges; sizes alone decide."""

    block_rows: int
    block_cols: int
    range_rows: int
    ranges: int
    col_programs: int


def _split(n_rows: int, n_cols: int, element_size: int) -> Split:
    elements = _TILE_BYTES // element_size
    cols = min(triton.next_power_of_2(n_cols), _LINE_BYTES // element_size)
    rows = min(triton.next_power_of_2(n_rows), elements // cols)
    cols = min(triton.next_power_of_2(n_cols), elements // rows)
    row_tiles, col_programs = triton.cdiv(n_rows, rows), triton.cdiv(n_cols, cols)
    steps = min(max(triton.cdiv(row_tiles * col_programs, _ENOUGH_PROGRAMS), _FEWEST_STEPS), _MOST_STEPS)
    range_rows = triton.cdiv(row_tiles, triton.cdiv(row_tiles, steps)) * rows
    return Split(rows, cols, range_rows, triton.cdiv(n_rows, range_rows), col_programs)


@triton.jit
def _finite(x, DTYPE: tl.constexpr):
    """By the largest finite number: the compiler turns a comparison with infinity into twice the instructions."""
    return tl.abs(x) <= (1.7976931348623157e308 if DTYPE == tl.float64 else 3.4028234663852886e38)


@triton.jit
def _load_tile(latents, rows, cols, mask, DTYPE: tl.constexpr):
    mu_ptr, logvar_ptr, mu_strides, logvar_strides, sizes = latents
    mu = load(mu_ptr + element_offsets(rows, cols, mu_strides, sizes), mask, DTYPE)
    return mu, load(logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes), mask, DTYPE)


@triton.jit
def _add_tile(mu, logvar, mask, low, high, shift, stats, DTYPE: tl.constexpr):
    """Add a tile to (sums and squares of distances from the shift, twice the KLs, clamped, infinite)."""
    sums, squares, kls, clamped, infinite = stats
    distance = mu - shift
    if low is not None:
        outside = (logvar < unpack_f64(low, DTYPE)) | (logvar > unpack_f64(high, DTYPE))
        clamped += (outside if mask is None else outside & mask).to(tl.int32)
        infinite += logvar * 0.0  # NaN if logvar is infinite, which the sum of clamped ones does not show
        logvar = clamp(logvar, low, high, DTYPE)
    kl = twice_kl_element(mu, logvar, exp(logvar, DTYPE, 0.5), DTYPE)
    if mask is not None:
        distance, kl = tl.where(mask, distance, 0.0), tl.where(mask, kl, 0.0)
    return sums + distance, squares + distance * distance, kls + kl, clamped, infinite


@triton.jit
def _total(sums):
    """Over the rows: [1, BLOCK_COLS]."""
    return tl.sum(sums, axis=0)[None, :]


@triton.jit
def _count_nonfinite(
    latents, start, stop, cols, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DTYPE: tl.constexpr
):
    """How many numbers of a range are NaN or infinite, by column."""
    count = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32)
    for first_row in range(start, stop, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
        mu, logvar = _load_tile(latents, rows, cols, (rows < stop) & (cols < n_cols), DTYPE)
        count += tl.where(_finite(mu, DTYPE), 0, 1) + tl.where(_finite(logvar, DTYPE), 0, 1)
    return _total(count)


@triton.jit
def _store_results(totals, results, cols, n_rows, n_cols, ACTIVE_VARIANCE: tl.constexpr):
    """Finish dimensions, [1, BLOCK_COLS] each, in float64, and count over them."""
    shift, sums, squares, kls, nonfinite, clamped = totals
    kl_ptr, mean_ptr, variance_ptr, counts_ptr = results
    mask = cols < n_cols
    dtype = mean_ptr.dtype.element_ty
    sums, squares = sums.to(tl.float64), squares.to(tl.float64)
    offset = sums / n_rows
    # one sample has no variance; lanes outside have 0, which is not active
    squares = tl.where(n_rows == 1, float("nan"), squares - sums * offset)
    variance = (squares / tl.maximum(n_rows - 1, 1)).to(dtype)
    tl.store(kl_ptr + cols, (0.5 * kls.to(tl.float64) / n_rows).to(dtype), mask=mask)
    tl.store(mean_ptr + cols, (shift.to(tl.float64) + offset).to(dtype), mask=mask)
    tl.store(variance_ptr + cols, variance, mask=mask)
    counts_ptr += tl.program_id(0).to(tl.int64) * 3
    tl.store(counts_ptr, tl.sum((variance >= ACTIVE_VARIANCE).to(tl.int64)))
    tl.store(counts_ptr + 1, tl.sum(nonfinite.to(tl.int64)))
    tl.store(counts_ptr + 2, tl.sum(clamped.to(tl.int64)))


@triton.jit(do_not_specialize=["low", "high"])
def _latent_stats_kernel(
    mu_ptr,  # [n_rows, n_cols], read
    logvar_ptr,  # [n_rows, n_cols], read
    partials_ptr,  # [n_ranges, 6, n_cols], written; None: the only range's are the results
    results,  # of `_store_results`: kl, mean, variance [n_cols], counts [n_programs, 3]
    low,  # bounds of logvar as bits of a float64, or None
    high,
    mu_strides,
    logvar_strides,
    sizes,
    n_rows,
    n_cols,
    range_rows,
    n_col_programs,
    ACTIVE_VARIANCE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COUNT_ROWS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    range_index = pid // n_col_programs
    start = range_index * range_rows
    stop = tl.minimum(start + range_rows, n_rows)
    first_col = (pid % n_col_programs) * BLOCK_COLS
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    latents = mu_ptr, logvar_ptr, mu_strides, logvar_strides, sizes
    zeros = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    stats = (zeros, zeros, zeros, tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32), zeros)
    rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
    mask = (rows < stop) & (cols < n_cols)
    mu, logvar = _load_tile(latents, rows, cols, mask, DTYPE)
    mean = tl.sum(mu, axis=0)[None, :] / tl.minimum(stop - start, BLOCK_ROWS).to(DTYPE)
    shift = tl.where(_finite(mean, DTYPE), mean, 0.0)
    stats = _add_tile(mu, logvar, mask, low, high, shift, stats, DTYPE)
    second = start + BLOCK_ROWS
    # to where no tile needs a mask
    whole = tl.where(first_col + BLOCK_COLS <= n_cols, stop - (stop - start) % BLOCK_ROWS, second)
    for first_row in range(second, whole, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
        mu, logvar = _load_tile(latents, rows, cols, None, DTYPE)
        stats = _add_tile(mu, logvar, None, low, high, shift, stats, DTYPE)
    for first_row in range(tl.maximum(second, whole), stop, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < stop) & (cols < n_cols)
        mu, logvar = _load_tile(latents, rows, cols, mask, DTYPE)
        stats = _add_tile(mu, logvar, mask, low, high, shift, stats, DTYPE)
    sums, squares, kls, clamped, infinite = stats
    sums, squares, kls = _total(sums), _total(squares), _total(kls)
    nonfinite = tl.zeros([1, BLOCK_COLS], tl.int32)
    if tl.sum(tl.where(_finite(sums, DTYPE) & _finite(kls, DTYPE) & (_total(infinite) == 0), 0, 1)) > 0:
        nonfinite = _count_nonfinite(latents, start, stop, cols, n_cols, COUNT_ROWS, BLOCK_COLS, DTYPE)
    totals = (shift, sums, squares, kls, nonfinite, _total(clamped))
    if partials_ptr is None:
        _store_results(totals, results, cols, n_rows, n_cols, ACTIVE_VARIANCE)
    else:
        for i in tl.static_range(6):
            at = partials_ptr + (range_index * 6 + i) * n_cols + cols
            tl.store(at, totals[i].to(DTYPE), mask=cols < n_cols)


@triton.jit
def _partial(partials_ptr, i, ranges, cols, n_cols, mask):
    return tl.load(partials_ptr + (ranges * 6 + i) * n_cols + cols, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _merge_kernel(
    partials_ptr,  # [n_ranges, 6, n_cols], read
    results,  # as above
    n_rows,
    n_cols,
    range_rows,
    n_ranges,
    ACTIVE_VARIANCE: tl.constexpr,
    BLOCK_RANGES: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    shift = tl.load(partials_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float64)
    sums = tl.zeros([BLOCK_RANGES, BLOCK_COLS], tl.float64)
    squares, kls, nonfinite, clamped = sums, sums, sums, sums
    for first in range(0, n_ranges, BLOCK_RANGES):
        ranges = tl.arange(0, BLOCK_RANGES)[:, None].to(tl.int64) + first
        mask = (ranges < n_ranges) & (cols < n_cols)
        rows = tl.minimum(n_rows - ranges * range_rows, range_rows).to(tl.float64)
        # between shifts: to be added to each of a range's distances
        gap = tl.where(mask, _partial(partials_ptr, 0, ranges, cols, n_cols, mask) - shift, 0.0)
        range_sums = _partial(partials_ptr, 1, ranges, cols, n_cols, mask)
        sums += range_sums + rows * gap
        squares += _partial(partials_ptr, 2, ranges, cols, n_cols, mask) + gap * (2.0 * range_sums + rows * gap)
        kls += _partial(partials_ptr, 3, ranges, cols, n_cols, mask)
        nonfinite += _partial(partials_ptr, 4, ranges, cols, n_cols, mask)
        clamped += _partial(partials_ptr, 5, ranges, cols, n_cols, mask)
    totals = (shift, _total(sums), _total(squares), _total(kls), _total(nonfinite), _total(clamped))
    _store_results(totals, results, cols, n_rows, n_cols, ACTIVE_VARIANCE)


def latent_stats(
    mu: Tensor, logvar: Tensor, logvar_clamp: tuple[float, float] | None, active_variance: float
) -> tuple[Tensor, ...]:
    """(kl, mean, variance) of dimensions and how many are active, how many numbers not finite, how many logvar
    clamped.
    """
    dtype = compute_dtype(mu, logvar)
    kl, mean, variance = (mu.new_empty(mu.shape[1:], dtype=dtype) for _ in range(3))
    if mu.numel() == 0:
        counts = mu.new_zeros(3, dtype=torch.int64)
        return *(result.fill_(torch.nan) for result in (kl, mean, variance)), *counts.unbind()
    at = layout((meta_of(mu), meta_of(logvar)), by_sample=True, c_order=True)
    split = _split(at.n_rows, at.n_cols, max(mu.element_size(), logvar.element_size()))
    whole = split.ranges == 1
    partials = None if whole else mu.new_empty(split.ranges, 6, at.n_cols, dtype=dtype)
    merge_ranges = min(triton.next_power_of_2(split.ranges), _MERGE_ELEMENTS // 8)
    merge_cols = min(triton.next_power_of_2(at.n_cols), _MERGE_ELEMENTS // merge_ranges)
    programs = split.col_programs if whole else triton.cdiv(at.n_cols, merge_cols)
    counts = mu.new_empty(programs, 3, dtype=torch.int64)
    results = (kl, mean, variance, counts)
    low, high = logvar_clamp or (None, None)
    with on_device(mu.device):
        _latent_stats_kernel[(split.ranges * split.col_programs,)](
            *(mu, logvar, partials, results if whole else None, pack_f64(low), pack_f64(high)),
            *(*at.strides, at.sizes, at.n_rows, at.n_cols, split.range_rows, split.col_programs),
            ACTIVE_VARIANCE=active_variance,
            DTYPE=triton_dtype(dtype),
            BLOCK_ROWS=split.block_rows,
            BLOCK_COLS=split.block_cols,
            COUNT_ROWS=max(32 * NUM_WARPS // split.block_cols, 1),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        if not whole:
            _merge_kernel[(programs,)](
                *(partials, results, at.n_rows, at.n_cols, split.range_rows, split.ranges),
                ACTIVE_VARIANCE=active_variance,
                BLOCK_RANGES=merge_ranges,
                BLOCK_COLS=merge_cols,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return kl, mean, variance, *(counts[0] if programs == 1 else counts.sum(0)).unbind()
