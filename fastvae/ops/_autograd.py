"""What autograd functions share: a direct call, upstream gradients that have memory, and second derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the Python code around it, which serves torch.func alone and takes 1 us of each call."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def materialize_grads(upstream: Sequence[Tensor | None], *, contiguous: bool = True) -> tuple[Tensor | None, ...]:
    """Upstream gradients as a kernel can read them: with memory (double backward of abs makes zeros without), no lazy
    negation.
    """
    for t in upstream:
        if t is not None and (t._is_zerotensor() or t.is_neg() or (contiguous and not t.is_contiguous())):
            return tuple(t if t is None else _materialized(t, contiguous) for t in upstream)
    return tuple(upstream)


def _materialized(grad: Tensor, contiguous: bool) -> Tensor:
    grad = torch.zeros_like(grad) if grad._is_zerotensor() else grad.resolve_neg()
    return grad.contiguous() if contiguous else grad


def alias_inputs(inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Aliases, each with a place of its own in the graph.

    The inputs of an op may depend on each other (a reconstruction on mu) or be one tensor: a gradient by one of them
    must not contain the way through another, along which autograd goes on its own.
    """
    return tuple(x if x is None else x.view_as(x) for x in inputs)


def gradients_through(
    outputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """d(outputs)/d(inputs) against the upstream gradients, as a graph of its own; None for each input not wanted."""
    pairs = zip(outputs, upstream, strict=True)
    used = [
        (output, grad) for output, grad in pairs if output is not None and grad is not None and output.requires_grad
    ]
    asked = [x for x, want in zip(inputs, wanted, strict=False) if want and x is not None]
    if not used:
        return [None] * len(inputs)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [output for output, _ in used], asked, [grad for _, grad in used], create_graph=True, allow_unused=True
    )
    by_input = iter(found)
    return [next(by_input) if want and x is not None else None for x, want in zip(inputs, wanted, strict=False)]
