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
from ._tile import NUM_WARPS, full_tile, load, on_device, pack_all, tile_origin, unpack_f64
from .elbo_samples_fwd import sample_terms_fwd
from .images import Images, image_pointers, image_tile
from .latents import Latents, apply_free_bits, kl_tile, latent_pointers
from .plan import ElboPlan
from .samples import ImagePartials, Samples, error_factor

_NO_IMAGES, _NO_LATENTS, _NO_PARTIALS = Images(), Latents(), ImagePartials()
_STRIDES: tuple[tuple[int, ...], ...] = (), (1,)  # of a scalar, and of one value per sample


@triton.jit
def _image_program(pid, images, likelihood, geometry, partials, factor, samples, options):
    first_row, first_col, rows = tile_origin(pid, geometry)
    row_factor = error_factor(
        samples, options, unpack_f64(factor, geometry.dtype), rows, rows < geometry.n_rows, geometry.dtype
    )
    errors = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    counts = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    weighed = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    weights = tl.zeros([geometry.block_rows, geometry.block_cols], geometry.dtype)
    for _ in range(geometry.steps):
        cols = first_col + tl.arange(0, geometry.block_cols)[None, :]
        ptrs = image_pointers(images, geometry, rows, cols)
        if full_tile(first_row, first_col, geometry):
            error, weight = image_tile(images, ptrs, likelihood, row_factor, 0.0, None, geometry.dtype)
            if partials.counts is not None:
                counts += load(ptrs.mask, None, geometry.dtype)
        else:
            mask = (rows < geometry.n_rows) & (cols < geometry.n_cols)
            error, weight = image_tile(images, ptrs, likelihood, row_factor, 0.0, mask, geometry.dtype)
            if partials.counts is not None:
                counts += load(ptrs.mask, mask, geometry.dtype)
        errors += error
        if images.weight is not None:
            weighed += error * weight
            weights += weight
        first_col += geometry.block_cols
    offsets = rows * geometry.n_col_programs + pid % geometry.n_col_programs
    _store_sums(partials.errors, offsets, errors, rows < geometry.n_rows)
    if partials.counts is not None:
        _store_sums(partials.counts, offsets, counts, rows < geometry.n_rows)
    if images.weight is not None:
        _store_sums(partials.weighed, offsets, weighed, rows < geometry.n_rows)
        _store_sums(partials.weights, offsets, weights, rows < geometry.n_rows)


@triton.jit
def _store_sums(ptr, offsets, values, mask):
    tl.store(ptr + offsets, tl.sum(values, axis=1)[:, None], mask=mask)


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
    partials,  # ImagePartials, [image_rows, image_col_programs], written
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
                partials,
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
    recon, target, log_scale, extra_map, mu, logvar, prior_mu, prior_logvar, mask, kl_mask, kl, *per_sample = tensors
    beta, recon_weight, _ = numbers
    factor = 0.0 if drecon is None else plan.recon_scale * recon_weight
    factor, recon_weight, beta = pack_all(factor, recon_weight, beta)
    image_partials, free_bits_partials, weight_map = _NO_PARTIALS, None, None
    kl_partials = kl
    images, latents = _NO_IMAGES, _NO_LATENTS
    if plan.weighs_elements:
        *per_sample, weight_map = per_sample
    if plan.image_programs:
        recon_partials = torch.empty_strided(*plan.recon_partials, dtype=plan.recon_dtype, device=plan.device)
        count_partials = torch.empty_like(recon_partials) if plan.counts_mask else None
        image_partials = ImagePartials(recon_partials, count_partials)
        if weight_map is not None:
            weights = torch.empty_like(recon_partials), torch.empty_like(recon_partials)
            image_partials = ImagePartials(recon_partials, count_partials, *weights)
        images = Images(recon, target, log_scale, mask, extra_map, weight_map, drecon, None, dlog_scale)
    if plan.latent_programs:
        kl_partials = torch.empty_strided(*plan.kl_partials, dtype=plan.kl_dtype, device=plan.device)
        free_bits_partials = None if plan.bounds.free_bits is None else torch.empty_like(kl_partials)
        latents = Latents(mu, logvar, prior_mu, prior_logvar, kl_mask)
    loss = torch.empty_strided(plan.shape, _STRIDES[len(plan.shape)], dtype=plan.dtype, device=plan.device)
    recon_term, kl_term = torch.empty_like(loss), torch.empty_like(loss)
    samples = None if plan.sample_options is None else Samples(*per_sample)
    with on_device(plan.device):
        if programs := plan.image_programs + plan.latent_programs:
            # kernel[grid](...) does the same, but copies the keywords three times, which takes 4 us
            _elbo_fwd_kernel.run(
                grid=(programs,),
                warmup=False,
                images=images,
                likelihood=plan.likelihood,
                image_geometry=plan.image,
                image_programs=plan.image_programs,
                factor=factor,
                samples=None if drecon is None else samples,
                sample_options=plan.sample_options,
                partials=image_partials,
                latents=latents,
                bounds=plan.bounds,
                latent_geometry=plan.latent,
                kl_partials_ptr=kl_partials,
                free_bits_partials_ptr=free_bits_partials,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        partials = image_partials, kl_partials, free_bits_partials
        if samples is not None:
            saved = sample_terms_fwd(plan, partials, samples, numbers, loss, recon_term, kl_term)
            return loss, recon_term, kl_term, saved
        # values of numbers that are tensors, which may change before the backward pass
        seen = torch.empty(2, dtype=plan.dtype, device=plan.device) if plan.has_number_tensors else None
        if plan.fold_programs:
            sums = image_partials.errors, kl_partials, free_bits_partials
            results = loss, recon_term, kl_term, seen
            arguments = *sums, *results, *plan.factors, recon_weight, beta, *plan.fold
            grid = (plan.fold_programs,)
            _elbo_fold_kernel.run(*arguments, grid=grid, warmup=False, num_warps=NUM_WARPS, enable_fp_fusion=True)
    return loss, recon_term, kl_term, () if seen is None else (seen,)
