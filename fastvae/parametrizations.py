"""logvar from whatever an encoder puts out: log sigma, sigma, sigma^2, or a number to be made positive by softplus.

All go element by element, [B, ...] to [B, ...], and can be differentiated twice and compiled. Arithmetic of 16-bit
tensors is float32, rounded once to their own dtype; for a finer logvar pass `tensor.float()`, since the losses take mu
and logvar of different dtypes. A variance of 0 has logvar -inf and an infinite KL: give the loss a `logvar_clamp`.

Errors of all: TypeError if the argument is not a floating point tensor, ValueError if it has no batch dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _numbers
from ._dtypes import compute_dtype

SMALLEST_EPS = 1e-12


def logvar_from_log_std(log_std: Tensor) -> Tensor:
    """logvar = 2 log_std, exactly: for encoders such as VDVAE's (Child, arXiv:2011.10650), which put out log sigma.

    Args:
        log_std: log sigma, [B, ...]; float64, float32, bfloat16 or float16.
    """
    _checks.float_tensor("log_std", log_std)
    return 2 * log_std


def logvar_from_std(std: Tensor) -> Tensor:
    """logvar = 2 log(std).

    At std = 0 it is -inf with gradient +inf, as torch.log; but an upstream gradient of 0, as a clamp of logvar sends
    it, stays 0 (torch.log would answer 0 * inf = NaN). A negative std gives NaN; looking for one would cost a sync.

    Args:
        std: sigma, [B, ...]; float64, float32, bfloat16 or float16.
    """
    _checks.float_tensor("std", std)
    return (2 * _log(_wide(std))).to(std.dtype)


def logvar_from_var(var: Tensor) -> Tensor:
    """logvar = log(var); at 0 and below as `logvar_from_std`.

    scVI's posterior is `logvar_from_var(activation(raw) + 1e-4)`, activation exp or softplus.

    Args:
        var: sigma^2, [B, ...]; float64, float32, bfloat16 or float16.
    """
    _checks.float_tensor("var", var)
    return _log(_wide(var)).to(var.dtype)


def logvar_from_softplus(raw: Tensor, eps: float = 0.0) -> Tensor:
    """logvar = 2 log(softplus(raw) + eps), softplus(raw) = log(1 + exp(raw)): sigma is positive whatever `raw` is.

    Finite, with finite gradients, for every finite `raw`: without eps, logvar goes to 2 raw and its gradient to 2 where
    softplus itself underflows to 0.

    Args:
        raw: [B, ...]; float64, float32, bfloat16 or float16.
        eps: Smallest sigma. 1e-4 in the audio autoencoder of diffusers.

    Raises:
        ValueError: eps is neither 0 nor within [1e-12, inf), below which its second derivatives overflow float32.

    Source: AutoencoderOobleck of diffusers.
    """
    _checks.float_tensor("raw", raw)
    eps = _numbers.not_negative("eps", eps)
    if 0 < eps < SMALLEST_EPS:
        _checks.fail(f"eps must be 0 or at least {SMALLEST_EPS}; got {eps!r}. With 0 no logvar is infinite either.")
    x = _wide(raw)
    # beyond it, softplus is exp on the left and the identity on the right, to the last bit
    edge = 40.0 if x.dtype == torch.float64 else 20.0
    if eps:
        log_std = torch.log(F.softplus(x, threshold=edge) + eps)
    else:
        # the clamp keeps the branch that is not taken finite, or its gradient would be 0 * inf
        log_std = torch.where(x < -edge, x, torch.log(F.softplus(x.clamp(min=-edge), threshold=edge)))
    return (2 * log_std).to(raw.dtype)


def soft_clamp(x: Tensor, limit: float) -> Tensor:
    """limit * tanh(x / limit): x near 0, never beyond +-limit, and unlike a clamp never without gradient near it.

    Args:
        x: mu, log sigma or logvar, [B, ...]; float64, float32, bfloat16 or float16.
        limit: Positive; 5 in NVAE, for mu and log sigma.

    Raises:
        ValueError: limit is not positive and finite.

    Source: Vahdat & Kautz, NVAE, arXiv:2007.03898, the code.
    """
    _checks.float_tensor("x", x)
    limit = _numbers.positive("limit", limit)
    return (limit * torch.tanh(_wide(x) / limit)).to(x.dtype)


class _Log(torch.autograd.Function):
    """torch.log whose gradient at 0 is 0 for an upstream gradient of 0, and not 0 / 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.log(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy / torch.where((x == 0) & (dy == 0), 1, x)


def _log(x: Tensor) -> Tensor:
    result: Tensor = _Log.apply(x)  # type: ignore[no-untyped-call]
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor))
