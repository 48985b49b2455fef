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
    if tensors.weight is not None:  # once for both terms, so that its gradient is rounded once
        tensors = tensors._replace(weight=tensors.weight.to(dtype))
    options = resolve(spec, tensors)
    images = ElboTensors(*tensors[:4], mask=tensors.mask, weight=tensors.weight, extra=tensors.extra)
    latents = ElboTensors(
        None, None, None, None, *tensors[4:8], kl_mask=tensors.kl_mask, kl=tensors.kl, weight=tensors.weight
    )
    if tensors.recon is None:
        recon = torch.zeros(tensors.mu.shape[:1] if options.per_sample else (), dtype=dtype, device=tensors.mu.device)
    elif isinstance(spec.likelihood, LikelihoodSpec) and spec.likelihood.optimal_scale:
        recon = _with_optimal_scale(images, spec, options)
    else:
        images = images._replace(sample_log_scale=tensors.sample_log_scale)
        recon = elbo(images, ElboNumbers(), spec._replace(free_bits=None, capacity_mode=None))[1]
    if spec.free_bits is not None and spec.free_bits.mode == "dim_batch":
        kl, regularized = _with_mean_free_bits(latents, numbers, options)
    elif latents.mu is None and latents.kl is None:
        kl = regularized = torch.zeros_like(recon)
    else:
        regularized, _, kl = elbo(latents, ElboNumbers(capacity=numbers.capacity), spec._replace(likelihood=None))
    loss = numbers.recon_weight * recon + numbers.beta * regularized
    return loss.to(dtype), recon.to(dtype), kl.to(dtype)


def _with_optimal_scale(images: ElboTensors, spec: LossSpec, options: ElboOptions) -> Tensor:
    """The term under the scale that makes it smallest: the log of the mean error."""
    assert isinstance(spec.likelihood, LikelihoodSpec)
    by_sample = LossSpec(
        spec.likelihood._replace(nll_weight=1.0, constant=0.0, mask_normalize=False, optimal_scale=False),
        "none",
        "none",
    )
    errors = elbo(images._replace(weight=None, extra=None), ElboNumbers(), by_sample)[1]
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
    return reference.combine(errors, n, None, None, images, ElboNumbers(), options)[1]


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
