"""Launches of group normalization with SiLU: one each way where a group fits into registers, else sums, their merge,
and the result; and a small one for the gradients of weight and bias.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._group_norm import Split, is_channels_last, split
from ._reduce import fold_rows
from ._tile import NUM_WARPS, on_device, pack_f64, power_of_2, triton_dtype
from .group_norm_bwd import dx_kernel, group_bwd_kernel, merge_sums_kernel, sums_kernel
from .group_norm_fwd import apply_kernel, group_fwd_kernel, merge_moments_kernel, moments_kernel
from .types import compute_dtype

# of storage, by what a thread holds
_MOMENTS_BYTES, _SUMS_BYTES, _ELEMENTS_BYTES = 8192, 4096, 4096
# tiles of a program; sums take theirs at once, as a loop there would need memory of its own
_MOMENTS_STEPS, _SUMS_STEPS, _ELEMENTS_STEPS_LAST = 8, 4, 8
# of arithmetic, that registers hold: 16 floats of a thread, of up to 16 warps
_WARPS_BYTES, _GROUP_BYTES = 8192, 32768
_MERGE_ELEMENTS = 1024


def group_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, x + residual or None, mean, rstd); the latter two [N, groups] in the dtype of arithmetic.

    x is contiguous or channels_last and not empty, and the residual has its strides; so have y and the sum.
    """
    dtype = compute_dtype(x)
    total = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(len(x), groups, dtype=dtype, device=x.device) for _ in range(2))
    affine, statistics = _affine(weight, bias), (mean, rstd)
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    arithmetic = {"DTYPE": triton_dtype(dtype)}
    with on_device(x.device):
        if (group := _whole_group(x, groups, dtype)) is not None:
            _launch(
                *(group_fwd_kernel, len(x) * groups),
                *(x, residual, total, y, affine, statistics, pack_f64(eps), channels, groups, pixels),
                **{"SILU": silu, **arithmetic, **group},
            )
            return y, total, mean, rstd
        at = split(x, _MOMENTS_BYTES, _MOMENTS_STEPS)
        means, squares = _partials(x, at, dtype)
        sources = x, residual, total
        _launch(moments_kernel, at.programs, *sources, means, squares, *at.arguments, **arithmetic, **at.constants)
        _launch(
            *(merge_moments_kernel, len(x) * groups),
            *(means, squares, mean, rstd, pack_f64(eps), channels, groups, pixels, at.ranges, at.pixels),
            **_merge(x, groups, at),
        )
        at = split(x, _ELEMENTS_BYTES, _ELEMENTS_STEPS_LAST if is_channels_last(x) else 1)
        source = x if total is None else total
        tensors = source, y, affine, statistics
        options = {"SILU": silu, **arithmetic, **at.constants}
        _launch(apply_kernel, at.programs, *tensors, channels, groups, *at.arguments, **options)
    return y, total, mean, rstd


def group_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, weight and bias, as far as wanted; dy has the strides of x."""
    dtype = mean.dtype
    dx = torch.empty_like(x) if wanted[0] else None
    affine, statistics = _affine(weight, bias), (mean, rstd)
    samples, channels, pixels = len(x), x.shape[1], math.prod(x.shape[2:])
    channel_sums = torch.empty(2, channels, samples, dtype=dtype, device=x.device)
    options = {"SILU": silu, "DTYPE": triton_dtype(dtype)}
    with on_device(x.device):
        if (group := _whole_group(x, groups, dtype)) is not None:
            _launch(
                *(group_bwd_kernel, samples * groups),
                *(x, dy, dx, affine, statistics, channel_sums.unbind(), samples, channels, groups, pixels),
                **{**options, **group},
            )
        else:
            at = split(x, _SUMS_BYTES, _SUMS_STEPS)
            partials, means = _partials(x, at, dtype), (torch.empty_like(mean), torch.empty_like(mean))
            tensors: tuple[Any, ...] = x, dy, affine, statistics, partials
            _launch(sums_kernel, at.programs, *tensors, channels, groups, *at.arguments, **options, **at.constants)
            _launch(
                *(merge_sums_kernel, samples * groups),
                *(partials, affine[0], channel_sums.unbind(), means, samples, channels, groups, pixels, at.ranges),
                **_merge(x, groups, at),
            )
            if dx is not None:
                at = split(x, _ELEMENTS_BYTES, _ELEMENTS_STEPS_LAST if is_channels_last(x) else 1)
                tensors = x, dy, dx, affine, statistics, means
                _launch(dx_kernel, at.programs, *tensors, channels, groups, *at.arguments, **options, **at.constants)
        if not any(wanted[1:]):
            return dx, None, None
        dweight, dbias = fold_rows(channel_sums.view(2 * channels, samples)).view(2, channels).unbind()
    return dx, dweight if wanted[1] else None, dbias if wanted[2] else None


def _launch(kernel: Any, programs: int, *arguments: Any, num_warps: int = NUM_WARPS, **constants: Any) -> None:
    # with fused operations, a sum of products across threads would be fma(a, b, theirs): each thread rounds its own
    # product differently, and which of them writes the result is not defined
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    kernel.run(*arguments, grid=(programs,), warmup=False, **options, **constants)


def _affine(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if weight is None else weight.resolve_neg().contiguous(),
        None if bias is None else bias.resolve_neg().contiguous(),
    )


def _partials(x: Tensor, at: Split, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Two sums of each channel of each sample and range of pixels, in the order in which programs write them."""
    return torch.empty(2, len(x) * x.shape[1] * at.ranges, dtype=dtype, device=x.device).unbind()


def _merge(x: Tensor, groups: int, at: Split) -> dict[str, Any]:
    channels = power_of_2(x.shape[1] // groups)
    ranges = min(power_of_2(at.ranges), max(_MERGE_ELEMENTS // channels, 1))
    return {"LAST": is_channels_last(x), "CHANNELS": channels, "RANGES": ranges}


def _whole_group(x: Tensor, groups: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """Constants of the kernels that hold a group; None if it is too large."""
    size, pixels = x.shape[1] // groups, math.prod(x.shape[2:])
    elements = power_of_2(size) * power_of_2(pixels)
    if elements * dtype.itemsize > _GROUP_BYTES:
        return None
    return {
        "LAST": is_channels_last(x),
        "WHOLE": elements == size * pixels,
        "CHANNELS": power_of_2(size),
        "PIXELS": power_of_2(pixels),
        "num_warps": NUM_WARPS * max(elements * dtype.itemsize // _WARPS_BYTES, 1),
    }
