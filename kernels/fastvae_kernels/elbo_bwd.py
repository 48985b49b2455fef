"""Gradients of a VAE's loss, in one launch. Where the forward pass has written recon's gradient already, its programs
read the upstream gradient and leave at once if that gradient is 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, ONE_TILE_EACH, element_offsets, host_scalar, load, part, scalar, triton_dtype
from .gaussian import clamp, expm1, inside
from .likelihoods import l2_gradient, target_scale

_MAX_IMAGE_PROGRAMS = 1 << 10  # few, so that leaving at once costs next to nothing; each walks over its share
_KL_BLOCK = 1024


@triton.jit
def _upstream(ptr, rows, n_rows, stride, DTYPE: tl.constexpr):
    """Upstream gradient of each row; 0 where none came."""
    gradient = tl.zeros(rows.shape, DTYPE)
    if ptr is not None:
        gradient = tl.load(ptr + rows * stride, mask=rows < n_rows, other=0.0).to(DTYPE)
    return gradient


@triton.jit
def _recompute_tile(
    recon_ptr,
    target_ptr,
    drecon_ptr,
    dtarget_ptr,
    recon_strides,
    target_strides,
    drecon_strides,
    dtarget_strides,
    sizes,
    rows,
    cols,
    coefficient,
    mask,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    recon = load(recon_ptr + element_offsets(rows, cols, recon_strides, sizes), mask, DTYPE)
    target = load(target_ptr + element_offsets(rows, cols, target_strides, sizes), mask, DTYPE)
    if TARGET_SCALE != 1:
        target = target * TARGET_SCALE
    gradient = coefficient * GRADIENT(recon, target)
    if drecon_ptr is not None:
        ptrs = drecon_ptr + element_offsets(rows, cols, drecon_strides, sizes)
        tl.store(ptrs, gradient.to(ptrs.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        ptrs = dtarget_ptr + element_offsets(rows, cols, dtarget_strides, sizes)
        tl.store(ptrs, (-gradient).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _rescale_tile(ptr, strides, sizes, rows, cols, factor, mask, DTYPE: tl.constexpr):
    ptrs = ptr + element_offsets(rows, cols, strides, sizes)
    tl.store(ptrs, (factor * load(ptrs, mask, DTYPE)).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _image_program(
    pid,
    dloss_ptr,
    dterm_ptr,
    dloss_stride,
    dterm_stride,
    recon_weight,
    recon_scale,
    recon_ptr,
    target_ptr,
    drecon_ptr,
    dtarget_ptr,
    recon_strides,
    target_strides,
    drecon_strides,
    dtarget_strides,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    HELD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STEPS: tl.constexpr,
):
    col_program = pid % n_col_programs
    first_row = (pid // n_col_programs) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    row_mask = rows < n_rows
    dloss = _upstream(dloss_ptr, rows, n_rows, dloss_stride, DTYPE)
    dterm = _upstream(dterm_ptr, rows, n_rows, dterm_stride, DTYPE)
    weight = scalar(recon_weight, DTYPE)
    coefficient = (weight * dloss + dterm) * scalar(recon_scale, DTYPE)

    n_steps = STEPS
    factor = coefficient
    exact = False
    if HELD:
        factor = dloss + dterm / weight
        # gradient 1: every row is as the forward pass left it
        n_steps = tl.where(tl.sum(((factor != 1.0) & row_mask).to(tl.int32)) == 0, 0, STEPS)
        exact = True
        if target_ptr is not None and drecon_ptr.dtype.element_ty.primitive_bitwidth < 32:
            # a power of two moves the exponent alone; any other factor would round a second time
            mantissa = factor.to(tl.int32, bitcast=True) & 0x007FFFFF
            exact = tl.sum(((mantissa != 0) & row_mask).to(tl.int32)) == 0
    for step in range(n_steps):
        first_col = (col_program * STEPS + step) * BLOCK_COLS
        cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
        mask = row_mask & (cols < n_cols)
        whole = (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols)
        if exact:
            if HELD:
                if whole:
                    _rescale_tile(drecon_ptr, drecon_strides, sizes, rows, cols, factor, None, DTYPE)
                else:
                    _rescale_tile(drecon_ptr, drecon_strides, sizes, rows, cols, factor, mask, DTYPE)
        elif target_ptr is None:  # recon is gone: its gradient took its place
            pass
        elif whole:
            _recompute_tile(
                *(recon_ptr, target_ptr, drecon_ptr, dtarget_ptr),
                *(recon_strides, target_strides, drecon_strides, dtarget_strides, sizes),
                *(rows, cols, coefficient, None, GRADIENT, TARGET_SCALE, DTYPE),
            )
        else:
            _recompute_tile(
                *(recon_ptr, target_ptr, drecon_ptr, dtarget_ptr),
                *(recon_strides, target_strides, drecon_strides, dtarget_strides, sizes),
                *(rows, cols, coefficient, mask, GRADIENT, TARGET_SCALE, DTYPE),
            )


@triton.jit
def _latent_tile(
    mu_ptr,
    logvar_ptr,
    dmu_ptr,
    dlogvar_ptr,
    mu_strides,
    logvar_strides,
    dmu_strides,
    dlogvar_strides,
    sizes,
    rows,
    cols,
    coefficient,
    low,
    high,
    mask,
    DTYPE: tl.constexpr,
):
    if dmu_ptr is not None:
        dmu = coefficient * load(mu_ptr + element_offsets(rows, cols, mu_strides, sizes), mask, DTYPE)
        ptrs = dmu_ptr + element_offsets(rows, cols, dmu_strides, sizes)
        tl.store(ptrs, dmu.to(ptrs.dtype.element_ty), mask=mask)
    if dlogvar_ptr is not None:
        logvar = load(logvar_ptr + element_offsets(rows, cols, logvar_strides, sizes), mask, DTYPE)
        dlogvar = 0.5 * coefficient * expm1(clamp(logvar, low, high, DTYPE), DTYPE)
        ptrs = dlogvar_ptr + element_offsets(rows, cols, dlogvar_strides, sizes)
        tl.store(ptrs, inside(logvar, low, high, dlogvar, DTYPE).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _latent_program(
    pid,
    dloss_ptr,
    dterm_ptr,
    dloss_stride,
    dterm_stride,
    beta,
    kl_scale,
    mu_ptr,
    logvar_ptr,
    dmu_ptr,
    dlogvar_ptr,
    low,
    high,
    mu_strides,
    logvar_strides,
    dmu_strides,
    dlogvar_strides,
    sizes,
    n_rows,
    n_cols,
    n_col_programs,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    first_row = (pid // n_col_programs) * BLOCK_ROWS
    first_col = (pid % n_col_programs) * BLOCK_COLS
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
    dloss = _upstream(dloss_ptr, rows, n_rows, dloss_stride, DTYPE)
    dterm = _upstream(dterm_ptr, rows, n_rows, dterm_stride, DTYPE)
    coefficient = (scalar(beta, DTYPE) * dloss + dterm) * scalar(kl_scale, DTYPE)
    if (first_row + BLOCK_ROWS <= n_rows) & (first_col + BLOCK_COLS <= n_cols):
        _latent_tile(
            *(mu_ptr, logvar_ptr, dmu_ptr, dlogvar_ptr),
            *(mu_strides, logvar_strides, dmu_strides, dlogvar_strides, sizes),
            *(rows, cols, coefficient, low, high, None, DTYPE),
        )
    else:
        _latent_tile(
            *(mu_ptr, logvar_ptr, dmu_ptr, dlogvar_ptr),
            *(mu_strides, logvar_strides, dmu_strides, dlogvar_strides, sizes),
            *(rows, cols, coefficient, low, high, (rows < n_rows) & (cols < n_cols), DTYPE),
        )


@triton.jit
def _kl_program(
    pid,
    dloss_ptr,
    dterm_ptr,
    dloss_stride,
    dterm_stride,
    beta,
    kl_scale,
    dkl_ptr,
    n_elements,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    dloss = _upstream(dloss_ptr, rows, n_elements, dloss_stride, DTYPE)
    dterm = _upstream(dterm_ptr, rows, n_elements, dterm_stride, DTYPE)
    dkl = (scalar(beta, DTYPE) * dloss + dterm) * scalar(kl_scale, DTYPE)
    tl.store(dkl_ptr + rows, dkl.to(dkl_ptr.dtype.element_ty), mask=rows < n_elements)


@triton.jit(do_not_specialize=["recon_weight", "beta", "recon_scale", "kl_scale", "low", "high"])
def _elbo_bwd_kernel(
    dloss_ptr,  # [n_rows] at its stride, or one for all at stride 0, read; None: no gradient came; so the next two
    drecon_term_ptr,
    dkl_term_ptr,
    recon_ptr,  # [image_rows, image_cols], read; None: no image gradient wanted
    target_ptr,
    drecon_ptr,  # [image_rows, image_cols], written; None: not wanted; HELD: holds recon_weight * the gradient already
    dtarget_ptr,  # [image_rows, image_cols], written; None: not wanted
    mu_ptr,  # [latent_rows, latent_cols], read; None: no latent gradient wanted
    logvar_ptr,
    dmu_ptr,  # [latent_rows, latent_cols], written; None: not wanted
    dlogvar_ptr,
    dkl_ptr,  # [n_kl], written; None: not wanted
    recon_weight,  # bits of a float64 or pointer, as is beta
    beta,
    recon_scale,  # bits of a float64, as are kl_scale and the bounds of logvar
    kl_scale,
    low,
    high,
    upstream_strides,  # of dloss, drecon_term, dkl_term
    recon_strides,
    target_strides,
    drecon_strides,
    dtarget_strides,
    image_sizes,
    image_rows,
    image_cols,
    image_col_programs,
    image_programs,  # programs from here on have latents
    mu_strides,
    logvar_strides,
    dmu_strides,
    dlogvar_strides,
    latent_sizes,
    latent_rows,
    latent_cols,
    latent_col_programs,
    latent_programs,  # programs from here on have values of kl
    n_kl,
    GRADIENT: tl.constexpr,
    TARGET_SCALE: tl.constexpr,
    HELD: tl.constexpr,
    IMAGE_DTYPE: tl.constexpr,
    IMAGE_ROWS: tl.constexpr,
    IMAGE_COLS: tl.constexpr,
    IMAGE_STEPS: tl.constexpr,
    LATENT_DTYPE: tl.constexpr,
    LATENT_ROWS: tl.constexpr,
    LATENT_COLS: tl.constexpr,
    KL_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < image_programs:
        if recon_ptr is not None:
            _image_program(
                *(pid, dloss_ptr, drecon_term_ptr, upstream_strides[0], upstream_strides[1], recon_weight, recon_scale),
                *(recon_ptr, target_ptr, drecon_ptr, dtarget_ptr),
                *(recon_strides, target_strides, drecon_strides, dtarget_strides, image_sizes),
                *(image_rows, image_cols, image_col_programs, GRADIENT, TARGET_SCALE, HELD),
                *(IMAGE_DTYPE, IMAGE_ROWS, IMAGE_COLS, IMAGE_STEPS),
            )
    elif pid < latent_programs:
        if mu_ptr is not None:
            _latent_program(
                *(pid - image_programs, dloss_ptr, dkl_term_ptr, upstream_strides[0], upstream_strides[2]),
                *(beta, kl_scale, mu_ptr, logvar_ptr, dmu_ptr, dlogvar_ptr, low, high),
                *(mu_strides, logvar_strides, dmu_strides, dlogvar_strides, latent_sizes),
                *(latent_rows, latent_cols, latent_col_programs, LATENT_DTYPE, LATENT_ROWS, LATENT_COLS),
            )
    elif dkl_ptr is not None:
        _kl_program(
            *(pid - latent_programs, dloss_ptr, dkl_term_ptr, upstream_strides[0], upstream_strides[2]),
            *(beta, kl_scale, dkl_ptr, n_kl, LATENT_DTYPE, KL_BLOCK),
        )


def elbo_bwd(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, ...],
    options: Any,
    *,
    holds_forward_gradient: bool,
) -> None:
    """Write the gradients that are asked for, given those of (loss, recon term, KL term).

    gradients: buffers for (recon, target, mu, logvar, kl). If `holds_forward_gradient`, recon's already holds what
        `elbo_fwd`
    wrote there and is only scaled, where that is exact or where recon is gone (None, as is target).
    """
    drecon, dtarget, dmu, dlogvar, dkl = gradients
    n_kl = 0 if dkl is None else dkl.numel()
    recon = drecon if recon is None else recon
    image = part(
        [recon, target, drecon, dtarget],
        drecon is not None or dtarget is not None,
        options.per_sample,
        _MAX_IMAGE_PROGRAMS,
    )
    latent = part([mu, logvar, dmu, dlogvar], dmu is not None or dlogvar is not None, options.per_sample, ONE_TILE_EACH)
    latent_end = image.programs + latent.programs
    programs = latent_end + triton.cdiv(n_kl, _KL_BLOCK)
    if not programs:
        return
    given = next(t for t in gradients if t is not None)
    low, high = options.logvar_clamp or (None, None)
    with torch.cuda.device_of(given):
        _elbo_bwd_kernel[(programs,)](
            *upstream,
            *image.tensors,
            *latent.tensors,
            dkl,
            *(host_scalar(options.recon_weight), host_scalar(options.beta)),
            *(host_scalar(options.recon_scale), host_scalar(options.kl_scale), host_scalar(low), host_scalar(high)),
            tuple(t.stride(0) if t is not None and t.ndim else 0 for t in upstream),
            *(*image.strides, image.sizes, image.n_rows, image.n_cols, image.tile.col_programs, image.programs),
            *(*latent.strides, latent.sizes, latent.n_rows, latent.n_cols, latent.tile.col_programs, latent_end, n_kl),
            GRADIENT=l2_gradient,
            TARGET_SCALE=target_scale(target),
            HELD=holds_forward_gradient,
            IMAGE_DTYPE=image.dtype,
            IMAGE_ROWS=image.tile.rows,
            IMAGE_COLS=image.tile.cols,
            IMAGE_STEPS=image.tile.steps,
            LATENT_DTYPE=latent.dtype if dkl is None or latent.programs else triton_dtype(dkl.dtype),
            LATENT_ROWS=latent.tile.rows,
            LATENT_COLS=latent.tile.cols,
            KL_BLOCK=_KL_BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
