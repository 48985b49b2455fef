"""Group normalization and SiLU by aten, keeping x and the statistics: the input of SiLU is computed again in the
backward pass. A float32 pass over a CPU's memory takes as long as the one that would have read it.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import compute_dtype

_PIECE = 1 << 18  # elements that are converted at a time where storage is 16 bits wide


def group_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, x + residual or None, mean, rstd); the latter two [N, groups] in the dtype of arithmetic.

    x is contiguous or channels_last, and the residual has its strides; so have y and the sum.
    """
    total = None
    if residual is not None:
        x = total = (x + residual).to(x.dtype)
    dtype = compute_dtype(x)
    scale, shift = _affine(x, weight, bias, dtype)  # aten keeps statistics in the dtype of the weight
    mean, rstd = (torch.empty(len(x), groups, dtype=dtype, device=x.device) for _ in range(2))
    y = torch.empty_like(x) if x.dtype != dtype else None
    for piece in _pieces(x, dtype):
        wide = x[piece].to(dtype)
        u, mean[piece], rstd[piece] = torch.native_group_norm(wide, scale, shift, *_sizes(wide, groups), eps)
        if silu:
            F.silu(u, inplace=True)
        if y is None:
            return u, total, mean, rstd
        y[piece] = u
    return y, total, mean, rstd  # type: ignore[return-value]


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
    scale, shift = _affine(x, weight, bias, dtype)
    dx = torch.empty_like(x) if wanted[0] and x.dtype != dtype else None
    dweight, dbias = (x.new_zeros(x.shape[1], dtype=dtype) if want else None for want in wanted[1:])
    for piece in _pieces(x, dtype):
        wide, du = x[piece].to(dtype), dy[piece].to(dtype)
        if silu:
            u = _normalized(wide, mean[piece], rstd[piece], scale, shift)
            du = torch.ops.aten.silu_backward.grad_input(du, u, grad_input=u)
        found = torch.ops.aten.native_group_norm_backward(
            du, wide, mean[piece], rstd[piece], scale, *_sizes(wide, groups), list(wanted)
        )
        if dx is not None:
            dx[piece] = found[0]
        elif wanted[0]:
            dx = found[0]
        if dweight is not None:
            dweight += found[1]
        if dbias is not None:
            dbias += found[2]
    return dx, dweight, dbias


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    return len(x), x.shape[1], math.prod(x.shape[2:]), groups


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight.to(dtype).contiguous()
    shift = x.new_zeros(x.shape[1], dtype=dtype) if bias is None else bias.to(dtype).contiguous()
    return scale, shift


def _pieces(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Ranges of samples: all of them, unless they are converted."""
    size = len(x) if x.dtype == dtype else max(_PIECE // max(math.prod(x.shape[1:]), 1), 1)
    return (slice(start, start + size) for start in range(0, len(x), max(size, 1)))


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The input of SiLU, by one multiplication and addition an element, as aten's forward pass has it."""
    channels_of_a_group = len(scale) // mean.shape[1]
    factor = rstd.repeat_interleave(channels_of_a_group, dim=1) * scale
    offset = torch.addcmul(shift, mean.repeat_interleave(channels_of_a_group, dim=1), factor, value=-1)
    to_x = (*factor.shape, *(1 for _ in x.shape[2:]))
    return torch.addcmul(offset.view(to_x), x, factor.view(to_x))
