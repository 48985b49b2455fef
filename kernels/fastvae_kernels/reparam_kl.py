"""Sample a diagonal Gaussian and measure its KL, reading each input once; backward draws the noise again instead
of reading it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold_rows
from ._tile import NUM_WARPS, element_offsets, load, on_device
from .gaussian import clamp, exp, expm1, inside, twice_kl_element
from .philox import philox_normal, tile_normals
from .reparam_kl_plan import Prior, ReparamKLPlan
from .reparam_kl_plan import plan_reparam_kl as plan_reparam_kl
from .types import Clamp, PhiloxNoise, compute_dtype


@triton.jit
def _prior_offsets(prior, strides, rows, cols, sizes):
    """Where a tile's elements of the prior lie; offsets of tensors that are None are not read."""
    mu = element_offsets(rows, cols, strides.mu, sizes)
    logvar = element_offsets(rows, cols, strides.logvar, sizes)
    return Prior(
        mu,
        logvar,
        mu if prior.dmu is None else element_offsets(rows, cols, strides.dmu, sizes),
        mu if prior.dlogvar is None else element_offsets(rows, cols, strides.dlogvar, sizes),
    )


@triton.jit
def _relative(mu, logvar, prior, at, mask, DTYPE: tl.constexpr):
    """(mu - mu_p) / sigma_p, logvar - logvar_p, 1 / sigma_p: the posterior as its prior sees it."""
    prior_logvar = load(prior.logvar + at.logvar, mask, DTYPE)
    precision = exp(prior_logvar, DTYPE, -0.5)
    return (mu - load(prior.mu + at.mu, mask, DTYPE)) * precision, logvar - prior_logvar, precision


@triton.jit
def _sample_tile(
    mu_ptrs, logvar_ptrs, z_ptrs, prior, at, noise, mask, low, high, WITH_KL: tl.constexpr, DTYPE: tl.constexpr
):
    """Store z; return twice the KL of each element (zeros if it is not asked for)."""
    mu = load(mu_ptrs, mask, DTYPE)
    logvar = clamp(load(logvar_ptrs, mask, DTYPE), low, high, DTYPE)
    sigma = exp(logvar, DTYPE, 0.5)
    tl.store(z_ptrs, (mu + sigma * noise).to(z_ptrs.dtype.element_ty), mask=mask)
    kl = tl.zeros(mu.shape, DTYPE)
    if WITH_KL:
        if prior is not None:
            mu, logvar, _ = _relative(mu, logvar, prior, at, mask, DTYPE)
            sigma = exp(logvar, DTYPE, 0.5)
        kl = twice_kl_element(mu, logvar, sigma, DTYPE)
    # lanes outside hold mu = logvar = 0, whose KL is 0 unless a clamp moved that logvar
    return kl if mask is None else tl.where(mask, kl, 0.0)


@triton.jit(do_not_specialize=["seed", "offset", "low", "high"])
def _reparam_kl_fwd_kernel(
    mu_ptr,  # [n_rows, n_cols], read
    logvar_ptr,  # [n_rows, n_cols], read
    z_ptr,  # [n_rows, n_cols], written
    kl_ptr,  # [n_rows, n_col_programs], written: partial sums; None: no KL
    prior,  # Prior, [n_rows, n_cols], read; None: N(0, I)
    prior_strides,
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
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    col_program = pid % n_col_programs
    first_row, first_col = (pid // n_col_programs) * BLOCK_ROWS, col_program * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    noise = tile_normals(seed, offset + rows * n_cols + first_col, BLOCK_COLS, ELEMENTS_PER_THREAD)

    mu_ptrs = mu_ptr + element_offsets(rows, cols, mu_strides, sizes)
    logvar_ptrs = logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes)
    z_ptrs = z_ptr + element_offsets(rows, cols, z_strides, sizes)
    at = None if prior is None else _prior_offsets(prior, prior_strides, rows, cols, sizes)
    if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
        kl = _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, prior, at, noise, None, low, high, kl_ptr is not None, DTYPE)
    else:
        mask = (rows < n_rows) & (cols < n_cols)
        kl = _sample_tile(mu_ptrs, logvar_ptrs, z_ptrs, prior, at, noise, mask, low, high, kl_ptr is not None, DTYPE)
    if kl_ptr is not None:
        sums = 0.5 * tl.sum(kl, axis=1)[:, None]
        tl.store(kl_ptr + rows * n_col_programs + col_program, sums, mask=rows < n_rows)


