"""Activation checkpointing: keep a module's input, compute the rest again in the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def call(module: Callable[[Tensor], Tensor], x: Tensor, *, recompute: bool) -> Tensor:
    """`module(x)`; with `recompute` nothing inside it is kept for the backward pass.

    Source: Chen et al., Training deep nets with sublinear memory cost, arXiv:1604.06174.
    """
    if not (recompute and torch.is_grad_enabled()):
        return module(x)
    # no module here draws noise, so the state of the generators need not be put back
    result: Tensor = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
    return result
