"""The loss of a VAE: errors of the images and KL of the latents in one launch, which also writes the gradient of the
reconstruction, then a tiny launch that folds the partial sums of both into (loss, recon term, KL term).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold
from ._tile import NUM_WARPS, full_tile, load, on_device, pack_f64, tile_origin, unpack_f64
from .elbo_samples import sample_terms_fwd
from .images import Images, image_pointers, image_tile
from .latents import Latents, apply_free_bits, kl_tile, latent_pointers
from .plan import ElboPlan
from .samples import Samples, error_factor
from .types import ElboNumbers

_NO_IMAGES, _NO_LATENTS = Images(), Latents()


@triton.jit
def _image_program(pid, images, likelihood, geometry, partials_ptr, count_partials_ptr, factor, samples, options):
    first_row, first_col, rows = tile_origin(pid, geometry)
    row_factor = error_factor(
        samples, options, unpack_f64(factor, geometry.dtype), rows, rows < geometry.n_rows, geometry.dtype
    )
    errors = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    counts = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    for _ in range(geometry.steps):
        cols = first_col + tl.arange(0, geometry.block_cols)[None, :]
        ptrs = image_pointers(images, geometry, rows, cols)
        if full_tile(first_row, first_col, geometry):
            errors += image_tile(images, ptrs, likelihood, row_factor, None, geometry.dtype)
            if count_partials_ptr is not None:
                counts += load(ptrs.mask, None, geometry.dtype)
        else:
            mask = (rows < geometry.n_rows) & (cols < geometry.n_cols)
            errors += image_tile(images, ptrs, likelihood, row_factor, mask, geometry.dtype)
            if count_partials_ptr is not None:
                counts += load(ptrs.mask, mask, geometry.dtype)
        first_col += geometry.block_cols
    offsets = rows * geometry.n_col_programs + pid % geometry.n_col_programs
    tl.store(partials_ptr + offsets, tl.sum(errors, axis=1)[:, None], mask=rows < geometry.n_rows)
    if count_partials_ptr is not None:
        tl.store(count_partials_ptr + offsets, tl.sum(counts, axis=1)[:, None], mask=rows < geometry.n_rows)


@triton.jit
def _latent_program(pid, latents, bounds, geometry, partials_ptr, free_bits_partials_ptr):
    first_row, first_col, rows = tile_origin(pid, geometry)
    kls = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    free_bits_kls = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    for _ in range(geometry.steps):
        cols = first_col + tl.arange(0, geometry.block_cols)[None, :]
        mask = (rows < geometry.n_rows) & (cols < geometry.n_cols)
        ptrs = latent_pointers(latents, geometry, rows, cols)
        if full_tile(first_row, first_col, geometry):
            kl = kl_tile(latents, ptrs, bounds, None, geometry.dtype)
        else:
            kl = kl_tile(latents, ptrs, bounds, mask, geometry.dtype)
        kls += kl
        if bounds.free_bits is not None:
            free_bits_kls += apply_free_bits(latents, ptrs, kl, bounds, mask, geometry.dtype)
        first_col += geometry.block_cols
    offsets = rows * geometry.n_col_programs + pid % geometry.n_col_programs
    tl.store(partials_ptr + offsets, 0.5 * tl.sum(kls, axis=1)[:, None], mask=rows < geometry.n_rows)
    if bounds.free_bits is not None:
        sums = 0.5 * tl.sum(free_bits_kls, axis=1)[:, None]
        tl.store(free_bits_partials_ptr + offsets, sums, mask=rows < geometry.n_rows)


@triton.jit(do_not_specialize=["factor"])
def _elbo_fwd_kernel(
    images,  # Images: pointers; no images where recon is None
    likelihood,  # Likelihood
    image_geometry,  # Geometry
    image_programs,  # programs from here on have latents
    factor,  # of the gradients that are written: bits of a float64
    samples,  # Samples that multiply it, or None
    sample_options,
    recon_partials_ptr,  # [image_rows, image_col_programs], written
    count_partials_ptr,  # the same, numbers of selected elements; None: not wanted
    latents,  # Latents: pointers; no latents where mu is None
    bounds,  # Bounds
    latent_geometry,  # Geometry
    kl_partials_ptr,  # [latent_rows, latent_col_programs], written
    free_bits_partials_ptr,  # the same of the KL under free bits; None: there are none
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if images.recon is not None:
            _image_program(
                pid,
                images,
                likelihood,
                image_geometry,
                recon_partials_ptr,
                count_partials_ptr,
                factor,
                samples,
                sample_options,
            )
    elif latents.mu is not None:
        latent_pid = pid - image_programs
        _latent_program(latent_pid, latents, bounds, latent_geometry, kl_partials_ptr, free_bits_partials_ptr)


@triton.jit(do_not_specialize=["recon_scale", "recon_constant", "kl_scale", "recon_weight", "beta"])
def _elbo_fold_kernel(
    recon_partials_ptr,  # [n_rows, n_recon_partials], read; None: no images
    kl_partials_ptr,  # [n_rows, n_kl_partials], read; None: no latents
    free_bits_partials_ptr,  # [n_rows, n_kl_partials], read; None: no free bits
    loss_ptr,  # [n_rows], written, as are the terms
    recon_ptr,
    kl_ptr,
    numbers_ptr,  # [2], written: recon_weight and beta as this call saw them; None: not wanted
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
    weight_recon, weight_kl = unpack_f64(recon_weight, tl.float64), unpack_f64(beta, tl.float64)
    recon = fold(recon_partials_ptr, rows, n_rows, n_recon_partials, BLOCK_ROWS, RECON_COLS)
    recon = recon * unpack_f64(recon_scale, tl.float64) + unpack_f64(recon_constant, tl.float64)
    kl_factor = unpack_f64(kl_scale, tl.float64)
    kl = fold(kl_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS) * kl_factor
    dtype = loss_ptr.dtype.element_ty
    weighed = kl
    if free_bits_partials_ptr is not None:
        weighed = fold(free_bits_partials_ptr, rows, n_rows, n_kl_partials, BLOCK_ROWS, KL_COLS) * kl_factor
    tl.store(loss_ptr + rows, (weight_recon * recon + weight_kl * weighed).to(dtype), mask=mask)
    tl.store(recon_ptr + rows, recon.to(dtype), mask=mask)
    tl.store(kl_ptr + rows, kl.to(dtype), mask=mask)
    if numbers_ptr is not None:
        first = tl.program_id(0) == 0
        tl.store(numbers_ptr, weight_recon.to(dtype), mask=first)
        tl.store(numbers_ptr + 1, weight_kl.to(dtype), mask=first)


def elbo_fwd(
    plan: ElboPlan, tensors: Sequence[Any], numbers: Sequence[Any], drecon: Tensor | None, dlog_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return (loss, recon term, KL term) and what `elbo_bwd` needs.

    Args:
        plan: Of these tensors and options.
        tensors, numbers: The fields of `ElboTensors` and `ElboNumbers`.
        drecon, dlog_scale: Buffers for recon_weight times the gradients of the recon term by recon and log_scale; None
            if the backward pass is to compute them.
    """
    with on_device(plan.device):
        return _launch(plan, tensors, numbers, drecon, dlog_scale)


