"""The loss of a VAE, reconstruction and KL in one node of the graph.

Where it can be right, the forward pass writes the gradient of the reconstruction along with the loss, so that images
are read once; the backward pass then only checks that the upstream gradient is 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae_kernels.types import ElboNumbers, ElboTensors

from .. import _backend, _checks, reference
from .._strides import readable, with_strides
from ..reference import Terms
from ._autograd import alias_inputs, gradients_through, materialize_grads
from .plan import LossSpec, Plan, plan, resolve

_N_TENSORS = len(ElboTensors._fields)
_LOG_SCALE, _WEIGHT = ElboTensors._fields.index("log_scale"), ElboTensors._fields.index("weight")
_RECON_TERM = {ElboTensors._fields.index(name) for name in ("recon", "target", "log_scale", "extra_map", "extra")}
_RECON_TERM.add(ElboTensors._fields.index("sample_log_scale"))


def elbo(tensors: ElboTensors, numbers: ElboNumbers, spec: LossSpec) -> Terms:
    """(loss, recon term, KL term), differentiable in every tensor and number."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        _checks.loss_inputs(tensors, numbers, spec)
        return reference.elbo(tensors, numbers, resolve(spec, tensors))
    try:
        metas, number_metas = [
            tuple(
                [
                    None
                    if t is None or type(t) is float
                    else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg(), type(t))
                    for t in group
                ]
            )
            for group in (tensors, numbers)
        ]
    except (AttributeError, TypeError, RuntimeError):
        _checks.loss_inputs(tensors, numbers, spec)  # says which is not a dense tensor
        raise
    grad_enabled = torch.is_grad_enabled()
    at = plan(_backend.choice(), spec, metas, number_metas, grad_enabled)
    if at.backend is None:
        return reference.elbo(tensors, numbers, at.options)
    if at.copies_inputs:
        copies = [readable(t) if isinstance(t, Tensor) else t for t in (*tensors, *numbers)]
        return elbo(ElboTensors(*copies[:_N_TENSORS]), ElboNumbers(*copies[_N_TENSORS:]), spec)
    if not grad_enabled and forward_ad._current_level < 0:  # no node of a graph is needed
        outputs = at.backend.elbo_fwd(at.launches, tensors, numbers, None, None)
        return outputs.loss, outputs.recon, outputs.kl
    terms: Terms = ElboFunction.apply(at, *tensors, *numbers)  # type: ignore[no-untyped-call]
    return terms


class ElboFunction(torch.autograd.Function):
    """(plan, *tensors, *numbers) -> (loss, recon term, KL term)."""

    @staticmethod
    def forward(ctx: Any, at: Plan, *inputs: Any) -> Terms:
        ctx.set_materialize_grads(False)
        tensors, numbers = ElboTensors(*inputs[:_N_TENSORS]), ElboNumbers(*inputs[_N_TENSORS:])
        recon, log_scale = tensors.recon, tensors.log_scale
        drecon = dlog_scale = None
        if at.writes_gradient and numbers.recon_weight != 0:
            drecon = recon.data if at.inplace else torch.empty_like(recon)
            if log_scale is not None and ctx.needs_input_grad[_LOG_SCALE + 1]:
                dlog_scale = torch.empty_like(log_scale)
        outputs = at.backend.elbo_fwd(at.launches, tensors, numbers, drecon, dlog_scale)  # type: ignore[union-attr]
        ctx.plan, ctx.numbers, ctx.state, ctx.recon_grad_ready = at, numbers, outputs.saved, drecon is not None
        kept = inputs
        if at.inplace and drecon is not None:
            # whoever saved recon finds another version and raises; a kernel's stores do not count versions
            torch.autograd.graph.increment_version(recon)
            kept = None, None, *inputs[2:]
        # tensor numbers without gradient may be stepped by a schedule: the backend keeps their values
        kept = [
            t if isinstance(t, Tensor) and (i < _N_TENSORS or t.requires_grad) else None for i, t in enumerate(kept)
        ]
        ctx.save_for_backward(*kept, drecon, dlog_scale)
        return outputs.loss, outputs.recon, outputs.kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        at: Plan = ctx.plan
        *saved, drecon, dlog_scale = ctx.saved_tensors
        inplace = at.inplace and drecon is not None
        if inplace and (torch.is_grad_enabled() or not ctx.recon_grad_ready):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            return None, *_differentiable_backward(ctx, saved, upstream)
        upstream = materialize_grads(upstream)
        dloss, drecon_term, dkl_term = upstream
        reaches_recon = dloss is not None or drecon_term is not None
        reaches_kl = dloss is not None or dkl_term is not None
        held = ctx.recon_grad_ready and reaches_recon
        gradients: list[Tensor | None] = [None] * len(saved)
        for place in at.differentiable:
            if not ctx.needs_input_grad[place + 1]:
                continue
            if place == 0 and held:
                # handed out once, as a tensor with a version counter of its own: its new owner may do with it what it
                # likes, and a second backward pass still finds every saved tensor unmodified
                gradients[0] = drecon.data
            elif place == _LOG_SCALE and held and dlog_scale is not None:
                gradients[place] = dlog_scale.data
            elif _reaches(place, dloss is not None, reaches_recon, reaches_kl):
                gradients[place] = torch.empty_like(saved[place])
        if all(gradient is None for gradient in gradients):
            return None, *gradients
        ctx.recon_grad_ready = ctx.recon_grad_ready and not held
        tensors = ElboTensors(
            *[t if t is None else with_strides(t, s) for t, s in zip(saved, at.strides, strict=False)]
        )
        buffers = ElboTensors(*gradients[:_N_TENSORS]), ElboNumbers(*gradients[_N_TENSORS:])
        by_tensor, by_number = at.backend.elbo_bwd(  # type: ignore[union-attr]
            at.launches, tensors, ctx.numbers, ctx.state, upstream, *buffers, held=held
        )
        return None, *by_tensor, *by_number


def _reaches(place: int, dloss: bool, reaches_recon: bool, reaches_kl: bool) -> bool:
    """Whether the upstream gradients reach the input in this place."""
    if place >= _N_TENSORS:
        return dloss
    if place == _WEIGHT:
        return reaches_recon or reaches_kl
    return reaches_recon if place in _RECON_TERM else reaches_kl


def _differentiable_backward(
    ctx: Any, saved: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    seen = ctx.plan.backend.seen_numbers(ctx.plan.launches, ctx.state, ctx.numbers)
    inputs = alias_inputs(saved)
    numbers = (s if t is None else t for t, s in zip(inputs[_N_TENSORS:], seen, strict=True))
    outputs = reference.elbo(ElboTensors(*inputs[:_N_TENSORS]), ElboNumbers(*numbers), ctx.plan.options)
    return gradients_through(outputs, upstream, inputs, ctx.needs_input_grad[1:])
