"""Group normalization and SiLU: autograd and dispatch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend, reference_norms
from .._strides import with_strides
from ._autograd import alias_inputs, gradients_through, materialize_grads


class Options(NamedTuple):
    groups: int
    eps: float
    silu: bool


def group_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: Options
) -> Tensor:
    """The inputs are checked."""
    seen = _backend.needs_reference() or torch._C._are_functorch_transforms_active()
    if seen or forward_ad._current_level >= 0 or x.numel() == 0:
        return reference_norms.group_norm_silu(x, residual, weight, bias, *options)
    name = _backend.backend_of(x)
    if name == "torch" and x.device.type != "cpu":  # where aten loses the layout
        return reference_norms.group_norm_silu(x, residual, weight, bias, *options)
    backend = _backend.load_backend(name, "group_norm")
    y: Tensor
    y, _ = GroupNormFunction.apply(backend, options, x, residual, weight, bias)  # type: ignore[no-untyped-call]
    return y


class GroupNormFunction(torch.autograd.Function):
    """(backend, options, x, residual, weight, bias) -> (y, x + residual or None).

    Keeps x, or the sum, and the statistics. The sum is an output so that second derivatives find the way from it to x
    and the residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        options: Options,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        at = _laid_out(x)
        added = None if residual is None else with_strides(residual.resolve_neg(), at.stride())
        y, total, mean, rstd = backend.group_norm_fwd(at, added, weight, bias, *options)
        ctx.save_for_backward(x if total is None else total, weight, bias, mean, rstd)
        ctx.backend, ctx.options = backend, options
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y, total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dtotal = upstream
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wants_x, wants_residual, *wants_affine = ctx.needs_input_grad[2:]
        wanted = wants_x or wants_residual, *wants_affine
        dx, dweight, dbias = None, None, None
        if dy is not None and torch.is_grad_enabled():  # create_graph=True: the reference is differentiable
            x, weight, bias = separate = alias_inputs((x, weight, bias))
            y = reference_norms.group_norm_silu(x, None, weight, bias, *ctx.options)  # type: ignore[arg-type]
            dx, dweight, dbias = gradients_through((y,), (dy,), separate, wanted)
        elif dy is not None:
            (dy,) = materialize_grads((dy,), contiguous=False)
            x = _laid_out(x)
            dy = with_strides(dy, x.stride())  # type: ignore[arg-type]
            groups, _, silu = ctx.options
            dx, dweight, dbias = ctx.backend.group_norm_bwd(dy, x, weight, bias, mean, rstd, groups, silu, wanted)
        if dtotal is not None:
            dx = dtotal if dx is None else dx + dtotal
        dresidual = dx.to(ctx.residual_dtype) if wants_residual and dx is not None else None
        return None, None, dx if wants_x else None, dresidual, dweight, dbias


def _laid_out(x: Tensor) -> Tensor:
    """x where it is contiguous or channels_last, else a contiguous copy."""
    x = x.resolve_neg()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim]):
        return x
    return x.contiguous()
