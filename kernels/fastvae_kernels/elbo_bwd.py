"""Gradients of a VAE's loss, in one launch. Where the forward pass has written that of the reconstruction already, its
programs read the upstream gradient and leave at once if that is what the forward pass took it for.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import (
    NUM_WARPS,
    ONE_TILE_EACH,
    Part,
    first,
    host_scalar,
    is_whole,
    keys,
    load,
    metas,
    part,
    place,
    scalar,
    strides_of,
    triton_dtype,
)
from .images import Images, image_pointers, image_tile
from .latents import Latents, bounds_of, latent_gradient_tile, latent_pointers
from .likelihoods import likelihood

_MAX_IMAGE_PROGRAMS = 1 << 10  # few, so that leaving at once costs next to nothing; each walks over its share
_KL_BLOCK = 1024


class Upstream(NamedTuple):
    """Gradients of the outputs, or their strides: [n_rows], or one for all at stride 0. None: no gradient came."""

    loss: Any
    recon: Any
    kl: Any
    floored: Any


@triton.jit
def _coefficient(weight, scale, dloss_ptr, dterm_ptr, dloss_stride, dterm_stride, rows, n_rows, DTYPE: tl.constexpr):
    """(weight * dloss + dterm) * scale of each row: the gradient of the sum that a term is made of."""
    coefficient = tl.zeros(rows.shape, DTYPE)
    if dloss_ptr is not None:
        coefficient += scalar(weight, DTYPE) * load(dloss_ptr + rows * dloss_stride, rows < n_rows, DTYPE)
    if dterm_ptr is not None:
        coefficient += load(dterm_ptr + rows * dterm_stride, rows < n_rows, DTYPE)
    return coefficient * scalar(scale, DTYPE)


@triton.jit
def _rescale(ptrs, factor, mask, DTYPE: tl.constexpr):
    tl.store(ptrs, (factor * load(ptrs, mask, DTYPE)).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_tile(images, ptrs, factor, mask, DTYPE: tl.constexpr):
    if images.drecon is not None:
        _rescale(ptrs.drecon, factor, mask, DTYPE)
    if images.dlog_scale is not None:
        _rescale(ptrs.dlog_scale, factor, mask, DTYPE)


@triton.jit
def _factor(recon_weight, row_weight, upstream, strides, coefficient, rows, at):
    """What the gradient that the forward pass wrote has to be multiplied by, each row; 1 in rows outside."""
    mask = rows < at.n_rows
    if row_weight is None:
        factor = tl.zeros(rows.shape, at.dtype)
        if upstream.loss is not None:
            factor += load(upstream.loss + rows * strides.loss, mask, at.dtype)
        if upstream.recon is not None:
            factor += load(upstream.recon + rows * strides.recon, mask, at.dtype) / scalar(recon_weight, at.dtype)
    else:
        written = load(row_weight + rows, mask, at.dtype)
        # equal where both are 0, too
        factor = tl.where(coefficient == written, 1.0, coefficient / tl.where(coefficient == written, 1.0, written))
    return tl.where(mask, factor, 1.0)


@triton.jit
def _scales_exactly(gradient_ptr, factor):
    """Whether the product of a stored gradient and `factor` is rounded once.

    In 16 bits that takes a power of two, which changes the exponent alone.
    """
    if gradient_ptr is None:
        exact = True
    elif gradient_ptr.dtype.element_ty.primitive_bitwidth < 32:
        mantissa = factor.to(tl.float32).to(tl.int32, bitcast=True) & 0x007FFFFF
        exact = tl.sum((mantissa != 0).to(tl.int32)) == 0
    else:
        exact = True
    return exact


@triton.jit
def _image_program(
    pid, images, likelihood, at, upstream, strides, recon_weight, row_weight, recon_scale, HELD: tl.constexpr
):
    first_row, first_col, rows = place(pid, at)
    coefficient = _coefficient(
        *(recon_weight, recon_scale, upstream.loss, upstream.recon, strides.loss, strides.recon),
        *(rows, at.n_rows, at.dtype),
    )
    n_steps = at.steps
    factor = coefficient
    exact = False
    if HELD:
        factor = _factor(recon_weight, row_weight, upstream, strides, coefficient, rows, at)
        # gradient 1: every row is as the forward pass left it
        n_steps = tl.where(tl.sum((factor != 1.0).to(tl.int32)) == 0, 0, at.steps)
        exact = True
        if images.target is not None:
            exact = _scales_exactly(images.drecon, factor) & _scales_exactly(images.dlog_scale, factor)
            if row_weight is not None:  # what was written under a weight of 0 tells nothing
                exact = exact & (tl.sum((tl.abs(factor) == float("inf")).to(tl.int32)) == 0)
    for _ in range(n_steps):
        cols = first_col + tl.arange(0, at.block_cols)[None, :]
        mask = (rows < at.n_rows) & (cols < at.n_cols)
        ptrs = image_pointers(images, at, rows, cols)
        whole = is_whole(first_row, first_col, at)
        if exact:
            if HELD:
                if whole:
                    _rescale_tile(images, ptrs, factor, None, at.dtype)
                else:
                    _rescale_tile(images, ptrs, factor, mask, at.dtype)
        elif images.target is None:  # recon is gone: its gradient took its place
            pass
        elif whole:
            image_tile(images, ptrs, likelihood, coefficient, None, at.dtype)
        else:
            image_tile(images, ptrs, likelihood, coefficient, mask, at.dtype)
        first_col += at.block_cols


@triton.jit
def _latent_program(pid, latents, bounds, at, upstream, strides, beta, kl_scale):
    first_row, first_col, rows = place(pid, at)
    cols = first_col + tl.arange(0, at.block_cols)[None, :]
    if bounds.floor is None:
        coefficient = _coefficient(
            *(beta, kl_scale, upstream.loss, upstream.kl, strides.loss, strides.kl, rows, at.n_rows, at.dtype)
        )
        of_floored = 0.0
    else:
        coefficient = _coefficient(
            *(beta, kl_scale, None, upstream.kl, strides.loss, strides.kl, rows, at.n_rows, at.dtype)
        )
        of_floored = _coefficient(
            *(beta, kl_scale, upstream.loss, upstream.floored, strides.loss, strides.floored),
            *(rows, at.n_rows, at.dtype),
        )
    ptrs = latent_pointers(latents, at, rows, cols)
    if is_whole(first_row, first_col, at):
        latent_gradient_tile(latents, ptrs, bounds, coefficient, of_floored, None, at.dtype)
    else:
        mask = (rows < at.n_rows) & (cols < at.n_cols)
        latent_gradient_tile(latents, ptrs, bounds, coefficient, of_floored, mask, at.dtype)


@triton.jit
def _kl_program(pid, upstream, strides, beta, kl_scale, dkl_ptr, n_kl, BLOCK_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    rows = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    dkl = _coefficient(beta, kl_scale, upstream.loss, upstream.kl, strides.loss, strides.kl, rows, n_kl, DTYPE)
    tl.store(dkl_ptr + rows, dkl.to(dkl_ptr.dtype.element_ty), mask=rows < n_kl)


@triton.jit(do_not_specialize=["recon_weight", "beta", "recon_scale", "kl_scale"])
def _elbo_bwd_kernel(
    upstream,  # Upstream: pointers
    upstream_strides,  # Upstream
    recon_weight,  # bits of a float64 or pointer, as is beta
    beta,
    recon_scale,  # bits of a float64, as is kl_scale
    kl_scale,
    images,  # Images: pointers; no image gradient wanted where recon is None
    likelihood,  # Likelihood
    image_at,  # Geometry
    image_programs,  # programs from here on have latents
    row_weight,  # [image_rows]: what the forward pass multiplied gradients by; None: recon_weight * recon_scale
    latents,  # Latents: pointers; no latent gradient wanted where mu is None
    bounds,  # Bounds
    latent_at,  # Geometry
    latent_programs,  # programs from here on have values of kl
    dkl_ptr,  # [n_kl], written; None: not wanted
    n_kl,
    HELD: tl.constexpr,  # drecon and dlog_scale hold what the forward pass wrote
    KL_BLOCK: tl.constexpr,
    KL_DTYPE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if images.recon is not None:
            _image_program(
                *(pid, images, likelihood, image_at, upstream, upstream_strides),
                *(recon_weight, row_weight, recon_scale, HELD),
            )
    elif pid < latent_programs:
        if latents.mu is not None:
            latent_pid = pid - image_programs
            _latent_program(latent_pid, latents, bounds, latent_at, upstream, upstream_strides, beta, kl_scale)
    elif dkl_ptr is not None:
        kl_pid = pid - latent_programs
        _kl_program(kl_pid, upstream, upstream_strides, beta, kl_scale, dkl_ptr, n_kl, KL_BLOCK, KL_DTYPE)


class _Plan(NamedTuple):
    """A backward pass but for its tensors and weights."""

    image: Part
    latent: Part
    likelihood: Any
    bounds: Any
    strides: Upstream
    factors: tuple[Any, Any]  # recon_scale, kl_scale
    programs: int
    n_kl: int
    kl_dtype: tl.dtype


@lru_cache(maxsize=1024)
def _plan(of: Any, of_upstream: Any, of_gradients: Any, constants: tuple[Any, ...], max_image_programs: int) -> _Plan:
    recon, target, log_scale, mu, logvar, prior_mu, prior_logvar, _, mask = metas(of)
    drecon, dtarget, dlog_scale, dmu, dlogvar, dprior_mu, dprior_logvar, dkl, _ = metas(of_gradients)
    recon_scale, _, kl_scale, per_sample, logvar_clamp, error, floor = constants
    images = Images(recon or drecon, target, log_scale, mask, drecon, dtarget, dlog_scale)
    latents = Latents(mu, logvar, prior_mu, prior_logvar, dmu, dlogvar, dprior_mu, dprior_logvar)
    image = part(images, any((drecon, dtarget, dlog_scale)), per_sample, max_image_programs)
    latent = part(latents, any(latents[4:]), per_sample, ONE_TILE_EACH)
    n_kl = 0 if dkl is None else math.prod(dkl.shape)
    return _Plan(
        *(image, latent, likelihood(error, images.recon, target)),
        bounds_of(logvar_clamp, floor),
        Upstream(*(t.strides[0] if t is not None and t.shape else 0 for t in metas(of_upstream))),
        (host_scalar(recon_scale), host_scalar(kl_scale)),
        image.programs + latent.programs + triton.cdiv(n_kl, _KL_BLOCK),
        n_kl,
        tl.float32 if dkl is None else triton_dtype(dkl.dtype),
    )


def elbo_bwd(
    tensors: Any,
    upstream: tuple[Tensor | None, ...],
    gradients: Any,
    options: Any,
    notes: dict[Any, Any],
    *,
    holds_forward_gradient: bool,
) -> None:
    """Write the gradients that are asked for, given those of (loss, recon term, KL term, KL term under the floor).

    gradients: buffers in the places of what they are gradients of. If `holds_forward_gradient`, those of recon and
        log_scale already hold what `elbo_fwd` wrote there and are only scaled, where that is exact or where recon is
        gone (None, as is target).
    """
    recon, target, log_scale, mu, logvar, prior_mu, prior_logvar, _, mask = tensors
    drecon, dtarget, dlog_scale, dmu, dlogvar, dprior_mu, dprior_logvar, dkl, _ = gradients
    # a hook may bring saved tensors back with other strides
    kind = strides_of((*tensors, *upstream, *gradients))
    if (plan := notes.get(kind)) is None:
        of = keys(tensors), keys(upstream), keys(gradients)
        plan = notes[kind] = _plan(*of, options.constants, _MAX_IMAGE_PROGRAMS)
    if not plan.programs:
        return
    recon = drecon if recon is None else recon
    images = Images(recon, target, log_scale, mask, drecon, dtarget, dlog_scale)
    latents = Latents(mu, logvar, prior_mu, prior_logvar, dmu, dlogvar, dprior_mu, dprior_logvar)
    image, latent = plan.image, plan.latent
    with torch.cuda.device_of(first(gradients)):
        _elbo_bwd_kernel[(plan.programs,)](
            *(Upstream(*upstream), plan.strides, host_scalar(options.recon_weight), host_scalar(options.beta)),
            *plan.factors,
            *(images if image.programs else Images(), plan.likelihood, image.at, image.programs, options.row_weight),
            *(latents if latent.programs else Latents(), plan.bounds, latent.at, image.programs + latent.programs),
            *(dkl, plan.n_kl),
            HELD=holds_forward_gradient,
            KL_BLOCK=_KL_BLOCK,
            KL_DTYPE=plan.kl_dtype,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
