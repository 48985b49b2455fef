"""The negative log-likelihood of counts by row; the forward pass writes the gradients that the backward pass hands out.

The caller tells which factor each row will have in its loss. Where the upstream gradient is another one, the backward
pass scales the gradients or computes them again.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae_kernels.count_types import CountGrads, CountOptions, CountTensors
from fastvae_kernels.types import TensorMeta, meta_of

from .. import _backend
from ..reference_counts import count_nll as reference_nll
from ..reference_counts import result_dtype
from ._autograd import alias_inputs, gradients_through, materialize_grads

_DIFFERENTIABLE = CountGrads._fields


class Plan(NamedTuple):
    """Who computes a call."""

    backend: ModuleType | None  # None: the reference formula
    launches: Any  # the backend's plan
    wanted: tuple[bool, ...]  # which gradients, in the order of `CountGrads`
    writes_gradients: bool  # in the forward pass


@lru_cache(maxsize=256)
def _plan(choice: str, options: CountOptions, metas: CountTensors, grad_enabled: bool, one_pass: bool) -> Plan:
    """The plan of a call; `choice`, the backend that was asked for, is a part of the cache key."""
    given = [meta for meta in metas if meta is not None]
    wanted = CountGrads(
        *(grad_enabled and getattr(metas, f) is not None and getattr(metas, f).requires_grad for f in _DIFFERENTIABLE)
    )
    plain = all(meta.kind in _backend.PLAIN for meta in given)
    name = _backend.backend_of(metas.logits)
    # the fallback looks at values to decide what to compute, which costs nothing on a CPU alone
    served = name == "triton" or metas.logits.device.type == "cpu"
    if not plain or not served or metas.counts.requires_grad:
        return Plan(None, None, wanted, False)
    backend = _backend.load_backend(name, "counts")
    # an unscaled float16 gradient underflows before a loss scaler can help
    pairs = zip(_DIFFERENTIABLE, wanted, strict=True)
    half = any(want and getattr(metas, field).dtype == torch.float16 for field, want in pairs)
    launches = backend.plan_counts(metas, options, wanted)
    return Plan(backend, launches, wanted, one_pass and any(wanted) and not half)


def count_nll(
    tensors: CountTensors,
    options: CountOptions,
    row_factors: Callable[[torch.dtype], Tensor],
    *,
    one_pass: bool = True,
) -> Tensor:
    """The negative log-likelihood of each row, [B], differentiable in all floating point inputs but the counts.

    Args:
        tensors, options: Laid out and checked as `fastvae_kernels.count_types` says.
        row_factors: Returns what the gradient of each row will most likely be multiplied by, [B] of a dtype.
        one_pass: The forward pass may write gradients.
    """
    if _backend.needs_reference() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference_nll(tensors, options)
    tensors = _readable(tensors)
    metas = CountTensors(*(None if t is None else _meta(t) for t in tensors))
    at = _plan(_backend.choice(), options, metas, torch.is_grad_enabled(), one_pass)
    if at.backend is None:
        return reference_nll(tensors, options)
    if not any(at.wanted):
        nll: Tensor = at.backend.counts_fwd(at.launches, tensors, None, CountGrads())[0]
        return nll
    factors = row_factors(result_dtype(tensors)) if at.writes_gradients else None
    inputs = (getattr(tensors, field) for field in _DIFFERENTIABLE)
    result: Tensor = CountFunction.apply(at, options, tensors, factors, *inputs)  # type: ignore[no-untyped-call]
    return result


def _meta(tensor: Tensor) -> TensorMeta:
    if tensor.layout == torch.strided:
        return meta_of(tensor)
    empty = torch.Size(), ()
    return TensorMeta(
        tensor.shape, empty[1], tensor.dtype, tensor.device, tensor.requires_grad, False, type(tensor), tensor.layout
    )


def _readable(tensors: CountTensors) -> CountTensors:
    """Without lazy negations, and dense where a kernel reads the counts."""
    tensors = CountTensors(*(t if t is None or not t.is_neg() else t.resolve_neg() for t in tensors))
    counts = tensors.counts
    if counts.layout != torch.strided and _backend.backend_of(counts) == "triton":
        return tensors._replace(counts=counts.to_dense())
    return tensors


class CountFunction(torch.autograd.Function):
    """(plan, options, tensors, row factors, logits, log_theta, log_library, zero_logits) -> nll, [B]."""

    @staticmethod
    def forward(
        ctx: Any, at: Plan, options: CountOptions, tensors: CountTensors, factors: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        grads = _buffers(inputs, at.wanted) if at.writes_gradients else CountGrads()
        nll: Tensor
        nll, ctx.state = at.backend.counts_fwd(at.launches, tensors, factors, grads)  # type: ignore[union-attr]
        ctx.plan, ctx.options, ctx.written = at, options, at.writes_gradients
        ctx.sparse = None if tensors.counts.layout == torch.strided else tensors.counts
        dense = tensors if ctx.sparse is None else tensors._replace(counts=None)
        ctx.save_for_backward(*dense, factors, *grads)
        return nll

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        at: Plan = ctx.plan
        n_inputs = len(CountTensors._fields)
        saved = ctx.saved_tensors
        tensors, factors = CountTensors(*saved[:n_inputs]), saved[n_inputs]
        if ctx.sparse is not None:
            tensors = tensors._replace(counts=ctx.sparse)
        inputs = [getattr(tensors, field) for field in _DIFFERENTIABLE]
        wanted = tuple(bool(want and need) for want, need in zip(at.wanted, ctx.needs_input_grad[4:], strict=True))
        nothing = None, None, None, None
        if upstream[0] is None:
            return *nothing, *nothing
        if torch.is_grad_enabled():  # create_graph=True: the backends are not differentiable, the reference is
            inputs = list(alias_inputs(inputs))
            tensors = tensors._replace(**dict(zip(_DIFFERENTIABLE, inputs, strict=True)))
            outputs = [reference_nll(tensors, ctx.options)]
            return *nothing, *gradients_through(outputs, upstream, inputs, wanted)
        (coefficients,) = materialize_grads(upstream)
        if ctx.written:
            # handed out once, as tensors with version counters of their own: their new owner may do with them what it
            # likes, and a second backward pass still finds every saved tensor unmodified
            grads = CountGrads(*(None if g is None else g.data for g in saved[n_inputs + 1 :]))
            state, ctx.written, ctx.state = ctx.state, False, None
        else:
            grads, state, factors = _buffers(inputs, at.wanted), None, None
        at.backend.counts_bwd(at.launches, tensors, state, factors, coefficients, grads)  # type: ignore[union-attr]
        return *nothing, *(g if want else None for g, want in zip(grads, wanted, strict=True))


def _buffers(inputs: Any, wanted: tuple[bool, ...]) -> CountGrads:
    return CountGrads(*(torch.empty_like(t) if want else None for t, want in zip(inputs, wanted, strict=True)))
