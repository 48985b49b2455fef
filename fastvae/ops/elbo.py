"""The loss of a VAE, reconstruction and KL in one node of the graph: autograd and dispatch.

Where it can be right, the forward pass writes the gradient of the reconstruction along with the loss, so that images
are read once; the backward pass then only checks that the upstream gradient is what the forward pass took it for.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

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

Terms = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Site(NamedTuple):
    """What calls whose tensors are alike have in common."""

    room: Any  # the backend's module
    places: tuple[int, ...]  # in ElboTensors of the tensors that come
    placed: Callable[[Sequence[Any]], tuple[Any, ...]]  # those and one more -> ElboTensors; the last is where none are
    notes: dict[Any, Any]  # what the backend worked out for such tensors


def site_of(tensors: ElboTensors) -> Site:
    like = next(t for t in tensors if t is not None)
    room = _registered if _registered.is_watched(like) else _backend.room_of(like, "elbo")
    places = tuple([place for place, t in enumerate(tensors) if t is not None])
    placed = itemgetter(*[places.index(place) if place in places else -1 for place in range(_N_TENSORS)])
    return Site(room, places, placed, {})


def elbo(tensors: ElboTensors, options: ElboOptions) -> Terms:
    """(loss, recon term, KL term, KL term under the floor or None), differentiable in every tensor and weight."""
    present = [readable(t) for t in tensors if t is not None]
    return elbo_at(site_of(tensors), options, *present)


def elbo_at(site: Site, options: ElboOptions, *present: Tensor) -> Terms:
    """The same of tensors in the site's places, which `readable` leaves as they are."""
    terms: Terms
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # no node of a graph is needed
        terms = site.room.elbo_fwd(_placed(site, present), _NOTHING, options, site.notes)[:4]
    else:
        weights = _tensor_weights(options)
        terms = ElboFunction.apply((site, options), *present, *weights.values())  # type: ignore[no-untyped-call]
    return terms


def _placed(site: Site, tensors: Sequence[Tensor | None]) -> ElboTensors:
    return ElboTensors._make(site.placed((*tensors, None)))


class ElboFunction(torch.autograd.Function):
    """(site, options), *tensors, *weights -> (loss, recon term, KL term, KL term under the floor or None).

    The weights are beta and recon_weight where they are tensors; options hold them in any case.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Site, ElboOptions], *given: Tensor) -> Terms:
        ctx.set_materialize_grads(False)
        site, options = call
        n_present = len(site.places)
        present = given[:n_present]
        tensors = _placed(site, present)
        written = _written_forward(tensors, site.placed((*ctx.needs_input_grad[1:], False)), options)
        loss, recon_term, kl_term, floored, weights = site.room.elbo_fwd(tensors, written, options, site.notes)
        ctx.site, ctx.options, ctx.holds_forward_gradient = site, options, written.recon is not None
        ctx.inplace = options.inplace and written.recon is not None
        kept: Sequence[Tensor | None] = present
        terms: tuple[Tensor | None, ...] = ()
        if weights is not None:
            # a schedule may step what has no gradient
            weighing = [w if w.requires_grad else None for w in given[n_present:]]
            # gradients of tensor weights are the terms they multiply, with the values that the forward pass saw
            terms = weights, recon_term, kl_term if floored is None else floored, *weighing
        if tensors.recon is not None and ctx.inplace:
            # who saved recon finds another version, and autograd says so; nothing else tells it of a kernel's stores
            torch.autograd.graph.increment_version(tensors.recon)
            kept = None, None, *present[2:]
        ctx.save_for_backward(*kept, written.recon, written.log_scale, *terms)
        return loss, recon_term, kl_term, floored

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        site, options, wanted = ctx.site, ctx.options, ctx.needs_input_grad[1:]
        saved, upstream = ctx.saved_tensors, with_memory(upstream)
        n_present = len(site.places)
        tensors = _placed(site, saved)
        drecon, dlog_scale, *terms = saved[n_present:]
        weights: dict[str, Tensor | None] = {}  # those that are tensors
        if terms:  # whatever became of them since
            weights = dict(zip(_tensor_weights(options), terms[3:], strict=True))
            seen = {"recon_weight": terms[0][0], "beta": terms[0][1]}
            options = options._replace(**{name: seen[name] for name in weights})
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.holds_forward_gradient):
            raise RuntimeError(
                "inplace=True serves one backward pass without create_graph: the gradient has taken recon's memory. "
                "Use inplace=False for retained graphs and second derivatives."
            )
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            inputs = apart((*saved[:n_present], *weights.values()))
            separate = zip(weights, inputs[n_present:], strict=True)
            options = options._replace(**{name: w for name, w in separate if w is not None})
            outputs = reference.elbo(_placed(site, inputs[:n_present]), options)
            return None, *gradients_through(outputs, upstream, inputs, wanted)

        dloss, drecon_term, dkl_term, dfloored = upstream
        reaches_recon = dloss is not None or drecon_term is not None
        reaches_kl = dloss is not None or dkl_term is not None or dfloored is not None
        holds = ctx.holds_forward_gradient and reaches_recon
        gradients: list[Tensor | None] = []
        reaches_any = False
        for place, tensor, want in zip(site.places, saved, wanted, strict=False):
            if not want or not (reaches_recon if place <= _LOG_SCALE else reaches_kl):
                gradients.append(None)
                continue
            reaches_any = True
            if holds and (place == 0 or place == _LOG_SCALE):
                # handed out once, as a tensor with a version counter of its own: its new owner may do with it what it
                # likes, and a second backward pass still finds every saved tensor unmodified
                gradients.append(drecon.data if place == 0 else dlog_scale.data)
            else:
                gradients.append(torch.empty_like(tensor))
        if holds:
            ctx.holds_forward_gradient = False
        if reaches_any:
            buffers = _placed(site, gradients)
            site.room.elbo_bwd(tensors, upstream, buffers, options, site.notes, holds_forward_gradient=holds)
        for name, weight in weights.items():
            term = terms[2 if name == "beta" else 1]
            gradients.append(None if weight is None or dloss is None else (dloss * term).sum().to(weight.dtype))
        return None, *gradients


def _tensor_weights(options: ElboOptions) -> dict[str, Tensor]:
    """Those that autograd has to see, in their order behind the op's tensors."""
    weights = ("beta", options.beta), ("recon_weight", options.recon_weight)
    return {name: weight for name, weight in weights if isinstance(weight, Tensor)}


def _written_forward(tensors: ElboTensors, wanted: Sequence[bool], options: ElboOptions) -> ElboTensors:
    """Buffers for the gradients that the forward pass writes; all None where the backward pass has to compute them."""
    recon, log_scale = tensors.recon, tensors.log_scale
    if recon is None or not wanted[0] or not options.one_pass:
        return _NOTHING
    if not one_pass_is_right(recon, wanted[1], options.recon_weight):
        return _NOTHING
    return ElboTensors(
        recon=recon.data if options.inplace else torch.empty_like(recon),
        log_scale=torch.empty_like(log_scale) if log_scale is not None and wanted[_LOG_SCALE] else None,
    )
