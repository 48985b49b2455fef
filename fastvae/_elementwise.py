"""The likelihoods whose error each element has by itself: their options, and the PyTorch functions of both passes.

The Triton functions are in `fastvae_kernels.likelihoods`, under the same names. e is the error of one element, x' the
reconstruction, x the target; a loss adds e up. In nats where a docstring says so.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _numbers
from ._custom import Custom
from ._likelihood_base import Elementwise, Piece

_aten = torch.ops.aten
_NO_REDUCTION = 0  # as ATen counts


@dataclass(frozen=True)
class _OfMeans(Elementwise):
    """An error of x', or of sigmoid(x') if `from_logits`."""

    from_logits: bool = False

    _name: ClassVar[str]

    @property
    def name(self) -> str:
        return f"{self._name}_of_logits" if self.from_logits else self._name

    @property
    def expects(self) -> str:
        return "logits" if self.from_logits else "values"

    @property
    def of_difference(self) -> bool:
        return not self.from_logits

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        return self._error(torch.sigmoid(recon) if self.from_logits else recon, target)

    def fill(self, piece: Piece) -> None:
        if not self.from_logits:
            self._fill(piece)
            return
        recon = torch.sigmoid(piece.recon, out=piece.scratch("a"))
        self._fill(piece._replace(recon=recon))
        if piece.gradient is not None:
            _aten.sigmoid_backward.grad_input(piece.gradient, recon, grad_input=piece.gradient)

    def _error(self, mean: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def _fill(self, piece: Piece) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class L2(_OfMeans):
    """e = (x' - x)^2: nats of a Gaussian decoder of variance 1/2, without its constant ½ log(pi) an element.

    Args:
        from_logits: x' is sigmoid(recon); the sigmoid is folded into the loss.
    """

    _name = "l2"
    log_normalizer = 0.5 * math.log(math.pi)

    def _error(self, mean: Tensor, target: Tensor) -> Tensor:
        return (mean - target).square()

    def _fill(self, piece: Piece) -> None:
        recon, target = piece.recon, piece.target
        if piece.errors is not None:
            torch.sub(recon, target, out=piece.errors).square_()
        if piece.gradient is not None:
            _aten.mse_loss_backward.grad_input(
                piece.coefficient, recon, target, _NO_REDUCTION, grad_input=piece.gradient
            )


@dataclass(frozen=True)
class L1(_OfMeans):
    """e = |x' - x|: nats of a Laplace decoder of scale 1, without its constant log(2) an element. Gradient 0 at 0.

    Args:
        from_logits: x' is sigmoid(recon); the sigmoid is folded into the loss.
    """

    _name = "l1"
    log_normalizer = math.log(2)

    def _error(self, mean: Tensor, target: Tensor) -> Tensor:
        return (mean - target).abs()

    def _fill(self, piece: Piece) -> None:
        recon, target = piece.recon, piece.target
        if piece.errors is not None:
            torch.sub(recon, target, out=piece.errors).abs_()
        if piece.gradient is not None:
            # with the smallest normal beta this is the sign in one pass, and unlike torch.sgn it keeps NaN
            beta = torch.finfo(recon.dtype).tiny
            _aten.smooth_l1_loss_backward.grad_input(
                piece.coefficient, recon, target, _NO_REDUCTION, beta, grad_input=piece.gradient
            )


@dataclass(frozen=True)
class Huber(Elementwise):
    """e = ½ d^2 where |d| = |x' - x| <= delta, else delta (|d| - ½ delta), as torch.nn.functional.huber_loss.

    Raises:
        ValueError: delta is not positive.
    """

    delta: float = 1.0
    name = "huber"
    of_difference = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.positive, "delta")

    @property
    def parameter(self) -> float:
        return self.delta

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        return F.huber_loss(recon, target, reduction="none", delta=parameter)

    def fill(self, piece: Piece) -> None:
        arguments = piece.recon, piece.target, _NO_REDUCTION, piece.parameter
        if piece.errors is not None:
            _aten.huber_loss.out(*arguments, out=piece.errors)
        if piece.gradient is not None:
            _aten.huber_loss_backward.out(piece.coefficient, *arguments, grad_input=piece.gradient)


@dataclass(frozen=True)
class SmoothL1(Elementwise):
    """e = ½ d^2 / beta where |d| = |x' - x| < beta, else |d| - ½ beta, as torch.nn.functional.smooth_l1_loss.

    That is the error of Huber(beta) / beta; with a beta of 0 that of L1.

    Raises:
        ValueError: beta is negative; 0 is L1.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.number if self.beta == 0 else _numbers.positive, "beta")

    @property
    def name(self) -> str:
        return "huber" if self.beta else "l1"

    @property
    def parameter(self) -> float:
        return self.beta

    @property
    def factor(self) -> float:
        return 1.0 / self.beta if self.beta else 1.0


