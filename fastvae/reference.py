"""The maths in its plainest differentiable form: for reading, compiled regions, second derivatives, tests, baselines.

Shares no code with the kernels. Arithmetic is float32 (float64 where an input is), as theirs is.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.types import (
    Clamp,
    ElboNumbers,
    ElboOptions,
    ElboTensors,
    ErrorOptions,
    FreeBitsOptions,
    needs_sample_terms,
)
from fastvae_kernels.types import compute_dtype as compute_dtype

from ._dtypes import in_dtype
from ._elementwise import ERRORS

Terms = tuple[Tensor, Tensor, Tensor]  # loss, recon, kl


def clamp(logvar: Tensor, bounds: Clamp | None) -> Tensor:
    return logvar if bounds is None else logvar.clamp(*bounds)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    bounds: Clamp | None = None,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) element by element; the prior is N(0, 1) if None.

    ((mu - prior_mu)^2 / exp(prior_logvar) + expm1(r) - r) / 2, r = logvar - prior_logvar
    """
    dtype = compute_dtype(mu, logvar, prior_mu, prior_logvar)
    mu, logvar = mu.to(dtype), clamp(logvar.to(dtype), bounds)
    if prior_mu is not None and prior_logvar is not None:
        prior_logvar = prior_logvar.to(dtype)  # once, so that its gradient is rounded once
        mu = (mu - prior_mu.to(dtype)) * torch.exp(-0.5 * prior_logvar)
        logvar = logvar - prior_logvar
    return 0.5 * (mu.square() + (torch.expm1(logvar) - logvar))


def per_sample(elements: Tensor) -> Tensor:
    """[B, ...] -> [B]: the sum over all but the batch."""
    return elements.flatten(1).sum(1) if elements.ndim > 1 else elements


def reparameterize_kl(
    mu: Tensor, logvar: Tensor, noise: Tensor, bounds: Clamp | None = None, *prior: Tensor
) -> tuple[Tensor, Tensor]:
    """z = mu + exp(logvar / 2) * noise, and the KL of each sample; prior: its mu and logvar."""
    dtype = compute_dtype(mu, logvar)
    sigma = torch.exp(0.5 * clamp(logvar.to(dtype), bounds))
    z = mu.to(dtype) + sigma * noise.to(dtype)
    return z.to(torch.promote_types(mu.dtype, logvar.dtype)), per_sample(gaussian_kl(mu, logvar, bounds, *prior))


