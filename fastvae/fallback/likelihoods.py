"""Reconstruction errors on cache-sized pieces: the error of each element and its gradient, from one reading of both.

ATen's fused kernels write straight into the caller's memory where PyTorch has them; the other functions work in few
passes and without temporaries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
_NO_REDUCTION = 0  # as ATen counts


class Piece(NamedTuple):
    """What a pair reads and fills; all tensors have one shape and the dtype of arithmetic, but for `coefficient`.

    `gradient` may be the memory of `recon`: it is written after the last reading of `recon`.
    """

    recon: Tensor
    target: Tensor
    parameter: float
    coefficient: Tensor  # of the gradient: broadcasts to it
    errors: Tensor | None
    gradient: Tensor | None
    scratch: Callable[[str], Tensor]  # uninitialized memory by name


class Pair(NamedTuple):
    """An error and its gradient by recon.

    `target_gradient` gives that by target, without the coefficient; it is the negative of that by recon if None.
    """

    fill: Callable[[Piece], None]
    target_gradient: Callable[[Piece], Tensor] | None = None


def _l2(piece: Piece) -> None:
    recon, target = piece.recon, piece.target
    if piece.errors is not None:
        torch.sub(recon, target, out=piece.errors).square_()
    if piece.gradient is not None:
        _aten.mse_loss_backward.grad_input(piece.coefficient, recon, target, _NO_REDUCTION, grad_input=piece.gradient)


def _l1(piece: Piece) -> None:
    recon, target = piece.recon, piece.target
    if piece.errors is not None:
        torch.sub(recon, target, out=piece.errors).abs_()
    if piece.gradient is not None:
        # with the smallest normal beta this is the sign in one pass, and unlike torch.sgn it keeps NaN
        beta = torch.finfo(recon.dtype).tiny
        _aten.smooth_l1_loss_backward.grad_input(
            piece.coefficient, recon, target, _NO_REDUCTION, beta, grad_input=piece.gradient
        )


def _huber(piece: Piece) -> None:
    arguments = piece.recon, piece.target, _NO_REDUCTION, piece.parameter
    if piece.errors is not None:
        _aten.huber_loss.out(*arguments, out=piece.errors)
    if piece.gradient is not None:
        _aten.huber_loss_backward.out(piece.coefficient, *arguments, grad_input=piece.gradient)


def _log_cosh(piece: Piece) -> None:
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


def _bernoulli(piece: Piece) -> None:
    """logits * (step(logits) - target) + log(1 + exp(-|logits|)), whose last term is -log1p(-sigmoid(-|logits|))."""
    logits = piece.recon
    if piece.errors is not None:
        # no difference of two products that may both be infinite
        torch.gt(logits, 0, out=piece.errors).sub_(piece.target).mul_(logits)
        # the small term last, where nothing large is added any more
        piece.errors.sub_(torch.abs(logits, out=piece.scratch("a")).neg_().sigmoid_().neg_().log1p_())
    if piece.gradient is not None:
        torch.sigmoid(logits, out=piece.gradient).sub_(piece.target).mul_(piece.coefficient)


def _bernoulli_by_target(piece: Piece) -> Tensor:
    return torch.neg(piece.recon)


def _bernoulli_probs(piece: Piece) -> None:
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


def _bernoulli_probs_by_target(piece: Piece) -> Tensor:
    log_zero, log_one = torch.neg(piece.recon).log1p_(), torch.log(piece.recon)
    return log_zero.clamp_(min=-100).sub_(log_one.clamp_(min=-100))


def _of_logits(fill: Callable[[Piece], None]) -> Pair:
    """The pair on sigmoid(recon), of one that needs no scratch memory."""

    def fill_of_logits(piece: Piece) -> None:
        recon = torch.sigmoid(piece.recon, out=piece.scratch("a"))
        fill(piece._replace(recon=recon))
        if piece.gradient is not None:
            _aten.sigmoid_backward.grad_input(piece.gradient, recon, grad_input=piece.gradient)

    def by_target(piece: Piece) -> Tensor:
        gradient, one = torch.empty_like(piece.recon), torch.ones_like(piece.coefficient)
        fill(Piece(torch.sigmoid(piece.recon), piece.target, piece.parameter, one, None, gradient, piece.scratch))
        return gradient.neg_()

    return Pair(fill_of_logits, by_target)


PAIRS = {
    "l2": Pair(_l2),
    "l1": Pair(_l1),
    "l2_of_logits": _of_logits(_l2),
    "l1_of_logits": _of_logits(_l1),
    "huber": Pair(_huber),
    "log_cosh": Pair(_log_cosh),
    "bernoulli": Pair(_bernoulli, _bernoulli_by_target),
    "bernoulli_probs": Pair(_bernoulli_probs, _bernoulli_probs_by_target),
}
