"""The loss of a VAE in few passes over memory, on any device."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import (
    ElboNumbers,
    ElboOptions,
    ElboTensors,
    TensorMeta,
    compute_dtype,
    needs_sample_terms,
    recon_constant,
)

from .. import reference
from .._dtypes import in_dtype
from .coefficients import host_value, per_row, rescale, scaled, scales_exactly, term_gradient
from .gaussian import kl_gradients, kl_terms, sum_by_sample
from .images import Coefficient, Images, sum_errors, sum_weighed_errors, write_gradients
from .samples import FIRST_OF_SAMPLES, SampleGraph, SampleSums, has_closed_form, sample_graph


class ElboPlan(NamedTuple):
    """The options of calls with equal signatures."""

    options: ElboOptions
    by_sample: bool  # options act on samples
    needs_graph: bool  # the gradients of their terms are left to autograd
    dtype: torch.dtype
    recon_scale: float
    recon_constant: float
    batch: int
    device: torch.device


Outputs = tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]


def plan_elbo(metas: ElboTensors, numbers: ElboNumbers, options: ElboOptions, writes_gradient: bool) -> ElboPlan:
    """See `fastvae_kernels.elbo`."""
    first = next(meta for meta in metas if meta is not None)
    differentiable = any(meta.requires_grad for meta in (*metas, *numbers) if isinstance(meta, TensorMeta))
    return ElboPlan(
        options=options,
        by_sample=needs_sample_terms(metas, numbers, options),
        needs_graph=differentiable and not has_closed_form(metas, numbers, options),
        dtype=compute_dtype(*metas, *numbers),
        recon_scale=options.recon_normalizer * options.error_weight,
        recon_constant=recon_constant(metas, options),
        batch=first.shape[0],
        device=first.device,
    )


def elbo_fwd(
    plan: ElboPlan, inputs: Sequence[Any], numbers: Sequence[Any], drecon: Tensor | None, dlog_scale: Tensor | None
) -> Outputs:
    """See `fastvae_kernels.elbo`."""
    tensors = ElboTensors(*inputs)
    if plan.by_sample:
        return _elbo_fwd_by_sample(plan, tensors, ElboNumbers(*numbers), drecon, dlog_scale)
    # plain numbers wherever the host may read them: arithmetic on those costs nothing
    beta, recon_weight = host_value(numbers[0]), host_value(numbers[1])
    recon_term: Coefficient = 0.0
    kl_term: Coefficient = 0.0
    regularized: Coefficient | None = None
    options = plan.options
    if tensors.recon is not None:
        weight = plan.recon_scale * _number(recon_weight) if drecon is not None else 0.0
        images = _images(tensors, ElboTensors(recon=drecon, log_scale=dlog_scale))
        errors = sum_errors(images, weight, options.error, per_sample=options.per_sample)
        recon_term = scaled(host_value(errors), plan.recon_scale) + plan.recon_constant
    kl = tensors.kl
    if kl is None and tensors.mu is not None:
        kl, raised = kl_terms(tensors, options, plan.dtype)
        regularized = None if raised is None else _reduced(raised, plan)
    if kl is not None:
        kl_term = _reduced(kl.to(plan.dtype), plan)
    weighed = kl_term if regularized is None else regularized
    loss = scaled(recon_term, recon_weight) + scaled(weighed, beta)
    loss, recon_term, kl_term = (_result(t, plan) for t in (loss, recon_term, kl_term))
    kl_term = kl_term.clone() if kl_term is tensors.kl else kl_term
    return loss, recon_term, kl_term, (*_seen((beta, recon_weight)),)


def _elbo_fwd_by_sample(
    plan: ElboPlan, tensors: ElboTensors, numbers: ElboNumbers, drecon: Tensor | None, dlog_scale: Tensor | None
) -> Outputs:
    options, dtype = plan.options, plan.dtype
    errors = weighed = kl = regularized = None
    n_selected: float | Tensor = 0.0
    n_weighed: Tensor | None = None
    if tensors.recon is not None:
        weight: Coefficient = 0.0
        if drecon is not None:
            weight = _error_factor(tensors, options, plan.recon_scale * _number(numbers.recon_weight))
        images = _images(tensors, ElboTensors(recon=drecon, log_scale=dlog_scale))
        if tensors.weight_map is None:
            errors = sum_errors(images, weight, options.error, per_sample=True)
        else:
            errors, weighed = sum_weighed_errors(images, weight, options.error)
            n_weighed = sum_by_sample(reference.selected(tensors.weight_map, tensors.mask), dtype)
        n_selected = float(math.prod(tensors.recon.shape[1:]))
        if tensors.mask is not None:
            count = torch.int32 if n_selected < 2**31 else torch.int64  # the former adds up twice as fast
            n_selected = sum_by_sample(tensors.mask, count).to(dtype)
    kl = tensors.kl
    if kl is None and tensors.mu is not None:
        kl, regularized = kl_terms(tensors, options, plan.dtype)
    if plan.needs_graph:
        sums = errors, weighed, kl, regularized
        terms, graph = sample_graph(sums, n_selected, n_weighed, tensors, numbers, options)
        return *terms, (graph,)
    weighed_errors = None if weighed is None or n_weighed is None else (weighed, n_weighed)
    terms = reference.combine(errors, n_selected, kl, regularized, tensors, numbers, options, weighed_errors)
    loss, recon_term, kl_term = terms
    kl_term = kl_term.clone() if kl_term is tensors.kl else kl_term
    return loss, recon_term, kl_term, (SampleSums(n_selected, kl, regularized, _seen(numbers)),)


def _seen(numbers: Sequence[Any]) -> Sequence[Coefficient]:
    """Their values, which the caller may change before the backward pass."""
    return [n.clone() if isinstance(n, Tensor) else n for n in map(host_value, numbers)]


def elbo_bwd(
    plan: ElboPlan,
    inputs: Sequence[Any],
    numbers: Sequence[Any],
    saved: tuple[Any, ...],
    upstream: tuple[Tensor | None, ...],
    buffers: Sequence[Tensor | None],
    *,
    held: bool,
) -> Sequence[Tensor | None]:
    """See `fastvae_kernels.elbo`."""
    tensors, gradients = ElboTensors(*inputs), ElboTensors(*buffers[: len(ElboTensors._fields)])
    small: Sequence[Tensor | None] = buffers[FIRST_OF_SAMPLES:]
    dloss, drecon_term, dkl_term = upstream
    options = plan.options
    factor: Coefficient = 1.0
    of_error: Coefficient
    of_kl: Coefficient
    of_free_bits: Coefficient
    if plan.by_sample:
        sums: SampleGraph | SampleSums = saved[0]
        of_sums, small = sums.backward(tensors, options, upstream)
        of_error, of_weighed, of_kl, of_free_bits = (0.0 if gradient is None else gradient for gradient in of_sums)
        # a gradient of the reconstruction term has no part in what the forward pass weighed and wrote
        held = held and (tensors.recon_weights is None or drecon_term is None)
        if held:
            factor = term_gradient(dloss, 1.0, None if drecon_term is None else drecon_term / numbers[1])
    else:
        beta, recon_weight = saved
        of_error = term_gradient(dloss, recon_weight, drecon_term)
        if held:
            factor = of_error / recon_weight
        of_error = of_error * plan.recon_scale
        has_free_bits = options.free_bits is not None
        of_kl = term_gradient(None if has_free_bits else dloss, beta, dkl_term) * options.kl_normalizer
        of_free_bits = term_gradient(dloss, beta, None) * options.kl_normalizer if has_free_bits else 0.0
    coefficients = (of_error, 0.0) if tensors.weight_map is None else (of_weighed, of_error)
    _image_gradients(plan, tensors, gradients, coefficients, factor, held=held)
    if gradients.kl is not None:
        of_kl = in_dtype(of_kl, gradients.kl.dtype)
        gradients.kl.copy_(of_kl) if isinstance(of_kl, Tensor) else gradients.kl.fill_(of_kl)
    if any(g is not None for g in gradients[4:8]):
        like = tensors.logvar if tensors.logvar is not None else tensors.mu
        by_row = [per_row(c, like) for c in (of_kl, of_free_bits)]
        kl_gradients(tensors, gradients, by_row[0], by_row[1] if options.element_free_bits else None, options)
    return (*gradients[:FIRST_OF_SAMPLES], *small)


def seen_numbers(plan: ElboPlan, saved: tuple[Any, ...], numbers: Sequence[Any]) -> Sequence[Any]:
    """See `fastvae_kernels.elbo`."""
    if plan.by_sample:
        return [t.detach() if isinstance(t, Tensor) else t for t in saved[0].numbers]
    return (*saved, None)


def _image_gradients(
    plan: ElboPlan,
    tensors: ElboTensors,
    gradients: ElboTensors,
    coefficients: tuple[Coefficient, Coefficient],
    factor: Coefficient,
    *,
    held: bool,
) -> None:
    """Write them; if `held`, those of recon and log_scale are there already but for the factor."""
    wanted = [g for g in gradients[:4] if g is not None]
    if not wanted:
        return
    if held and (tensors.recon is None or scales_exactly(wanted, factor)):
        for gradient in wanted:
            rescale(gradient, factor)
    else:
        write_gradients(_images(tensors, gradients), coefficients[0], plan.options.error, coefficients[1])


def _error_factor(tensors: ElboTensors, options: ElboOptions, factor: Coefficient) -> Coefficient:
    """What multiplies the error of each element: factor * weight * recon_weight / exp(log scale), a number or [B]."""
    if tensors.sample_log_scale is not None:
        log_scale = tensors.sample_log_scale.to(compute_dtype(tensors.recon, tensors.sample_log_scale))
        factor = torch.exp(-reference.soft_lower_bound(log_scale, options.softclip)) * factor
    for weight in (tensors.weight, None if tensors.weight_map is not None else tensors.recon_weights):
        if weight is not None:
            factor = weight.to(compute_dtype(tensors.recon, weight)) * factor
    return host_value(factor)


def _images(tensors: ElboTensors, gradients: ElboTensors) -> Images:
    return Images(
        *(tensors.recon, tensors.target, tensors.log_scale, tensors.extra_map, tensors.mask),
        *(gradients.recon, gradients.target, gradients.log_scale, gradients.extra_map),
        tensors.weight_map,
    )


def _reduced(kl: Tensor, plan: ElboPlan) -> Coefficient:
    return scaled(kl if plan.options.per_sample else host_value(kl.sum()), plan.options.kl_normalizer)


def _result(term: Coefficient, plan: ElboPlan) -> Tensor:
    term = in_dtype(term, plan.dtype)
    if isinstance(term, Tensor):
        return term
    if plan.options.per_sample:
        return torch.full((plan.batch,), term, dtype=plan.dtype, device=plan.device)
    return torch.scalar_tensor(term, dtype=plan.dtype, device=plan.device)


def _number(weight: Coefficient) -> float:
    assert not isinstance(weight, Tensor)  # one pass is not right under a tensor
    return weight
