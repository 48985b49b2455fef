"""The loss of a VAE, reconstruction and KL in one node of the graph: autograd and dispatch.

Where it can be right, the forward pass writes the gradient of the reconstruction along with the loss, so that images
are read once; the backward pass then only checks that the upstream gradient is what the forward pass took it for.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._checks import one_pass_is_right
from .._options import ElboOptions, ElboTensors
from . import _registered
from ._double import apart, gradients_through, with_memory

_N_TENSORS = len(ElboTensors._fields)


def room_of(like: Tensor) -> Any:
    """Where this tensor's loss is computed."""
    return _registered if _registered.is_watched(like) else _backend.room(_backend.backend_of(like), "elbo")


class ElboFunction(torch.autograd.Function):
    """(*tensors, beta, recon_weight), options -> (loss, recon term, KL term, KL term under the floor or None).

    beta and recon_weight are inputs only if they are tensors; options hold them in any case.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tensors, (beta, recon_weight, options) = ElboTensors(*args[:_N_TENSORS]), args[_N_TENSORS:]
        like = next(t for t in tensors if t is not None)
        ctx.room = room_of(like)
        written = _written_forward(tensors, ctx.needs_input_grad, options)
        *outputs, weights = ctx.room.elbo_fwd(tensors, written, options)
        ctx.options, ctx.holds_forward_gradient = options, written.recon is not None
        ctx.inplace = options.inplace and written.recon is not None
        if tensors.recon is not None and ctx.inplace:
            # who saved recon finds another version, and autograd says so; nothing else tells it of a kernel's stores
            torch.autograd.graph.increment_version(tensors.recon)
            tensors = tensors._replace(recon=None, target=None)
        _, recon_term, kl_term, floored = outputs
        ctx.save_for_backward(
            *tensors,
            *(t if t is not None and t.requires_grad else None for t in (beta, recon_weight)),
            *(written.recon, written.log_scale, weights),
            *((None, None) if weights is None else (recon_term, kl_term if floored is None else floored)),
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, upstream = ctx.saved_tensors, with_memory(upstream)
        tensors, (beta, recon_weight, drecon, dlog_scale, weights, recon_term, weighed_kl) = (
            ElboTensors(*saved[:_N_TENSORS]),
            saved[_N_TENSORS:],
        )
        options, inputs = ctx.options, (*tensors, beta, recon_weight)
        wanted = ctx.needs_input_grad[: len(inputs)]
        if weights is not None:  # the values that the forward pass saw, whatever became of the tensors since
            seen = {"recon_weight": weights[0], "beta": weights[1]}
            options = options._replace(**{k: v for k, v in seen.items() if isinstance(getattr(options, k), Tensor)})
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.holds_forward_gradient):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            aliases = apart(inputs)
            tensors, (beta, recon_weight) = ElboTensors(*aliases[:_N_TENSORS]), aliases[_N_TENSORS:]
            inputs = (*tensors, beta, recon_weight)
            if beta is not None:
                options = options._replace(beta=beta)
            if recon_weight is not None:
                options = options._replace(recon_weight=recon_weight)
            outputs = reference.elbo(tensors, options)
            return *gradients_through(outputs, upstream, inputs, wanted), None

        # a forward gradient is handed out once, as a tensor with a version counter of its own: its new owner may do
        # with it what it likes, and a second backward pass still finds every saved tensor unmodified
        dloss, drecon_term, *dkl_terms = upstream
        reaches_recon = dloss is not None or drecon_term is not None
        held = ElboTensors()
        if ctx.holds_forward_gradient and reaches_recon:
            ctx.holds_forward_gradient = False
            held = ElboTensors(recon=drecon.data, log_scale=None if dlog_scale is None else dlog_scale.data)
        reaches_kl = dloss is not None or any(d is not None for d in dkl_terms)
        gradients = ElboTensors(
            *(
                _buffer(x, want and (reaches_recon if name in ("recon", "target", "log_scale") else reaches_kl), buffer)
                for name, x, want, buffer in zip(ElboTensors._fields, tensors, wanted, held, strict=False)
            )
        )
        if any(gradient is not None for gradient in gradients):
            ctx.room.elbo_bwd(tensors, upstream, gradients, options, holds_forward_gradient=held.recon is not None)
        dbeta = _dot(dloss, weighed_kl, beta)
        drecon_weight = _dot(dloss, recon_term, recon_weight)
        return *gradients, dbeta, drecon_weight, None


def _written_forward(tensors: ElboTensors, wanted: tuple[bool, ...], options: ElboOptions) -> ElboTensors:
    """Buffers for the gradients that the forward pass writes; all None where the backward pass has to compute them."""
    by_name = dict(zip(ElboTensors._fields, wanted, strict=False))
    recon, log_scale = tensors.recon, tensors.log_scale
    if recon is None or not by_name["recon"] or not options.one_pass:
        return ElboTensors()
    if not one_pass_is_right(recon, by_name["target"], options.recon_weight):
        return ElboTensors()
    return ElboTensors(
        recon=recon.data if options.inplace else torch.empty_like(recon),
        log_scale=torch.empty_like(log_scale) if log_scale is not None and by_name["log_scale"] else None,
    )


def _buffer(x: Tensor | None, wanted: bool, held: Tensor | None) -> Tensor | None:
    return held if held is not None or x is None or not wanted else torch.empty_like(x)


def _dot(dloss: Tensor | None, term: Tensor, weight: Tensor | None) -> Tensor | None:
    """Gradient of a tensor weight: the term it multiplies."""
    return None if dloss is None or weight is None else (dloss * term).sum().to(weight.dtype)
