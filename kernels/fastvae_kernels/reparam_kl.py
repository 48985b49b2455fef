"""Sample a diagonal Gaussian and measure its KL, reading each input once; backward draws the noise again instead
of reading it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold_rows
from ._tile import (
    NUM_WARPS,
    ONE_TILE_EACH,
    accumulator,
    element_offsets,
    host_scalar,
    keys,
    layout,
    load,
    metas,
    strides_of,
    tile,
    triton_dtype,
)
from .gaussian import clamp, exp, expm1, inside, twice_kl_element
from .philox import noise_run, philox_normal, tile_normals


@triton.jit
def _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, noise, mask, low, high, WITH_KL: tl.constexpr, DTYPE: tl.constexpr):
    """Store z; return twice the KL of each element (zeros if it is not asked for)."""
    mu = load(mu_ptrs, mask, DTYPE)
    logvar = clamp(load(logvar_ptrs, mask, DTYPE), low, high, DTYPE)
    sigma = exp(0.5 * logvar, DTYPE)
    tl.store(z_ptrs, (mu + sigma * noise).to(z_ptrs.dtype.element_ty), mask=mask)
    kl = tl.zeros(mu.shape, DTYPE)
    if WITH_KL:
        kl = twice_kl_element(mu, logvar, sigma, DTYPE)
    # lanes outside hold mu = logvar = 0, whose KL is 0 unless a clamp moved that logvar
    return kl if mask is None else tl.where(mask, kl, 0.0)


@triton.jit(do_not_specialize=["seed", "offset", "low", "high"])
def _reparam_kl_fwd_kernel(
    mu_ptr,  # [n_rows, n_cols], read
    logvar_ptr,  # [n_rows, n_cols], read
    z_ptr,  # [n_rows, n_cols], written
    kl_ptr,  # [n_rows, n_col_programs], written: partial sums; None: no KL
    seed,  # int64, or pointer to one
    offset,  # of the first element in the seed's stream
    low,  # bounds of logvar as bits of a float64, or None
    high,
    mu_strides,
    logvar_strides,
    z_strides,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    RUN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    col_program = pid % n_col_programs
    first_row, first_col = (pid // n_col_programs) * BLOCK_ROWS, col_program * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    noise = tile_normals(seed, offset + rows * n_cols + first_col, BLOCK_COLS, RUN)

    mu_ptrs = mu_ptr + element_offsets(rows, cols, mu_strides, sizes)
    logvar_ptrs = logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes)
    z_ptrs = z_ptr + element_offsets(rows, cols, z_strides, sizes)
    if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
        kl = _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, noise, None, low, high, kl_ptr is not None, DTYPE)
    else:
        mask = (rows < n_rows) & (cols < n_cols)
        kl = _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, noise, mask, low, high, kl_ptr is not None, DTYPE)
    if kl_ptr is not None:
        sums = 0.5 * tl.sum(kl, axis=1)[:, None]
        tl.store(kl_ptr + rows * n_col_programs + col_program, sums, mask=rows < n_rows)


@triton.jit
def _gradient_tile(
    mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, noise, mask, low, high, DTYPE: tl.constexpr
):
    """Store dmu and dlogvar; each of dz and dkl may be None, and what only its part needs is then not read."""
    raw_logvar = load(logvar_ptrs, mask, DTYPE)
    logvar = clamp(raw_logvar, low, high, DTYPE)
    dmu = tl.zeros(raw_logvar.shape, DTYPE)
    dlogvar = tl.zeros(raw_logvar.shape, DTYPE)
    if dz_ptrs is not None:
        dz = load(dz_ptrs, mask, DTYPE)
        dmu += dz
        dlogvar += dz * (exp(0.5 * logvar, DTYPE) * noise)
    if dkl is not None:
        dmu += dkl * load(mu_ptrs, mask, DTYPE)
        dlogvar += dkl * expm1(logvar, DTYPE)
    dlogvar = inside(raw_logvar, low, high, 0.5 * dlogvar, DTYPE)
    if dmu_ptrs is not None:
        tl.store(dmu_ptrs, dmu.to(dmu_ptrs.dtype.element_ty), mask=mask)
    if dlogvar_ptrs is not None:
        tl.store(dlogvar_ptrs, dlogvar.to(dlogvar_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "low", "high"])
def _reparam_kl_bwd_kernel(
    mu_ptr,  # [n_rows, n_cols], read
    logvar_ptr,  # [n_rows, n_cols], read
    dz_ptr,  # [n_rows, n_cols], read; None: no gradient came
    dkl_ptr,  # [n_rows] at dkl_stride, read; None: no gradient came
    dmu_ptr,  # [n_rows, n_cols], written; None: not wanted
    dlogvar_ptr,  # [n_rows, n_cols], written; None: not wanted
    seed,
    offset,
    low,
    high,
    mu_strides,
    logvar_strides,
    dz_strides,
    dmu_strides,
    dlogvar_strides,
    dkl_stride,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    RUN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    first_row, first_col = (pid // n_col_programs) * BLOCK_ROWS, (pid % n_col_programs) * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    noise = tile_normals(seed, offset + rows * n_cols + first_col, BLOCK_COLS, RUN)

    dkl = None if dkl_ptr is None else load(dkl_ptr + rows * dkl_stride, rows < n_rows, DTYPE)
    mu_ptrs = mu_ptr + element_offsets(rows, cols, mu_strides, sizes)
    logvar_ptrs = logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes)
    dz_ptrs = None if dz_ptr is None else dz_ptr + element_offsets(rows, cols, dz_strides, sizes)
    dmu_ptrs = None if dmu_ptr is None else dmu_ptr + element_offsets(rows, cols, dmu_strides, sizes)
    dlogvar_ptrs = None if dlogvar_ptr is None else dlogvar_ptr + element_offsets(rows, cols, dlogvar_strides, sizes)
    if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
        _gradient_tile(mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, noise, None, low, high, DTYPE)
    else:
        mask = (rows < n_rows) & (cols < n_cols)
        _gradient_tile(mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, noise, mask, low, high, DTYPE)


class _Plan(NamedTuple):
    """A launch but for its tensors and its noise."""

    programs: int
    strides: tuple[Any, ...]  # of each tensor
    shape: tuple[Any, ...]  # sizes, n_rows, n_cols, n_col_programs
    constants: dict[str, Any]
    partials: tuple[int, ...]  # shape of the partial sums; [n_rows] where they are the sums
    dtype: torch.dtype


@lru_cache(maxsize=1024)
def _plan(of: tuple[Any, ...], element_size: int, aligned: bool, by_sample: bool) -> _Plan:
    """of: keys of mu, logvar and what else is read and written. aligned: the first element begins a counter."""
    tensors = metas(of)
    at = layout(tensors, by_sample=by_sample, c_order=True)
    t = tile(at.n_rows, at.n_cols, element_size, max_programs=ONE_TILE_EACH, noise=True)
    dtype = accumulator(*tensors[:2])
    constants = {
        "RUN": noise_run(element_size, 0 if aligned else 1, 0 if at.n_rows == 1 else at.n_cols),
        "DTYPE": triton_dtype(dtype),
        "BLOCK_ROWS": t.rows,
        "BLOCK_COLS": t.cols,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }
    shape = (at.sizes, at.n_rows, at.n_cols, t.col_programs)
    partials = (at.n_rows, t.col_programs) if t.col_programs > 1 else (at.n_rows,)
    return _Plan(t.programs(at.n_rows), tuple(at.strides), shape, constants, partials, dtype)


def reparam_kl_fwd(
    mu: Tensor,
    logvar: Tensor,
    noise: Any,
    z: Tensor,
    logvar_clamp: tuple[float, float] | None,
    notes: dict[Any, Any],
    *,
    with_kl: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless asked for) and what the backward pass needs: nothing more.

    noise: has .seed (int64 or tensor of one) and .offset.
    notes: of calls whose tensors and options are alike.
    """
    if mu.numel() == 0:
        return (mu.new_zeros(mu.shape[0], dtype=accumulator(mu, logvar)) if with_kl else None), ()
    aligned = noise.offset % 4 == 0
    if (plan := notes.get(aligned)) is None:
        plan = notes[aligned] = _plan(keys((mu, logvar, z)), z.element_size(), aligned, with_kl)
    partials = mu.new_empty(plan.partials, dtype=plan.dtype) if with_kl else None
    low, high = logvar_clamp or (None, None)
    with torch.cuda.device_of(mu):
        _reparam_kl_fwd_kernel[(plan.programs,)](
            *(mu, logvar, z, partials, noise.seed, noise.offset, host_scalar(low), host_scalar(high)),
            *(*plan.strides, *plan.shape),
            **plan.constants,
        )
        return (partials if partials is None or partials.ndim == 1 else fold_rows(partials)), ()


