"""What every likelihood has whose error each element has by itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import ErrorOptions

from . import _numbers

BYTE_SCALE = 1 / 255  # a uint8 target stands for the values 0, 1/255, ..., 1


class LikelihoodSpec(NamedTuple):
    """A likelihood without its tensors; hashable. See `ElboOptions` for what is computed of it."""

    error: ErrorOptions
    factor: float = 1.0  # on the error
    mask_normalize: bool = False
    nll_weight: float = 1.0
    constant: float = 0.0
    softclip: float | None = None
    log_scale: float = 0.0  # if it is fixed
    optimal_scale: bool = False


class Piece(NamedTuple):
    """What `Elementwise.fill` reads and writes. Tensors have one shape and dtype, but for `coefficient`."""

    recon: Tensor
    target: Tensor
    parameter: float
    coefficient: Tensor  # of the gradient: broadcasts to it
    errors: Tensor | None
    gradient: Tensor | None  # by recon; may share recon's memory, so it is written after the last reading of recon
    scratch: Callable[[str], Tensor]  # uninitialized memory by name


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """An error that each element has by itself.

    Args:
        target_scale, target_shift: A uint8 target stands for value * target_scale + target_shift.
        mask_normalize: Divide by the number of elements that the mask selects instead of by the batch ("batchmean") or
            by the number of all elements ("mean").
    """

    target_scale: float = BYTE_SCALE
    target_shift: float = 0.0
    mask_normalize: bool = False

    # Class variables and properties of a likelihood, plain ones: dynamo traces no super() in a property.
    name: ClassVar[Any]  # of the error in both backends
    parameter: ClassVar[Any] = 1.0  # the constant of the error
    factor: ClassVar[Any] = 1.0  # what the error is multiplied by
    expects: ClassVar[Any] = "values"  # what recon is: "values", "logits" or "probabilities"
    of_difference: ClassVar[Any] = False  # e is a function of x' - x: its gradients are each other's negatives
    log_normalizer: ClassVar[float | None] = None  # -log p(x | x') - e of an element; None: e is not -log of a density

    def __post_init__(self) -> None:
        self._hold(_numbers.finite, "target_scale", "target_shift")

    def _hold(self, check: Callable[[str, object], float], *names: str) -> None:
        """Replace fields by what a check makes of them."""
        for name in names:
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def base(self) -> "Elementwise":
        """The likelihood without a scale: itself."""
        return self

    @property
    def spec(self) -> LikelihoodSpec:
        factor = float(self.factor)
        options = ErrorOptions(self.name, self.parameter, self.target_scale, self.target_shift, 1 / factor)
        return LikelihoodSpec(options, factor, self.mask_normalize)

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        """e / factor of each element, differentiable any number of times."""
        raise NotImplementedError

    def fill(self, piece: Piece) -> None:
        """Write `error` and its gradient times `piece.coefficient`, each where there is a buffer.

        Subclasses replace this by few passes without temporaries.
        """
        errors, gradient = self._by_autograd(piece, "recon")
        if piece.errors is not None:
            piece.errors.copy_(errors)
        if piece.gradient is not None:
            torch.mul(gradient, piece.coefficient, out=piece.gradient)

    def target_gradient(self, piece: Piece) -> Tensor:
        """The gradient of `error` by the target, without the coefficient."""
        return self._by_autograd(piece, "target")[1]

    def _by_autograd(self, piece: Piece, by: Literal["recon", "target"]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            recon, target = piece.recon.clone(), piece.target.clone()
            variable = (recon if by == "recon" else target).requires_grad_()
            errors = self.error(recon, target, piece.parameter)
            return errors.detach(), torch.autograd.grad(errors, variable, torch.ones_like(errors))[0]
