"""A likelihood whose error the caller writes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dtypes import compute_dtype
from ._likelihood_base import Elementwise, Piece


@dataclass(frozen=True)
class Custom(Elementwise):
    """e = function(x', x): an error written in plain PyTorch, which autograd differentiates.

    `vae_loss(..., likelihood=function)` is short for it. It is slower than the other likelihoods: the errors of all
    elements are in memory, and autograd keeps what the function needs for its gradient.

    Args:
        function: Called with reconstruction and target, both of the loss's shape and in the dtype of arithmetic
            (float64 if one of them is, else float32; a uint8 target is scaled). Elements outside a mask are 0 in both.
            Returns the error of each element, a floating point tensor of the same shape: "reduction='none'".

    Raises:
        TypeError: function is not callable, or returns no floating point tensor. ValueError: it returns another shape.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    name = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(
                f"function must be callable; got {type(self.function).__name__}. Pass (recon, target) -> e."
            )

    def errors(self, recon: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        """What the function returns, checked; the loss then has it in place of the reconstruction."""
        dtype = compute_dtype(recon, target)
        if target.dtype == torch.uint8:
            target = target.to(dtype) * self.target_scale + self.target_shift
        recon, target = recon.to(dtype), target.to(dtype)
        if mask is not None:  # the gradient of what is left out would be 0 * NaN
            recon, target = (torch.where(mask, t, torch.zeros_like(t)) for t in (recon, target))
        errors: object = self.function(recon, target)
        name = getattr(self.function, "__name__", type(self.function).__name__)
        if not isinstance(errors, Tensor) or not errors.is_floating_point():
            found = errors.dtype if isinstance(errors, Tensor) else type(errors).__name__
            raise TypeError(f"the likelihood's function must return a floating point tensor; {name} returned {found}.")
        if errors.shape != recon.shape:
            raise ValueError(
                f"the likelihood's function must return one error per element, of shape {tuple(recon.shape)}; {name} "
                f"returned {tuple(errors.shape)}. Leave out its reduction, for example with reduction='none'."
            )
        return errors

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        return recon

    def fill(self, piece: Piece) -> None:
        if piece.errors is not None:
            piece.errors.copy_(piece.recon)
        if piece.gradient is not None:
            piece.gradient.copy_(piece.coefficient)