def resample_kl(
    mu: Tensor, logvar: Tensor, scaled_noise: Tensor, bounds: Clamp | None = None, *prior: Tensor
) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` around a sample already drawn, given `scaled_noise` = sigma * noise there; differentiable
    again and again.

    The factor exp((logvar - its value) / 2) is 1 and has sigma's derivatives relative to sigma, without dividing by a
    sigma that may have vanished.
    """
    dtype, stored = compute_dtype(mu, logvar), torch.promote_types(mu.dtype, logvar.dtype)
    # converted once for both results, so that a 16-bit gradient is rounded once
    mu, logvar = mu.to(dtype), clamp(logvar.to(dtype), bounds)
    z = mu + scaled_noise * torch.exp(0.5 * (logvar - logvar.detach()))
    return z.to(stored), per_sample(gaussian_kl(mu, logvar, None, *prior))


def error(recon: Tensor, target: Tensor, options: ErrorOptions) -> Tensor:
    """The error of each element; a uint8 target is scaled and shifted first."""
    dtype = compute_dtype(recon, target)
    if target.dtype == torch.uint8:
        target = target.to(dtype) * options.target_scale + options.target_shift
    return ERRORS[options.name].error(recon.to(dtype), target.to(dtype), options.parameter)


def apply_free_bits(kl: Tensor, free_bits: FreeBitsOptions) -> Tensor:
    """The KL of each element (or sample) under free bits."""
    if free_bits.mode == "dim_mask":
        return torch.where(kl <= free_bits.nats, torch.zeros_like(kl), kl)
    return kl.clamp(min=free_bits.nats)


def elbo(tensors: ElboTensors, numbers: ElboNumbers, options: ElboOptions) -> Terms:
    """(loss, recon term, KL term), 0-d or [B]; a term without inputs is 0."""
    by_sample = options.per_sample or needs_sample_terms(tensors, numbers, options)

    def total(elements: Tensor) -> Tensor:
        return per_sample(elements) if by_sample else elements.sum()

    errors = kl = regularized = weighed = None
    n_selected: float | Tensor = 0.0
    if tensors.recon is not None:
        elements = _errors(tensors, options)
        errors = total(elements)
        if tensors.weight_map is not None:
            weights = selected(tensors.weight_map, tensors.mask).to(elements.dtype)
            weighed = total(weights * elements), total(weights)
        n_selected = tensors.recon.numel()
        if by_sample:
            n_selected = math.prod(tensors.recon.shape[1:])
        if tensors.mask is not None:
            n_selected = total(tensors.mask.to(errors.dtype))
    if tensors.kl is not None:
        kl = tensors.kl.to(compute_dtype(tensors.kl))
        kl = kl if by_sample else kl.sum()
    elif tensors.mu is not None:
        elements = kl_elements(tensors, options)
        kl = total(elements)
        if options.element_free_bits is not None:
            raised = apply_free_bits(elements, options.element_free_bits)
            regularized = total(raised if tensors.kl_mask is None else raised * tensors.kl_mask)
    return combine(errors, n_selected, kl, regularized, tensors, numbers, options, weighed)


def kl_elements(tensors: ElboTensors, options: ElboOptions) -> Tensor:
    """The KL of each element; 0 outside the mask."""
    latents: tuple[Any, ...] = tensors[4:8]
    if tensors.kl_mask is not None:  # what is outside may be NaN, whose gradient would be too
        mask = tensors.kl_mask
        latents = tuple(None if t is None else torch.where(mask, t, torch.zeros_like(t)) for t in latents)
    mu, logvar, prior_mu, prior_logvar = latents
    elements = gaussian_kl(mu, logvar, options.logvar_clamp, prior_mu, prior_logvar)
    return elements if tensors.kl_mask is None else torch.where(tensors.kl_mask, elements, torch.zeros_like(elements))


def _errors(tensors: ElboTensors, options: ElboOptions) -> Tensor:
    """The error of each element, with its own scale and extra error; 0 outside the mask."""
    mask = tensors.mask
    errors = error(selected(tensors.recon, mask), selected(tensors.target, mask), options.error)
    if tensors.extra_map is not None:
        errors = errors + selected(tensors.extra_map, mask).to(errors.dtype) * options.error.extra_scale
    if tensors.log_scale is not None:
        log_scale = selected(tensors.log_scale, mask).to(errors.dtype)
        errors = errors * torch.exp(-log_scale) + log_scale
    return selected(errors, mask)


def selected(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """0 outside the mask, where a tensor may be NaN, whose gradient would be too."""
    return tensor if mask is None else torch.where(mask, tensor, torch.zeros_like(tensor))


_FIRST_SMALL = ElboTensors._fields.index("weight")


def combine(
    errors: Tensor | None,
    n_selected: float | Tensor,
    kl: Tensor | None,
    regularized: Tensor | None,
    tensors: ElboTensors,
    numbers: ElboNumbers,
    options: ElboOptions,
    weighed_errors: tuple[Tensor, float | Tensor] | None = None,
) -> Terms:
    """The terms, given sums of each sample, [B]; where no option acts on samples, sums of the batch, 0-d, will do.

    Args:
        errors: Sum of the errors.
        n_selected: Number of elements that the mask selects; of all without a mask.
        kl, regularized: Sum of the KL, and the same under free bits of each element (None if there are none).
        tensors, numbers, options: As in `elbo`, of which only what acts on samples is read.
        weighed_errors: Where elements have weights, sums of the errors times these and of the selected weights.
    """
    dtype = compute_dtype(errors, kl, *tensors, *numbers)
    beta, recon_weight = in_dtype(numbers.beta, dtype), in_dtype(numbers.recon_weight, dtype)
    capacity = 0.0 if numbers.capacity is None else in_dtype(numbers.capacity, dtype)
    if errors is None and kl is None:
        raise ValueError("a loss needs errors or a KL")
    # once for all terms, so that their gradients are rounded once
    small = [t if t is None or t.ndim > 1 else t.to(dtype) for t in tensors[_FIRST_SMALL:]]
    tensors = ElboTensors(*tensors[:_FIRST_SMALL], *small)
    weight = tensors.weight

    def weighed(term: Tensor) -> Tensor:
        return term if weight is None else term * weight

    recon: Any = None
    term: Any = None
    if errors is not None:
        recon = weighed_recon = _reconstruction(errors.to(dtype), n_selected, n_selected, tensors, options)
        if weighed_errors is not None:
            sums, weights = weighed_errors
            weighed_recon = _reconstruction(sums.to(dtype), weights, n_selected, tensors, options)
        elif tensors.recon_weights is not None:
            weighed_recon = recon * _of_selected(tensors.recon_weights, n_selected, tensors)
        if weight is not None:
            of_selected = _of_selected(weight, n_selected, tensors)
            recon, weighed_recon = _both(lambda t: t * of_selected, recon, weighed_recon)
        if not options.per_sample:
            factor = recon_normalizer(n_selected, options)
            recon, weighed_recon = _both(lambda t: t.sum() * factor, recon, weighed_recon)

    if kl is not None:
        term = kl.to(dtype)
        regularized_term = term if regularized is None else regularized.to(dtype)
        if options.free_bits is not None and options.free_bits.mode == "sample":
            regularized_term = apply_free_bits(term, options.free_bits)
        if options.capacity_mode == "sample":
            regularized_term = (regularized_term - capacity).abs()
        if tensors.betas is not None:
            regularized_term = regularized_term * tensors.betas
        term, regularized_term = _both(weighed, term, regularized_term)
    if kl is not None and not options.per_sample:
        term, regularized_term = _both(lambda t: t.sum() * options.kl_normalizer, term, regularized_term)
        if options.capacity_mode == "batch":
            n_samples = (tensors.mu if tensors.kl is None else tensors.kl).shape[0]
            regularized_term = (regularized_term - capacity * (options.kl_normalizer * n_samples)).abs()
    if recon is None:
        recon = weighed_recon = torch.zeros_like(term)
    if term is None:
        term = regularized_term = torch.zeros_like(recon)
    loss = recon_weight * weighed_recon + beta * regularized_term
    return loss.to(dtype), recon.to(dtype), term.to(dtype)


def _both(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The function of both, called once if they are one tensor."""
    result = function(a)
    return result, result if b is a else function(b)


def _reconstruction(
    errors: Tensor, n: float | Tensor, n_selected: float | Tensor, tensors: ElboTensors, options: ElboOptions
) -> Tensor:
    """Of each sample, before its weight, of the errors of n elements."""
    scaled = options.error_weight * errors
    if tensors.extra is not None:
        scaled = scaled + options.extra_weight * n * _of_selected(tensors.extra, n_selected, tensors)
    per_element: float | Tensor = options.constant
    if tensors.sample_log_scale is not None:
        log_scale = _of_selected(tensors.sample_log_scale, n_selected, tensors)
        log_scale = soft_lower_bound(log_scale, options.softclip)
        scaled = scaled * torch.exp(-log_scale)
        per_element = options.nll_weight * log_scale + options.constant
    if isinstance(per_element, Tensor) or per_element != 0:
        scaled = scaled + n * per_element
    return scaled


def _of_selected(per_sample: Tensor, n_selected: Any, tensors: ElboTensors) -> Tensor:
    """0 for samples without selected elements: these have no term, whatever their scale, extra error, weight hold."""
    if tensors.mask is None:
        return per_sample
    return torch.where(n_selected == 0, torch.zeros_like(per_sample), per_sample)


def soft_lower_bound(log_scale: Tensor, softclip: float | None) -> Tensor:
    """log_scale, of which the half is softly bounded by `softclip` from below."""
    if softclip is None:
        return log_scale
    return 2 * (softclip + F.softplus(log_scale / 2 - softclip))


def recon_normalizer(n_selected: float | Tensor, options: ElboOptions) -> float | Tensor:
    if not options.mask_normalize:
        return options.recon_normalizer
    assert isinstance(n_selected, Tensor)  # there is a mask
    n = n_selected.sum()
    # nothing selected: a term of 0, or of NaN where there is nothing to select from
    return torch.where(n == 0, 0.0 * options.recon_normalizer, 1.0 / torch.where(n == 0, 1.0, n))