@dataclass(frozen=True)
class LogCosh(Elementwise):
    """e = log(cosh(alpha d)) / alpha, d = x' - x, as |d| + log1p(exp(-2 alpha |d|)) / alpha - log(2) / alpha: finite.

    Raises:
        ValueError: alpha is not positive.

    Source: Chen et al., Log Hyperbolic Cosine Loss Improves Variational Auto-Encoder, 2018.
    """

    alpha: float = 1.0
    name = "log_cosh"
    of_difference = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.positive, "alpha")

    @property
    def parameter(self) -> float:
        return self.alpha

    @property
    def factor(self) -> float:
        return 1.0 / self.alpha

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        distance = parameter * (recon - target).abs()
        return distance + torch.log1p(torch.exp(-2 * distance)) - math.log(2)

    def fill(self, piece: Piece) -> None:
        """With y = alpha d and w = expm1(-2 |y|): |y| + log1p(w / 2), and tanh |y| = -w / (w + 2)."""
        signed, remainder = piece.scratch("a"), piece.scratch("b")
        torch.sub(piece.recon, piece.target, out=signed).mul_(piece.parameter)
        distance = torch.abs(signed, out=remainder if piece.errors is None else piece.errors)
        torch.mul(distance, -2, out=remainder).expm1_()
        if piece.gradient is not None:
            torch.add(remainder, 2, out=piece.gradient)
            torch.div(remainder, piece.gradient, out=piece.gradient)
            piece.gradient.mul_(signed.sgn_()).mul_(piece.coefficient * -piece.parameter)
        if piece.errors is not None:
            piece.errors.add_(remainder.mul_(0.5).log1p_())


@dataclass(frozen=True)
class Bernoulli(Elementwise):
    """e = softplus(x') - x' x, x' the logits: nats, as torch.nn.functional.binary_cross_entropy_with_logits."""

    name = "bernoulli"
    expects = "logits"
    log_normalizer = 0.0

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(recon, target, reduction="none")

    def fill(self, piece: Piece) -> None:
        """logits * (step(logits) - target) + log(1 + exp(-|logits|)), the last term as -log1p(-sigmoid(-|logits|))."""
        logits = piece.recon
        if piece.errors is not None:
            # no difference of two products that may both be infinite
            torch.gt(logits, 0, out=piece.errors).sub_(piece.target).mul_(logits)
            # the small term last, where nothing large is added any more
            piece.errors.sub_(torch.abs(logits, out=piece.scratch("a")).neg_().sigmoid_().neg_().log1p_())
        if piece.gradient is not None:
            torch.sigmoid(logits, out=piece.gradient).sub_(piece.target).mul_(piece.coefficient)

    def target_gradient(self, piece: Piece) -> Tensor:
        return torch.neg(piece.recon)


@dataclass(frozen=True)
class BernoulliProbs(Elementwise):
    """e = -x log(x') - (1 - x) log(1 - x'), x' probabilities: nats, as torch.nn.functional.binary_cross_entropy.

    As there, a logarithm is at least -100, and the gradient divides by at least 1e-12. Values of x' outside [0, 1] are
    not looked for, which would cost a sync.
    """

    name = "bernoulli_probs"
    expects = "probabilities"
    log_normalizer = 0.0

    def error(self, recon: Tensor, target: Tensor, parameter: float) -> Tensor:
        return F.binary_cross_entropy(recon, target, reduction="none")

    def fill(self, piece: Piece) -> None:
        recon, target = piece.recon, piece.target
        if piece.errors is not None:
            zero, weight = piece.scratch("a"), piece.scratch("b")
            # log(1 - recon) and log(recon), at least -100
            torch.neg(recon, out=zero).log1p_().clamp_(min=-100).mul_(torch.sub(target, 1, out=weight))
            torch.log(recon, out=piece.errors).clamp_(min=-100)
            torch.addcmul(zero, target, piece.errors, value=-1, out=piece.errors)
        if piece.gradient is not None:
            _aten.binary_cross_entropy_backward.grad_input(
                piece.coefficient, recon, target, None, _NO_REDUCTION, grad_input=piece.gradient
            )

    def target_gradient(self, piece: Piece) -> Tensor:
        log_zero, log_one = torch.neg(piece.recon).log1p_(), torch.log(piece.recon)
        return log_zero.clamp_(min=-100).sub_(log_one.clamp_(min=-100))


NAMED: dict[str, Elementwise] = {
    "l2": L2(),
    "l1": L1(),
    "huber": Huber(),
    "smooth_l1": SmoothL1(),
    "log_cosh": LogCosh(),
    "bernoulli": Bernoulli(),
    "bernoulli_probs": BernoulliProbs(),
}

_OF_LOGITS = L2(from_logits=True), L1(from_logits=True)
# by the names of errors; the parameter of the object is not read. SmoothL1 has that of Huber
ERRORS = {likelihood.name: likelihood for likelihood in reversed((*NAMED.values(), *_OF_LOGITS, Custom(torch.sub)))}
