"""The whole loss surface in float64, element by element as documented; shares no code with fastvae."""

import math

import torch
import torch.nn.functional as F

from tests.helpers import oracle

ERRORS = {
    "l2": lambda r, t, p: (r - t) ** 2,
    "l1": lambda r, t, p: (r - t).abs(),
    "huber": lambda r, t, p: F.huber_loss(r, t, reduction="none", delta=p),
    "smooth_l1": lambda r, t, p: F.smooth_l1_loss(r, t, reduction="none", beta=p),
    "log_cosh": lambda r, t, p: torch.log(torch.cosh(p * (r - t))) / p,
    "bernoulli": lambda r, t, p: F.binary_cross_entropy_with_logits(r, t, reduction="none"),
    "bernoulli_probs": lambda r, t, p: F.binary_cross_entropy(r, t, reduction="none"),
    "l2_of_logits": lambda r, t, p: (r.sigmoid() - t) ** 2,
    "l1_of_logits": lambda r, t, p: (r.sigmoid() - t).abs(),
    "given": lambda r, t, p: r - t,  # the function of the cases
}


def vae_loss(
    recon,
    target,
    mu=None,
    logvar=None,
    *,
    kl=None,
    error="l2",
    parameter=1.0,
    target_scale=1 / 255,
    target_shift=0.0,
    log_scale=None,  # e becomes share (e exp(-log_scale) + log_scale) + constant
    share=1.0,
    constant=0.0,
    softclip=None,
    beta=1.0,
    recon_weight=1.0,
    reduction="batchmean",
    logvar_clamp=None,
    free_bits=None,  # (nats, mode)
    capacity=None,  # (nats, mode)
    prior=None,
    weight=None,
    mask=None,
    mask_normalize=False,
    extra=None,
):
    """(loss, recon, kl)"""
    batch, n_pixels = recon.shape[0], recon[:1].numel()
    n_latents = mu[:1].numel() if mu is not None else None
    weight = torch.ones(batch, dtype=torch.float64) if weight is None else weight
    mask = torch.ones(recon.shape, dtype=torch.bool) if mask is None else mask.expand(recon.shape)
    if not target.is_floating_point():
        target = target.double() * target_scale + target_shift
    recon, target = recon.masked_fill(~mask, 0.5), target.masked_fill(~mask, 0.5)

    e = ERRORS[error](recon, target, parameter)
    if extra is not None:
        e = e + (_rows(extra, recon) if extra.shape == (batch,) else extra)
    if log_scale is not None:
        s = log_scale
        if isinstance(s, str):
            s = (e * mask).sum().div(mask.sum()).log()
        s = torch.as_tensor(s, dtype=torch.float64)
        if softclip is not None:
            s = 2 * (softclip + F.softplus(s / 2 - softclip))
        s = _rows(s, recon) if s.shape == (batch,) else s
        e = share * (e * torch.exp(-s) + s) + constant
    e = e.masked_fill(~mask, 0.0)
    by_sample = oracle.per_sample(e) * weight
    map_of_weights = torch.as_tensor(recon_weight, dtype=torch.float64)
    map_of_weights = _rows(map_of_weights, recon) if map_of_weights.shape == (batch,) else map_of_weights
    weighed_by_sample = oracle.per_sample(map_of_weights * e) * weight
    divisors = {"sum": 1, "none": 1, "batchmean": batch, "mean": batch * n_pixels}
    divisor = mask.sum() if mask_normalize else divisors[reduction]
    recon_term, weighed_term = (
        term / divisor if reduction == "none" else term.sum() / divisor for term in (by_sample, weighed_by_sample)
    )

    k = kl_elements(mu, logvar, prior, logvar_clamp) if kl is None else kl
    raw = (k if kl is not None else oracle.per_sample(k)) * weight
    divisors |= {"mean": batch * (n_latents or 1)}
    kl_term = raw if reduction == "none" else raw.sum() / divisors[reduction]
    nats = beta * regularised_nats(k, weight, free_bits, capacity)  # a sample, [B], or of the batch, 0-d
    regularised = nats if reduction == "none" else nats.mean() * batch / divisors[reduction]
    return weighed_term + regularised, recon_term, kl_term


def regularised_nats(k, weight, free_bits, capacity):
    nats, mode = free_bits or (None, None)
    by_sample = k if k.ndim == 1 else oracle.per_sample(k)
    if mode == "dim_batch":
        value = (k * _rows(weight, k)).mean(0).clamp(min=nats).sum()
    elif mode == "dim":
        value = oracle.per_sample(k.clamp(min=nats))
    elif mode == "dim_mask":
        value = oracle.per_sample(k * (k > nats))
    elif mode == "sample":
        value = by_sample.clamp(min=nats)
    else:
        value = by_sample
    limit, of = capacity or (None, None)
    if of == "sample":
        value = (value - limit).abs()
    if mode != "dim_batch":
        value = value * weight
    return (value.mean() - limit).abs() if of == "batch" else value


def kl_elements(mu, logvar, prior, bounds):
    logvar = oracle.clamp(logvar, bounds)
    mu_p, logvar_p = prior or (torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    return 0.5 * (((mu - mu_p) ** 2 + logvar.exp()) / logvar_p.exp() - 1 - (logvar - logvar_p))


def _rows(x, like):
    return x.reshape(-1, *[1] * (like.ndim - 1))


LOG_2PI = math.log(2 * math.pi)