@triton.jit
def _gradient_tile(
    mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, prior, at, noise, mask, low, high, DTYPE: tl.constexpr
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
        mu = load(mu_ptrs, mask, DTYPE)
        if prior is None:
            dmu += dkl * mu
            dlogvar += dkl * expm1(logvar, DTYPE)
        else:
            mu, logvar, precision = _relative(mu, logvar, prior, at, mask, DTYPE)
            of_mu, slope = dkl * mu * precision, expm1(logvar, DTYPE)
            dmu += of_mu
            dlogvar += dkl * slope
            if prior.dmu is not None:
                tl.store(prior.dmu + at.dmu, (-of_mu).to(prior.dmu.dtype.element_ty), mask=mask)
            if prior.dlogvar is not None:
                of_logvar = -0.5 * dkl * (mu * mu + slope)
                tl.store(prior.dlogvar + at.dlogvar, of_logvar.to(prior.dlogvar.dtype.element_ty), mask=mask)
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
    prior,  # Prior, [n_rows, n_cols], read and written; None: N(0, I)
    prior_strides,
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
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    first_row, first_col = (pid // n_col_programs) * BLOCK_ROWS, (pid % n_col_programs) * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    noise = tile_normals(seed, offset + rows * n_cols + first_col, BLOCK_COLS, ELEMENTS_PER_THREAD)

    dkl = None if dkl_ptr is None else load(dkl_ptr + rows * dkl_stride, rows < n_rows, DTYPE)
    mu_ptrs = mu_ptr + element_offsets(rows, cols, mu_strides, sizes)
    logvar_ptrs = logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes)
    dz_ptrs = None if dz_ptr is None else dz_ptr + element_offsets(rows, cols, dz_strides, sizes)
    dmu_ptrs = None if dmu_ptr is None else dmu_ptr + element_offsets(rows, cols, dmu_strides, sizes)
    dlogvar_ptrs = None if dlogvar_ptr is None else dlogvar_ptr + element_offsets(rows, cols, dlogvar_strides, sizes)
    at = None if prior is None else _prior_offsets(prior, prior_strides, rows, cols, sizes)
    if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
        _gradient_tile(
            mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, prior, at, noise, None, low, high, DTYPE
        )
    else:
        mask = (rows < n_rows) & (cols < n_cols)
        _gradient_tile(
            mu_ptrs, logvar_ptrs, dz_ptrs, dkl, dmu_ptrs, dlogvar_ptrs, prior, at, noise, mask, low, high, DTYPE
        )


def reparam_kl_fwd(
    plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: PhiloxNoise, z: Tensor, prior: Sequence[Tensor] = ()
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Write z; return the KL of each sample (None unless the plan has it) and what the backward pass needs: nothing.

    prior: Its mu and logvar; none: N(0, I).
    """
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
            Prior(*prior) if prior else None,
            at.prior_strides,
            noise.seed,
            noise.offset,
            *plan.bounds,
            *at.strides,
            *at.shape,
            ELEMENTS_PER_THREAD=at.elements_per_thread if noise.offset % 4 == 0 else 1,
            DTYPE=plan.triton_dtype,
            BLOCK_ROWS=at.block_rows,
            BLOCK_COLS=at.block_cols,
            grid=(at.programs,),
            warmup=False,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        return (partials if partials is None or partials.ndim == 1 else fold_rows(partials)), ()


def recompute_saved(
    plan: ReparamKLPlan, mu: Tensor, logvar: Tensor, noise: PhiloxNoise, prior: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
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
    prior: Sequence[Tensor] = (),
    dprior: Sequence[Tensor | None] = (),
) -> None:
    """Write the gradients that are wanted: dmu = dz + dkl mu; dlogvar = (dz sigma noise + dkl expm1(logvar)) / 2.

    With a prior, m = (mu - mu_p) / sigma_p and r = logvar - logvar_p, those of the KL are m / sigma_p, expm1(r) / 2,
    -m / sigma_p and -(m^2 + expm1(r)) / 2. dz has the strides of z.
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
            Prior(*prior, *dprior) if prior else None,
            at.prior_strides,
            noise.seed,
            noise.offset,
            *plan.bounds,
            *at.strides,
            0 if dkl is None else dkl.stride(0),
            *at.shape,
            ELEMENTS_PER_THREAD=at.elements_per_thread if noise.offset % 4 == 0 else 1,
            DTYPE=plan.triton_dtype,
            BLOCK_ROWS=at.block_rows,
            BLOCK_COLS=at.block_cols,
            grid=(at.programs,),
            warmup=False,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
