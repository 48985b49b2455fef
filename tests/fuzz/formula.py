"""The loss of a VAE as a textbook writes it, with every option of `fastvae.vae_loss`.

    loss = recon_weight * recon + beta * regularised KL

The fuzz test takes it for the truth: evaluated in float64, differentiated by autograd, no code shared with fastvae.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Number = float | Tensor

# error of one element, from the reconstruction r, the target t, a parameter p and `Loss.rounded`
ERRORS = {
    "l2": lambda r, t, p, rounded: (r - t) ** 2,
    "l1": lambda r, t, p, rounded: (r - t).abs(),
    "huber": lambda r, t, p, rounded: huber(r - t, p),
    "smooth_l1": lambda r, t, p, rounded: huber(r - t, p) / p,
    "log_cosh": lambda r, t, p, rounded: log_cosh(r - t, p, rounded),
    "bernoulli": lambda r, t, p, rounded: F.binary_cross_entropy_with_logits(r, t, reduction="none"),
    "bernoulli_probs": lambda r, t, p, rounded: -t * r.log().clamp(min=-100) - (1 - t) * (1 - r).log().clamp(min=-100),
}


def huber(d: Tensor, delta: Number) -> Tensor:
    return torch.where(d.abs() <= delta, d**2 / 2, delta * (d.abs() - delta / 2))


def log_cosh(d: Tensor, alpha: Number, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """log(cosh(alpha d)) / alpha"""
    return rounded(d.abs()) + (rounded(torch.log1p(torch.exp(-2 * alpha * d.abs()))) - math.log(2)) / alpha


@dataclass
class Loss:
    """What a loss is computed from. A term whose tensors are None is 0."""

    # the reconstruction term
    recon: Tensor | None = None  # [B, ...]
    target: Tensor | None = None  # shape of recon; uint8 stands for value * target_scale + target_shift
    target_scale: Number = 1 / 255
    target_shift: Number = 0.0
    error: str = "l2"
    parameter: Number = 1.0
    from_logits: bool = False  # the reconstruction is sigmoid(recon)
    decoder: str | None = None  # "gaussian": (e exp(-s) + s [+ log 2 pi]) / 2; "scaled": e exp(-s) + s
    log_scale: Number | str = 0.0  # s: a number, [B], what broadcasts to recon, or "optimal": log of the mean error
    softclip: Number | None = None  # soft lower bound of s / 2
    full: bool = False  # with log 2 pi
    extra: Tensor | None = None  # [B] or broadcasts to recon, part of the error of each element
    mask: Tensor | None = None  # broadcasts to recon; elements that it leaves out do not exist
    mask_normalize: bool = False  # divide by the number of elements in the mask
    recon_reduction: str = "batchmean"
    recon_weight: Number = 1.0  # or [B], or what broadcasts to recon

    # the KL term
    mu: Tensor | None = None  # [B, ...]
    logvar: Tensor | None = None
    kl: Tensor | None = None  # [B], in place of mu and logvar
    prior_mu: Tensor | None = None  # broadcast to mu; N(0, 1) if None
    prior_logvar: Tensor | None = None
    clamp: tuple[Number, Number] | None = None  # of logvar
    free_bits: tuple[Number, str] | None = None  # (nats, mode)
    capacity: tuple[Number, str] | None = None  # (nats, mode)
    kl_reduction: str = "batchmean"
    beta: Number = 1.0  # or [B]

    weight: Tensor | None = None  # [B], of both terms

    rounded: Callable[[Tensor], Tensor] = lambda t: t  # applied to the parts of an element's error and KL


def terms(x: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, recon, kl)"""
    recon = weighed_recon = kl = regularised = torch.zeros((), dtype=torch.float64)
    if x.recon is not None:
        elements, mask, count = reconstruction_elements(x)
        recon = reduced(weighed(per_sample(elements), x.weight), x.recon_reduction, count)
        weights = number(x.recon_weight)
        if weights.ndim == 0:
            weighed_recon = weights * recon
        else:
            weights = torch.where(mask, aligned(weights, elements), 0.0)
            weighed_recon = reduced(weighed(per_sample(weights * elements), x.weight), x.recon_reduction, count)
    if x.mu is not None or x.kl is not None:
        k = kl_elements(x) if x.kl is None else x.kl
        batch, count = len(k), (k if x.mu is None else x.mu).numel()
        kl = reduced(weighed(per_sample(k), x.weight), x.kl_reduction, count)
        nats = regularised_nats(x, k)
        if nats.ndim == 0:  # of the whole batch: every sample has as much
            nats = nats.expand(batch)
        regularised = reduced(x.beta * nats, x.kl_reduction, count)
    return weighed_recon + regularised, recon, kl


