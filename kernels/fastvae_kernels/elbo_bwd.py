"""Gradients of a VAE's loss, in one launch. Where the forward pass has written that of the reconstruction already, its
programs read the upstream gradient and return at once if it is 1, as the forward pass assumed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, full_tile, load, on_device, pack_all, tile_origin, unpack_f64
from .elbo_samples_bwd import sample_gradients
from .images import Images, image_pointers, image_tile
from .latents import Latents, latent_gradient_tile, latent_pointers
from .plan import ElboPlan, seen_numbers
from .samples import Samples
from .types import ElboNumbers

_KL_BLOCK = 1024
_NO_IMAGES, _NO_LATENTS = Images(), Latents()


class Upstream(NamedTuple):
    """Gradients of the outputs, one per row at `stride` 1, or one for all at 0. None: none was given."""

    loss: Any
    recon: Any
    kl: Any
    stride: Any


@triton.jit
def _coefficient(weight, scale, dloss_ptr, dterm_ptr, stride, rows, n_rows, DTYPE: tl.constexpr):
    """(weight * dloss + dterm) * scale of each row: the gradient of the sum that a term is made of."""
    coefficient = tl.zeros(rows.shape, DTYPE)
    if dloss_ptr is not None:
        coefficient += unpack_f64(weight, DTYPE) * load(dloss_ptr + rows * stride, rows < n_rows, DTYPE)
    if dterm_ptr is not None:
        coefficient += load(dterm_ptr + rows * stride, rows < n_rows, DTYPE)
    return coefficient * unpack_f64(scale, DTYPE)


@triton.jit
def _rescale(gradient_ptr, ptrs, factor, mask, DTYPE: tl.constexpr):
    if gradient_ptr is not None:
        tl.store(ptrs, (factor * load(ptrs, mask, DTYPE)).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_tile(images, ptrs, factor, mask, DTYPE: tl.constexpr):
    _rescale(images.drecon, ptrs.drecon, factor, mask, DTYPE)
    _rescale(images.dlog_scale, ptrs.dlog_scale, factor, mask, DTYPE)


@triton.jit
def _held_factor(recon_weight, upstream, coefficients, rows, geometry):
    """What the gradient that the forward pass wrote has to be multiplied by, for each row; 1 in rows outside."""
    mask = rows < geometry.n_rows
    factor = tl.zeros(rows.shape, geometry.dtype)
    if coefficients is not None:
        factor += load(coefficients.held + rows, mask, geometry.dtype)
    else:
        if upstream.loss is not None:
            factor += load(upstream.loss + rows * upstream.stride, mask, geometry.dtype)
        if upstream.recon is not None:
            written = unpack_f64(recon_weight, geometry.dtype)
            factor += load(upstream.recon + rows * upstream.stride, mask, geometry.dtype) / written
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
    pid, images, likelihood, geometry, upstream, recon_weight, recon_scale, coefficients, RECON_GRAD_READY: tl.constexpr
):
    first_row, first_col, rows = tile_origin(pid, geometry)
    if coefficients is None:
        dloss, dterm, stride = upstream.loss, upstream.recon, upstream.stride
        coefficient = _coefficient(
            recon_weight, recon_scale, dloss, dterm, stride, rows, geometry.n_rows, geometry.dtype
        )
    else:
        coefficient = load(coefficients.error + rows, rows < geometry.n_rows, geometry.dtype)
    unweighed = 0.0
    if images.weight is not None:
        unweighed = coefficient
        coefficient = load(coefficients.weighed + rows, rows < geometry.n_rows, geometry.dtype)
    n_steps = geometry.steps
    factor = coefficient
    exact = False
    if RECON_GRAD_READY:
        factor = _held_factor(recon_weight, upstream, coefficients, rows, geometry)
        # upstream gradients of 1: what the forward pass wrote is right
        n_steps = tl.where(tl.sum((factor != 1.0).to(tl.int32)) == 0, 0, geometry.steps)
        exact = True
        if images.target is not None:
            exact = _scales_exactly(images.drecon, factor) & _scales_exactly(images.dlog_scale, factor)
    for _ in range(n_steps):
        cols = first_col + tl.arange(0, geometry.block_cols)[None, :]
        mask = (rows < geometry.n_rows) & (cols < geometry.n_cols)
        ptrs = image_pointers(images, geometry, rows, cols)
        whole = full_tile(first_row, first_col, geometry)
        if exact:
            if RECON_GRAD_READY:
                if whole:
                    _rescale_tile(images, ptrs, factor, None, geometry.dtype)
                else:
                    _rescale_tile(images, ptrs, factor, mask, geometry.dtype)
        elif images.target is None:  # recon is gone: its gradient took its place
            pass
        elif whole:
            image_tile(images, ptrs, likelihood, coefficient, unweighed, None, geometry.dtype)
        else:
            image_tile(images, ptrs, likelihood, coefficient, unweighed, mask, geometry.dtype)
        first_col += geometry.block_cols


@triton.jit
def _latent_program(pid, latents, bounds, geometry, upstream, beta, kl_scale, coefficients):
    first_row, first_col, rows = tile_origin(pid, geometry)
    cols = first_col + tl.arange(0, geometry.block_cols)[None, :]
    n_rows = geometry.n_rows
    of_free_bits = 0.0
    if coefficients is not None:
        coefficient = load(coefficients.kl + rows, rows < n_rows, geometry.dtype)
        if bounds.free_bits is not None:
            of_free_bits = load(coefficients.free_bits + rows, rows < n_rows, geometry.dtype)
    elif bounds.free_bits is None:
        coefficient = _coefficient(
            beta, kl_scale, upstream.loss, upstream.kl, upstream.stride, rows, n_rows, geometry.dtype
        )
    else:
        coefficient = _coefficient(beta, kl_scale, None, upstream.kl, upstream.stride, rows, n_rows, geometry.dtype)
        of_free_bits = _coefficient(beta, kl_scale, upstream.loss, None, upstream.stride, rows, n_rows, geometry.dtype)
    ptrs = latent_pointers(latents, geometry, rows, cols)
    if full_tile(first_row, first_col, geometry):
        latent_gradient_tile(latents, ptrs, bounds, coefficient, of_free_bits, None, geometry.dtype)
    else:
        mask = (rows < n_rows) & (cols < geometry.n_cols)
        latent_gradient_tile(latents, ptrs, bounds, coefficient, of_free_bits, mask, geometry.dtype)


@triton.jit
def _kl_program(pid, upstream, beta, kl_scale, dkl_ptr, n_kl, BLOCK_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    rows = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    dkl = _coefficient(beta, kl_scale, upstream.loss, upstream.kl, upstream.stride, rows, n_kl, DTYPE)
    tl.store(dkl_ptr + rows, dkl.to(dkl_ptr.dtype.element_ty), mask=rows < n_kl)


@triton.jit(do_not_specialize=["recon_weight", "beta", "recon_scale", "kl_scale"])
def _elbo_bwd_kernel(
    upstream,  # Upstream: pointers
    coefficients,  # SampleCoefficients; None: computed from upstream, numbers and scales
    recon_weight,  # bits of a float64 or pointer, as is beta
    beta,
    recon_scale,  # bits of a float64, as is kl_scale
    kl_scale,
    images,  # Images: pointers; no image gradient wanted where recon is None
    likelihood,  # Likelihood
    image_geometry,  # Geometry
    image_programs,  # programs from here on have latents
    latents,  # Latents: pointers; no latent gradient wanted where mu is None
    bounds,  # Bounds
    latent_geometry,  # Geometry
    latent_programs,  # programs from here on have values of kl
    dkl_ptr,  # [n_kl], written; None: not wanted
    n_kl,
    RECON_GRAD_READY: tl.constexpr,  # drecon and dlog_scale hold what the forward pass wrote
    KL_BLOCK: tl.constexpr,
    KL_DTYPE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if images.recon is not None:
            _image_program(
                pid,
                images,
                likelihood,
                image_geometry,
                upstream,
                recon_weight,
                recon_scale,
                coefficients,
                RECON_GRAD_READY,
            )
    elif pid < latent_programs:
        if latents.mu is not None:
            _latent_program(
                pid - image_programs,
                latents,
                bounds,
                latent_geometry,
                upstream,
                beta,
                kl_scale,
                coefficients,
            )
    elif dkl_ptr is not None:
        kl_pid = pid - latent_programs
        _kl_program(kl_pid, upstream, beta, kl_scale, dkl_ptr, n_kl, KL_BLOCK, KL_DTYPE)


def elbo_bwd(
    plan: ElboPlan,
    tensors: Sequence[Any],
    numbers: Sequence[Any],
    saved: tuple[Tensor, ...],
    upstream: tuple[Tensor | None, ...],
    gradients: Sequence[Tensor | None],
    *,
    held: bool,
) -> Sequence[Tensor | None]:
    """Return the gradients that are wanted, given those of (loss, recon term, KL term).

    Args:
        plan, tensors, numbers: Those of the forward pass; recon and target are None if the gradient overwrote recon.
        saved: Returned by `elbo_fwd`.
        upstream: Contiguous.
        gradients: Buffers, in the order of (*ElboTensors, *ElboNumbers); None where no gradient is wanted.
        held: The buffers of recon and log_scale hold what `elbo_fwd` wrote. They are only scaled, where that is exact
            or where recon is gone.
    """
    recon, target, log_scale, extra_map, mu, logvar, prior_mu, prior_logvar, mask, kl_mask, _, *per_sample = tensors
    drecon, dtarget, dlog_scale, dextra_map, dmu, dlogvar, dprior_mu, dprior_logvar, _, _, dkl, *small = gradients
    dloss, drecon_term, dkl_term = upstream
    no_image = drecon is None and dtarget is None and dlog_scale is None and dextra_map is None
    no_latent = dmu is None and dlogvar is None and dprior_mu is None and dprior_logvar is None
    with on_device(plan.device):
        beta = recon_weight = weight_map = coefficients = None
        if plan.sample_options is None:
            beta, recon_weight, _ = pack_all(*(seen_numbers(plan, saved, numbers) if saved else numbers))
        else:
            # a gradient of the reconstruction term has no part in what the forward pass weighed and wrote
            held = held and (per_sample[-1] is None or drecon_term is None)
            if plan.weighs_elements:
                *per_sample, weight_map = per_sample
            buffers = Samples(small[0], small[1], small[2], small[3], small[4], dkl)
            numbers_grad = ElboNumbers(*small[5:])
            coefficients = sample_gradients(plan, Samples(*per_sample), saved, upstream, buffers, numbers_grad)
            dkl = None
        image_programs = 0 if no_image else plan.image_programs_bwd
        latent_programs = image_programs + (0 if no_latent else plan.latent_programs_bwd)
        programs = latent_programs + (0 if dkl is None else -(-plan.n_kl // _KL_BLOCK))
        if not programs:
            return gradients
        recon = drecon if recon is None else recon
        images, latents = _NO_IMAGES, _NO_LATENTS
        if image_programs:
            by_element = drecon, dtarget, dlog_scale, dextra_map
            images = Images(recon, target, log_scale, mask, extra_map, weight_map, *by_element)
        if latent_programs > image_programs:
            latents = Latents(mu, logvar, prior_mu, prior_logvar, kl_mask, dmu, dlogvar, dprior_mu, dprior_logvar)
        _elbo_bwd_kernel.run(
            grid=(programs,),
            warmup=False,
            upstream=Upstream(dloss, drecon_term, dkl_term, int(plan.shape != ())),
            coefficients=coefficients,
            recon_weight=recon_weight,
            beta=beta,
            recon_scale=plan.factors[0],
            kl_scale=plan.factors[2],
            images=images,
            likelihood=plan.likelihood,
            image_geometry=plan.image_bwd,
            image_programs=image_programs,
            latents=latents,
            bounds=plan.bounds,
            latent_geometry=plan.latent_bwd,
            latent_programs=latent_programs,
            dkl_ptr=dkl,
            n_kl=plan.n_kl,
            RECON_GRAD_READY=held,
            KL_BLOCK=_KL_BLOCK,
            KL_DTYPE=plan.dkl_dtype,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return gradients
