"""What the kernels of group normalization share: how tensors are cut into tiles, and the formulas of an element.

A contiguous tensor is [samples * channels, pixels]; a channels_last one is, for each sample, [pixels, channels]. In
both a program sums along the pixels, over several tiles. Sizes of a sample alone decide how its sums are cut.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._tile import load, power_of_2

_LINE_BYTES = 128  # of a cache: rows of a tile are as long where channels are adjacent
_ENOUGH_PROGRAMS = 1024  # of a sample: beyond, a program takes several tiles
_FEWEST_PIXELS = 256  # of a program, so that its sums, and numbers of channels, are few beside them


class Split(NamedTuple):
    """How a tensor is cut.

    Attributes:
        pixels: That one program takes.
        ranges: Programs along the pixels: partial sums of a channel.
        programs: In all.
        arguments: Of the kernels.
        constants: Of the kernels.
    """

    pixels: int
    ranges: int
    programs: int
    arguments: tuple[int, ...]
    constants: dict[str, Any]


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def split(x: Tensor, tile_bytes: int, most_steps: int) -> Split:
    """The cut of x into tiles of so many bytes; each program takes up to `most_steps` along the pixels."""
    samples, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    size, last = tile_bytes // x.element_size(), is_channels_last(x)
    if last:
        cols = min(power_of_2(channels), _LINE_BYTES // x.element_size())
        rows = min(size // cols, power_of_2(pixels))
        tile_pixels, tile_channels = rows, cols
    else:
        cols = min(power_of_2(pixels), size)
        rows = min(size // cols, power_of_2(channels))
        tile_pixels, tile_channels = cols, rows
    tiles, channel_tiles = -(-pixels // tile_pixels), -(-channels // tile_channels)
    wanted = max(-(-tiles * channel_tiles // _ENOUGH_PROGRAMS), _FEWEST_PIXELS // tile_pixels, 1)
    steps = min(power_of_2(wanted), most_steps, power_of_2(tiles))
    ranges = -(-tiles // steps)
    if last:
        n_rows, n_cols, row_tiles, col_tiles, planes = pixels, channels, ranges, channel_tiles, samples
        whole = pixels % (rows * steps) == 0 and channels % cols == 0
    else:
        n_rows, n_cols, col_tiles, planes = samples * channels, pixels, ranges, 1
        row_tiles = -(-n_rows // rows)
        whole = n_rows % rows == 0 and pixels % (cols * steps) == 0
    constants = {"LAST": last, "WHOLE": whole, "ROWS": rows, "COLS": cols, "STEPS": steps}
    return Split(
        pixels=tile_pixels * steps,
        ranges=ranges,
        programs=planes * row_tiles * col_tiles,
        arguments=(n_rows, n_cols, row_tiles, col_tiles),
        constants=constants,
    )


@triton.jit
def origin(
    n_row_tiles,
    n_col_tiles,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(sample, range of pixels, first row, first column) of a program; the sample is 0 in a contiguous tensor."""
    pid = tl.program_id(0).to(tl.int64)
    col_tile = pid % n_col_tiles
    row_tile = (pid // n_col_tiles) % n_row_tiles
    if LAST:
        sample, pixel_range = pid // n_col_tiles // n_row_tiles, row_tile
        first_row, first_col = row_tile * (ROWS * STEPS), col_tile * COLS
    else:
        sample, pixel_range = pid * 0, col_tile
        first_row, first_col = row_tile * ROWS, col_tile * (COLS * STEPS)
    return sample, pixel_range, first_row, first_col


@triton.jit
def step_at(
    step,
    sample,
    first_row,
    first_col,
    n_rows,
    n_cols,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(offsets, mask) of a program's tile."""
    rows = first_row + tl.arange(0, ROWS)[:, None] + (step * ROWS if LAST else 0)
    cols = first_col + tl.arange(0, COLS)[None, :] + (0 if LAST else step * COLS)
    return (sample * n_rows + rows) * n_cols + cols, None if WHOLE else (rows < n_rows) & (cols < n_cols)


@triton.jit
def of_channels(ptr, channels, mask, absent, DTYPE: tl.constexpr):
    """The weight or bias of channels; `absent` everywhere where there is none."""
    return tl.full(channels.shape, absent, DTYPE) if ptr is None else load(ptr + channels, mask, DTYPE)


@triton.jit
def channels_at(
    sample,
    first_row,
    first_col,
    n_rows,
    n_cols,
    n_channels,
    n_groups,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(channels, groups of samples, mask) of a tile: [1, COLS] if LAST, else [ROWS, 1]."""
    if LAST:
        channels = first_col + tl.arange(0, COLS)[None, :]
        inside = channels < n_cols
        groups = sample * n_groups + channels // (n_channels // n_groups)
    else:
        rows = first_row + tl.arange(0, ROWS)[:, None]
        inside = rows < n_rows
        channels = rows % n_channels
        groups = rows // n_channels * n_groups + channels // (n_channels // n_groups)
    return channels, groups, None if WHOLE else inside


@triton.jit
def load_affine(affine, statistics, channels, groups, inside, DTYPE: tl.constexpr):
    """(weight, bias, mean, rstd) of a tile."""
    weight = of_channels(affine[0], channels, inside, 1.0, DTYPE)
    bias = of_channels(affine[1], channels, inside, 0.0, DTYPE)
    return weight, bias, load(statistics[0] + groups, inside, DTYPE), load(statistics[1] + groups, inside, DTYPE)


@triton.jit
def sums_at(
    sample,
    pixel_range,
    first_row,
    first_col,
    n_rows,
    n_cols,
    n_row_tiles,
    n_col_tiles,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(offsets, mask) of a program's sums over its pixels, in the order that `partial_at` reads."""
    if LAST:
        channels = first_col + tl.arange(0, COLS)[None, :]
        to, inside = (sample * n_row_tiles + pixel_range) * n_cols + channels, channels < n_cols
    else:
        rows = first_row + tl.arange(0, ROWS)[:, None]
        to, inside = rows * n_col_tiles + pixel_range, rows < n_rows
    return to, inside


@triton.jit
def partial_at(sample, channels, ranges, n_channels, n_ranges, LAST: tl.constexpr):
    """Offsets in [samples, ranges, channels] if LAST, else in [samples, channels, ranges]."""
    return (
        (sample * n_ranges + ranges) * n_channels + channels
        if LAST
        else (sample * n_channels + channels) * n_ranges + ranges
    )


@triton.jit
def activate(u, SILU: tl.constexpr):
    return u * tl.sigmoid(u) if SILU else u


@triton.jit
def through_silu(dy, normalized, weight, bias, SILU: tl.constexpr):
    """The gradient by SiLU's input, which is computed again."""
    if SILU:
        u = normalized * weight + bias
        s = tl.sigmoid(u)
        dy = dy * (s * (1.0 + u * (1.0 - s)))
    return dy


@triton.jit
def group_at(
    pid,
    n_channels,
    n_groups,
    n_pixels,
    LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """(offsets, channels, mask) of one group of one sample: [CHANNELS, PIXELS], or [PIXELS, CHANNELS] if LAST."""
    size = n_channels // n_groups
    sample, first = pid // n_groups, pid % n_groups * size
    if LAST:
        channel, pixel = tl.arange(0, CHANNELS)[None, :], tl.arange(0, PIXELS)[:, None]
        offsets = (sample * n_pixels + pixel) * n_channels + (first + channel)
    else:
        channel, pixel = tl.arange(0, CHANNELS)[:, None], tl.arange(0, PIXELS)[None, :]
        offsets = (sample * n_channels + first + channel) * n_pixels + pixel
    return offsets, first + channel, None if WHOLE else (channel < size) & (pixel < n_pixels)
