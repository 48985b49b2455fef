"""What Stirling's formula leaves of lgamma, and its counterpart for digamma:

    S(z) = lgamma(z) - ((z - 1/2) log(z) - z + 1/2 log(2 pi)),  P(z) = log(z) - digamma(z)

Unlike lgamma, they are small where z is large, so that their differences keep their digits.
"""

import math

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# polynomials in w = 1 / z, times w, for z >= 1: absolute errors of 7e-8 and 1.2e-8
_S = (
    0.08333326569655006,
    4.672182492715653e-06,
    -0.002828949994283775,
    0.00018733572033460485,
    0.0005846255040673189,
    -0.00021954994946021684,
)
_P = (
    0.5000000121008392,
    0.08333192857972574,
    2.6116521158071632e-05,
    -0.008502051486879067,
    0.00038951529220679587,
    0.004248581777187693,
    -0.0029899195472664723,
    0.0007114937658573977,
)
# asymptotic series in w^2, for z >= 16 exact in float64: S(z) / w, and (P(z) - w / 2) / w^2
_LARGE = 16.0
_S_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)
_P_SERIES = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760)


def _polynomial(w: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    # as 0-d tensors, because each call would convert a Python number anew
    constants = w.new_tensor(coefficients).unbind()
    result = torch.addcmul(constants[-2], w, constants[-1])
    for constant in constants[-3::-1]:
        torch.addcmul(constant, result, w, out=result)
    return result


def s_of_inverse(w: Tensor) -> Tensor:
    """S(1 / w) to 7e-8, for w <= 1."""
    return _polynomial(w, _S).mul_(w)


def p_of_inverse(w: Tensor) -> Tensor:
    """P(1 / w) to 1.2e-8, for w <= 1."""
    return _polynomial(w, _P).mul_(w)


def s_exact(z: Tensor) -> Tensor:
    """S(z) for z > 0, in float64."""
    z = z.double()
    w = 1 / z
    small = torch.lgamma(z) - ((z - 0.5) * z.log() - z + HALF_LOG_2PI)
    return torch.where(z < _LARGE, small, _polynomial(w * w, _S_SERIES) * w)


def p_exact(z: Tensor) -> Tensor:
    """P(z) for z > 0, in float64."""
    z = z.double()
    w = 1 / z
    return torch.where(z < _LARGE, z.log() - torch.digamma(z), _polynomial(w * w, _P_SERIES) * w * w + w / 2)
