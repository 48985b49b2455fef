"""Sampling of a diagonal Gaussian and its KL. Each input is read once; the backward pass draws the noise again."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold_rows
from ._tile import NUM_WARPS, ONE_TILE_EACH, element_offsets, layout, load, on_device, pack_f64, tile, triton_dtype
from .gaussian import clamp, exp, expm1, inside, twice_kl_element
from .philox import elements_per_thread, philox_normal, tile_normals
from .types import Clamp, PhiloxNoise, TensorMeta, compute_dtype


@triton.jit
def _noise_tile(
    seed,
    offset,
    n_cols,
    n_col_programs,
    ELEMENTS_PER_THREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """First row, first column, rows, columns and noise of this program's tile."""
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    first_row, first_col = (pid // n_col_programs) * BLOCK_ROWS, (pid % n_col_programs) * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    noise = tile_normals(seed, offset + rows * n_cols + first_col, BLOCK_COLS, ELEMENTS_PER_THREAD)
    return first_row, first_col, rows, cols, noise


@triton.jit
def _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, noise, mask, low, high, WITH_KL: tl.constexpr, DTYPE: tl.constexpr):
    """Store z; return twice the KL of each element (zeros without WITH_KL)."""
    mu = load(mu_ptrs, mask, DTYPE)
    logvar = clamp(load(logvar_ptrs, mask, DTYPE), low, high, DTYPE)
    sigma = exp(logvar, DTYPE, 0.5)
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
    ELEMENTS_PER_THREAD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_row, first_col, rows, cols, noise = _noise_tile(
        seed, offset, n_cols, n_col_programs, ELEMENTS_PER_THREAD, BLOCK_ROWS, BLOCK_COLS
    )
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
        col_program = tl.program_id(0).to(tl.int64) % n_col_programs
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
        dlogvar += dz * (exp(logvar, DTYPE, 0.5) * noise)
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
    dz_ptr,  # [n_rows, n_cols], read; None: no gradient was given
    dkl_ptr,  # [n_rows] at dkl_stride, read; None: no gradient was given
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
    ELEMENTS_PER_THREAD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_row, first_col, rows, cols, noise = _noise_tile(
        seed, offset, n_cols, n_col_programs, ELEMENTS_PER_THREAD, BLOCK_ROWS, BLOCK_COLS
    )
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


class _Pass(NamedTuple):
    """One launch without its tensors and its noise."""

    programs: int
    strides: tuple[Any, ...]  # of each tensor
    shape: tuple[Any, ...]  # sizes, n_rows, n_cols, n_col_programs
    elements_per_thread: int  # where the noise of the first element begins a counter
    constants: dict[str, Any]  # further keywords of the launch


class ReparamKLPlan(NamedTuple):
    """The launches of both passes, for calls with equal signatures."""

    device: torch.device
    with_kl: bool
    bounds: tuple[Any, Any]  # of logvar, packed
    dtype: torch.dtype  # of arithmetic
    forward: _Pass
    backward: _Pass
    # shape and strides of the partial sums of the KL; [n_rows] where they are the sums
    partials: tuple[tuple[int, ...], tuple[int, ...]]


def plan_reparam_kl(
    mu: TensorMeta,
    logvar: TensorMeta,
    z: TensorMeta,
    dmu: TensorMeta,
    dlogvar: TensorMeta,
    logvar_clamp: Clamp | None,
    with_kl: bool,
) -> ReparamKLPlan:
    """Plan the launches of a sample; dmu and dlogvar are gradient buffers."""
    low, high = logvar_clamp or (None, None)
    dtype = compute_dtype(mu, logvar)
    forward = _plan_pass((mu, logvar, z), z.dtype.itemsize, with_kl)
    n_rows, n_col_programs = forward.shape[1], forward.shape[3]
    return ReparamKLPlan(
        device=mu.device,
        with_kl=with_kl,
        bounds=(pack_f64(low), pack_f64(high)),
        dtype=dtype,
        forward=forward,
        backward=_plan_pass((mu, logvar, z, dmu, dlogvar), mu.dtype.itemsize, with_kl),
        partials=((n_rows, n_col_programs), (n_col_programs, 1)) if n_col_programs > 1 else ((n_rows,), (1,)),
    )


