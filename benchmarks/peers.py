"""Providers of sampling and loss: fastvae and what people use today.

Each computes the same numbers (reconstruction: sum of squared errors, mean over the batch; KL: nats of each sample),
so a peer's own constants are left out: pythae's 1/2, the log-density's constants. The formulas of projects are written
here as their sources have them, so that nothing else need be installed.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastvae
from fastvae.cli.bench import textbook_recon, textbook_sample

Pair = tuple[Tensor, Tensor]
OURS, OURS_IN_PLACE = "fastvae", "fastvae in place"
COMPILED = "torch.compile"  # of EAGER


@dataclass(frozen=True)
class Provider:
    name: str
    sample: Callable[[Tensor, Tensor], Pair]  # mu, logvar -> z, kl [B]
    moments: Callable[[Tensor], Pair]  # mu and logvar, packed along dimension 1 -> z, kl [B]
    recon: Callable[[Tensor, Tensor], tuple[Tensor]]  # recon, target -> loss
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # recon, target, kl [B] -> loss
    whole: Callable[[Tensor, Tensor, Tensor, Tensor], Pair]  # recon, target, mu, logvar -> loss, z


def per_sample(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1)


def as_float(target: Tensor) -> Tensor:
    return target / 255 if target.dtype == torch.uint8 else target


def eager_recon(recon: Tensor, target: Tensor) -> tuple[Tensor]:
    return (textbook_recon(recon, as_float(target)),)


def distributions_sample(mu: Tensor, logvar: Tensor) -> Pair:
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return posterior.rsample(), per_sample(kl_divergence(posterior, prior))


def distributions_recon(recon: Tensor, target: Tensor) -> tuple[Tensor]:
    """A Gaussian decoder of variance 1/2, without its constant."""
    target = as_float(target).to(torch.promote_types(recon.dtype, torch.float32))
    nll = -Normal(recon, math.sqrt(0.5)).log_prob(target).sum()  # type: ignore[no-untyped-call]
    return ((nll - 0.5 * math.log(math.pi) * recon.numel()) / recon.shape[0],)


def pythae_sample(mu: Tensor, logvar: Tensor) -> Pair:
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=tuple(range(1, mu.ndim)))


def pythae_recon(recon: Tensor, target: Tensor) -> tuple[Tensor]:
    batch = recon.shape[0]
    target = as_float(target)
    return (F.mse_loss(recon.reshape(batch, -1), target.reshape(batch, -1), reduction="none").sum(dim=-1).mean(),)


def diffusers_sample(mu: Tensor, logvar: Tensor) -> Pair:
    """The posterior of its autoencoders, a DiagonalGaussianDistribution."""
    logvar = torch.clamp(logvar, -30.0, 20.0)
    std, var = torch.exp(0.5 * logvar), torch.exp(logvar)
    z = mu + std * torch.randn(mu.shape, dtype=mu.dtype, device=mu.device)
    return z, 0.5 * torch.sum(torch.pow(mu, 2) + var - 1.0 - logvar, dim=tuple(range(1, mu.ndim)))


def diffusers_recon(recon: Tensor, target: Tensor) -> tuple[Tensor]:
    """As its autoencoder trainer: both images to float32 first."""
    error = F.mse_loss(recon.float(), as_float(target).float(), reduction="none")
    return (torch.sum(error) / error.shape[0],)


def _whole(sample: Callable[..., Pair], loss: Callable[..., Tensor]) -> Callable[..., Pair]:
    def whole(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> Pair:
        z, kl = sample(mu, logvar)
        return loss(recon, target, kl), z

    return whole


def _peer(name: str, sample: Callable[..., Pair], recon: Callable[..., tuple[Tensor]]) -> Provider:
    def moments(packed: Tensor) -> Pair:
        return sample(*packed.chunk(2, dim=1))

    def loss(x: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return recon(x, target)[0] + kl.mean()

    return Provider(name, sample, moments, recon, loss, _whole(sample, loss))


def _fastvae(name: str, *, inplace: bool) -> Provider:
    def moments(packed: Tensor) -> Pair:
        return fastvae.DiagonalGaussian.from_moments(packed).rsample_kl()

    def loss(x: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return fastvae.vae_loss(x, target, kl=kl, inplace=inplace).loss

    def recon(x: Tensor, target: Tensor) -> tuple[Tensor]:
        if inplace:  # which only the loss as a whole offers
            return (loss(x, target, x.new_zeros(x.shape[0], dtype=torch.float32)),)
        return (fastvae.reconstruction_loss(x, target),)

    sample = fastvae.reparameterize_kl
    return Provider(name, sample, moments, recon, loss, _whole(sample, loss))


EAGER = _peer("eager", textbook_sample, eager_recon)
_PLAIN = {
    provider.name: provider
    for provider in (
        EAGER,
        _peer("torch.distributions", distributions_sample, distributions_recon),
        _peer("pythae", pythae_sample, pythae_recon),
        _peer("diffusers", diffusers_sample, diffusers_recon),
        _fastvae(OURS, inplace=False),
        _fastvae(OURS_IN_PLACE, inplace=True),
    )
}
NAMES = ("eager", COMPILED, "torch.distributions", "pythae", "diffusers", OURS, OURS_IN_PLACE)


def function_of(provider: str, op: str, backend: str = "inductor") -> Callable[..., Any]:
    """The provider's `sample`, `moments`, `recon`, `whole` or `loss`.

    Compiled at its first call where the provider compiles, by this backend of torch.compile.
    """
    if provider != COMPILED:
        function: Callable[..., Any] = getattr(_PLAIN[provider], op)
        return function
    torch.compiler.reset()  # a function compiled for too many shapes is not compiled any more
    return torch.compile(getattr(EAGER, op), dynamic=False, backend=backend)


def obstacle(provider: str, device: torch.device) -> str | None:
    """Why this provider cannot run here; None if it can."""
    if provider == COMPILED and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on CPUs; none of g++, clang++, c++ is on the PATH"
    return None
