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
_TARGET, _LOG_SCALE = (ElboTensors._fields.index(name) for name in ("target", "log_scale"))
_RECON_WEIGHT = _N_TENSORS + 1


def elbo(tensors: ElboTensors, options: ElboOptions) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, recon term, KL term, KL term under the floor or None), differentiable in every tensor and weight."""
    weights = [w if isinstance(w, Tensor) else None for w in (options.beta, options.recon_weight)]
    # autograd's time goes by the inputs: only what is there becomes one
    fields = [i for i, t in enumerate((*tensors, *weights)) if t is not None]
    given = [readable(t) for t in (*tensors, *weights) if t is not None]
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # no node of a graph is needed
        tensors = ElboTensors(*_placed(fields, given)[:_N_TENSORS])
        terms: tuple[Tensor, Tensor, Tensor, Tensor | None]
        terms = _room_of(given[0]).elbo_fwd(tensors, ElboTensors(), options)[:4]
        return terms
    outputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
    outputs = ElboFunction.apply(options, fields, *given)  # type: ignore[no-untyped-call]
    return outputs


def _room_of(like: Tensor) -> Any:
    """Where this tensor's loss is computed."""
    return _registered if _registered.is_watched(like) else _backend.room(_backend.backend_of(like), "elbo")


def _placed(fields: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Values where their fields are in (*ElboTensors, beta, recon_weight); None elsewhere."""
    places: list[Any] = [None] * (_N_TENSORS + 2)
    for field, value in zip(fields, values, strict=False):
        places[field] = value
    return places


class ElboFunction(torch.autograd.Function):
    """options, fields, given -> (loss, recon term, KL term, KL term under the floor or None).

    given: the tensors that there are, beta and recon_weight among them if they are tensors (options hold them in any
        case); fields: where in (*ElboTensors, beta, recon_weight) each belongs.
    """

    @staticmethod
    def forward(
        ctx: Any, options: ElboOptions, fields: list[int], *given: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        tensors = ElboTensors(*_placed(fields, given)[:_N_TENSORS])
        ctx.room = _room_of(given[0])
        written = _written_forward(tensors, _placed(fields, ctx.needs_input_grad[2:]), options)
        *outputs, weights = ctx.room.elbo_fwd(tensors, written, options)
        ctx.options, ctx.fields, ctx.holds_forward_gradient = options, fields, written.recon is not None
        ctx.inplace = options.inplace and written.recon is not None
        kept: Sequence[Tensor | None] = given
        if weights is not None:  # a schedule may step what has no gradient
            kept = [t if i < _N_TENSORS or t.requires_grad else None for i, t in zip(fields, given, strict=True)]
        if tensors.recon is not None and ctx.inplace:
            # who saved recon finds another version, and autograd says so; nothing else tells it of a kernel's stores
            torch.autograd.graph.increment_version(tensors.recon)
            kept = [None if i <= _TARGET else t for i, t in zip(fields, kept, strict=True)]
        # gradients of tensor weights are the terms they multiply, with the values that the forward pass saw
        terms = () if weights is None else (weights, outputs[1], outputs[3] if outputs[3] is not None else outputs[2])
        ctx.save_for_backward(*kept, written.recon, written.log_scale, *terms)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        fields, options, wanted = ctx.fields, ctx.options, ctx.needs_input_grad[2:]
        n_given = len(fields)
        saved, upstream = ctx.saved_tensors, with_memory(upstream)
        given, (drecon, dlog_scale, *terms) = saved[:n_given], saved[n_given:]
        if terms:  # whatever became of the weights since
            seen = {"recon_weight": terms[0][0], "beta": terms[0][1]}
            options = options._replace(**{k: v for k, v in seen.items() if isinstance(getattr(options, k), Tensor)})
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.holds_forward_gradient):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            inputs = apart(given)
            *aliases, beta, recon_weight = _placed(fields, inputs)
            if beta is not None:
                options = options._replace(beta=beta)
            if recon_weight is not None:
                options = options._replace(recon_weight=recon_weight)
            outputs = reference.elbo(ElboTensors(*aliases), options)
            return None, None, *gradients_through(outputs, upstream, inputs, wanted)

        dloss, drecon_term, *dkl_terms = upstream
        reaches_recon = dloss is not None or drecon_term is not None
        reaches_kl = dloss is not None or any(d is not None for d in dkl_terms)
        # a forward gradient is handed out once, as a tensor with a version counter of its own: its new owner may do
        # with it what it likes, and a second backward pass still finds every saved tensor unmodified
        held: dict[int, Tensor] = {}
        holds = ctx.holds_forward_gradient and reaches_recon
        if holds:
            ctx.holds_forward_gradient = False
            held[0] = drecon.data
            if dlog_scale is not None:
                held[_LOG_SCALE] = dlog_scale.data
        gradients: list[Tensor | None] = []
        for field, tensor, want in zip(fields, given, wanted, strict=True):
            gradient = None
            if want and field < _N_TENSORS and (reaches_recon if field <= _LOG_SCALE else reaches_kl):
                gradient = held[field] if field in held else torch.empty_like(tensor)
            gradients.append(gradient)
        if any(gradient is not None for gradient in gradients):
            tensors, buffers = (ElboTensors(*_placed(fields, ts)[:_N_TENSORS]) for ts in (given, gradients))
            ctx.room.elbo_bwd(tensors, upstream, buffers, options, holds_forward_gradient=holds)
        if terms and dloss is not None:
            for i, field in enumerate(fields):
                if field >= _N_TENSORS and wanted[i]:
                    term = terms[1] if field == _RECON_WEIGHT else terms[2]
                    gradients[i] = (dloss * term).sum().to(given[i].dtype)
        return None, None, *gradients


def _written_forward(tensors: ElboTensors, wanted: list[bool | None], options: ElboOptions) -> ElboTensors:
    """Buffers for the gradients that the forward pass writes; all None where the backward pass has to compute them."""
    wants = ElboTensors(*wanted[:_N_TENSORS])  # type: ignore[arg-type]
    recon, log_scale = tensors.recon, tensors.log_scale
    if recon is None or not wants.recon or not options.one_pass:
        return ElboTensors()
    if not one_pass_is_right(recon, bool(wants.target), options.recon_weight):
        return ElboTensors()
    return ElboTensors(
        recon=recon.data if options.inplace else torch.empty_like(recon),
        log_scale=torch.empty_like(log_scale) if log_scale is not None and wants.log_scale else None,
    )
