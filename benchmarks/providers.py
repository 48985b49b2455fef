"""What computes an op: fastvae, textbook PyTorch, torch.compile of it, and the packages that people use today.

Each returns the same numbers: a package's own constants are undone here, those of a log density and pythae's 1/2.
Ops and their arguments:

    sample    mu, logvar -> z, kl [B]
    moments   mu and logvar, packed along dimension 1 -> z, kl [B]
    recon     recon, target -> loss
    loss      recon, target, kl [B] -> loss
    whole     recon, target, mu, logvar -> loss, z
    loss NAME recon, target, mu, logvar, further tensors -> loss; NAME is one of `losses.LOSSES`
"""

import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastvae
from fastvae._backend import backend_of
from fastvae.cli.bench import textbook_recon, textbook_sample
from fastvae.cli.timing import Call

from .losses import LOSSES, Loss, by_sample

Function = Callable[..., tuple[Tensor, ...]]
Functions = dict[str, Function]
EAGER, COMPILED, DISTRIBUTIONS = "eager", "torch.compile", "torch.distributions"
PYTHAE, DIFFUSERS = "pythae", "diffusers"
KERNELS, FALLBACK, IN_PLACE = "fastvae kernels", "fastvae fallback", "fastvae in place"
BACKENDS = {KERNELS: "triton", FALLBACK: "torch", IN_PLACE: "auto"}
OURS = tuple(BACKENDS)
LOSS = "loss "


def providers_of(op: str, latent_ndim: int, *, backward: bool) -> tuple[str, ...]:
    """pythae's latents are vectors, diffusers' are images; without a gradient there is nothing to write in place."""
    if op.startswith(LOSS):
        return (EAGER, COMPILED, KERNELS, FALLBACK)
    in_place = (IN_PLACE,) if backward and op == "whole" else ()
    package = {("whole", 2): (PYTHAE,), ("moments", 4): (DIFFUSERS,)}.get((op, latent_ndim), ())
    return (EAGER, COMPILED, DISTRIBUTIONS, *package, KERNELS, FALLBACK, *in_place)


def function_of(provider: str, op: str, compiler: str = "inductor") -> Function:
    """The provider's function for an op; torch.compile traces it, for this backend, at its first call."""
    if provider == COMPILED:
        torch.compiler.reset()  # a function compiled for too many shapes is not compiled any more
        return torch.compile(function_of(EAGER, op), dynamic=False, backend=compiler)
    if op.startswith(LOSS):
        loss = LOSSES[op.removeprefix(LOSS)]
        return (lambda *inputs: (loss.textbook(*inputs),)) if provider == EAGER else _loss(loss)
    return _FUNCTIONS[provider]()[op]


def skip_reason(provider: str, device: torch.device) -> str | None:
    """Why this provider cannot run here; None if it can."""
    if provider == COMPILED and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on CPUs; none of g++, clang++, c++ is on the PATH"
    if provider in (PYTHAE, DIFFUSERS) and find_spec(provider) is None:
        return f"{provider} is not installed"
    if provider == KERNELS:
        try:
            with fastvae.use_backend("triton"):
                backend_of(torch.empty(0, device=device))
        except RuntimeError as error:
            return str(error)
    return None


def on_backend(call: Call, provider: str) -> Call:
    """The call on the provider's backend; as it is where tensors get that backend anyway."""
    backend, usual = BACKENDS.get(provider, "auto"), "triton" if torch.cuda.is_available() else "torch"
    return call if backend in ("auto", usual) else fastvae.use_backend(backend)(call)


def as_float(target: Tensor) -> Tensor:
    return target / 255 if target.dtype == torch.uint8 else target


def _loss(loss: Loss) -> Function:
    def fused(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, *needs: Tensor) -> tuple[Tensor]:
        return (fastvae.vae_loss(recon, target, mu, logvar, **loss.keywords(*needs)).loss,)

    return fused


def _functions(sample: Function, loss: Function, **others: Function) -> Functions:
    """All ops of a provider, from how it samples and how it adds error and KL up."""

    def whole(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        z, kl = sample(mu, logvar)
        return loss(recon, target, kl)[0], z

    others.setdefault("moments", lambda packed: sample(*packed.chunk(2, dim=1)))
    return {"sample": sample, "loss": loss, "whole": whole, **others}


def _plain(sample: Function, error: Callable[[Tensor, Tensor], Tensor]) -> Functions:
    """A provider whose error is a function of its own."""
    return _functions(
        sample,
        loss=lambda recon, target, kl: (error(recon, as_float(target)) + kl.mean(),),
        recon=lambda recon, target: (error(recon, as_float(target)),),
    )


def _distributions() -> Functions:
    def sample(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        posterior = Normal(mu, torch.exp(0.5 * logvar))
        prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
        return posterior.rsample(), by_sample(kl_divergence(posterior, prior))

    def error(recon: Tensor, target: Tensor) -> Tensor:
        """A Gaussian decoder of variance 1/2, without its constant."""
        nll = -Normal(recon, math.sqrt(0.5)).log_prob(target.to(torch.promote_types(recon.dtype, torch.float32))).sum()
        return (nll - 0.5 * math.log(math.pi) * recon.numel()) / recon.shape[0]

    return _plain(sample, error)


def _pythae() -> Functions:
    from pythae.models import VAE

    model: Any = SimpleNamespace(model_config=SimpleNamespace(reconstruction_loss="mse"))

    def whole(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = VAE._sample_gauss(model, mu, torch.exp(0.5 * logvar))
        _, half_error, kl = VAE.loss_function(model, recon, as_float(target), mu, logvar, z)
        return 2 * half_error + kl, z

    return {"whole": whole}


def _diffusers() -> Functions:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def moments(packed: Tensor) -> tuple[Tensor, Tensor]:
        posterior = DiagonalGaussianDistribution(packed)
        return posterior.sample(), posterior.kl()

    return {"moments": moments}


def _fastvae(*, inplace: bool = False) -> Functions:
    def loss(recon: Tensor, target: Tensor, kl: Tensor) -> tuple[Tensor]:
        return (fastvae.vae_loss(recon, target, kl=kl, inplace=inplace).loss,)

    def recon(x: Tensor, target: Tensor) -> tuple[Tensor]:
        return (fastvae.reconstruction_loss(x, target),)

    def moments(packed: Tensor) -> tuple[Tensor, ...]:
        return fastvae.DiagonalGaussian.from_moments(packed).rsample_kl()

    return _functions(fastvae.reparameterize_kl, loss, recon=recon, moments=moments)


_FUNCTIONS: dict[str, Callable[[], Functions]] = {  # made when asked for: packages are imported there
    EAGER: lambda: _plain(textbook_sample, textbook_recon),
    DISTRIBUTIONS: _distributions,
    PYTHAE: _pythae,
    DIFFUSERS: _diffusers,
    KERNELS: _fastvae,
    FALLBACK: _fastvae,
    IN_PLACE: lambda: _fastvae(inplace=True),
}
