"""Reconstruction errors as pairs of small device functions: the error of an element, and its gradients by recon and by
target.

One generic kernel takes a pair as constants, so a new likelihood is a new pair here and not a new kernel. Constants
stand to the right of tensors: the interpreter knows no product of a constant and a tensor.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .gaussian import exp, expm1


class Likelihood(NamedTuple):
    """What a kernel is told, all of it constant."""

    error: Any
    gradient: Any
    parameter: Any
    target_scale: Any
    target_shift: Any
    extra_scale: Any
    outside: Any  # what recon is read as in lanes outside the tensors; the target is 0 there, before its shift
    zero_outside: Any  # their error is then 0, and needs no mask


@triton.jit
def _l2_error(recon, target, parameter):
    """(recon - target)^2"""
    difference = recon - target
    return difference * difference


@triton.jit
def _l2_gradient(recon, target, parameter):
    drecon = 2.0 * (recon - target)
    return drecon, -drecon


@triton.jit
def _l1_error(recon, target, parameter):
    return tl.abs(recon - target)


@triton.jit
def _l1_gradient(recon, target, parameter):
    difference = recon - target
    drecon = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # NaN stays
    return drecon, -drecon


@triton.jit
def _huber_error(recon, target, delta):
    distance = tl.abs(recon - target)
    near = tl.where(distance > delta, delta, distance)
    return near * (distance - 0.5 * near)


@triton.jit
def _huber_gradient(recon, target, delta):
    difference = recon - target
    drecon = tl.where(difference > delta, delta, tl.where(difference < -delta, -delta, difference))
    return drecon, -drecon


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, to 2 ulp: in float32 x times the minimax polynomial of log(1 + x) / x."""
    if x.dtype == tl.float64:
        u = 1.0 + x  # its rounding is divided out again
        logarithm = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        y = x - 0.5
        p = y * -3.2440251670777798e-3 + 5.253348965197802e-3
        p = p * y - 6.749911233782768e-3
        p = p * y + 1.1576151475310326e-2
        p = p * y - 2.0570294931530952e-2
        p = p * y + 3.663547337055206e-2
        p = p * y - 6.768769770860672e-2
        p = p * y + 0.13260900974273682
        p = p * y - 0.28852710127830505
        logarithm = (p * y + 0.8109301924705505) * x
    return logarithm


@triton.jit
def _log_cosh_error(recon, target, alpha):
    """log(cosh(alpha |recon - target|))"""
    distance = tl.abs(recon - target) * alpha
    return distance + (log1p(exp(distance, distance.dtype, -2.0)) - 0.6931471805599453)


@triton.jit
def _log_cosh_gradient(recon, target, alpha):
    difference = recon - target
    # tanh(x) = -expm1(-2 x) / (1 + exp(-2 x)) for x >= 0
    remainder = expm1(-2.0 * (tl.abs(difference) * alpha), difference.dtype)
    tanh = -remainder / (2.0 + remainder)
    drecon = tl.where(difference < 0, -tanh, tanh) * alpha
    return drecon, -drecon


@triton.jit
def _sigmoid(x):
    small = exp(-tl.abs(x), x.dtype)
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _bernoulli_error(logits, target, parameter):
    """log(1 + exp(logits)) - logits * target, without a difference of the two, which is NaN where both are infinite"""
    size = tl.abs(logits)
    return size * tl.where(logits < 0, target, 1.0 - target) + log1p(exp(-size, logits.dtype))


@triton.jit
def _bernoulli_gradient(logits, target, parameter):
    return _sigmoid(logits) - target, -logits


@triton.jit
def _log_probability(p):
    """log(p), at least -100, as torch's binary cross entropy has it."""
    logarithm = tl.log(tl.where(p == 0, 1.0, p))
    return tl.where((p == 0) | (logarithm < -100.0), -100.0, logarithm)


@triton.jit
def _log_of_complement(p):
    """log(1 - p), at least -100, without losing the digits of a small p."""
    u = 1.0 - p
    logarithm = tl.log(tl.where(u == 0, 1.0, u)) * (-p / tl.where(u == 1.0, 1.0, u - 1.0))
    logarithm = tl.where(u == 1.0, -p, logarithm)
    return tl.where((u == 0) | (logarithm < -100.0), -100.0, logarithm)


@triton.jit
def _bernoulli_probs_error(recon, target, parameter):
    return (target - 1.0) * _log_of_complement(recon) - target * _log_probability(recon)


@triton.jit
def _bernoulli_probs_gradient(recon, target, parameter):
    variance = (1.0 - recon) * recon
    drecon = (recon - target) / tl.where(variance < 1e-12, 1e-12, variance)
    return drecon, _log_of_complement(recon) - _log_probability(recon)


@triton.jit
def _l2_of_logits_error(logits, target, parameter):
    return _l2_error(_sigmoid(logits), target, parameter)


@triton.jit
def _l2_of_logits_gradient(logits, target, parameter):
    recon = _sigmoid(logits)
    drecon, dtarget = _l2_gradient(recon, target, parameter)
    return drecon * ((1.0 - recon) * recon), dtarget


@triton.jit
def _l1_of_logits_error(logits, target, parameter):
    return _l1_error(_sigmoid(logits), target, parameter)


@triton.jit
def _l1_of_logits_gradient(logits, target, parameter):
    recon = _sigmoid(logits)
    drecon, dtarget = _l1_gradient(recon, target, parameter)
    return drecon * ((1.0 - recon) * recon), dtarget


@triton.jit
def _given_error(errors, target, parameter):
    """The tensor in recon's place holds the errors themselves."""
    return errors


@triton.jit
def _given_gradient(errors, target, parameter):
    return tl.zeros_like(errors) + 1.0, tl.zeros_like(errors)


PAIRS = {
    "l2": (_l2_error, _l2_gradient),
    "l1": (_l1_error, _l1_gradient),
    "l2_of_logits": (_l2_of_logits_error, _l2_of_logits_gradient),
    "l1_of_logits": (_l1_of_logits_error, _l1_of_logits_gradient),
    "huber": (_huber_error, _huber_gradient),
    "log_cosh": (_log_cosh_error, _log_cosh_gradient),
    "bernoulli": (_bernoulli_error, _bernoulli_gradient),
    "bernoulli_probs": (_bernoulli_probs_error, _bernoulli_probs_gradient),
    "given": (_given_error, _given_gradient),
}
ZERO_WHERE_EQUAL = {"l2", "l1", "huber"}


def likelihood(options: Any, recon: Any, target: Any) -> Likelihood:
    """What kernels take for `options`, an `ErrorOptions`, on images of these metas."""
    byte = target is not None and target.dtype == torch.uint8
    scale, shift = (options.target_scale, options.target_shift) if byte else (1.0, 0.0)
    exact = shift == 0 or torch.tensor(shift, dtype=recon.dtype, device="cpu").item() == shift
    exact = exact and math.isfinite(scale) and math.isfinite(shift)
    outside = shift if exact else 0.0, options.name in ZERO_WHERE_EQUAL and exact
    constants = options.parameter, scale, shift, options.extra_scale, *outside
    return Likelihood(*PAIRS[options.name], *map(tl.constexpr, constants))
