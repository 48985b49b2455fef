"""What backward passes share: upstream gradients that have memory, and second derivatives."""

from collections.abc import Sequence

import torch
from torch import Tensor


def with_memory(upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Autograd's zeros without memory (double backward of abs makes some) as tensors that a kernel can read."""
    return tuple(torch.zeros_like(t) if t is not None and t._is_zerotensor() else t for t in upstream)


def gradients_through(
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """d(outputs)/d(inputs) against the upstream gradients, as a graph of its own; None for each input not wanted."""
    pairs = zip(outputs, upstream, strict=True)
    used = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
    asked = [x for x, want in zip(inputs, wanted, strict=False) if want and x is not None]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [output for output, _ in used], asked, [grad for _, grad in used], create_graph=True, allow_unused=True
    )
    by_input = iter(found)
    return [next(by_input) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]
