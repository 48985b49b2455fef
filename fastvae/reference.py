"""The maths in its plainest differentiable form: for reading, compiled regions, second derivatives, tests, baselines.

Shares no code with the kernels or the fallback. Arithmetic is float32 (float64 where an input is), as theirs is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dtypes import compute_dtype as compute_dtype
from ._options import Clamp, ElboOptions, ElboTensors, ErrorOptions, FloorOptions

BYTE_SCALE = 1 / 255  # a uint8 target stands for the values 0, 1/255, ..., 1


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


def reparameterize_kl(mu: Tensor, logvar: Tensor, noise: Tensor, bounds: Clamp | None = None) -> tuple[Tensor, Tensor]:
    """z = mu + exp(logvar / 2) * noise, and the KL of each sample."""
    dtype = compute_dtype(mu, logvar)
    sigma = torch.exp(0.5 * clamp(logvar.to(dtype), bounds))
    z = mu.to(dtype) + sigma * noise.to(dtype)
    return z.to(torch.promote_types(mu.dtype, logvar.dtype)), per_sample(gaussian_kl(mu, logvar, bounds))


def resample_kl(mu: Tensor, logvar: Tensor, spread: Tensor, bounds: Clamp | None = None) -> tuple[Tensor, Tensor]:
    """`reparameterize_kl` around a sample already drawn, given `spread` = sigma * noise there, differentiable again
    and again.

    The factor exp((logvar - its value) / 2) is 1 and has sigma's derivatives relative to sigma, without dividing by a
    sigma that may have vanished.
    """
    dtype, stored = compute_dtype(mu, logvar), torch.promote_types(mu.dtype, logvar.dtype)
    # converted once for both results, so that a 16-bit gradient is rounded once
    mu, logvar = mu.to(dtype), clamp(logvar.to(dtype), bounds)
    z = mu + spread * torch.exp(0.5 * (logvar - logvar.detach()))
    return z.to(stored), per_sample(gaussian_kl(mu, logvar))


def error(recon: Tensor, target: Tensor, options: ErrorOptions) -> Tensor:
    """The error of each element; a uint8 target is scaled and shifted first."""
    dtype = compute_dtype(recon, target)
    recon, parameter = recon.to(dtype), options.parameter
    if target.dtype == torch.uint8:
        target = target.to(dtype) * options.target_scale + options.target_shift
    target = target.to(dtype)
    name = options.name.removesuffix("_of_logits")
    if name != options.name:
        recon = torch.sigmoid(recon)
    match name:
        case "l2":
            return (recon - target).square()
        case "l1":
            return (recon - target).abs()
        case "huber":
            return F.huber_loss(recon, target, reduction="none", delta=parameter)
        case "log_cosh":
            distance = parameter * (recon - target).abs()
            return distance + torch.log1p(torch.exp(-2 * distance)) - math.log(2)
        case "bernoulli":
            return F.binary_cross_entropy_with_logits(recon, target, reduction="none")
        case "bernoulli_probs":
            return F.binary_cross_entropy(recon, target, reduction="none")
    raise AssertionError(options.name)


def raised(kl: Tensor, floor: FloorOptions) -> Tensor:
    """The KL of each element under free bits."""
    if floor.mode == "dim":
        return kl.clamp(min=floor.nats)
    return torch.where(kl <= floor.nats, torch.zeros_like(kl), kl)


def elbo(inputs: ElboTensors, options: ElboOptions) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, recon term, KL term, KL term under the floor if there is one); a term without inputs is 0."""
    recon, target, log_scale, mu, logvar, prior_mu, prior_logvar, kl, mask = inputs
    given = [t for t in inputs[:-1] if t is not None]
    dtype = compute_dtype(*given)
    recon_term = kl_term = torch.zeros((), dtype=dtype, device=given[0].device)
    regularised = None

    def total(elements: Tensor) -> Tensor:
        return per_sample(elements) if options.per_sample else elements.sum()

    if recon is not None and target is not None:
        if mask is not None:  # what is outside may be NaN, whose gradient would be too
            recon, target = (torch.where(mask, t, torch.zeros_like(t)) for t in (recon, target))
            log_scale = None if log_scale is None else torch.where(mask, log_scale, torch.zeros_like(log_scale))
        elements = error(recon, target, options.error)
        if log_scale is not None:
            log_scale = log_scale.to(elements.dtype)
            elements = elements * torch.exp(-log_scale) + log_scale
        if mask is not None:
            elements = torch.where(mask, elements, torch.zeros_like(elements))
        recon_term = options.recon_scale * total(elements) + options.recon_constant
    if kl is not None:
        kl_term = options.kl_scale * (kl.to(dtype) if options.per_sample else kl.to(dtype).sum())
    elif mu is not None and logvar is not None:
        elements = gaussian_kl(mu, logvar, options.logvar_clamp, prior_mu, prior_logvar)
        kl_term = options.kl_scale * total(elements)
        if options.floor is not None:
            regularised = options.kl_scale * total(raised(elements, options.floor))
    recon_term, kl_term = recon_term.to(dtype), kl_term.to(dtype)
    weighed = kl_term if regularised is None else regularised.to(dtype)
    return options.recon_weight * recon_term + options.beta * weighed, recon_term, kl_term, regularised
