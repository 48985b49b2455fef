"""Group normalization and SiLU, forward: moments of ranges of pixels, their merge by group, and the result; or all in
one launch where a group fits into registers.

Squares are summed of distances from a shift near the mean, each range's own: those of x would cancel where the mean is
large. Ranges are merged in float64.
"""

import triton
import triton.language as tl

from ._group_norm import (
    activate,
    channels_at,
    group_at,
    load_affine,
    of_channels,
    origin,
    partial_at,
    step_at,
    sums_at,
)
from ._tile import load, unpack_f64


@triton.jit
def _load_sum(x_ptr, residual_ptr, total_ptr, offsets, mask, DTYPE: tl.constexpr):
    """x, or x + residual, which is written and read as it was rounded."""
    x = load(x_ptr + offsets, mask, DTYPE)
    if residual_ptr is not None:
        rounded = (x + load(residual_ptr + offsets, mask, DTYPE)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=mask)
        x = rounded.to(DTYPE)
    return x


@triton.jit
def moments_kernel(
    x_ptr,  # read
    residual_ptr,  # read, or None
    total_ptr,  # x + residual, written, or None
    means_ptr,  # [samples, channels, ranges], or [samples, ranges, channels] of channels_last; written
    squares_ptr,  # sums of squared distances from the mean, likewise
    n_rows,
    n_cols,
    n_row_tiles,
    n_col_tiles,
    DTYPE: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    sample, pixel_range, first_row, first_col = origin(n_row_tiles, n_col_tiles, LAST, ROWS, COLS, STEPS)
    axis: tl.constexpr = 0 if LAST else 1
    pixels = n_rows - first_row if LAST else n_cols - first_col
    offsets, mask = step_at(0, sample, first_row, first_col, n_rows, n_cols, LAST, WHOLE, ROWS, COLS)
    x = _load_sum(x_ptr, residual_ptr, total_ptr, offsets, mask, DTYPE)
    shift = tl.sum(x, axis=axis, keep_dims=True) / tl.minimum(pixels, ROWS if LAST else COLS).to(DTYPE)
    distance = x - shift if WHOLE else tl.where(mask, x - shift, 0.0)
    sums, squares = distance, distance * distance
    for step in range(1, STEPS):
        offsets, mask = step_at(step, sample, first_row, first_col, n_rows, n_cols, LAST, WHOLE, ROWS, COLS)
        x = _load_sum(x_ptr, residual_ptr, total_ptr, offsets, mask, DTYPE)
        distance = x - shift if WHOLE else tl.where(mask, x - shift, 0.0)
        sums += distance
        squares += distance * distance
    count = tl.minimum(pixels, (ROWS if LAST else COLS) * STEPS).to(DTYPE)
    total = tl.sum(sums, axis=axis, keep_dims=True)
    offset = total / count
    to, inside = sums_at(
        sample, pixel_range, first_row, first_col, n_rows, n_cols, n_row_tiles, n_col_tiles, LAST, ROWS, COLS
    )
    tl.store(means_ptr + to, shift + offset, mask=inside)
    tl.store(squares_ptr + to, tl.sum(squares, axis=axis, keep_dims=True) - total * offset, mask=inside)


@triton.jit(do_not_specialize=["eps"])
def merge_moments_kernel(
    means_ptr,  # as above, read
    squares_ptr,
    mean_ptr,  # [samples, groups], written
    rstd_ptr,
    eps,  # bits of a float64
    n_channels,
    n_groups,
    n_pixels,
    n_ranges,
    range_pixels,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,  # a power of 2, at least those of a group
    RANGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    size = n_channels // n_groups
    channel = tl.arange(0, CHANNELS)[:, None]
    channels = (pid % n_groups) * size + channel
    elements = n_pixels.to(tl.float64) * size
    sums = tl.zeros([CHANNELS, RANGES], tl.float64)
    for first in range(0, n_ranges, RANGES):
        ranges = first + tl.arange(0, RANGES)[None, :].to(tl.int64)
        mask = (channel < size) & (ranges < n_ranges)
        count = tl.minimum(n_pixels - ranges * range_pixels, range_pixels).to(tl.float64)
        at = partial_at(pid // n_groups, channels, ranges, n_channels, n_ranges, LAST)
        sums += tl.where(mask, load(means_ptr + at, mask, tl.float64) * count, 0.0)
    mean = tl.sum(tl.sum(sums, axis=1), axis=0) / elements
    squares = tl.zeros([CHANNELS, RANGES], tl.float64)
    for first in range(0, n_ranges, RANGES):
        ranges = first + tl.arange(0, RANGES)[None, :].to(tl.int64)
        mask = (channel < size) & (ranges < n_ranges)
        count = tl.minimum(n_pixels - ranges * range_pixels, range_pixels).to(tl.float64)
        at = partial_at(pid // n_groups, channels, ranges, n_channels, n_ranges, LAST)
        gap = load(means_ptr + at, mask, tl.float64) - mean
        squares += tl.where(mask, load(squares_ptr + at, mask, tl.float64) + count * gap * gap, 0.0)
    variance = tl.sum(tl.sum(squares, axis=1), axis=0) / elements
    dtype = mean_ptr.dtype.element_ty
    tl.store(mean_ptr + pid, mean.to(dtype))
    tl.store(rstd_ptr + pid, (1.0 / tl.sqrt(variance + unpack_f64(eps, tl.float64))).to(dtype))


@triton.jit
def apply_kernel(
    x_ptr,  # read
    y_ptr,  # written
    affine,  # (weight, bias), [C], or None
    statistics,  # (mean, rstd), [samples, groups], read
    n_channels,
    n_groups,
    n_rows,
    n_cols,
    n_row_tiles,
    n_col_tiles,
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    sample, _, first_row, first_col = origin(n_row_tiles, n_col_tiles, LAST, ROWS, COLS, STEPS)
    channels, groups, inside = channels_at(
        sample, first_row, first_col, n_rows, n_cols, n_channels, n_groups, LAST, WHOLE, ROWS, COLS
    )
    weight, bias, mean, rstd = load_affine(affine, statistics, channels, groups, inside, DTYPE)
    for step in range(STEPS):
        offsets, mask = step_at(step, sample, first_row, first_col, n_rows, n_cols, LAST, WHOLE, ROWS, COLS)
        u = (load(x_ptr + offsets, mask, DTYPE) - mean) * (rstd * weight) + bias
        tl.store(y_ptr + offsets, activate(u, SILU).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["eps"])
def group_fwd_kernel(
    x_ptr,  # read
    residual_ptr,  # read, or None
    total_ptr,  # x + residual, written, or None
    y_ptr,  # written
    affine,  # (weight, bias), [C], or None
    statistics,  # (mean, rstd), [samples, groups], written
    eps,  # bits of a float64
    n_channels,
    n_groups,
    n_pixels,
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One group of one sample, all of it in registers."""
    pid = tl.program_id(0).to(tl.int64)
    offsets, channels, mask = group_at(pid, n_channels, n_groups, n_pixels, LAST, WHOLE, CHANNELS, PIXELS)
    elements = (n_channels // n_groups * n_pixels).to(DTYPE)
    x = _load_sum(x_ptr, residual_ptr, total_ptr, offsets, mask, DTYPE)
    mean = tl.sum(x) / elements
    distance = x - mean if WHOLE else tl.where(mask, x - mean, 0.0)
    # what the first sum lost to rounding
    offset = tl.sum(distance) / elements
    distance -= offset
    squares = distance * distance if WHOLE else tl.where(mask, distance * distance, 0.0)
    variance = (tl.sum(squares) / elements).to(tl.float64)
    rstd = (1.0 / tl.sqrt(variance + unpack_f64(eps, tl.float64))).to(DTYPE)
    tl.store(statistics[0] + pid, mean + offset)
    tl.store(statistics[1] + pid, rstd)
    inside = None if WHOLE else channels < (pid % n_groups + 1) * (n_channels // n_groups)
    weight = of_channels(affine[0], channels, inside, 1.0, DTYPE)
    u = distance * (rstd * weight) + of_channels(affine[1], channels, inside, 0.0, DTYPE)
    tl.store(y_ptr + offsets, activate(u, SILU).to(y_ptr.dtype.element_ty), mask=mask)
