"""The loss of a VAE: errors of the images and KL of the latents in one launch, which also writes the gradient of the
reconstruction, then a tiny launch that folds the partial sums of both into (loss, recon term, KL term).
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold, fold_tile
from ._tile import NUM_WARPS, Part, accumulator, first, host_scalar, is_whole, keys, load, metas, part, place, scalar
from .elbo_bwd import elbo_bwd as elbo_bwd
from .images import Images, image_pointers, image_tile
from .latents import Latents, bounds_of, floored, kl_tile, latent_pointers
from .likelihoods import likelihood


@triton.jit
def _image_program(pid, images, likelihood, at, partials_ptr, weight):
    first_row, first_col, rows = place(pid, at)
    # one number for all, or one a row
    scale = load(weight + rows, rows < at.n_rows, at.dtype) if weight.dtype.is_ptr() else scalar(weight, at.dtype)
    errors = tl.zeros([at.block_rows, at.block_cols], at.dtype)
    for _ in range(at.steps):
        cols = first_col + tl.arange(0, at.block_cols)[None, :]
        ptrs = image_pointers(images, at, rows, cols)
        if is_whole(first_row, first_col, at):
            errors += image_tile(images, ptrs, likelihood, scale, None, at.dtype)
        else:
            mask = (rows < at.n_rows) & (cols < at.n_cols)
            errors += image_tile(images, ptrs, likelihood, scale, mask, at.dtype)
        first_col += at.block_cols
    sums = tl.sum(errors, axis=1)[:, None]
    tl.store(partials_ptr + rows * at.n_col_programs + pid % at.n_col_programs, sums, mask=rows < at.n_rows)


@triton.jit
def _latent_program(pid, latents, bounds, at, partials_ptr, floored_partials_ptr):
    first_row, first_col, rows = place(pid, at)
    kls = tl.zeros([at.block_rows, at.block_cols], at.dtype)
    floored_kls = tl.zeros([at.block_rows, at.block_cols], at.dtype)
    for _ in range(at.steps):
        cols = first_col + tl.arange(0, at.block_cols)[None, :]
        mask = (rows < at.n_rows) & (cols < at.n_cols)
        ptrs = latent_pointers(latents, at, rows, cols)
        if is_whole(first_row, first_col, at):
            kl = kl_tile(latents, ptrs, bounds, None, at.dtype)
        else:
            kl = kl_tile(latents, ptrs, bounds, mask, at.dtype)
        kls += kl
        if bounds.floor is not None:
            floored_kls += floored(kl, bounds, mask, at.dtype)
        first_col += at.block_cols
    offsets = rows * at.n_col_programs + pid % at.n_col_programs
    tl.store(partials_ptr + offsets, 0.5 * tl.sum(kls, axis=1)[:, None], mask=rows < at.n_rows)
    if bounds.floor is not None:
        sums = 0.5 * tl.sum(floored_kls, axis=1)[:, None]
        tl.store(floored_partials_ptr + offsets, sums, mask=rows < at.n_rows)


@triton.jit(do_not_specialize=["weight"])
def _elbo_fwd_kernel(
    images,  # Images: pointers; no images where recon is None
    likelihood,  # Likelihood
    image_at,  # Geometry
    image_programs,  # programs from here on have latents
    weight,  # of the gradients that are written: bits of a float64, or a pointer to [image_rows]
    recon_partials_ptr,  # [image_rows, image_col_programs], written
    latents,  # Latents: pointers; no latents where mu is None
    bounds,  # Bounds
    latent_at,  # Geometry
    kl_partials_ptr,  # [latent_rows, latent_col_programs], written
    floored_partials_ptr,  # the same of the KL under the floor; None: there is no floor
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if images.recon is not None:
            _image_program(pid, images, likelihood, image_at, recon_partials_ptr, weight)
    elif latents.mu is not None:
        latent_pid = pid - image_programs
        _latent_program(latent_pid, latents, bounds, latent_at, kl_partials_ptr, floored_partials_ptr)


@triton.jit(do_not_specialize=["recon_scale", "recon_constant", "kl_scale", "recon_weight", "beta"])
def _elbo_fold_kernel(
    recon_partials_ptr,  # [n_rows, n_recon_partials], read; None: no images
    kl_partials_ptr,  # [n_rows, n_kl_partials], read; None: no latents
    floored_partials_ptr,  # [n_rows, n_kl_partials], read; None: no floor
    loss_ptr,  # [n_rows], written, as are the terms
    recon_ptr,
    kl_ptr,
    floored_ptr,
    weights_ptr,  # [2], written: recon_weight and beta as this call saw them; None: not wanted
    recon_scale,  # bits of a float64, as are recon_constant and kl_scale
    recon_constant,
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
    recon = recon * scalar(recon_scale, tl.float64) + scalar(recon_constant, tl.float64)
    kl_factor = scalar(kl_scale, tl.float64)
    kl = fold(kl_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS) * kl_factor
    dtype = loss_ptr.dtype.element_ty
    weighed = kl
    if floored_partials_ptr is not None:
        weighed = fold(floored_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS) * kl_factor
        tl.store(floored_ptr + rows, weighed.to(dtype), mask=mask)
    tl.store(loss_ptr + rows, (weight_recon * recon + weight_kl * weighed).to(dtype), mask=mask)
    tl.store(recon_ptr + rows, recon.to(dtype), mask=mask)
    tl.store(kl_ptr + rows, kl.to(dtype), mask=mask)
    if weights_ptr is not None:
        first = tl.program_id(0) == 0
        tl.store(weights_ptr, weight_recon.to(dtype), mask=first)
        tl.store(weights_ptr + 1, weight_kl.to(dtype), mask=first)


class _Plan(NamedTuple):
    """A forward pass but for its tensors and weights."""

    image: Part
    latent: Part
    likelihood: Any
    bounds: Any
    recon_sums: tuple[int, int] | None  # shape of the partial sums; None: nothing to sum up
    recon_dtype: torch.dtype
    kl_sums: tuple[int, int] | None
    kl_dtype: torch.dtype
    factors: tuple[Any, ...]  # recon_scale, recon_constant, kl_scale
    shape: tuple[int, ...]  # of the results
    dtype: torch.dtype
    fold_programs: int
    fold: tuple[int, ...]  # n_rows to KL_COLS


@lru_cache(maxsize=1024)
def _plan(of: Any, of_written: Any, constants: tuple[Any, ...], batch: int) -> _Plan:
    recon, target, log_scale, mu, logvar, prior_mu, prior_logvar, kl, mask = tensors = metas(of)
    drecon, dlog_scale = metas(of_written)
    recon_scale, recon_constant, kl_scale, per_sample, logvar_clamp, error, floor = constants
    images = Images(recon, target, log_scale, mask, drecon, None, dlog_scale)
    latents = Latents(mu, logvar, prior_mu, prior_logvar)
    image = part(images, recon is not None, per_sample)
    latent = part(latents, mu is not None, per_sample)
    shape = (batch,) if per_sample else ()
    n_rows = batch if per_sample else 1
    # a KL measured already: its values are the partial sums
    n_kl = latent.n_rows * latent.n_partials if kl is None else math.prod(kl.shape)
    n_recon = image.n_rows * image.n_partials
    n_recon, n_kl = (n // n_rows if n_rows else 0 for n in (n_recon, n_kl))
    tiles = fold_tile(n_rows, n_recon), fold_tile(n_rows, n_kl)
    block_rows = min(rows for rows, _ in tiles)
    return _Plan(
        *(image, latent, likelihood(error, images.recon, target)),
        bounds_of(logvar_clamp, floor),
        (image.n_rows, image.n_partials) if image.programs else None,
        accumulator(recon, target, log_scale),
        (latent.n_rows, latent.n_partials) if latent.programs else None,
        accumulator(*latents),
        tuple(map(host_scalar, (recon_scale, recon_constant, kl_scale))),
        shape,
        accumulator(*tensors[:-1]),
        triton.cdiv(n_rows, block_rows),
        (n_rows, n_recon, n_kl, block_rows, tiles[0][1], tiles[1][1]),
    )


def elbo_fwd(
    tensors: Any, written: Any, options: Any, notes: dict[Any, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (loss, recon term, KL term, KL term under the floor, weights).

    weights: a snapshot of (recon_weight, beta) if one of them is a tensor, which may change before the backward pass.
    written: buffers for recon_weight times the gradients of the recon term by recon and log_scale, or None; laid out
        as these, or as memory allows.
    notes: of calls whose tensors and constants are alike.
    """
    recon, target, log_scale, mu, logvar, prior_mu, prior_logvar, kl, mask = tensors
    drecon, dlog_scale = written.recon, written.log_scale
    like = first(tensors)
    kind = drecon is not None, dlog_scale is not None
    if (plan := notes.get(kind)) is None:
        plan = notes[kind] = _plan(keys(tensors), keys((drecon, dlog_scale)), options.constants, like.shape[0])
    new = like.new_empty
    recon_partials = None if plan.recon_sums is None else new(plan.recon_sums, dtype=plan.recon_dtype)
    kl_partials = kl if plan.kl_sums is None else new(plan.kl_sums, dtype=plan.kl_dtype)
    floored_partials = None if options.floor is None or kl_partials is None else torch.empty_like(kl_partials)
    loss = new(plan.shape, dtype=plan.dtype)
    recon_term, kl_term = torch.empty_like(loss), torch.empty_like(loss)
    floored_term = None if options.floor is None else torch.empty_like(loss)
    beta, recon_weight, row_weight = options.beta, options.recon_weight, options.row_weight
    on_device = isinstance(recon_weight, Tensor) or isinstance(beta, Tensor)
    weights = new(2, dtype=plan.dtype) if on_device else None
    if row_weight is None:
        row_weight = host_scalar(0.0 if drecon is None else options.recon_scale * recon_weight)
    with torch.cuda.device_of(like):
        if programs := plan.image.programs + plan.latent.programs:
            _elbo_fwd_kernel[(programs,)](
                Images(recon, target, log_scale, mask, drecon, None, dlog_scale) if plan.image.programs else Images(),
                *(plan.likelihood, plan.image.at, plan.image.programs, row_weight, recon_partials),
                Latents(mu, logvar, prior_mu, prior_logvar) if plan.latent.programs else Latents(),
                *(plan.bounds, plan.latent.at, kl_partials, floored_partials),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        if plan.fold_programs:
            _elbo_fold_kernel[(plan.fold_programs,)](
                *(recon_partials, None if kl_partials is None else kl_partials.contiguous(), floored_partials),
                *(loss, recon_term, kl_term, floored_term, weights, *plan.factors),
                *(host_scalar(recon_weight), host_scalar(beta), *plan.fold),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return loss, recon_term, kl_term, floored_term, weights