def _launch(
    plan: ElboPlan, tensors: Sequence[Any], numbers: Sequence[Any], drecon: Tensor | None, dlog_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    recon, target, log_scale, extra_map, mu, logvar, prior_mu, prior_logvar, mask, kl_mask, kl, *per_sample = tensors
    beta, recon_weight, _ = numbers
    new = tensors[plan.first].new_empty
    recon_partials = count_partials = free_bits_partials = None
    kl_partials = kl
    images, latents = _NO_IMAGES, _NO_LATENTS
    if plan.image_programs:
        recon_partials = new(plan.recon_partials, dtype=plan.recon_dtype)
        count_partials = torch.empty_like(recon_partials) if plan.counts_mask else None
        images = Images(recon, target, log_scale, mask, extra_map, drecon, None, dlog_scale)
    if plan.latent_programs:
        kl_partials = new(plan.kl_partials, dtype=plan.kl_dtype)
        free_bits_partials = None if plan.bounds.free_bits is None else torch.empty_like(kl_partials)
        latents = Latents(mu, logvar, prior_mu, prior_logvar, kl_mask)
    samples = None if plan.samples is None else Samples(*per_sample)
    if programs := plan.image_programs + plan.latent_programs:
        _elbo_fwd_kernel[(programs,)](
            images=images,
            likelihood=plan.likelihood,
            image_geometry=plan.image,
            image_programs=plan.image_programs,
            factor=0 if drecon is None else pack_f64(plan.recon_scale * recon_weight),
            samples=None if drecon is None else samples,
            sample_options=None if plan.samples is None else plan.samples.options,
            recon_partials_ptr=recon_partials,
            count_partials_ptr=count_partials,
            latents=latents,
            bounds=plan.bounds,
            latent_geometry=plan.latent,
            kl_partials_ptr=kl_partials,
            free_bits_partials_ptr=free_bits_partials,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    loss = new(plan.shape, dtype=plan.dtype)
    recon_term, kl_term = torch.empty_like(loss), torch.empty_like(loss)
    if plan.samples is not None and samples is not None:
        partials = recon_partials, count_partials, kl_partials, free_bits_partials
        saved = sample_terms_fwd(plan.samples, partials, samples, ElboNumbers(*numbers), loss, recon_term, kl_term)
        return loss, recon_term, kl_term, saved
    seen = None  # numbers that are tensors: these may change before the backward pass
    if plan.has_number_tensors:
        seen = new(2, dtype=plan.dtype)
    if plan.fold_programs:
        _elbo_fold_kernel[(plan.fold_programs,)](
            recon_partials,
            kl_partials,
            free_bits_partials,
            loss,
            recon_term,
            kl_term,
            seen,
            *plan.factors,
            pack_f64(recon_weight),
            pack_f64(beta),
            *plan.fold,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return loss, recon_term, kl_term, () if seen is None else (seen,)
