"""The loss of a VAE, reconstruction and KL in one node of the graph: autograd and dispatch.

Where it can be right, the forward pass writes the gradient of the reconstruction along with the loss, so that images
are read once; the backward pass then only checks that the upstream gradient is what the forward pass took it for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backend, reference
from .._checks import one_pass_is_right
from .._options import ElboOptions, ElboTensors
from .._strides import readable
from . import _registered
from ._double import apart, gradients_through, with_memory

_N_TENSORS = len(ElboTensors._fields)
_LOG_SCALE = ElboTensors._fields.index("log_scale")
_NOTHING = ElboTensors()


def elbo(tensors: ElboTensors, options: ElboOptions) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, recon term, KL term, KL term under the floor or None), differentiable in every tensor and weight."""
    tensors = ElboTensors(*[None if t is None else readable(t) for t in tensors])
    like = next(t for t in tensors if t is not None)
    room = _registered if _registered.is_watched(like) else _backend.room_of(like, "elbo")
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # no node of a graph is needed
        terms: tuple[Tensor, Tensor, Tensor, Tensor | None] = room.elbo_fwd(tensors, _NOTHING, options)[:4]
        return terms
    beta, recon_weight = (w if isinstance(w, Tensor) else None for w in (options.beta, options.recon_weight))
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    outputs = ElboFunction.apply(room, options, *tensors, beta, recon_weight)  # type: ignore[no-untyped-call]
    return outputs


class ElboFunction(torch.autograd.Function):
    """room, options, *ElboTensors, beta, recon_weight -> (loss, recon term, KL term, KL term under the floor or None).

    room: the backend's module. The weights are None unless they are tensors; options hold them in any case.
    """

    @staticmethod
    def forward(
        ctx: Any, room: Any, options: ElboOptions, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tensors = ElboTensors(*given[:_N_TENSORS])
        written = _written_forward(tensors, ctx.needs_input_grad[2:], options)
        loss, recon_term, kl_term, floored, weights = room.elbo_fwd(tensors, written, options)
        ctx.room, ctx.options, ctx.holds_forward_gradient = room, options, written.recon is not None
        ctx.inplace = options.inplace and written.recon is not None
        kept: Sequence[Tensor | None] = given
        terms: tuple[Tensor, ...] = ()
        if weights is not None:
            # a schedule may step what has no gradient
            kept = *tensors, *(w if w is None or w.requires_grad else None for w in given[_N_TENSORS:])
            # gradients of tensor weights are the terms they multiply, with the values that the forward pass saw
            terms = weights, recon_term, kl_term if floored is None else floored
        if tensors.recon is not None and ctx.inplace:
            # who saved recon finds another version, and autograd says so; nothing else tells it of a kernel's stores
            torch.autograd.graph.increment_version(tensors.recon)
            kept = None, None, *kept[2:]
        ctx.save_for_backward(*kept, written.recon, written.log_scale, *terms)
        return loss, recon_term, kl_term, floored

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        options, wanted = ctx.options, ctx.needs_input_grad[2:]
        saved, upstream = ctx.saved_tensors, with_memory(upstream)
        tensors = ElboTensors(*saved[:_N_TENSORS])
        beta, recon_weight, drecon, dlog_scale, *terms = saved[_N_TENSORS:]
        if terms:  # whatever became of the weights since
            seen = {"recon_weight": terms[0][0], "beta": terms[0][1]}
            options = options._replace(**{k: v for k, v in seen.items() if isinstance(getattr(options, k), Tensor)})
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.holds_forward_gradient):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            inputs = apart((*tensors, beta, recon_weight))
            weights = {"beta": inputs[-2], "recon_weight": inputs[-1]}
            options = options._replace(**{name: w for name, w in weights.items() if w is not None})
            outputs = reference.elbo(ElboTensors(*inputs[:_N_TENSORS]), options)
            return None, None, *gradients_through(outputs, upstream, inputs, wanted)

        dloss, drecon_term, dkl_term, dfloored = upstream
        reaches_recon = dloss is not None or drecon_term is not None
        reaches_kl = dloss is not None or dkl_term is not None or dfloored is not None
        gradients: list[Tensor | None] = [None] * len(wanted)
        holds = ctx.holds_forward_gradient and reaches_recon
        if holds:
            # handed out once, as a tensor with a version counter of its own: its new owner may do with it what it
            # likes, and a second backward pass still finds every saved tensor unmodified
            ctx.holds_forward_gradient = False
            gradients[0] = drecon.data
            gradients[_LOG_SCALE] = None if dlog_scale is None else dlog_scale.data
        for i, tensor in enumerate(tensors):
            reaches = reaches_recon if i <= _LOG_SCALE else reaches_kl
            if tensor is not None and wanted[i] and reaches and gradients[i] is None:
                gradients[i] = torch.empty_like(tensor)
        buffers = ElboTensors(*gradients[:_N_TENSORS])
        if any(buffer is not None for buffer in buffers):
            ctx.room.elbo_bwd(tensors, upstream, buffers, options, holds_forward_gradient=holds)
        if terms and dloss is not None:
            weighed = zip((beta, recon_weight), (terms[2], terms[1]), wanted[_N_TENSORS:], strict=True)
            gradients[_N_TENSORS:] = [(dloss * term).sum().to(w.dtype) if want else None for w, term, want in weighed]
        return None, None, *gradients


def _written_forward(tensors: ElboTensors, wanted: Sequence[bool], options: ElboOptions) -> ElboTensors:
    """Buffers for the gradients that the forward pass writes; all None where the backward pass has to compute them."""
    recon, log_scale = tensors.recon, tensors.log_scale
    wants_recon, wants_target, wants_log_scale = wanted[: _LOG_SCALE + 1]
    if recon is None or not wants_recon or not options.one_pass:
        return _NOTHING
    if not one_pass_is_right(recon, wants_target, options.recon_weight):
        return _NOTHING
    return ElboTensors(
        recon=recon.data if options.inplace else torch.empty_like(recon),
        log_scale=torch.empty_like(log_scale) if log_scale is not None and wants_log_scale else None,
    )