def reduced(by_sample: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    """[B] -> the term. count: number of elements of all samples, or what replaces the divisor."""
    if reduction == "none":
        return by_sample
    if isinstance(count, Tensor):
        return by_sample.sum() / count
    return by_sample.sum() / {"sum": 1, "batchmean": len(by_sample), "mean": count or math.nan}[reduction]


def weighed(by_sample: Tensor, weight: Tensor | None) -> Tensor:
    return by_sample if weight is None else by_sample * weight


def per_sample(elements: Tensor) -> Tensor:
    return elements.sum(tuple(range(1, elements.ndim))) if elements.ndim > 1 else elements


def rows(by_sample: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...]"""
    return by_sample.reshape(-1, *[1] * (like.ndim - 1))


def aligned(t: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...]; what broadcasts as it is."""
    return rows(t, like) if t.shape == like.shape[:1] else t


def reconstruction_elements(x: Loss) -> tuple[Tensor, Tensor, int | Tensor]:
    """The term of each element, [B, ...], which are selected, and what "mean" divides by."""
    mask = torch.ones(x.recon.shape, dtype=torch.bool) if x.mask is None else x.mask.expand(x.recon.shape)

    def selected(t: Tensor, other: float = 0.0) -> Tensor:  # also if what is left out is NaN
        return torch.where(mask, t, other)

    target = x.target if x.target.is_floating_point() else x.target * x.target_scale + x.target_shift
    recon = selected(x.recon, 0.5)
    e = ERRORS[x.error](recon.sigmoid() if x.from_logits else recon, selected(target, 0.5), x.parameter, x.rounded)
    s = x.log_scale
    if isinstance(s, str):
        s = torch.log(selected(e).sum() / mask.sum())
    s = number(s)
    s = selected(aligned(s, e))
    if x.softclip is not None:
        s = 2 * (x.softclip + F.softplus(s / 2 - x.softclip))
    if x.extra is not None:
        e = e + selected(aligned(x.extra, e))
    if x.decoder is not None:
        e = x.rounded(e * torch.exp(-s)) + x.rounded(s) + (math.log(2 * math.pi) if x.full else 0.0)
    if x.decoder == "gaussian":
        e = e / 2
    return selected(e), mask, mask.sum() if x.mask_normalize else e.numel()


def number(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def clamped(x: Loss) -> Tensor:
    return x.logvar if x.clamp is None else x.logvar.clamp(*map(number, x.clamp))


def kl_elements(x: Loss) -> Tensor:
    """KL of each latent's posterior, N(mu, exp(logvar)), from its prior."""
    logvar = clamped(x)
    if x.prior_mu is None:
        return (x.mu**2 + x.rounded(torch.expm1(logvar)) - logvar) / 2
    r = x.rounded(logvar - x.prior_logvar)
    return ((x.mu - x.prior_mu) ** 2 / x.prior_logvar.exp() + x.rounded(torch.expm1(r)) - r) / 2


def regularised_nats(x: Loss, k: Tensor) -> Tensor:
    """The KL under free bits and capacity: of each sample, [B], or of the batch's mean, 0-d."""
    nats, mode = x.free_bits or (None, None)
    limit, limited = x.capacity or (None, None)
    if mode == "dim_batch":  # max(nats, mean over the batch) of each latent
        value = (k if x.weight is None else k * rows(x.weight, k)).mean(0).clamp(min=number(nats)).sum()
    else:
        if mode == "dim":
            k = k.clamp(min=number(nats))
        elif mode == "dim_mask":
            k = k * (k > nats)
        value = per_sample(k)
        if mode == "sample":
            value = value.clamp(min=number(nats))
        if limited == "sample":
            value = (value - limit).abs()
        value = weighed(value, x.weight)
    if limited == "batch":
        value = (value.mean() - limit).abs()
    return value


def sample(x: Loss, noise: Tensor) -> Tensor:
    """z, drawn from the posterior."""
    return x.mu + (clamped(x) / 2).exp() * noise
