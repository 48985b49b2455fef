"""Reconstruction errors as pairs of functions: the error of each element, and its gradient by recon and by target.

A pair works on cache-sized pieces, in the dtype of arithmetic. The gradient by target is None where it is the negative
of that by recon.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Error = Callable[[Tensor, Tensor, float], Tensor]
Gradient = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor | None]]


class Pair(NamedTuple):
    error: Error
    gradient: Gradient


def _l2_error(recon: Tensor, target: Tensor, parameter: float) -> Tensor:
    return torch.sub(recon, target).square_()


def _l2_gradient(recon: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, None]:
    return torch.sub(recon, target).mul_(2), None


def _l1_error(recon: Tensor, target: Tensor, parameter: float) -> Tensor:
    return torch.sub(recon, target).abs_()


def _l1_gradient(recon: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, None]:
    difference = torch.sub(recon, target)
    return torch.where(difference.isnan(), difference, difference.sgn()), None  # torch's sign of NaN is 0


def _huber_error(recon: Tensor, target: Tensor, delta: float) -> Tensor:
    # with c = min(d, delta): c d - c^2 / 2 is d^2 / 2 inside and delta (d - delta / 2) outside
    distance = torch.sub(recon, target).abs_()
    near = distance.clamp(max=delta)
    return distance.mul_(near).addcmul_(near, near, value=-0.5)


def _huber_gradient(recon: Tensor, target: Tensor, delta: float) -> tuple[Tensor, None]:
    return torch.sub(recon, target).clamp_(-delta, delta), None


def _log_cosh_error(recon: Tensor, target: Tensor, alpha: float) -> Tensor:
    distance = torch.sub(recon, target).abs_().mul_(alpha)
    return distance.add(torch.mul(distance, -2).exp_().log1p_()).sub_(math.log(2))


def _log_cosh_gradient(recon: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, None]:
    return torch.sub(recon, target).mul_(alpha).tanh_().mul_(alpha), None


def _bernoulli_error(logits: Tensor, target: Tensor, parameter: float) -> Tensor:
    # logits * (step - target): no difference of two products that may both be infinite
    error = logits.sgn().clamp_(min=0).sub_(target).mul_(logits)
    # the small term last, where nothing large is added any more
    return error.add_(logits.abs().neg_().exp_().log1p_())


def _bernoulli_gradient(logits: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(logits).sub_(target), torch.neg(logits)


def _bernoulli_probs_error(recon: Tensor, target: Tensor, parameter: float) -> Tensor:
    zero, one = _log_probabilities(recon)
    return zero.mul_(target - 1).addcmul_(target, one, value=-1)


def _bernoulli_probs_gradient(recon: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    zero, one = _log_probabilities(recon)
    return torch.sub(recon, target).div_(((1 - recon) * recon).clamp_(min=1e-12)), zero.sub_(one)


def _log_probabilities(recon: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 - recon) and log(recon), at least -100."""
    return torch.neg(recon).log1p_().clamp_(min=-100), torch.log(recon).clamp_(min=-100)


def _of_logits(pair: Pair) -> Pair:
    """The pair on sigmoid(recon)."""

    def error(logits: Tensor, target: Tensor, parameter: float) -> Tensor:
        return pair.error(torch.sigmoid(logits), target, parameter)

    def gradient(logits: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
        recon = torch.sigmoid(logits)
        by_recon, _ = pair.gradient(recon, target, parameter)
        return by_recon * (1 - recon).mul_(recon), by_recon.neg()

    return Pair(error, gradient)


L2 = Pair(_l2_error, _l2_gradient)
L1 = Pair(_l1_error, _l1_gradient)
PAIRS = {
    "l2": L2,
    "l1": L1,
    "l2_of_logits": _of_logits(L2),
    "l1_of_logits": _of_logits(L1),
    "huber": Pair(_huber_error, _huber_gradient),
    "log_cosh": Pair(_log_cosh_error, _log_cosh_gradient),
    "bernoulli": Pair(_bernoulli_error, _bernoulli_gradient),
    "bernoulli_probs": Pair(_bernoulli_probs_error, _bernoulli_probs_gradient),
}
