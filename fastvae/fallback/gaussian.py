"""The KL of a diagonal Gaussian, for the ops that need it."""

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, ElboOptions, ElboTensors, FreeBitsOptions, compute_dtype

from ..reference import apply_free_bits


def clamped(logvar: Tensor, bounds: Clamp | None) -> Tensor:
    return logvar if bounds is None or _all_inside(logvar, bounds) else logvar.clamp(*bounds)


def zero_outside(gradient: Tensor, logvar: Tensor, bounds: Clamp | None, dtype: torch.dtype) -> None:
    """What a clamp in `dtype` makes of logvar's gradient, in place."""
    if bounds is None or _all_inside(logvar, bounds):
        return
    logvar = logvar.to(dtype)  # a comparison in 16 bits would round the bounds
    gradient.masked_fill_((logvar < bounds[0]) | (logvar > bounds[1]), 0)


def _all_inside(logvar: Tensor, bounds: Clamp) -> bool:
    """Whether a clamp changes nothing, as is usual: to ask takes a tenth of what masks take. NaN is never inside."""
    if logvar.device.type != "cpu" or logvar.numel() == 0:  # elsewhere the host would have to wait
        return False
    lowest, highest = torch.aminmax(logvar)
    return bounds[0] <= lowest.item() and highest.item() <= bounds[1]


def rows(per_sample: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] with the rank of `like`."""
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))


def sum_by_sample(elements: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, ...] -> [B], added up in `dtype`; may return `elements` itself."""
    return elements if elements.ndim == 1 else elements.sum(tuple(range(1, elements.ndim)), dtype=dtype)


def kl_per_sample(mu: Tensor, logvar: Tensor, expm1: Tensor) -> Tensor:
    """[B]: sum of (mu^2 + expm1(logvar) - logvar) / 2 over each sample; all three already in the dtype of
    arithmetic.
    """
    elements = torch.sub(expm1, logvar).addcmul_(mu, mu)
    return sum_by_sample(elements).mul_(0.5)


def kl_terms(tensors: ElboTensors, options: ElboOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """[B]: the KL of each sample, and the same under free bits of each element, if there are any."""
    mu, logvar, _ = _relative(tensors, options, dtype)
    expm1 = torch.expm1(logvar)
    if options.element_free_bits is None and tensors.kl_mask is None:
        return kl_per_sample(mu, logvar, expm1), None
    elements = _selected(torch.sub(expm1, logvar).addcmul_(mu, mu).mul_(0.5), tensors)
    if options.element_free_bits is None:
        return sum_by_sample(elements), None
    raised = _selected(apply_free_bits(elements, options.element_free_bits), tensors)
    return sum_by_sample(elements), sum_by_sample(raised)


def _selected(elements: Tensor, tensors: ElboTensors) -> Tensor:
    """0 in place of what the mask leaves out, in place."""
    return elements if tensors.kl_mask is None else elements.masked_fill_(~tensors.kl_mask, 0)


def kl_gradients(
    tensors: ElboTensors,
    gradients: ElboTensors,
    coefficient: float | Tensor,
    free_bits_coefficient: float | Tensor | None,
    options: ElboOptions,
) -> None:
    """Write coefficient times the gradients of the KL plus `free_bits_coefficient` times those under free bits.

    With m = (mu - mu_p) / sigma_p and r = logvar - logvar_p, that by mu is m / sigma_p, by logvar expm1(r) / 2; by mu_p
    the negative of the first, by logvar_p -(m^2 + expm1(r)) / 2.
    """
    raw_logvar = tensors.logvar
    assert raw_logvar is not None
    dtype = compute_dtype(tensors.mu, tensors.logvar, tensors.prior_mu, tensors.prior_logvar)
    mu, logvar, precision = _relative(tensors, options, dtype)
    expm1 = torch.expm1(logvar)
    if free_bits_coefficient is not None and options.element_free_bits is not None:
        elements = torch.sub(expm1, logvar).addcmul_(mu, mu).mul_(0.5)
        coefficient = coefficient + free_bits_coefficient * passes(elements, options.element_free_bits).to(dtype)
    slope = mu if precision is None else mu * precision
    if gradients.mu is not None:
        torch.mul(slope, coefficient, out=gradients.mu)
    if gradients.prior_mu is not None:
        torch.mul(slope, -coefficient, out=gradients.prior_mu)
    if gradients.logvar is not None:
        torch.mul(expm1, coefficient * 0.5, out=gradients.logvar)
        zero_outside(gradients.logvar, raw_logvar, options.logvar_clamp, dtype)
    if gradients.prior_logvar is not None:
        torch.mul(torch.addcmul(expm1, mu, mu), coefficient * -0.5, out=gradients.prior_logvar)
    for gradient in gradients[4:8]:
        if gradient is not None:
            _selected(gradient, tensors)


def _relative(tensors: ElboTensors, options: ElboOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """((mu - mu_p) / sigma_p, logvar - logvar_p, 1 / sigma_p): the posterior standardized by its prior."""
    assert tensors.mu is not None
    assert tensors.logvar is not None
    mu, logvar = tensors.mu.to(dtype), clamped(tensors.logvar.to(dtype), options.logvar_clamp)
    if tensors.prior_mu is None or tensors.prior_logvar is None:
        return mu, logvar, None
    prior_logvar = tensors.prior_logvar.to(dtype)
    precision = torch.exp(-0.5 * prior_logvar)
    return (mu - tensors.prior_mu.to(dtype)).mul_(precision), logvar - prior_logvar, precision


def passes(kl: Tensor, free_bits: FreeBitsOptions) -> Tensor:
    """1 where the KL is above its free bits, and so has a gradient; as torch.clamp's where both are equal."""
    return ~(kl <= free_bits.nats) if free_bits.mode == "dim_mask" else ~(kl < free_bits.nats)
