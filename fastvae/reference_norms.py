"""Group normalization in plain PyTorch: any layout in and out, differentiable any number of times."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import compute_dtype


def group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """As the public function. Splitting a dimension is a view in every layout, so nothing is copied, and the result
    keeps the order of x's memory; aten's group norm on CUDA would lose it, and its gradient on a CPU is wrong if the
    upstream gradient has another layout than x.
    """
    if residual is not None:
        x = (x + residual).to(x.dtype)
    dtype = compute_dtype(x)
    u = x.to(dtype)
    if x.numel():  # nothing has no mean
        split = u.unflatten(1, (groups, x.shape[1] // groups))  # type: ignore[no-untyped-call]
        var, mean = torch.var_mean(split, dim=list(range(2, split.ndim)), correction=0, keepdim=True)
        u = ((split - mean) * torch.rsqrt(var + eps)).flatten(1, 2)
    channels = (-1, *(1 for _ in x.shape[2:]))
    if weight is not None:
        u = u * weight.to(dtype).view(channels)
    if bias is not None:
        u = u + bias.to(dtype).view(channels)
    return (F.silu(u) if silu else u).to(x.dtype)
