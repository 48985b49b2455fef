"""The loss of a VAE: errors of the images and KL of the latents in one launch, which also writes recon's gradient,
then a tiny launch that folds the partial sums of both into (loss, recon term, KL term).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold, fold_tile
from ._tile import NUM_WARPS, accumulator, element_offsets, host_scalar, load, part, scalar
from .elbo_bwd import elbo_bwd as elbo_bwd
from .gaussian import clamp, exp, twice_kl_element
from .likelihoods import l2_error, l2_gradient, target_scale


@triton.jit
def _image_tile(
    recon_ptrs,
    target_ptrs,
    drecon_ptrs,
    scale,
    mask,
    ERROR: tl.constexpr,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Errors of a tile; their gradient is stored on the way."""
    recon, target = load(recon_ptrs, mask, DTYPE), load(target_ptrs, mask, DTYPE)
    if TARGET_SCALE != 1:
        target = target * TARGET_SCALE
    if drecon_ptrs is not None:
        tl.store(drecon_ptrs, (scale * GRADIENT(recon, target)).to(drecon_ptrs.dtype.element_ty), mask=mask)
    return ERROR(recon, target)  # lanes outside hold 0 and 0, whose error is 0


@triton.jit
def _image_program(
    pid,
    recon_ptr,
    target_ptr,
    drecon_ptr,
    partials_ptr,
    drecon_scale,
    recon_strides,
    target_strides,
    drecon_strides,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    ERROR: tl.constexpr,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    scale = scalar(drecon_scale, DTYPE)
    col_program = pid % n_col_programs
    first_row = (pid // n_col_programs) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    errors = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    for step in range(STEPS):
        first_col = (col_program * STEPS + step) * BLOCK_COLS
        cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
        recon_ptrs = recon_ptr + element_offsets(rows, cols, recon_strides, sizes)
        target_ptrs = target_ptr + element_offsets(rows, cols, target_strides, sizes)
        if drecon_ptr is None:
            drecon_ptrs: tl.constexpr = None
        else:
            drecon_ptrs = drecon_ptr + element_offsets(rows, cols, drecon_strides, sizes)
        if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
            errors += _image_tile(
                recon_ptrs, target_ptrs, drecon_ptrs, scale, None, ERROR, GRADIENT, TARGET_SCALE, DTYPE
            )
        else:
            mask = (rows < n_rows) & (cols < n_cols)
            errors += _image_tile(
                recon_ptrs, target_ptrs, drecon_ptrs, scale, mask, ERROR, GRADIENT, TARGET_SCALE, DTYPE
            )
    sums = tl.sum(errors, axis=1)[:, None]
    tl.store(partials_ptr + rows * n_col_programs + col_program, sums, mask=rows < n_rows)


@triton.jit
def _kl_tile(mu_ptrs, logvar_ptrs, mask, low, high, DTYPE: tl.constexpr):
    logvar = clamp(load(logvar_ptrs, mask, DTYPE), low, high, DTYPE)
    kl = twice_kl_element(load(mu_ptrs, mask, DTYPE), logvar, exp(0.5 * logvar, DTYPE), DTYPE)
    return kl if mask is None else tl.where(mask, kl, 0.0)


@triton.jit
def _latent_program(
    pid,
    mu_ptr,
    logvar_ptr,
    partials_ptr,
    low,
    high,
    mu_strides,
    logvar_strides,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    col_program = pid % n_col_programs
    first_row = (pid // n_col_programs) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    kls = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    for step in range(STEPS):
        first_col = (col_program * STEPS + step) * BLOCK_COLS
        cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
        mu_ptrs = mu_ptr + element_offsets(rows, cols, mu_strides, sizes)
        logvar_ptrs = logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes)
        if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
            kls += _kl_tile(mu_ptrs, logvar_ptrs, None, low, high, DTYPE)
        else:
            kls += _kl_tile(mu_ptrs, logvar_ptrs, (rows < n_rows) & (cols < n_cols), low, high, DTYPE)
    sums = 0.5 * tl.sum(kls, axis=1)[:, None]
    tl.store(partials_ptr + rows * n_col_programs + col_program, sums, mask=rows < n_rows)


@triton.jit(do_not_specialize=["drecon_scale", "low", "high"])
def _elbo_fwd_kernel(
    recon_ptr,  # [image_rows, image_cols], read; None: no images
    target_ptr,  # [image_rows, image_cols], read
    drecon_ptr,  # [image_rows, image_cols], written; None: no gradient
    recon_partials_ptr,  # [image_rows, image_col_programs], written
    mu_ptr,  # [latent_rows, latent_cols], read; None: no latents
    logvar_ptr,  # [latent_rows, latent_cols], read
    kl_partials_ptr,  # [latent_rows, latent_col_programs], written
    drecon_scale,  # bits of a float64, as are the bounds of logvar
    low,
    high,
    recon_strides,
    target_strides,
    drecon_strides,
    image_sizes,
    image_rows,
    image_cols,
    image_col_programs,
    image_programs,  # programs from here on have latents
    mu_strides,
    logvar_strides,
    latent_sizes,
    latent_rows,
    latent_cols,
    latent_col_programs,
    ERROR: tl.constexpr,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    IMAGE_DTYPE: tl.constexpr,
    IMAGE_ROWS: tl.constexpr,
    IMAGE_COLS: tl.constexpr,
    IMAGE_STEPS: tl.constexpr,
    LATENT_DTYPE: tl.constexpr,
    LATENT_ROWS: tl.constexpr,
    LATENT_COLS: tl.constexpr,
    LATENT_STEPS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if recon_ptr is not None:
            _image_program(
                *(pid, recon_ptr, target_ptr, drecon_ptr, recon_partials_ptr, drecon_scale),
                *(recon_strides, target_strides, drecon_strides, image_sizes),
                *(image_rows, image_cols, image_col_programs),
                *(ERROR, GRADIENT, TARGET_SCALE, IMAGE_DTYPE, IMAGE_ROWS, IMAGE_COLS, IMAGE_STEPS),
            )
    elif mu_ptr is not None:
        _latent_program(
            *(pid - image_programs, mu_ptr, logvar_ptr, kl_partials_ptr, low, high),
            *(mu_strides, logvar_strides, latent_sizes, latent_rows, latent_cols, latent_col_programs),
            *(LATENT_DTYPE, LATENT_ROWS, LATENT_COLS, LATENT_STEPS),
        )


@triton.jit(do_not_specialize=["recon_scale", "kl_scale", "recon_weight", "beta"])
def _elbo_fold_kernel(
    recon_partials_ptr,  # [n_rows, n_recon_partials], read; None: no images
    kl_partials_ptr,  # [n_rows, n_kl_partials], read; None: no latents
    loss_ptr,  # [n_rows], written, as are the two terms
    recon_ptr,
    kl_ptr,
    weights_ptr,  # [2], written: recon_weight and beta as this call saw them; None: not wanted
    recon_scale,  # bits of a float64, as is kl_scale
    kl_scale,
    recon_weight,  # bits of a float64 or pointer, as is beta
    beta,
    n_rows,
    n_recon_partials,
    n_kl_partials,
    BLOCK_ROWS: tl.constexpr,
    RECON_COLS: tl.constexpr,
    KL_COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < n_rows
    weight_recon, weight_kl = scalar(recon_weight, tl.float64), scalar(beta, tl.float64)
    recon = fold(recon_partials_ptr, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    recon *= scalar(recon_scale, tl.float64)
    kl = fold(kl_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS) * scalar(kl_scale, tl.float64)
    dtype = loss_ptr.dtype.element_ty
    tl.store(loss_ptr + rows, (weight_recon * recon + weight_kl * kl).to(dtype), mask=mask)
    tl.store(recon_ptr + rows, recon.to(dtype), mask=mask)
    tl.store(kl_ptr + rows, kl.to(dtype), mask=mask)
    if weights_ptr is not None:
        first = tl.program_id(0) == 0
        tl.store(weights_ptr, weight_recon.to(dtype), mask=first)
        tl.store(weights_ptr + 1, weight_kl.to(dtype), mask=first)


def elbo_fwd(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    drecon: Tensor | None,
    options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, recon term, KL term, weights); write recon_weight * d(recon term)/d(recon) to `drecon` if it is
    given.

    weights: a snapshot of (recon_weight, beta) if one of them is a tensor, which may change before the backward pass.
    """
    like = next(t for t in (recon, mu, kl) if t is not None)
    image = part([recon, target, drecon], recon is not None, options.per_sample)
    latent = part([mu, logvar], mu is not None, options.per_sample)
    recon_partials = like.new_empty(image.n_rows, image.tile.col_programs, dtype=accumulator(recon, target))
    kl_partials = like.new_empty(latent.n_rows, latent.tile.col_programs, dtype=accumulator(mu, logvar))
    low, high = options.logvar_clamp or (None, None)
    drecon_scale = 0.0 if drecon is None else options.recon_scale * options.recon_weight
    with torch.cuda.device_of(like):
        if image.programs + latent.programs:
            _elbo_fwd_kernel[(image.programs + latent.programs,)](
                *(*image.tensors, recon_partials, *latent.tensors, kl_partials),
                *(host_scalar(drecon_scale), host_scalar(low), host_scalar(high)),
                *(*image.strides, image.sizes, image.n_rows, image.n_cols, image.tile.col_programs, image.programs),
                *(*latent.strides, latent.sizes, latent.n_rows, latent.n_cols, latent.tile.col_programs),
                ERROR=l2_error,
                GRADIENT=l2_gradient,
                TARGET_SCALE=target_scale(target),
                IMAGE_DTYPE=image.dtype,
                IMAGE_ROWS=image.tile.rows,
                IMAGE_COLS=image.tile.cols,
                IMAGE_STEPS=image.tile.steps,
                LATENT_DTYPE=latent.dtype,
                LATENT_ROWS=latent.tile.rows,
                LATENT_COLS=latent.tile.cols,
                LATENT_STEPS=latent.tile.steps,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        if kl is not None:  # measured already: its values are the partial sums
            kl_partials = kl.contiguous()
        dtype = accumulator(recon, target, mu, logvar, kl)
        return _folded(recon_partials, kl_partials, options, like.shape[0], dtype)


def _folded(
    recon_partials: Tensor, kl_partials: Tensor, options: Any, batch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    shape = (batch,) if options.per_sample else ()
    loss, recon_term, kl_term = (recon_partials.new_empty(shape, dtype=dtype) for _ in range(3))
    on_device = isinstance(options.recon_weight, Tensor) or isinstance(options.beta, Tensor)
    weights = recon_partials.new_empty(2, dtype=dtype) if on_device else None
    if n_rows := loss.numel():
        n_recon, n_kl = recon_partials.numel() // n_rows, kl_partials.numel() // n_rows
        tiles = fold_tile(n_rows, n_recon), fold_tile(n_rows, n_kl)
        block_rows = min(rows for rows, _ in tiles)
        _elbo_fold_kernel[(triton.cdiv(n_rows, block_rows),)](
            *(recon_partials, kl_partials, loss, recon_term, kl_term, weights),
            *(host_scalar(options.recon_scale), host_scalar(options.kl_scale)),
            *(host_scalar(options.recon_weight), host_scalar(options.beta)),
            *(n_rows, n_recon, n_kl, block_rows, tiles[0][1], tiles[1][1]),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return loss, recon_term, kl_term, weights
