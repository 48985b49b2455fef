"""Losses whose reconstruction term is a likelihood of counts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import ElboNumbers, ElboOptions, ElboTensors, ErrorOptions

from . import _checks, reference
from ._batch_terms import elbo_with_batch_terms, needs_batch_terms
from ._dtypes import in_dtype
from .likelihood_counts import CountLikelihood
from .likelihoods import LikelihoodSpec
from .ops._elbo_plan import LossSpec, resolve
from .ops.counts import count_nll
from .ops.elbo import elbo
from .reference import Terms
from .reference_counts import result_dtype


def elbo_of_counts(
    likelihood: CountLikelihood,
    arguments: Mapping[str, Tensor | None] | None,
    inputs: Sequence[Any],
    values: Sequence[Any],
    options_of_loss: Sequence[Any],
) -> Terms:
    """As `elbo`, whose tensors, numbers and options follow the likelihood and its arguments for this batch."""
    tensors, numbers, spec = ElboTensors(*inputs), ElboNumbers(*values), LossSpec(*options_of_loss)
    _checks.reductions(spec.recon_reduction, spec.recon_reduction, spec.kl_reduction)
    _checks.defined(
        spec.free_bits, spec.capacity_mode, likelihood.mask_normalize, (spec.recon_reduction, spec.kl_reduction)
    )
    weighed_recon, recon = _reconstruction(likelihood, arguments, tensors, numbers, spec)
    latents = ElboTensors(
        None, None, None, None, *tensors[4:8], kl_mask=tensors.kl_mask, kl=tensors.kl, weight=tensors.weight
    )._replace(betas=tensors.betas)
    if latents.kl is None and latents.mu is None:
        return weighed_recon, recon, torch.zeros_like(recon)
    if latents.kl is not None:
        _checks.per_sample("kl", latents.kl, tensors.recon)
    spec = spec._replace(likelihood=None, inplace=False)
    function = elbo_with_batch_terms if needs_batch_terms(spec) else elbo
    regularized, _, kl = function(latents, numbers._replace(recon_weight=1.0), spec)  # times beta
    dtype = torch.promote_types(recon.dtype, kl.dtype)
    return regularized + weighed_recon, recon.to(dtype), kl.to(dtype)


def _reconstruction(
    likelihood: CountLikelihood,
    arguments: Mapping[str, Tensor | None] | None,
    tensors: ElboTensors,
    numbers: ElboNumbers,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """The reconstruction term with its weights of the loss, and without."""
    if tensors.weight_map is not None:
        _checks.fail("recon_weight must be a number or of shape [B] with a likelihood of counts; got a map.")
    counts, options = likelihood.inputs(tensors.recon, tensors.target, tensors.mask, arguments)
    if tensors.weight is not None:
        _checks.per_sample("weight", tensors.weight, tensors.recon)
    likelihood_spec = LikelihoodSpec(ErrorOptions("counts"), mask_normalize=likelihood.mask_normalize)
    of_loss = resolve(spec._replace(likelihood=likelihood_spec), tensors)
    n_selected: float | Tensor = float(math.prod(tensors.recon.shape[1:]))
    images = ElboTensors(mask=tensors.mask, weight=tensors.weight, recon_weights=tensors.recon_weights)
    if counts.mask is not None:
        n_selected = counts.mask.sum(1).to(result_dtype(counts))

    def row_factors(dtype: torch.dtype) -> Tensor:
        return _row_factors(tensors, n_selected, numbers.recon_weight, of_loss, dtype)

    nll = count_nll(counts, options, row_factors, one_pass=spec.one_pass)
    only_recon = ElboNumbers(recon_weight=numbers.recon_weight)
    loss, recon, _ = reference.combine(nll, n_selected, None, None, images, only_recon, of_loss)
    return loss, recon


@torch.no_grad()
def _row_factors(
    tensors: ElboTensors, n_selected: Any, recon_weight: float | Tensor, options: ElboOptions, dtype: torch.dtype
) -> Tensor:
    """The derivative of the loss by the error of each row."""
    factor = in_dtype(recon_weight, dtype) * reference.recon_normalizer(n_selected, options)
    ones = torch.ones(tensors.recon.shape[0], dtype=dtype, device=tensors.recon.device)
    if tensors.weight is not None:
        ones = tensors.weight.to(dtype)
    if tensors.recon_weights is not None:
        ones = ones * tensors.recon_weights.to(dtype)
    return ones * factor
