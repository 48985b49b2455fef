"""The second half of every sum: folds the partial sums that programs wrote. How a sum is split depends on sizes only.

No atomics, so the same input gives the same bits; in float64, because one program adds up thousands of partial sums
and has nothing else to do.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, power_of_2

_TILE = 4096


@triton.jit
def fold(
    partials_ptr,  # [n_rows, n_partials] contiguous, or None: sums of 0
    rows,  # [BLOCK_ROWS] int64
    n_rows,
    n_partials,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """[BLOCK_ROWS] float64: the sum of each row."""
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float64)
    if partials_ptr is not None:
        row_mask = (rows < n_rows)[:, None]
        for start in range(0, n_partials, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)[None, :]
            mask = row_mask & (cols < n_partials)
            sums += tl.load(partials_ptr + rows[:, None] * n_partials + cols, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=1)


@triton.jit
def _fold_rows_kernel(
    partials_ptr,  # [n_rows, n_partials], read
    sums_ptr,  # [n_rows], written
    n_rows,
    n_partials,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sums = fold(partials_ptr, rows, n_rows, n_partials, BLOCK_ROWS, BLOCK_COLS)
    tl.store(sums_ptr + rows, sums.to(sums_ptr.dtype.element_ty), mask=rows < n_rows)


def fold_tile(n_rows: int, n_partials: int) -> tuple[int, int]:
    """(BLOCK_ROWS, BLOCK_COLS) of `fold`: by the partials alone, so that a row's sum does not depend on its
    neighbours.
    """
    cols = min(power_of_2(n_partials), _TILE)
    return (1 if n_rows == 1 else max(_TILE // cols // 4, 1)), cols


def fold_rows(partials: Tensor) -> Tensor:
    """[n_rows]: the sum of each row of [n_rows, n_partials]."""
    n_rows, n_partials = partials.shape
    sums = partials.new_empty(n_rows)
    block_rows, block_cols = fold_tile(n_rows, n_partials)
    _fold_rows_kernel[(triton.cdiv(n_rows, block_rows),)](
        *(partials, sums, n_rows, n_partials, block_rows, block_cols), num_warps=NUM_WARPS, enable_fp_fusion=True
    )
    return sums
