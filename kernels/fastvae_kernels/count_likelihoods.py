"""Negative log-likelihoods of counts as device functions: the value of an element and its derivatives.

With Stirling's series, S(z) = lgamma(z) - ((z - 1/2) log z - z + log(2 pi) / 2) and P(z) = log z - digamma(z) are small
and smooth for z >= 1, and what is left of the likelihood are logarithms of ratios. So nothing cancels, however large
theta, the mean and the counts are. Gamma functions of a count x and of theta + x are taken at x + 1 and theta + x + 1,
because counts need not be integers.

Constants stand to the right of tensors: the interpreter knows no product of a constant and a tensor.
"""

import triton
import triton.language as tl

from .gaussian import exp
from .likelihoods import log1p

_FLOOR, _LOG_FLOOR = tl.constexpr(1.0814110597793e-30), tl.constexpr(-69.0)  # of a mean
_HALF_LOG_2PI = tl.constexpr(0.9189385332046727)

# S(1 / w) / w and P(1 / w) / w on 0 < w <= 1, highest power first: of w in float32, of w - 1/2 in float64
_S32 = tl.constexpr(
    (
        -0.00021954994946021684,
        0.0005846255040673189,
        0.00018733572033460485,
        -0.002828949994283775,
        4.672182492715653e-06,
        0.08333326569655006,
    )
)
_P32 = tl.constexpr(
    (
        -0.000630917815500611,
        0.00430373549675736,
        -0.010102646217830202,
        0.0003359230813426914,
        0.08330957027026181,
        0.5000002740995446,
    )
)
_S64 = tl.constexpr(
    (
        -7.926781127975656e-05,
        8.343758736002251e-05,
        3.522854501838686e-05,
        -8.175143491528634e-05,
        4.856034741175721e-05,
        -2.548148820167735e-05,
        4.794936103334286e-06,
        3.0184813033631685e-05,
        -6.128362076415388e-05,
        6.667410973061784e-05,
        -2.999916482952826e-05,
        -5.471485844390123e-05,
        0.0001630315422797431,
        -0.00020492915299834283,
        -2.0194630451511272e-05,
        0.0008061463921746573,
        -0.0019404175523960445,
        -0.0024600201298022157,
        0.08268139191081736,
    )
)
_P64 = tl.constexpr(
    (
        0.00033072269315250705,
        1.4395166519386574e-05,
        -0.0006798686879964653,
        0.00039564141356531103,
        0.0001735795486931004,
        -0.00031478119431035246,
        0.00030868425527015635,
        -0.00028188244803929524,
        0.00011035943636721568,
        0.00020740985382091393,
        -0.0005430117391083135,
        0.0006710090022966174,
        -0.0002656073017896621,
        -0.0009835403877932697,
        0.0028775480032981033,
        -0.003019934861296968,
        -0.0091664743441868,
        0.07802115293971235,
        0.5407256909229954,
    )
)
# (log(1 + m) - m) / m^2 on -0.28 <= m <= 0.44, to 3e-7
_LOG_REMAINDER = tl.constexpr(
    (
        0.077149322,
        -0.136394614,
        0.149307662,
        -0.166466554,
        0.199701588,
        -0.24999548,
        0.333336759,
        -0.500000034,
    )
)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    p = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, DEGREE + 1):
        p = p * x + COEFFICIENTS[i]
    return p


@triton.jit
def _stirling(w):
    """S(1 / w)"""
    return (_polynomial(w - 0.5, _S64, 18) if w.dtype == tl.float64 else _polynomial(w, _S32, 5)) * w


@triton.jit
def _log_minus_digamma(w):
    """P(1 / w)"""
    return (_polynomial(w - 0.5, _P64, 18) if w.dtype == tl.float64 else _polynomial(w, _P32, 5)) * w


@triton.jit
def _rough_reciprocal(x):
    """1 / x, in float32 for 1e-36 < x < 1e36, to 4e-7: one instruction and a product, where a division takes eight."""
    if x.dtype == tl.float64:
        inverse = 1.0 / x
    else:
        root = tl.rsqrt(x)
        inverse = root * root
    return inverse


@triton.jit
def _reciprocal(x):
    """The same to 1e-7."""
    inverse = _rough_reciprocal(x)
    return inverse if x.dtype == tl.float64 else inverse * (2.0 - x * inverse)


