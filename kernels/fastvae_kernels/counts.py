"""Negative log-likelihoods of counts and their gradients: each program takes a range of rows, one after the other.

The gradient of a log_theta that rows share is added up by programs, and over programs in a second launch, so that the
same input gives the same bits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, load, on_device, triton_dtype
from .count_likelihoods import dispersion
from .count_rows import Rows, row_in_pieces, row_on_chip
from .count_types import CountGrads, CountOptions, CountTensors
from .types import compute_dtype

_ACCESS_BYTES = 16  # of a thread in a piece of a row, where storage has the dtype of arithmetic
_FEW_WARPS, _MANY_WARPS, _SHORT_BYTES = 4, 8, 8192
_MAX_PROGRAMS = 1024  # beyond, a program takes several rows, so that the partial sums stay few
_MANY = tl.constexpr(1024)
_TABLE_BLOCK, _FOLD_TILE = 512, (16, 128)


class CountPlan(NamedTuple):
    """Launches of one kind of call."""

    device: torch.device
    dtype: torch.dtype
    n_rows: int
    programs: int
    rows_per_program: int
    sizes: tuple[Any, ...]  # fields of `Rows` from n_thetas on
    num_warps: int
    n_groups: int  # rows of a log_theta that rows of counts share
    fold_col_programs: int


def plan_counts(metas: CountTensors, options: CountOptions, wanted: CountGrads) -> CountPlan:
    """Plan the launches for inputs of these metas; `wanted` holds a bool in the place of each gradient."""
    n_rows, n_cols = metas.logits.shape
    dtype = compute_dtype(*metas)
    n_thetas = metas.log_theta.numel() if options.theta in ("gene", "batch") else 0
    # with an index, the rows of a program need not share log_theta
    rows_per_program = 1 if metas.index is not None else max(-(-n_rows // _MAX_PROGRAMS), 1)
    num_warps = _FEW_WARPS if n_cols * dtype.itemsize <= _SHORT_BYTES else _MANY_WARPS
    block_cols = 32 * num_warps * _ACCESS_BYTES // dtype.itemsize
    pieces = -(-n_cols // block_cols)
    if options.head != "softmax" or pieces > _most_pieces(options, dtype):
        pieces = 0
        block_cols *= 1 if dtype == torch.float64 else 2
    constants = options.family, options.head, options.theta, pieces, block_cols, triton_dtype(dtype)
    return CountPlan(
        device=metas.logits.device,
        dtype=dtype,
        n_rows=n_rows,
        programs=-(-n_rows // rows_per_program) if n_cols else 0,
        rows_per_program=rows_per_program,
        sizes=(n_thetas, n_cols, *map(tl.constexpr, constants)),
        num_warps=num_warps,
        n_groups=n_thetas // n_cols if n_cols else 0,
        fold_col_programs=-(-n_cols // _FOLD_TILE[1]),
    )


def _most_pieces(options: CountOptions, dtype: torch.dtype) -> int:
    """How many pieces of a row a program holds without spilling registers."""
    if dtype == torch.float64:
        return 0
    return 4 if options.family == "zinb" or options.theta == "cell" else 8


@triton.jit
def _dispersion_kernel(
    log_theta_ptr,  # [n], read
    table_ptr,  # [3, n], written: of `dispersion`
    n,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n
    theta, constant, p_theta = dispersion(load(log_theta_ptr + offsets, mask, tl.float64))
    dtype = table_ptr.dtype.element_ty
    tl.store(table_ptr + offsets, theta.to(dtype), mask=mask)
    tl.store(table_ptr + n + offsets, constant.to(dtype), mask=mask)
    tl.store(table_ptr + 2 * n + offsets, p_theta.to(dtype), mask=mask)


@triton.jit
def _is_changed(kept_ptr, coefficients_ptr, first, last, DTYPE: tl.constexpr):
    """Whether a row of the range has another coefficient than the one its gradients were made with."""
    tolerance: tl.constexpr = 8.9e-16 if DTYPE == tl.float64 else 4.8e-7
    changed = tl.zeros([_MANY], tl.int32)
    for start in range(first, last, _MANY):
        rows = start + tl.arange(0, _MANY)
        kept = load(kept_ptr + rows, rows < last, DTYPE)
        difference = tl.abs(load(coefficients_ptr + rows, rows < last, DTYPE) - kept)
        changed += tl.where(difference <= tl.abs(kept) * tolerance, 0, 1)  # NaN is a change
    return tl.max(changed) > 0


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _count_rows_kernel(
    rows,  # Rows
    theta_sums_ptr,  # [n_programs, n_cols], written: of the gradient of log_theta; None: rows do not share it
    coefficients_ptr,  # [n_rows], read: gradients are multiplied by them; None: there are no gradients
    kept_ptr,  # [n_rows], read: the coefficients of what the gradients hold; None: they hold nothing
    n_rows,
    rows_per_program,
):
    pid = tl.program_id(0).to(tl.int64)
    first = pid * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    if kept_ptr is not None:
        if theta_sums_ptr is None:
            changed = _is_changed(kept_ptr, coefficients_ptr, first, last, rows.dtype)
        else:  # which is a sum over all rows
            changed = _is_changed(kept_ptr, coefficients_ptr, 0, n_rows, rows.dtype)
        last = tl.where(changed, last, first)
    if theta_sums_ptr is not None:
        theta_sums_ptr += pid * rows.n_cols
    for row in range(first, last):
        log_library = tl.zeros([], rows.dtype)
        if rows.tensors.log_library is not None:
            log_library += tl.load(rows.tensors.log_library + row).to(rows.dtype)
        coefficient = log_library
        if coefficients_ptr is not None:
            coefficient = tl.load(coefficients_ptr + row).to(rows.dtype)
        n_held = tl.where(row > first, rows.n_cols, 0)
        if rows.pieces > 0:
            row_on_chip(rows, row, log_library, coefficient, theta_sums_ptr, n_held)
        else:
            row_in_pieces(rows, row, log_library, coefficient, theta_sums_ptr, n_held)


@triton.jit(do_not_specialize=["n_rows", "n_sums"])
def _fold_theta_kernel(
    theta_sums_ptr,  # [n_sums, n_cols], read
    index_ptr,  # [n_sums], read: the row of the gradient that each belongs to; None: there is one
    dlog_theta_ptr,  # [n_groups, n_cols], written
    coefficients_ptr,  # as above
    kept_ptr,
    n_rows,
    n_sums,
    n_cols,
    n_col_programs,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    group = pid // n_col_programs
    cols = (pid % n_col_programs) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    if kept_ptr is not None:
        n_sums = tl.where(_is_changed(kept_ptr, coefficients_ptr, 0, n_rows, DTYPE), n_sums, 0)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float64)
    for start in range(0, n_sums, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        mask = (rows < n_sums) & (cols < n_cols)
        if index_ptr is not None:
            mask &= tl.load(index_ptr + rows, mask=rows < n_sums, other=-1) == group
        sums += load(theta_sums_ptr + rows * n_cols + cols, mask, tl.float64)
    total = tl.sum(sums, axis=0)[None, :].to(DTYPE)  # the interpreter rounds float64 to bfloat16 wrongly
    total = total.to(dlog_theta_ptr.dtype.element_ty)
    tl.store(dlog_theta_ptr + group * n_cols + cols, total, mask=cols < tl.where(n_sums > 0, n_cols, 0))


def _launch(
    plan: CountPlan,
    tensors: CountTensors,
    grads: CountGrads,
    nll: Tensor | None,
    table: Tensor | None,
    coefficients: Tensor | None,
    kept: Tensor | None,
) -> None:
    theta_sums = None
    n_cols = plan.sizes[1]
    if grads.log_theta is not None and plan.n_groups:
        theta_sums = torch.empty((plan.programs, n_cols), dtype=plan.dtype, device=plan.device)
    _count_rows_kernel.run(
        Rows(tensors, grads, nll, table, *plan.sizes),
        *(theta_sums, coefficients, kept, plan.n_rows, plan.rows_per_program),
        grid=(plan.programs,),
        warmup=False,
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
    )
    if theta_sums is not None:
        _fold_theta_kernel.run(
            *(theta_sums, tensors.index, grads.log_theta, coefficients, kept, plan.n_rows, plan.programs, n_cols),
            *(plan.fold_col_programs, triton_dtype(plan.dtype), *_FOLD_TILE),
            grid=(plan.n_groups * plan.fold_col_programs,),
            warmup=False,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


def _dispersions(plan: CountPlan, log_theta: Tensor | None) -> Tensor | None:
    """The table of a log_theta that rows share."""
    if not plan.n_groups or log_theta is None:
        return None
    n_thetas = plan.sizes[0]
    table = torch.empty((3, n_thetas), dtype=plan.dtype, device=plan.device)
    _dispersion_kernel.run(
        *(log_theta, table, n_thetas, _TABLE_BLOCK),
        grid=(-(-n_thetas // _TABLE_BLOCK),),
        warmup=False,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return table


def counts_fwd(
    plan: CountPlan, tensors: CountTensors, row_factors: Tensor | None, grads: CountGrads
) -> tuple[Tensor, Tensor | None]:
    """Return the negative log-likelihood of each row, and what `counts_bwd` needs; write the gradients of their sum
    times `row_factors` into `grads`. See `count_types`.
    """
    nll = torch.empty(plan.n_rows, dtype=plan.dtype, device=plan.device)
    wanted = CountGrads() if row_factors is None else grads
    if not plan.programs:
        _clear(wanted)
        return nll.zero_(), None
    with on_device(plan.device):
        table = _dispersions(plan, tensors.log_theta)
        _launch(plan, tensors, wanted, nll, table, row_factors, None)
    return nll, table


def counts_bwd(
    plan: CountPlan,
    tensors: CountTensors,
    state: Tensor | None,
    row_factors: Tensor | None,
    row_coefficients: Tensor,
    grads: CountGrads,
) -> None:
    """Make `grads`, as `counts_fwd` left them for `row_factors`, the gradients of the sum times `row_coefficients`. See
    `count_types`.
    """
    if not plan.programs:
        _clear(grads)
        return
    with on_device(plan.device):
        table = _dispersions(plan, tensors.log_theta) if state is None else state
        _launch(plan, tensors, grads, None, table, row_coefficients, row_factors)


def _clear(grads: CountGrads) -> None:
    """Gradients of what no count depends on."""
    for gradient in grads:
        if gradient is not None:
            gradient.zero_()
