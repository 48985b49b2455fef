"""How a [n_rows, n_cols] problem is cut into tiles, and how a tile finds its memory. No device query, no tuning
at run time.
"""

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import TensorMeta, compute_dtype

_TILE_BYTES = 4096  # four warps of 32 threads with two 16-byte accesses each: enough bytes in flight, few registers
ONE_TILE_EACH = 1 << 62  # programs: no limit
MAX_PROGRAMS = 1 << 14  # beyond, a program takes several tiles, so that the partial sums stay few
_MAX_INNER_DIMS = 4  # with the row, five dimensions are read in place, whatever their strides
NUM_WARPS = 4
_NO_CONTEXT = nullcontext()
_FLOAT64, _INT64 = struct.Struct("d"), struct.Struct("q")


class Tile(NamedTuple):
    """Shape of a tile and how many of them, side by side along the columns, one program takes; sizes decide alone."""

    rows: int
    cols: int
    steps: int
    col_programs: int  # programs along the columns

    def programs(self, n_rows: int) -> int:
        return -(-n_rows // self.rows) * self.col_programs


def power_of_2(n: int) -> int:
    """The least that is at least n; triton.next_power_of_2 takes 10 us of the host's time for it."""
    return 1 << max(n - 1, 0).bit_length()


def tile(n_rows: int, n_cols: int, element_size: int, *, max_programs: int = MAX_PROGRAMS, noise: bool = False) -> Tile:
    """The tile of a problem whose elements take `element_size` bytes. A row's cut does not depend on n_rows
    unless that is 1. Where noise is made, tiles are larger, so that what a program does once weighs little, but not in
    16 bits: it is made in 32, and 4096 normals a program spill registers.
    """
    size = 2 * _TILE_BYTES // max(element_size, 4) if noise else _TILE_BYTES // element_size
    cols = min(max(power_of_2(n_cols), 8), size)
    tiles = max(-(-n_cols // cols), 1)
    steps = power_of_2(-(-tiles // max_programs))
    return Tile(size // cols, cols, steps, -(-tiles // steps))


class Layout(NamedTuple):
    """Tensors of one shape as [n_rows, n_cols], each with (row stride, inner strides...).

    sizes: extents of the inner dimensions that a column number splits into; None where columns are adjacent in every
        tensor.
    """

    n_rows: int
    n_cols: int
    sizes: tuple[int, ...] | None
    strides: list[tuple[int, ...]]


def layout(tensors: Sequence[TensorMeta | None], *, by_sample: bool, c_order: bool) -> Layout:
    """Collapse the dimensions of tensors of one shape into as few as all of their strides allow.

    Rows are samples if `by_sample`; else one row if the tensors allow it. Columns run in C order if `c_order` (noise
    is numbered so), else in the order of the first tensor's memory. Tensors of more than five dimensions must be
    contiguous.
    """
    given = [t.strides for t in tensors if t is not None]
    shape = next(t.shape for t in tensors if t is not None)
    none = (1, *(0 for _ in given))  # a row of everything; stride 0 is divisible by 16, as an odd row stride is not
    dims = [(size, *(s[i] for s in given)) for i, size in enumerate(shape)]
    row = dims.pop(0) if by_sample else none
    dims = [dim for dim in dims if dim[0] != 1]
    if not c_order:
        dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, ...]] = []
    for size, *inner in dims:
        if merged and all(outer == size * stride for outer, stride in zip(merged[-1][1:], inner, strict=True)):
            merged[-1] = (merged[-1][0] * size, *inner)
        else:
            merged.append((size, *inner))
    rows_apart = len(merged) == 2 and _adjacent(merged[1])
    if not by_sample and (rows_apart or len(merged) > _MAX_INNER_DIMS):
        row = merged.pop(0)
    if row[0] == 1:
        row = none

    n_cols = math.prod(size for size, *_ in merged)
    if not merged or (len(merged) == 1 and _adjacent(merged[0])):
        merged, sizes = [], None
    else:
        sizes = tuple(size for size, *_ in merged)
    by_tensor = zip(*(dim[1:] for dim in (row, *merged)), strict=True)
    return Layout(row[0], n_cols, sizes, [() if t is None else next(by_tensor) for t in tensors])


class Geometry(NamedTuple):
    """How one kind of tensors is laid out and cut; kernels take it whole."""

    strides: Any  # of each tensor, in a tuple of the tensors' kind
    sizes: Any
    n_rows: Any
    n_cols: Any
    n_col_programs: Any
    block_rows: Any  # constant, as are the next three
    block_cols: Any
    steps: Any
    dtype: Any  # of arithmetic

    @property
    def programs(self) -> int:
        return int(-(-self.n_rows // self.block_rows.value) * self.n_col_programs)


def make_geometry(tensors: Any, by_sample: bool, max_programs: int = MAX_PROGRAMS) -> Geometry:
    """Layout and tiles of a named tuple of tensors of one shape, inputs and gradient buffers; the first decides the
    order of elements. Without a first one, or without elements, there are no programs.
    """
    kind: Any = type(tensors)
    first = tensors[0]
    dtype = tl.constexpr(triton_dtype(compute_dtype(*tensors)))
    if first is None or 0 in first.shape:
        return Geometry(
            kind(*[()] * len(tensors)), None, 0, 0, 1, tl.constexpr(1), tl.constexpr(8), tl.constexpr(1), dtype
        )
    n_rows, n_cols, sizes, by_tensor = layout(tensors, by_sample=by_sample, c_order=False)
    t = tile(n_rows, n_cols, first.dtype.itemsize, max_programs=max_programs)
    if by_tensor[0][0] == 1 < n_rows:  # rows are adjacent in memory, as latent dimensions are: so are lanes
        t = _tall(t, n_rows, n_cols, max_programs)
    rows, cols, steps = map(tl.constexpr, (t.rows, t.cols, t.steps))
    return Geometry(kind(*by_tensor), sizes, n_rows, n_cols, t.col_programs, rows, cols, steps, dtype)


def _tall(t: Tile, n_rows: int, n_cols: int, max_programs: int) -> Tile:
    """The tile with as many rows as 32 lanes take, or there are."""
    size = t.rows * t.cols
    rows = min(power_of_2(n_rows), 32)
    cols = min(size // rows, power_of_2(n_cols))
    tiles = -(-n_cols // cols)
    steps = power_of_2(-(-tiles // max_programs))
    return Tile(size // cols, cols, steps, -(-tiles // steps))


def _adjacent(dim: tuple[int, ...]) -> bool:
    return all(stride == 1 for stride in dim[1:])


@triton.jit
def element_offsets(
    rows,  # [BLOCK_ROWS, 1] int64
    cols,  # [1, BLOCK_COLS] int64
    strides,  # (row stride, inner strides...)
    sizes,  # inner sizes, or None for adjacent columns
):
    """Offsets in memory of a tile's elements."""
    offsets = rows * strides[0]
    if sizes is None:
        offsets += cols
    else:
        rest = cols
        for i in tl.static_range(len(sizes) - 1, 0, -1):
            offsets += (rest % sizes[i]) * strides[i + 1]
            rest = rest // sizes[i]
        offsets += rest * strides[1]
    return offsets


@triton.jit
def pointers(ptr, strides, geometry, rows, cols, absent):
    """To a tile's elements; `absent`, which is not read, without a tensor: a tuple of pointers takes no None."""
    return absent if ptr is None else ptr + element_offsets(rows, cols, strides, geometry.sizes)


@triton.jit
def tile_origin(pid, geometry):
    """First row and first column of a program, and its rows, [block_rows, 1]."""
    first_row = (pid // geometry.n_col_programs) * geometry.block_rows
    first_col = (pid % geometry.n_col_programs) * (geometry.block_cols * geometry.steps)
    return first_row, first_col, first_row + tl.arange(0, geometry.block_rows)[:, None]


@triton.jit
def full_tile(first_row, first_col, geometry):
    """Whether a tile lies within the tensors: then it needs no mask, which would prevent wide accesses."""
    return (first_row + geometry.block_rows <= geometry.n_rows) & (first_col + geometry.block_cols <= geometry.n_cols)


@triton.jit
def load(ptrs, mask, DTYPE: tl.constexpr, other=0.0):
    """Load into the dtype of arithmetic. A mask of None keeps 16-byte accesses; masked-off elements read as `other`."""
    values = tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask, other=other)
    if values.dtype == tl.bfloat16:  # the upper half of a float32; the compiler's conversion takes an instruction more
        values = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def unpack_f64(x, DTYPE: tl.constexpr):
    """A number from the host (a pointer to it, or the bits of a float64) in the dtype of arithmetic."""
    value = tl.load(x) if x.dtype.is_ptr() else x.to(tl.int64).to(tl.float64, bitcast=True)
    return value.to(DTYPE)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else _NO_CONTEXT


def pack_f64(x: float | Tensor | None) -> Any:
    """What `unpack_f64` takes: the bits of a float, because a float argument arrives on a GPU rounded to float32."""
    return pack_all(x)[0]


def pack_all(*numbers: float | Tensor | None) -> list[Any]:
    """`pack_f64` of each."""
    packed: list[Any] = []
    for x in numbers:
        packed.append(x if x is None or isinstance(x, Tensor) else _INT64.unpack(_FLOAT64.pack(x))[0])
    return packed


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
