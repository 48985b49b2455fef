"""Where a tensor's elements lie in memory."""

from collections.abc import Callable

import torch
from torch import Tensor


def transposed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


def sliced(t: Tensor) -> Tensor:
    """Every other element of each dimension of something larger, from the second on."""
    return t.new_zeros([2 * n + 1 for n in t.shape])[tuple(slice(1, None, 2) for _ in t.shape)].copy_(t)


# the same values elsewhere in memory; the last two repeat some of the values
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": transposed,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 2 else t,
    "sliced": sliced,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "expanded rows": lambda t: t[:1].expand_as(t) if t.ndim else t,
    "expanded columns": lambda t: t[(slice(None), *[slice(1)] * (t.ndim - 1))].expand_as(t) if t.ndim else t,
}


def repeats(t: Tensor) -> bool:
    """Whether two elements share a place in memory."""
    return any(stride == 0 and n > 1 for stride, n in zip(t.stride(), t.shape, strict=True))
