"""The maths in its plainest differentiable form: for reading, compiled regions, second derivatives, tests, baselines.

Shares no code with the kernels or the fallback. Arithmetic is float32 (float64 where an input is), as theirs is.
"""

import torch
from torch import Tensor

from ._options import Clamp, ElboOptions

BYTE_SCALE = 1 / 255  # a uint8 target stands for the values 0, 1/255, ..., 1


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: the dtype of arithmetic, losses and KL."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def clamp(logvar: Tensor, bounds: Clamp | None) -> Tensor:
    return logvar if bounds is None else logvar.clamp(*bounds)


def gaussian_kl(mu: Tensor, logvar: Tensor, bounds: Clamp | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) element by element: (mu^2 + expm1(logvar) - logvar) / 2."""
    dtype = compute_dtype(mu, logvar)
    mu, logvar = mu.to(dtype), clamp(logvar.to(dtype), bounds)
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
    dtype = compute_dtype(mu, logvar)
    clamped = clamp(logvar.to(dtype), bounds)
    z = mu.to(dtype) + spread * torch.exp(0.5 * (clamped - clamped.detach()))
    return z.to(torch.promote_types(mu.dtype, logvar.dtype)), per_sample(gaussian_kl(mu, logvar, bounds))


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    """(recon - target)^2 element by element; a uint8 target is scaled to [0, 1]."""
    dtype = compute_dtype(recon, target)
    scale = BYTE_SCALE if target.dtype == torch.uint8 else 1.0
    return (recon.to(dtype) - target.to(dtype) * scale).square()


def elbo(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    options: ElboOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, recon term, KL term); a term without inputs is 0. The KL comes from `kl` if given, else from mu,
    logvar.
    """
    given = [t for t in (recon, target, mu, logvar, kl) if t is not None]
    recon_term = kl_term = torch.zeros((), dtype=compute_dtype(*given), device=given[0].device)
    if recon is not None and target is not None:
        error = per_sample(squared_error(recon, target))
        recon_term = options.recon_scale * (error if options.per_sample else error.sum())
    if kl is None and mu is not None and logvar is not None:
        kl = per_sample(gaussian_kl(mu, logvar, options.logvar_clamp))
    if kl is not None:
        kl = kl.to(compute_dtype(kl))
        kl_term = options.kl_scale * (kl if options.per_sample else kl.sum())
    return options.recon_weight * recon_term + options.beta * kl_term, recon_term, kl_term
