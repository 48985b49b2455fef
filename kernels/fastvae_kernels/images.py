"""The reconstruction term on a tile: errors and gradients."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tile import element_offsets, load, pointers
from .gaussian import exp


class Images(NamedTuple):
    """Tensors of one shape, or their strides. None: not given, or not wanted."""

    recon: Any = None  # read, as are the next five
    target: Any = None
    log_scale: Any = None
    mask: Any = None
    extra: Any = None
    weight: Any = None  # of the error in the loss
    drecon: Any = None  # written, as are the next three
    dtarget: Any = None
    dlog_scale: Any = None
    dextra: Any = None


@triton.jit
def image_pointers(images, geometry, rows, cols):
    recon = images.recon + element_offsets(rows, cols, geometry.strides.recon, geometry.sizes)
    return Images(
        recon,
        pointers(images.target, geometry.strides.target, geometry, rows, cols, recon),
        pointers(images.log_scale, geometry.strides.log_scale, geometry, rows, cols, recon),
        pointers(images.mask, geometry.strides.mask, geometry, rows, cols, recon),
        pointers(images.extra, geometry.strides.extra, geometry, rows, cols, recon),
        pointers(images.weight, geometry.strides.weight, geometry, rows, cols, recon),
        pointers(images.drecon, geometry.strides.drecon, geometry, rows, cols, recon),
        pointers(images.dtarget, geometry.strides.dtarget, geometry, rows, cols, recon),
        pointers(images.dlog_scale, geometry.strides.dlog_scale, geometry, rows, cols, recon),
        pointers(images.dextra, geometry.strides.dextra, geometry, rows, cols, recon),
    )


@triton.jit
def _store(ptrs, gradient, selected, mask):
    gradient = gradient if selected is None else tl.where(selected, gradient, 0.0)
    tl.store(ptrs, gradient.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def image_tile(images, ptrs, likelihood, coefficient, unweighed, mask, DTYPE: tl.constexpr):
    """(error of each element, its weight), both 0 in lanes outside; the gradients that have a place are stored.

    `images` has None for absent tensors, `ptrs` the addresses. Gradients are multiplied by `coefficient`, or, where
    elements have weights, by weight * coefficient + unweighed.
    """
    recon, target = load(ptrs.recon, mask, DTYPE, likelihood.outside), load(ptrs.target, mask, DTYPE)
    if likelihood.target_scale != 1:
        target = target * likelihood.target_scale
    if likelihood.target_shift != 0:
        target = target + likelihood.target_shift
    selected = None if images.mask is None else load(ptrs.mask, mask, tl.int1)
    weight = 0.0
    if images.weight is not None:
        weight = load(ptrs.weight, mask, DTYPE)
        coefficient = weight * coefficient + unweighed
        weight = weight if selected is None else tl.where(selected, weight, 0.0)
    error = likelihood.error(recon, target, likelihood.parameter)
    if images.extra is not None:
        error += load(ptrs.extra, mask, DTYPE) * likelihood.extra_scale
    inverse_scale = 1.0
    if images.log_scale is not None:
        log_scale = load(ptrs.log_scale, mask, DTYPE)
        inverse_scale = exp(-log_scale, DTYPE)
        error *= inverse_scale
        if images.dlog_scale is not None:
            _store(ptrs.dlog_scale, coefficient * (1.0 - error), selected, mask)
        error += log_scale
    if images.dextra is not None:
        dextra = tl.zeros(recon.shape, DTYPE) + coefficient * inverse_scale * likelihood.extra_scale
        _store(ptrs.dextra, dextra, selected, mask)
    if images.drecon is not None or images.dtarget is not None:
        drecon, dtarget = likelihood.gradient(recon, target, likelihood.parameter)
        if images.drecon is not None:
            drecon = coefficient * (drecon if images.log_scale is None else drecon * inverse_scale)
            _store(ptrs.drecon, drecon, selected, mask)
        if images.dtarget is not None:
            dtarget = coefficient * (dtarget if images.log_scale is None else dtarget * inverse_scale)
            _store(ptrs.dtarget, dtarget, selected, mask)
    if selected is not None:
        error = tl.where(selected, error, 0.0)
    elif images.log_scale is not None or not likelihood.zero_outside:
        error = error if mask is None else tl.where(mask, error, 0.0)
    return error, weight