def _plan_pass(tensors: tuple[TensorMeta, ...], element_size: int, by_sample: bool) -> _Pass:
    if 0 in tensors[0].shape:
        return _Pass(0, ((),) * len(tensors), (None, tensors[0].shape[0], 0, 1), 1, {})
    n_rows, n_cols, sizes, strides = layout(tensors, by_sample=by_sample, c_order=True)
    t = tile(n_rows, n_cols, element_size, max_programs=ONE_TILE_EACH, noise=True)
    per_thread = elements_per_thread(element_size, 0 if n_rows == 1 else n_cols)
    shape = sizes, n_rows, n_cols, t.col_programs
    dtype = triton_dtype(compute_dtype(*tensors[:2]))
    constants = {"DTYPE": dtype, "BLOCK_ROWS": t.rows, "BLOCK_COLS": t.cols, "num_warps": NUM_WARPS}
    launch = {"grid": (t.programs(n_rows),), "warmup": False, "enable_fp_fusion": True}
    return _Pass(t.programs(n_rows), tuple(strides), shape, per_thread, constants | launch)


def reparam_kl_fwd(
    plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: PhiloxNoise, z: Tensor
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless the plan has it) and what the backward pass needs: nothing."""
    at = plan.forward
    if not at.programs:
        return (mu.new_zeros(mu.shape[0], dtype=plan.dtype) if plan.with_kl else None), ()
    partials = torch.empty_strided(*plan.partials, dtype=plan.dtype, device=plan.device) if plan.with_kl else None
    with on_device(plan.device):
        _reparam_kl_fwd_kernel.run(
            mu,
            logvar,
            z,
            partials,
            noise.seed,
            noise.offset,
            *plan.bounds,
            *at.strides,
            *at.shape,
            ELEMENTS_PER_THREAD=at.elements_per_thread if noise.offset % 4 == 0 else 1,
            **at.constants,
        )
        return (partials if partials is None or partials.ndim == 1 else fold_rows(partials)), ()


def recompute_saved(plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: PhiloxNoise) -> tuple[Tensor, ...]:
    """What `reparam_kl_fwd` returns for the backward pass."""
    return ()


def scaled_noise(
    mu: Tensor, logvar: Tensor, saved: tuple[Tensor, ...], noise: PhiloxNoise, logvar_clamp: Clamp | None
) -> Tensor:
    """sigma * noise, as the forward pass drew it."""
    dtype = compute_dtype(mu, logvar)
    logvar = logvar.detach().to(dtype)
    sigma = torch.exp(0.5 * (logvar if logvar_clamp is None else logvar.clamp(*logvar_clamp)))
    return sigma * philox_normal(mu.shape, noise.seed, noise.offset, dtype, mu.device)


def reparam_kl_bwd(
    plan: ReparamKLPlan,
    mu: Tensor,
    logvar: Tensor,
    saved: tuple[Tensor, ...],
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dlogvar: Tensor | None,
    noise: PhiloxNoise,
) -> None:
    """Write the gradients that are wanted: dmu = dz + dkl mu; dlogvar = (dz sigma noise + dkl expm1(logvar)) / 2.

    dz has the strides of z.
    """
    at = plan.backward
    if not at.programs:
        return
    with on_device(plan.device):
        _reparam_kl_bwd_kernel.run(
            mu,
            logvar,
            dz,
            dkl,
            dmu,
            dlogvar,
            noise.seed,
            noise.offset,
            *plan.bounds,
            *at.strides,
            0 if dkl is None else dkl.stride(0),
            *at.shape,
            ELEMENTS_PER_THREAD=at.elements_per_thread if noise.offset % 4 == 0 else 1,
            **at.constants,
        )
