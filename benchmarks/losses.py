"""Every likelihood and option of `fastvae.vae_loss`, and beside each the same loss as a training script writes it.

The textbook formulas are the baselines of the benchmarks and, in float64, the truth that all results are compared with.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.likelihoods import L1, L2, Gaussian, Huber, Scaled, SmoothL1
from fastvae.regularizers import Capacity, FreeBits

BITS, NATS = 0.5, 5.0  # free or of capacity: for each latent, for each sample
BOUNDS = (-1.0, 1.0)  # of logvar
LOGVAR = -1.0  # of the decoder
FIXED, OPTIMAL, NORMALIZED = Gaussian(LOGVAR), Gaussian("optimal"), L2(mask_normalize=True)


class Loss(NamedTuple):
    """One row of the table.

    textbook: (recon, target, mu, logvar, *tensors named in `needs`) -> loss.
    options: Keyword arguments of `fastvae.vae_loss`, or a function that makes them from those tensors in every call.
    needs: Names of further tensors, see `tensor`.
    jumps: The gradient jumps at a threshold, which arithmetic in 16 bits may place elsewhere.
    """

    textbook: Callable[..., Tensor]
    options: dict[str, Any] | Callable[..., dict[str, Any]]
    needs: tuple[str, ...] = ()
    jumps: bool = False

    def keywords(self, *tensors: Tensor) -> dict[str, Any]:
        return self.options if isinstance(self.options, dict) else self.options(*tensors)


def tensor(name: str, image: tuple[int, ...], latent: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """One of the tensors that a loss needs beside images and latents; `dtype` is that of the network's outputs."""
    if name in ("mask", "kl_mask"):
        return torch.rand(image if name == "mask" else latent, device=device) < 0.75
    if name in ("weight", "extra"):
        return torch.rand(image[:1], device=device)
    if name == "map":
        return torch.rand(image, dtype=dtype, device=device)
    if name == "log_scale":  # a parameter, which autocast leaves in float32
        return torch.full((), LOGVAR, device=device).requires_grad_()
    shape = {"prior": latent, "sample_log_scale": image[:1], "log_scale_map": image}[name]
    return torch.rand(shape, dtype=dtype, device=device).sub_(1).requires_grad_()


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Of each latent, as the VAE of pytorch/examples writes it."""
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def prior_kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> Tensor:
    r = logvar - prior_logvar
    return 0.5 * ((mu - prior_mu).pow(2) * torch.exp(-prior_logvar) + r.exp() - 1 - r).sum() / len(mu)


def by_sample(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1)


def rows(by_sample: Tensor, images: Tensor) -> Tensor:
    return by_sample.reshape(-1, *[1] * (images.ndim - 1))


def squared(recon: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(recon, target, reduction="none")


def log_cosh(recon: Tensor, target: Tensor) -> Tensor:
    distance = (recon - target).abs()
    return (distance + F.softplus(-2 * distance) - math.log(2)).sum()


def bernoulli_probs(recon: Tensor, target: Tensor) -> Tensor:
    """Which autocast refuses to compute in 16 bits."""
    with torch.autocast(recon.device.type, enabled=False):
        dtype = torch.promote_types(recon.dtype, torch.float32)
        return F.binary_cross_entropy(recon.to(dtype), target.to(dtype), reduction="sum")


def gaussian(recon: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    return (0.5 * ((recon - target).pow(2) * torch.exp(-logvar) + logvar)).sum()


def scaled_l1(recon: Tensor, target: Tensor, log_scale: Tensor) -> Tensor:
    """As the autoencoder loss of latent diffusion."""
    return ((target - recon).abs() / torch.exp(log_scale) + log_scale).sum()


def samples(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return by_sample(squared(recon, target)) + by_sample(kl(mu, logvar))


def errors(error: Callable[..., Tensor], likelihood: Any, *needs: str, jumps: bool = False, **fixed: Any) -> Loss:
    """A row whose textbook has this sum of errors, (recon, target, *needs, **fixed), and the plain KL.

    likelihood: Or, where there are `needs`, a function that makes `Loss.options` of them.
    """

    def textbook(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, *tensors: Tensor) -> Tensor:
        return (error(recon, target, *tensors, **fixed) + kl(mu, logvar).sum()) / len(recon)

    return Loss(textbook, likelihood if needs else {"likelihood": likelihood}, needs, jumps)


def regularized(term: Callable[..., Tensor], options: Any, *needs: str, jumps: bool = False) -> Loss:
    """A row whose textbook has the plain squared error and this term, (mu, logvar, *needs)."""

    def textbook(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, *tensors: Tensor) -> Tensor:
        return F.mse_loss(recon, target, reduction="sum") / len(recon) + term(mu, logvar, *tensors)

    return Loss(textbook, options, needs, jumps)


def of_kl(term: Callable[[Tensor], Tensor], *, jumps: bool = False, **options: Any) -> Loss:
    """The same for a term of the elements of the KL."""
    return regularized(lambda mu, logvar: term(kl(mu, logvar)), options, jumps=jumps)


def gaussian_of(logvar: Tensor) -> dict[str, Any]:
    return {"likelihood": Gaussian(logvar)}


@cache  # a scale that is learned outlives the step, and so does its likelihood
def learned(kind: Any, *arguments: Any) -> dict[str, Any]:
    return {"likelihood": kind(*arguments)}


LOSSES: dict[str, Loss] = {
    "l2": errors(F.mse_loss, "l2", reduction="sum"),
    "l1": errors(F.l1_loss, "l1", reduction="sum"),
    "huber": errors(F.huber_loss, Huber(delta=0.1), delta=0.1, reduction="sum"),
    "smooth_l1": errors(F.smooth_l1_loss, SmoothL1(beta=0.1), beta=0.1, reduction="sum"),
    "log_cosh": errors(log_cosh, "log_cosh"),
    "bernoulli": errors(F.binary_cross_entropy_with_logits, "bernoulli", reduction="sum"),
    "bernoulli_probs": errors(bernoulli_probs, "bernoulli_probs"),
    "l2_logits": errors(lambda x, t: F.mse_loss(x.sigmoid(), t, reduction="sum"), L2(from_logits=True)),
    "l1_logits": errors(lambda x, t: F.l1_loss(x.sigmoid(), t, reduction="sum"), L1(from_logits=True), jumps=True),
    "custom": errors(lambda x, t: squared(x, t).sum(), squared),
    "gaussian_fixed": errors(lambda x, t: (0.5 * (squared(x, t) * math.exp(-LOGVAR) + LOGVAR)).sum(), FIXED),
    "gaussian_learned": errors(gaussian, lambda s: learned(Gaussian, s), "log_scale"),
    "gaussian_by_sample": errors(lambda x, t, s: gaussian(x, t, rows(s, x)), gaussian_of, "sample_log_scale"),
    "gaussian_by_element": errors(gaussian, gaussian_of, "log_scale_map"),
    "gaussian_optimal": errors(lambda x, t: gaussian(x, t, F.mse_loss(x, t).log()), OPTIMAL),
    "scaled": errors(scaled_l1, lambda s: learned(Scaled, "l1", s), "log_scale"),
    "mask": errors(lambda x, t, m: (squared(x, t) * m).sum(), lambda m: {"mask": m}, "mask"),
    "mask_normalize": Loss(
        lambda x, t, mu, lv, m: (squared(x, t) * m).sum() / m.sum() + kl(mu, lv).sum() / len(mu),
        lambda m: {"mask": m, "likelihood": NORMALIZED},
        ("mask",),
    ),
    "weight": Loss(lambda x, t, mu, lv, w: (w * samples(x, t, mu, lv)).mean(), lambda w: {"weight": w}, ("weight",)),
    "extra": errors(lambda x, t, e: (squared(x, t) + rows(e, x)).sum(), lambda e: {"extra": e}, "extra"),
    "extra_map": errors(lambda x, t, e: (squared(x, t) + e).sum(), lambda e: {"extra": e}, "map"),
    "error_weight_by_sample": errors(
        lambda x, t, w: (rows(w, x) * squared(x, t)).sum(), lambda w: {"recon_weight": w}, "weight"
    ),
    "error_weight_by_element": errors(lambda x, t, w: (w * squared(x, t)).sum(), lambda w: {"recon_weight": w}, "map"),
    "beta_by_sample": regularized(
        lambda mu, lv, b: (b * by_sample(kl(mu, lv))).mean(), lambda b: {"beta": b}, "weight"
    ),
    "reduction_none": Loss(samples, {"reduction": "none"}),
    "reduction_mean": Loss(lambda x, t, mu, lv: F.mse_loss(x, t) + kl(mu, lv).mean(), {"reduction": "mean"}),
    "beta": of_kl(lambda k: 4 * k.sum() / len(k), beta=4.0),
    "prior": regularized(prior_kl, lambda *prior: {"prior": prior}, "prior", "prior"),
    "kl_mask": regularized(lambda mu, lv, m: (kl(mu, lv) * m).sum() / len(mu), lambda m: {"kl_mask": m}, "kl_mask"),
    "logvar_clamp": regularized(lambda mu, lv: kl(mu, lv.clamp(*BOUNDS)).sum() / len(mu), {"logvar_clamp": BOUNDS}),
    "free_bits_dim": of_kl(lambda k: k.clamp(min=BITS).sum() / len(k), free_bits=FreeBits(BITS, "dim"), jumps=True),
    "free_bits_dim_batch": of_kl(lambda k: k.mean(0).clamp(min=BITS).sum(), free_bits=FreeBits(BITS, "dim_batch")),
    "free_bits_dim_mask": of_kl(
        lambda k: F.threshold(k, BITS, 0.0).sum() / len(k), free_bits=FreeBits(BITS, "dim_mask"), jumps=True
    ),
    "free_bits_sample": of_kl(lambda k: by_sample(k).clamp(min=NATS).mean(), free_bits=FreeBits(NATS, "sample")),
    "capacity_sample": of_kl(lambda k: (by_sample(k) - NATS).abs().mean(), capacity=Capacity(NATS, "sample")),
    "capacity_batch": of_kl(lambda k: (k.sum() / len(k) - NATS).abs(), capacity=Capacity(NATS, "batch")),
}
