"""Group normalization and SiLU, backward: sums of ranges of pixels, their merge by group, and the gradient by x; or all
in one launch where a group fits into registers. Sums of channels over the samples are another, small launch.

With n = (x - mean) * rstd and du, the gradient by SiLU's input:

    dweight = sum of du * n,  dbias = sum of du,                       over samples and pixels
    dx = rstd * (weight * du - mean of weight * du - n * mean of weight * du * n)       means over a group
"""

import triton
import triton.language as tl

from ._group_norm import (
    channels_at,
    group_at,
    load_affine,
    of_channels,
    origin,
    partial_at,
    step_at,
    sums_at,
    through_silu,
)
from ._tile import load


@triton.jit
def sums_kernel(
    x_ptr,  # read
    dy_ptr,  # read
    affine,  # (weight, bias), [C], or None
    statistics,  # (mean, rstd), [samples, groups], read
    partials,  # sums of du * n and of du: [samples, channels, ranges], or [samples, ranges, channels]; written
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
    sample, pixel_range, first_row, first_col = origin(n_row_tiles, n_col_tiles, LAST, ROWS, COLS, STEPS)
    channels, groups, inside = channels_at(
        sample, first_row, first_col, n_rows, n_cols, n_channels, n_groups, LAST, WHOLE, ROWS, COLS
    )
    weight, bias, mean, rstd = load_affine(affine, statistics, channels, groups, inside, DTYPE)
    products = tl.zeros([ROWS, COLS], DTYPE)
    sums = tl.zeros([ROWS, COLS], DTYPE)
    for step in tl.static_range(STEPS):
        offsets, mask = step_at(step, sample, first_row, first_col, n_rows, n_cols, LAST, WHOLE, ROWS, COLS)
        n = (load(x_ptr + offsets, mask, DTYPE) - mean) * rstd
        # 0 outside, and so are the sums
        du = through_silu(load(dy_ptr + offsets, mask, DTYPE), n, weight, bias, SILU)
        products += du * n if WHOLE else tl.where(mask, du * n, 0.0)
        sums += du if WHOLE else tl.where(mask, du, 0.0)
    axis: tl.constexpr = 0 if LAST else 1
    to, inside = sums_at(
        sample, pixel_range, first_row, first_col, n_rows, n_cols, n_row_tiles, n_col_tiles, LAST, ROWS, COLS
    )
    tl.store(partials[0] + to, tl.sum(products, axis=axis, keep_dims=True), mask=inside)
    tl.store(partials[1] + to, tl.sum(sums, axis=axis, keep_dims=True), mask=inside)


@triton.jit
def merge_sums_kernel(
    partials,  # as above, read
    weight_ptr,  # [C], or None
    channel_sums,  # (sums of du * n, of du), [C, samples] each; written
    group_means,  # means of weight * du * n and of weight * du, [samples, groups] each; written
    n_samples,
    n_channels,
    n_groups,
    n_pixels,
    n_ranges,
    LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    size = n_channels // n_groups
    sample = pid // n_groups
    channel = tl.arange(0, CHANNELS)[:, None]
    channels = (pid % n_groups) * size + channel
    weight = of_channels(weight_ptr, channels, channel < size, 1.0, tl.float64)
    for i in tl.static_range(2):
        sums = tl.zeros([CHANNELS, RANGES], tl.float64)
        for first in range(0, n_ranges, RANGES):
            ranges = first + tl.arange(0, RANGES)[None, :].to(tl.int64)
            mask = (channel < size) & (ranges < n_ranges)
            at = partial_at(sample, channels, ranges, n_channels, n_ranges, LAST)
            sums += load(partials[i] + at, mask, tl.float64)
        of_channel = tl.sum(sums, axis=1, keep_dims=True)
        dtype = group_means[i].dtype.element_ty
        tl.store(channel_sums[i] + channels * n_samples + sample, of_channel.to(dtype), mask=channel < size)
        weighed = tl.sum(tl.where(channel < size, weight * of_channel, 0.0)) / (n_pixels.to(tl.float64) * size)
        tl.store(group_means[i] + pid, weighed.to(dtype))


@triton.jit
def dx_kernel(
    x_ptr,  # read
    dy_ptr,  # read
    dx_ptr,  # written
    affine,  # (weight, bias), [C], or None
    statistics,  # (mean, rstd), [samples, groups], read
    group_means,  # as above, read
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
    product_mean = load(group_means[0] + groups, inside, DTYPE)
    sum_mean = load(group_means[1] + groups, inside, DTYPE)
    for step in range(STEPS):
        offsets, mask = step_at(step, sample, first_row, first_col, n_rows, n_cols, LAST, WHOLE, ROWS, COLS)
        n = (load(x_ptr + offsets, mask, DTYPE) - mean) * rstd
        du = through_silu(load(dy_ptr + offsets, mask, DTYPE), n, weight, bias, SILU)
        dx = rstd * (weight * du - sum_mean - n * product_mean)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def group_bwd_kernel(
    x_ptr,  # read
    dy_ptr,  # read
    dx_ptr,  # written, or None
    affine,  # (weight, bias), [C], or None
    statistics,  # (mean, rstd), [samples, groups], read
    channel_sums,  # (sums of du * n, of du), [C, samples] each; written
    n_samples,
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
    axis: tl.constexpr = 0 if LAST else 1
    size = n_channels // n_groups
    inside = channels < (pid % n_groups + 1) * size
    rstd = tl.load(statistics[1] + pid)
    weight = of_channels(affine[0], channels, inside, 1.0, DTYPE)
    bias = of_channels(affine[1], channels, inside, 0.0, DTYPE)
    n = (load(x_ptr + offsets, mask, DTYPE) - tl.load(statistics[0] + pid)) * rstd
    du = through_silu(load(dy_ptr + offsets, mask, DTYPE), n, weight, bias, SILU)
    if not WHOLE:
        du, n = tl.where(mask, du, 0.0), tl.where(mask, n, 0.0)
    products, sums = tl.sum(du * n, axis=axis, keep_dims=True), tl.sum(du, axis=axis, keep_dims=True)
    to = channels * n_samples + pid // n_groups
    tl.store(channel_sums[0] + to, products, mask=inside)
    tl.store(channel_sums[1] + to, sums, mask=inside)
    if dx_ptr is not None:
        elements = (size * n_pixels).to(DTYPE)
        product_mean = tl.sum(tl.where(inside, weight * products, 0.0)) / elements
        sum_mean = tl.sum(tl.where(inside, weight * sums, 0.0)) / elements
        dx = rstd * (weight * du - sum_mean - n * product_mean)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
