"""Device functions of a diagonal Gaussian, on loaded values."""

import triton
import triton.language as tl

from ._tile import scalar


@triton.jit
def clamp(logvar, low, high, DTYPE: tl.constexpr):
    """logvar within [low, high], NaN kept; None: no clamp. Plain min and max would drop a NaN on a GPU."""
    if low is not None:
        lo, hi = scalar(low, DTYPE), scalar(high, DTYPE)
        logvar = tl.where(logvar < lo, lo, tl.where(logvar > hi, hi, logvar))
    return logvar


@triton.jit
def inside(logvar, low, high, gradient, DTYPE: tl.constexpr):
    """The gradient of a clamped logvar: 0 outside the bounds, as torch.clamp's."""
    if low is not None:
        outside = (logvar < scalar(low, DTYPE)) | (logvar > scalar(high, DTYPE))
        gradient = tl.where(outside, 0.0, gradient)
    return gradient


@triton.jit
def _exp_remainder_series(x, DTYPE: tl.constexpr):
    """exp(x) - 1 - x for |x| < 1/2, by its Taylor series: relative error below the dtype's rounding."""
    if tl.float64 == DTYPE:
        p = x * 4.779477332387385e-14 + 7.647163731819816e-13
        p = p * x + 1.1470745597729725e-11
        p = p * x + 1.6059043836821613e-10
        p = p * x + 2.08767569878681e-09
        p = p * x + 2.505210838544172e-08
        p = p * x + 2.755731922398589e-07
        p = p * x + 2.7557319223985893e-06
        p = p * x + 2.48015873015873e-05
    else:
        p = x * 2.7557319223985893e-06 + 2.48015873015873e-05
    p = p * x + 1.984126984126984e-04
    p = p * x + 1.388888888888889e-03
    p = p * x + 8.333333333333333e-03
    p = p * x + 4.1666666666666664e-02
    p = p * x + 1.6666666666666666e-01
    p = p * x + 0.5
    return p * x * x


@triton.jit
def kl_element(mu, logvar, variance, DTYPE: tl.constexpr):
    """KL(N(mu, variance) || N(0, 1)) = (mu^2 + variance - 1 - logvar) / 2, nats, without cancellation near 0."""
    series = _exp_remainder_series(logvar, DTYPE)
    remainder = tl.where(tl.abs(logvar) < 0.5, series, variance - 1.0 - logvar)
    return 0.5 * (mu * mu + remainder)


@triton.jit
def expm1(x, DTYPE: tl.constexpr):
    """exp(x) - 1 without cancellation near 0: twice the KL's derivative by logvar."""
    return tl.where(tl.abs(x) < 0.5, _exp_remainder_series(x, DTYPE) + x, tl.exp(x) - 1.0)