@triton.jit
def _log_ratio(u, q):
    """log(u), its remainder log(u) - q, and whether u is near 1: elsewhere the remainder is meaningless.

    q is u - 1 without the digits that u has lost, and counts where u is near 1.
    """
    if u.dtype == tl.float64:
        near = tl.abs(q) < 0.25
        rounded = tl.where(near, q, 0.0) + 1.0
        # the rounding of 1 + q is divided out again
        log1p = tl.where(rounded == 1.0, q, tl.log(rounded) * (q / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
        logarithm = tl.where(near, log1p, tl.log(u))
        remainder = logarithm - q
    else:
        exponent = (u.to(tl.int32, bitcast=True) - 0x3F3851EC) & -8388608  # brings u into [0.72, 1.44)
        near = exponent == 0
        m = tl.where(near, q, u * (0x3F800000 - exponent).to(tl.float32, bitcast=True) - 1.0)
        remainder = _polynomial(m, _LOG_REMAINDER, 7) * m * m
        logarithm = exponent.to(tl.float32) * 8.262958294867817e-08 + (m + remainder)
    return logarithm, remainder, near


@triton.jit
def _log(x):
    """log(x) of a normal x > 0, in float32 to 4e-7 absolutely: a guess from the bits and, by polynomial, the logarithm
    of x over what was guessed, which is within 3 % of 1. tl.log takes three times the instructions.
    """
    if x.dtype == tl.float64:
        logarithm = tl.log(x)
    else:
        guess = x.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 126.95696433
        rest = x * tl.exp2(-guess) - 1.0
        logarithm = (rest * 0.33342946632855747 - 0.5001201634939142) * rest * rest + rest + guess * 0.6931471805599453
    return logarithm


@triton.jit
def dispersion(log_theta):
    """What the negative binomial takes of a gene: theta, S(theta) - log(theta) / 2 + log(2 pi) / 2 and P(theta)."""
    theta = exp(log_theta, log_theta.dtype)
    small = theta < 1.0
    raised = tl.where(small, theta + 1.0, theta)  # by the recurrences of lgamma and digamma
    ratio = tl.where(small, _log(raised) - log_theta, 0.0)
    w = _reciprocal(raised)
    stirling = _stirling(w) + tl.where(small, (theta + 0.5) * ratio - 1.0, 0.0)
    log_minus_digamma = _log_minus_digamma(w) + tl.where(small, _reciprocal(theta) - ratio, 0.0)
    return theta, stirling - log_theta * 0.5 + _HALF_LOG_2PI, log_minus_digamma


@triton.jit
def count_of(x, DTYPE: tl.constexpr):
    """A loaded count in the dtype of arithmetic; NaN if it is negative or not finite."""
    count = x.to(DTYPE)
    if not x.dtype.is_int_unsigned():
        # the compiler turns a comparison with infinity into twice the instructions
        largest: tl.constexpr = 1.7976931348623157e308 if DTYPE == tl.float64 else 3.4028234663852886e38
        count = tl.where((count >= 0) & (count <= largest), count, float("nan"))
    return count


@triton.jit
def exact_exp(x):
    """exp(x) to 2e-7 of itself also where x is large, which costs `exp` digits."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        power = tl.floor(x * 1.4426950408889634 + 0.5)
        rest = x - power * 0.693145751953125 - power * 1.428606765330187e-06
        result = tl.exp2(rest * 1.4426950408889634) * tl.exp2(power)
    return result


@triton.jit
def mean_of(log_mu):
    """The mean, at least exp(-69), and by how much its logarithm is then too large."""
    raised = tl.maximum(log_mu, _LOG_FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return exact_exp(raised), raised - log_mu


@triton.jit
def scaled_mean(mu, log_mu):
    """The same of a mean that is known more exactly than its logarithm."""
    return tl.maximum(mu, _FLOOR, propagate_nan=tl.PropagateNan.ALL), tl.maximum(_LOG_FLOOR - log_mu, 0.0)


@triton.jit
def nb(mu, excess, x, theta, constant, p_theta):
    """Value, and its derivatives by log mu and log theta.

    mu, excess: Of `mean_of`. theta, constant, p_theta: Of `dispersion`.
    """
    some = x > 0
    raised = x + 1.0
    count = tl.where(some, raised, x)
    z = theta + count
    total = theta + mu
    inverse = _reciprocal(z * total)
    w, inverse_total = inverse * total, inverse * z
    difference = mu - x
    from_count = mu - count
    u, q = total * w, from_count * w
    log_u, remainder, near = _log_ratio(u, q)
    T = difference * inverse_total
    dlog_theta = tl.where(near, q * (from_count * inverse_total) + remainder, log_u - from_count * inverse_total)
    zero_value = theta * log_u

    # what x > 0 adds
    inverse = _reciprocal(raised * mu)
    inverse_mu = inverse * raised
    r = -theta * q * inverse_mu
    log_v, v_remainder, v_near = _log_ratio(raised * u * inverse_mu, r)
    value = tl.where(
        near & v_near, theta * remainder + x * v_remainder - r * difference, zero_value + x * (log_v + excess)
    )
    y = theta + x
    value += _log(raised * w * (y * y)) * 0.5 + constant + _stirling(inverse * mu) - _stirling(w)
    dlog_theta += tl.where(some, T * _rough_reciprocal(y) + (_log_minus_digamma(w) - p_theta), 0.0)
    return tl.where(some, value, zero_value), theta * T, theta * dlog_theta


@triton.jit
def _softplus_and_sigmoid(x):
    small = exp(-tl.abs(x), x.dtype)
    return log1p(small), tl.where(x < 0, small, 1.0) * _reciprocal(small + 1.0)


@triton.jit
def zero_inflated(value, dlog_mu, dlog_theta, x, zero_logit):
    """The value of `nb` and its derivatives with additional zeros, of probability sigmoid(zero_logit), and the
    derivative by zero_logit.
    """
    zero = x == 0
    logit = zero_logit + value  # of an additional zero, given that there is a zero
    tail, probability = _softplus_and_sigmoid(zero_logit)
    zero_tail, posterior = _softplus_and_sigmoid(logit)
    posterior = tl.where(zero, posterior, 0.0)
    keep = 1.0 - posterior
    # of a zero softplus(zero_logit) + value - softplus(logit), without the difference
    rest = tl.where(zero, tl.where(logit > 0, -zero_logit, value) - zero_tail, value)
    value = tl.where(zero_logit > 0, zero_logit, 0.0) + tail + rest
    return value, dlog_mu * keep, dlog_theta * keep, probability - posterior


@triton.jit
def poisson(mu, excess, x):
    """Value and its derivative by log mu. mu, excess: Of `mean_of`."""
    raised = x + 1.0
    w = _reciprocal(raised)
    from_raised = mu - raised
    t = from_raised * w
    log_u, remainder, near = _log_ratio(mu * w, t)
    value = tl.where(near, t - x * remainder, from_raised - x * (log_u - excess))
    value += _log(raised) * 0.5 + _HALF_LOG_2PI + _stirling(w)
    return tl.where(x == 0, mu, value), mu - x
