"""Reconstruction errors as pairs of small device functions: the error of an element, and its gradients by recon and by
target.

One generic kernel takes a pair as constants, so a new likelihood is a new pair here and not a new kernel. Constants
stand to the right of tensors: the interpreter cannot multiply a constant by a tensor.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .gaussian import exp, expm1


class Likelihood(NamedTuple):
    """Constants of a kernel."""

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
    """log(1 + x) for 0 <= x <= 1, in float64 -1/2 <= x, to 2 ulp: in float32 x times a minimax polynomial."""
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
def _log_of_complement(x, F: tl.constexpr = 1.0):
    """log(1 - F x) for 0 <= F x <= 1/2, to 2 ulp: in float32 x times the minimax polynomial of log(1 - F x) / x."""
    if x.dtype == tl.float64:
        logarithm = log1p(-F * x)
    else:
        p = x * (-1.4411139488220215 * F**9) + 1.6958249807357788 * F**8
        p = p * x - 1.2576812505722046 * F**7
        p = p * x + 0.20354433357715607 * F**6
        p = p * x - 0.26961418986320496 * F**5
        p = p * x - 0.2428048551082611 * F**4
        p = p * x - 0.33370062708854675 * F**3
        p = p * x - 0.49999284744262695 * F**2
        logarithm = (p * x - 1.0 * F) * x
    return logarithm


@triton.jit
def _log(x):
    """log(x) for 0 <= x <= 1/2, at least -100, to 2 ulp. In float32 all else, NaN too, gives a meaningless number."""
    if x.dtype == tl.float64:
        logarithm = tl.log(tl.where(x == 0, 1.0, x))
        logarithm = tl.where(x == 0, -100.0, logarithm)
    else:
        # 2^64 x = 2^e (1 + m) with 1 + m in [3/4, 3/2) and e times 2^23 in `exponent`; 0 comes to less than -100
        bits = (tl.abs(x) * 18446744073709551616.0).to(tl.int32, bitcast=True)
        exponent = (bits - (0x3F400000 + (64 << 23))) & -0x00800000
        m = (bits - exponent - (64 << 23)).to(tl.float32, bitcast=True) - 1.0
        p = m * -6.299251317977905e-2 + 0.13951706886291504
        p = p * m - 0.17463292181491852
        p = p * m + 0.2015715092420578
        p = p * m - 0.2497139275074005
        p = p * m + 0.3332664966583252
        p = p * m - 0.5000031590461731
        p = p * m + 1.0000005960464478
        logarithm = p * m + exponent.to(tl.float32) * 8.262958294867817e-08  # log(2) / 2^23
    return tl.where(logarithm < -100.0, -100.0, logarithm)


@triton.jit
def _divide(x, y):
    """x / y for y in [2^-100, 2^100], to 4 ulp: in float32 by the square root of 1 / y, which is one instruction.
    Division is eight, most of them for extreme y.
    """
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        root = tl.rsqrt(y)
        quotient = (x * root) * root
    return quotient


@triton.jit
def _log_cosh_error(recon, target, alpha):
    """log(cosh(x)) = x + log(1 + expm1(-2 x) / 2) of x = alpha |recon - target|"""
    distance = tl.abs(recon - target) * alpha
    return distance + _log_of_complement(expm1(distance, distance.dtype, -2.0), -0.5)


@triton.jit
def _log_cosh_gradient(recon, target, alpha):
    difference = recon - target
    # tanh(x) = -expm1(-2 x) / (2 + expm1(-2 x)) for x >= 0
    remainder = expm1(tl.abs(difference) * alpha, difference.dtype, -2.0)
    drecon = _with_sign(_divide(-remainder, 2.0 + remainder), difference) * alpha
    return drecon, -drecon


@triton.jit
def _with_sign(x, y):
    """x >= 0 with the sign of y: in float32 by one instruction on bits."""
    if x.dtype == tl.float64:
        signed = tl.where(y < 0, -x, x)
    else:
        sign = y.to(tl.int32, bitcast=True) & -0x80000000
        signed = (x.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return signed


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
def _logs_of_probability(p):
    """(log(1 - s), log(s)) of s = min(p, 1 - p), and whether s is p. No digits of a p near 0 or 1 are lost. No
    logarithm is below -100, as in torch's binary cross entropy. The first is NaN unless 0 <= p <= 1.
    """
    is_p = p < 0.5
    s = tl.where(is_p, p, 1.0 - p)
    return tl.where(s < 0, float("nan"), _log_of_complement(s)), _log(s), is_p


@triton.jit
def _bernoulli_probs_error(recon, target, parameter):
    near, far, is_recon = _logs_of_probability(recon)
    return tl.where(is_recon, target, 1.0 - target) * (near - far) - near


@triton.jit
def _bernoulli_probs_gradient(recon, target, parameter):
    variance = (1.0 - recon) * recon
    drecon = _divide(recon - target, tl.where(variance < 1e-12, 1e-12, variance))
    near, far, is_recon = _logs_of_probability(recon)
    return drecon, tl.where(is_recon, near - far, far - near)


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