def saved_again(mu: Tensor, logvar: Tensor, noise: Any, logvar_clamp: tuple[float, float] | None) -> list[Tensor]:
    """What `reparam_kl_fwd` returns for the backward pass: nothing."""
    return []


def spread(
    mu: Tensor, logvar: Tensor, saved: list[Tensor], noise: Any, logvar_clamp: tuple[float, float] | None
) -> Tensor:
    """sigma * noise, as the forward pass drew it."""
    dtype = accumulator(mu, logvar)
    logvar = logvar.detach().to(dtype)
    sigma = torch.exp(0.5 * (logvar if logvar_clamp is None else logvar.clamp(*logvar_clamp)))
    return sigma * philox_normal(mu.shape, noise.seed, noise.offset, dtype, mu.device)


def reparam_kl_bwd(
    mu: Tensor,
    logvar: Tensor,
    saved: list[Tensor],
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dlogvar: Tensor | None,
    noise: Any,
    logvar_clamp: tuple[float, float] | None,
    notes: dict[Any, Any],
) -> None:
    """Write the gradients that are asked for: dmu = dz + dkl mu; dlogvar = (dz sigma noise + dkl expm1(logvar)) / 2."""
    if mu.numel() == 0:
        return
    dz = dz if dz is None or dz.ndim <= 5 else dz.contiguous()  # mu and logvar came so
    aligned = noise.offset % 4 == 0
    read_and_written = (mu, logvar, dz, dmu, dlogvar)
    # a hook may bring saved tensors back with other strides
    kind = aligned, dkl is None, None if dz is None else dz.dtype, strides_of(read_and_written)
    if (plan := notes.get(kind)) is None:
        plan = notes[kind] = _plan(keys(read_and_written), mu.element_size(), aligned, dkl is not None)
    low, high = logvar_clamp or (None, None)
    with torch.cuda.device_of(mu):
        _reparam_kl_bwd_kernel[(plan.programs,)](
            *(mu, logvar, dz, dkl, dmu, dlogvar, noise.seed, noise.offset, host_scalar(low), host_scalar(high)),
            *(*plan.strides, 0 if dkl is None else dkl.stride(0), *plan.shape),
            **plan.constants,
        )
