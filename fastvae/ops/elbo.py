"""The loss of a VAE, reconstruction and KL in one node of the graph.

Where it can be right, the forward pass writes the gradient of the reconstruction along with the loss, so that images
are read once; the backward pass then only checks that the upstream gradient is 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae_kernels.types import ElboNumbers, ElboTensors, meta_of

from .. import _backend, _checks, reference
from .._strides import readable, with_strides
from ..reference import Terms
from ._autograd import alias_inputs, direct_apply, gradients_through, materialize_grads
from ._elbo_plan import LossSpec, Plan, plan, resolve

_N_TENSORS = len(ElboTensors._fields)
_LOG_SCALE = ElboTensors._fields.index("log_scale")


def elbo(tensors: Sequence[Any], numbers: Sequence[Any], spec: Sequence[Any]) -> Terms:
    """(loss, recon term, KL term), differentiable in every tensor and number.

    Args:
        tensors, numbers, spec: The fields of `ElboTensors`, `ElboNumbers` and `LossSpec`; plain tuples, because to name
            their fields takes as long as to look up the plan.
    """
    if _backend.needs_reference():
        return _traced(ElboTensors(*tensors), ElboNumbers(*numbers), LossSpec(*spec))
    given = [t for t in tensors if t is not None]
    try:
        metas = tuple(
            [
                None
                if t is None
                else (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg(), type(t), t.layout)
                for t in tensors
            ]
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        _checks.loss_inputs(ElboTensors(*tensors), ElboNumbers(*numbers), LossSpec(*spec))  # says which is no tensor
        raise
    number_metas: tuple[Any, ...] = _FLOATS
    for number in numbers:
        if isinstance(number, Tensor):
            number_metas = tuple([meta_of(n) if isinstance(n, Tensor) else None for n in numbers])
            given += [n for n in numbers if isinstance(n, Tensor)]
            break
    grad_enabled = torch.is_grad_enabled()
    at = plan(_backend.choice(), spec, metas, number_metas, grad_enabled)
    if at.backend is None:
        return reference.elbo(ElboTensors(*tensors), ElboNumbers(*numbers), at.options)
    if at.copies_inputs:
        copies = [readable(t) if isinstance(t, Tensor) else t for t in (*tensors, *numbers)]
        return elbo(copies[:_N_TENSORS], copies[_N_TENSORS:], spec)
    if not grad_enabled and forward_ad._current_level < 0:  # no node of a graph is needed
        loss, recon_term, kl_term, _ = at.backend.elbo_fwd(at.launches, tensors, numbers, None, None)
        return loss, recon_term, kl_term
    apply: Any = ElboFunction.apply if torch._C._are_functorch_transforms_active() else _apply
    terms: Terms = apply(at, numbers, tensors, *given)
    return terms


_FLOATS = (None,) * len(ElboNumbers._fields)


def _traced(tensors: ElboTensors, numbers: ElboNumbers, spec: LossSpec) -> Terms:
    """For compilers and dispatch modes: the plain formula, which a compiler fuses with its neighbours."""
    _checks.loss_inputs(tensors, numbers, spec)
    return reference.elbo(tensors, numbers, resolve(spec, tensors))


class ElboFunction(torch.autograd.Function):
    """(plan, numbers, tensors, *inputs) -> (loss, recon term, KL term).

    `inputs` are the tensors that are given, and the numbers that are tensors, in the places that the plan tells.
    """

    @staticmethod
    def forward(ctx: Any, at: Plan, numbers: Any, tensors: Any, *inputs: Tensor) -> Terms:
        ctx.set_materialize_grads(False)
        drecon = dlog_scale = None
        kept: Sequence[Tensor | None] = inputs
        if at.writes_gradient and numbers[1] != 0:
            recon, log_scale = inputs[0], tensors[_LOG_SCALE]
            if log_scale is not None and log_scale.requires_grad:
                dlog_scale = torch.empty_like(log_scale)
            if at.inplace:
                drecon = recon.data
                # whoever saved recon finds another version and raises; a kernel's stores do not count versions
                torch.autograd.graph.increment_version(recon)
                kept = None, None, *inputs[2:]
            else:
                drecon = torch.empty_like(recon)
        loss, recon_term, kl_term, state = at.backend.elbo_fwd(at.launches, tensors, numbers, drecon, dlog_scale)  # type: ignore[union-attr]
        ctx.plan, ctx.numbers, ctx.state, ctx.recon_grad_ready = at, numbers, state, drecon is not None
        if len(inputs) > at.n_tensors:
            # a schedule may step numbers that get no gradient: the backend keeps their values
            kept = [t if t is not None and (i < at.n_tensors or t.requires_grad) else None for i, t in enumerate(kept)]
        ctx.save_for_backward(*kept, drecon, dlog_scale)
        return loss, recon_term, kl_term

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        at: Plan = ctx.plan
        *saved, drecon, dlog_scale = ctx.saved_tensors
        if at.inplace and drecon is not None and (torch.is_grad_enabled() or not ctx.recon_grad_ready):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            return None, None, None, *_differentiable_backward(ctx, saved, upstream)
        for i, tensor in enumerate(saved):
            if tensor is not None and tensor.stride() != at.strides[i]:
                saved[i] = with_strides(tensor, at.strides[i])
        upstream = materialize_grads(upstream)
        dloss, of_recon, of_kl = upstream[0] is not None, upstream[1] is not None, upstream[2] is not None
        recon_reached = dloss or of_recon
        reached = recon_reached, dloss or of_kl, recon_reached or of_kl, dloss  # by `Reach`
        held = ctx.recon_grad_ready and recon_reached
        gradients: list[Tensor | None] = [None] * len(saved)
        reaches_any = False
        for i, reach in at.differentiable:
            if reached[reach] and ctx.needs_input_grad[i + 3]:
                reaches_any = True
                # handed out once, as a tensor with a version counter of its own: its new owner may do with it what it
                # likes, and a second backward pass still finds every saved tensor unmodified
                if held and i == 0:
                    gradients[0] = with_strides(drecon, at.recon_strides).data
                elif held and dlog_scale is not None and at.places[i] == _LOG_SCALE:
                    gradients[i] = with_strides(dlog_scale, torch.empty_like(saved[i]).stride()).data
                else:
                    gradients[i] = torch.empty_like(saved[i])
        if not reaches_any:
            return None, None, None, *gradients
        ctx.recon_grad_ready = ctx.recon_grad_ready and not held
        inputs, buffers = at.arrange((*saved, None))[:_N_TENSORS], at.arrange((*gradients, None))
        returned = at.backend.elbo_bwd(at.launches, inputs, ctx.numbers, ctx.state, upstream, buffers, held=held)  # type: ignore[union-attr]
        return None, None, None, *[returned[place] for place in at.places]


_apply = direct_apply(ElboFunction)


def _differentiable_backward(
    ctx: Any, saved: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    at: Plan = ctx.plan
    numbers = at.backend.seen_numbers(at.launches, ctx.state, ctx.numbers)  # type: ignore[union-attr]
    inputs = alias_inputs(saved)
    arranged = at.arrange((*inputs, None))
    numbers = [seen if n is None else n for n, seen in zip(arranged[_N_TENSORS:], numbers, strict=True)]
    outputs = reference.elbo(ElboTensors(*arranged[:_N_TENSORS]), ElboNumbers(*numbers), at.options)
    return gradients_through(outputs, upstream, inputs, ctx.needs_input_grad[3:])
