"""What a run minimises: a model and its loss as one module, so that both are trained, averaged and saved alike."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

import fastvae
from fastvae import schedules
from fastvae.likelihoods import L1, L2, Bernoulli, BernoulliProbs, Gaussian, Likelihood, Scaled, resolve
from fastvae.models import VAE
from fastvae.models.vae import VAEOutput
from fastvae.regularizers import FreeBits


class Objective(nn.Module):
    """A model and the loss that it is trained with.

    Args:
        model: The model; it decodes to logits if the likelihood wants logits or probabilities.
        criterion: The loss, which returns terms, as nats per image (of the likelihood); the negative ELBO with "l2" if
            None.
        logvar_clamp: Bounds of the posterior's log variance.
        beta_unit: What a beta of 1 is in the loss; not 1 where the loss is a sum over the batch or a mean of elements.
        perceptual: [B] distances of reconstructions from images, added to the error of each element while training.
    """

    def __init__(
        self,
        model: VAE,
        criterion: fastvae.VAELoss | None = None,
        *,
        logvar_clamp: tuple[float, float] | None = None,
        beta_unit: float = 1.0,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion if criterion is not None else fastvae.VAELoss(return_terms=True)
        self.logvar_clamp = logvar_clamp
        self.beta_unit = beta_unit
        self.perceptual = perceptual
        self._schedules = [module for module in self.criterion.modules() if isinstance(module, schedules.Schedule)]

    @property
    def likelihood(self) -> Likelihood:
        return resolve(self.criterion.likelihood)

    def fix_scale(self, log_scale: float) -> None:
        """Put a number in the place of the likelihood's optimal scale."""
        likelihood = self.likelihood
        assert isinstance(likelihood, Gaussian | Scaled)
        likelihood.log_scale = log_scale

    @property
    def decodes_logits(self) -> bool:
        return wants_logits(self.likelihood)

    def forward(
        self, images: Tensor, *, seed: int | None = None, offset: int = 0
    ) -> tuple[VAEOutput, fastvae.VAELossTerms]:
        """Run the model on images, with the noise of torch's default generator or of `seed`, and take the loss."""
        out = self.run_model(images, seed, offset)
        out = out._replace(recon=self._as_likelihood_wants(out.recon))
        extra = self._perceptual_error(out.recon, images) if self.training else None
        if by_dimension(self.criterion.free_bits):  # which the KL of a whole image does not tell
            return out, self.criterion(out.recon, images, out.mu, out.logvar, extra=extra)
        return out, self.criterion(out.recon, images, kl=out.kl, extra=extra)

    def run_model(self, images: Tensor, seed: int | None, offset: int) -> VAEOutput:
        if self.logvar_clamp is None:
            out: VAEOutput = self.model(images, seed=seed, offset=offset)
            return out
        mu, logvar = self.model.encode(images)
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=seed, offset=offset, logvar_clamp=self.logvar_clamp)
        return VAEOutput(self.model.decode(z), z, mu, logvar, kl)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, within the clamp; each [B, *latent_shape]."""
        posterior = self.model.posterior(images)
        mu, logvar = posterior.mean, posterior.logvar
        return mu, logvar if self.logvar_clamp is None else logvar.clamp(*self.logvar_clamp)

    def reconstruction_nats(self, z: Tensor, images: Tensor) -> Tensor:
        """[B]: nats of each image, given its latent; without what the likelihood leaves out."""
        recon = self._as_likelihood_wants(self.model.decode(z))
        return fastvae.reconstruction_loss(recon, images, likelihood=self.likelihood, reduction="none")

    def _as_likelihood_wants(self, recon: Tensor) -> Tensor:
        # 16 bits have no probability between 0.998 and 1
        return recon.float().sigmoid() if isinstance(self.likelihood, BernoulliProbs) else recon

    def _perceptual_error(self, recon: Tensor, images: Tensor) -> Tensor | None:
        if self.perceptual is None:
            return None
        is_logits = self.decodes_logits and not isinstance(self.likelihood, BernoulliProbs)
        return self.perceptual(recon.sigmoid() if is_logits else recon, images)

    def step(self) -> None:
        """Bring the schedules to the next optimizer step, on the device."""
        for schedule in self._schedules:
            schedule.step()

    def beta_at(self, step: int) -> float:
        """Beta after so many steps, computed on the host."""
        beta = self.criterion.beta
        return (beta.value_at(step) if isinstance(beta, schedules.Schedule) else float(beta)) / self.beta_unit

    def scales(self) -> dict[str, nn.Parameter]:
        """The learned scales of the likelihood (log variance of a Gaussian), by name; empty if there is none."""
        return dict(self.criterion.named_parameters())

    def weighted_nats(self, recon: float, kl: float) -> float:
        """The loss without its regularisers, with beta at the end of its schedule: comparable over a whole run."""
        beta = self.criterion.beta
        end = beta.end if isinstance(beta, schedules.Schedule) else float(beta)
        return float(self.criterion.recon_weight) * recon + end * kl


def decode_to_images(objective: Objective) -> AbstractContextManager[Any]:
    """Let the objective's model decode to probabilities where it decodes to logits: for good, or in a `with` block."""
    if not objective.decodes_logits:
        return nullcontext()
    return objective.model.decoder.register_forward_hook(lambda module, inputs, logits: logits.sigmoid())


def wants_logits(likelihood: Likelihood) -> bool:
    """Whether a decoder for this likelihood has no bounds of its own, but a sigmoid after it."""
    base = likelihood.base if isinstance(likelihood, Gaussian | Scaled) else likelihood
    return isinstance(base, Bernoulli | BernoulliProbs) or (isinstance(base, L1 | L2) and base.from_logits)


def by_dimension(free_bits: FreeBits | None) -> bool:
    return free_bits is not None and free_bits.mode != "sample"
