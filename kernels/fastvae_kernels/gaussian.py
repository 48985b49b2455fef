"""Device functions of a diagonal Gaussian, on loaded values."""

import triton
import triton.language as tl

from ._tile import unpack_f64


@triton.jit
def clamp(logvar, low, high, DTYPE: tl.constexpr):
    """logvar within [low, high], NaN kept; None: no clamp. Plain min and max would drop a NaN on a GPU."""
    if low is not None:
        lo, hi = unpack_f64(low, DTYPE), unpack_f64(high, DTYPE)
        logvar = tl.where(logvar < lo, lo, tl.where(logvar > hi, hi, logvar))
    return logvar


@triton.jit
def inside(logvar, low, high, gradient, DTYPE: tl.constexpr):
    """The gradient of a clamped logvar: 0 outside the bounds, as torch.clamp's."""
    if low is not None:
        outside = (logvar < unpack_f64(low, DTYPE)) | (logvar > unpack_f64(high, DTYPE))
        gradient = tl.where(outside, 0.0, gradient)
    return gradient


@triton.jit
def exp(x, DTYPE: tl.constexpr, F: tl.constexpr = 1.0):
    """exp(F x). In float32 by way of 2^x, whose instruction needs no guard against subnormal results: they become
    0. The compiler would not join the two factors.
    """
    return tl.exp(x * F) if DTYPE == tl.float64 else tl.exp2(x * (1.4426950408889634 * F))


@triton.jit
def _exp_remainder_series(x, DTYPE: tl.constexpr):
    """exp(x) - 1 - x for |x| < 1/2, to the dtype's rounding: Taylor's series, in float32 the minimax polynomial."""
    if DTYPE == tl.float64:
        p = x * 4.779477332387385e-14 + 7.647163731819816e-13
        p = p * x + 1.1470745597729725e-11
        p = p * x + 1.6059043836821613e-10
        p = p * x + 2.08767569878681e-09
        p = p * x + 2.505210838544172e-08
        p = p * x + 2.755731922398589e-07
        p = p * x + 2.7557319223985893e-06
        p = p * x + 2.48015873015873e-05
        p = p * x + 0.0001984126984126984
        p = p * x + 0.001388888888888889
        p = p * x + 0.008333333333333333
        p = p * x + 0.041666666666666664
        p = p * x + 0.16666666666666666
        p = p * x + 0.5
    else:
        p = _remainder_polynomial(x)
    return p * (x * x)


@triton.jit
def _remainder_polynomial(x, F: tl.constexpr = 1.0):
    """(exp(F x) - 1 - F x) / x^2 for |F x| < 1/2, minimax in float32."""
    p = x * (1.99448744416e-4 * F**7) + 1.39821860463e-3 * F**6
    p = p * x + 8.33323613352e-3 * F**5
    p = p * x + 4.166579123e-2 * F**4
    p = p * x + 0.166666668017 * F**3
    return p * x + 0.500000012161 * F**2


@triton.jit
def twice_kl_element(mu, logvar, sigma, DTYPE: tl.constexpr):
    """2 KL(N(mu, sigma^2) || N(0, 1)) = mu^2 + (sigma^2 - 1 - logvar), nats, without cancellation near 0.

    Twice, because the half costs an instruction here and nothing after the sum.
    """
    series = _exp_remainder_series(logvar, DTYPE)
    return mu * mu + tl.where(tl.abs(logvar) < 0.5, series, sigma * sigma - (1.0 + logvar))


@triton.jit
def expm1(x, DTYPE: tl.constexpr, F: tl.constexpr = 1.0):
    """exp(F x) - 1 without cancellation near 0: with F = 1, twice the KL's derivative by logvar."""
    if DTYPE == tl.float64:
        near = _exp_remainder_series(x * F, DTYPE) + x * F
    else:
        near = (_remainder_polynomial(x, F) * x + F) * x
    bound: tl.constexpr = 0.5 / F if F > 0 else -0.5 / F
    return tl.where(tl.abs(x) < bound, near, exp(x, DTYPE, F) - 1.0)
