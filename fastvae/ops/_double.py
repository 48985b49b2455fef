"""Second derivatives: backward passes that are differentiable themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_through(
    outputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """d(outputs)/d(inputs) against the upstream gradients, as a graph of its own; None for each input not wanted."""
    used = [(output, grad) for output, grad in zip(outputs, upstream, strict=True) if grad is not None]
    asked = [x for x, want in zip(inputs, wanted, strict=False) if want and x is not None]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [output for output, _ in used], asked, [grad for _, grad in used], create_graph=True, allow_unused=True
    )
    by_input = iter(found)
    return [next(by_input) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]
