"""Losses with a statistic of the batch inside a term, in plain torch on sums of samples.

These are the scale that is the best for the batch, and free bits of the batch's mean.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import ElboNumbers, ElboOptions, ElboTensors

from . import _checks, reference
from ._dtypes import compute_dtype, in_dtype
from .likelihoods import LikelihoodSpec
from .ops._elbo_plan import LossSpec, resolve
from .ops.elbo import elbo
from .reference import Terms


def needs_batch_terms(spec: Sequence[Any]) -> bool:
    """Whether these fields of `LossSpec` ask for a statistic of the batch."""
    likelihood, free_bits = spec[0], spec[4]
    optimal_scale = isinstance(likelihood, LikelihoodSpec) and likelihood.optimal_scale
    return optimal_scale or (free_bits is not None and free_bits.mode == "dim_batch")


def elbo_with_batch_terms(inputs: Sequence[Any], values: Sequence[Any], options_of_loss: Sequence[Any]) -> Terms:
    """As `elbo`."""
    tensors, numbers, spec = ElboTensors(*inputs), ElboNumbers(*values), LossSpec(*options_of_loss)
    _checks.loss_inputs(tensors, numbers, spec)
    dtype = compute_dtype(*tensors, *numbers)
    # copies, because a schedule may step them before the backward pass
    numbers = ElboNumbers(
        *(n if n is None else in_dtype(n.clone() if isinstance(n, Tensor) else n, dtype) for n in numbers)
    )
    # once for all of their uses, so that their gradients are rounded once
    weights = (None if t is None else t.to(dtype) for t in (tensors.weight, tensors.recon_weights))
    tensors = tensors._replace(**dict(zip(("weight", "recon_weights"), weights, strict=True)))
    options = resolve(spec, tensors)
    small = {"weight": tensors.weight, "extra": tensors.extra, "recon_weights": tensors.recon_weights}
    images = ElboTensors(*tensors[:4], mask=tensors.mask, **small)
    latents = tensors._replace(**dict.fromkeys(_OF_IMAGES))
    if tensors.recon is None:
        like = tensors.mu
        recon = weighed = torch.zeros(like.shape[:1] if options.per_sample else (), dtype=dtype, device=like.device)
    elif isinstance(spec.likelihood, LikelihoodSpec) and spec.likelihood.optimal_scale:
        weighed, recon, _ = _with_optimal_scale(images, spec, options)
    else:
        images = images._replace(sample_log_scale=tensors.sample_log_scale)
        weighed, recon, _ = elbo(images, ElboNumbers(), spec._replace(free_bits=None, capacity_mode=None))
    if spec.free_bits is not None and spec.free_bits.mode == "dim_batch":
        kl, regularized = _with_mean_free_bits(latents, numbers, options)
    elif latents.mu is None and latents.kl is None:
        kl = regularized = torch.zeros_like(recon)
    else:
        regularized, _, kl = elbo(latents, ElboNumbers(capacity=numbers.capacity), spec._replace(likelihood=None))
    loss = numbers.recon_weight * weighed + numbers.beta * regularized
    return loss.to(dtype), recon.to(dtype), kl.to(dtype)


_OF_IMAGES = ("recon", "target", "log_scale", "extra_map", "mask", "extra", "sample_log_scale", "recon_weights")


def _with_optimal_scale(images: ElboTensors, spec: LossSpec, options: ElboOptions) -> Terms:
    """The terms of the reconstruction under the scale that makes it smallest: the log of the mean error."""
    assert isinstance(spec.likelihood, LikelihoodSpec)
    by_sample = LossSpec(
        spec.likelihood._replace(nll_weight=1.0, constant=0.0, mask_normalize=False, optimal_scale=False),
        "none",
        "none",
    )
    plain = images._replace(weight=None, extra=None, extra_map=None, recon_weights=images.weight_map)
    weighed, errors, _ = elbo(plain, ElboNumbers(), by_sample)
    n: float | Tensor = float(math.prod(images.recon.shape[1:]))
    total: float | Tensor = n * errors.shape[0]
    if images.mask is not None:
        n = reference.per_sample(images.mask.to(errors.dtype))
        total = n.sum()
    # the mean of nothing is 1
    if isinstance(total, Tensor):
        mean = torch.where(total > 0, errors.sum() / total.clamp(min=1), 1.0)
    else:
        mean = errors.sum() / total if total else errors.new_ones(())
    log_scale = torch.log(mean)
    # errors hold the likelihood's factor already
    options = options._replace(error_weight=options.nll_weight)
    images = images._replace(sample_log_scale=log_scale)
    of_weights = weights = None
    if images.weight_map is not None:
        weights = reference.selected(images.weight_map, images.mask).to(errors.dtype)
    if images.extra_map is not None:
        extra = reference.selected(images.extra_map, images.mask).to(errors.dtype)
        errors = errors + reference.per_sample(extra)
        weighed = weighed if weights is None else weighed + reference.per_sample(weights * extra)
    if weights is not None:
        of_weights = weighed, reference.per_sample(weights)
    return reference.combine(errors, n, None, None, images, ElboNumbers(), options, of_weights)


def _with_mean_free_bits(latents: ElboTensors, numbers: ElboNumbers, options: ElboOptions) -> tuple[Tensor, Tensor]:
    """(KL term, regularised one): the mean over the batch of each dimension's KL is at least `free_bits.nats`."""
    assert options.free_bits is not None
    elements = reference.kl_elements(latents, options)
    batch = elements.shape[0]  # not len, which torch.jit.trace records as a constant
    elements = elements.reshape(batch, math.prod(elements.shape[1:]))
    if latents.weight is not None:
        elements = elements * latents.weight.to(elements.dtype)[:, None]
    kl = elements.sum(0)
    raised = (kl / batch if batch else kl).clamp(min=options.free_bits.nats)
    if latents.kl_mask is not None:  # dimensions of which nothing is selected
        raised = raised * latents.kl_mask.reshape(elements.shape).any(0)
    regularized = raised.sum() * (options.kl_normalizer * batch)
    if options.capacity_mode == "batch":
        regularized = (regularized - numbers.capacity * (options.kl_normalizer * batch)).abs()
    return options.kl_normalizer * kl.sum(), regularized
