"""pythae's losses, computed by fastvae."""

from typing import Any

from torch import Tensor

from .. import _checks, functional, likelihoods
from ..functional import VAELossTerms
from ..regularizers import Capacity
from ._patch import Patch, Replacement, imported

Model = Any  # one of pythae's models, which are not imported here


def patch_pythae() -> Patch:
    """Let fastvae compute the losses of pythae's `VAE`, `BetaVAE` and `DisentangledBetaVAE`.

        recon = ½ sum of (x' - x)^2 ("mse"), or binary cross-entropy of the probabilities x' ("bce")
        loss = mean over the batch of recon + beta * KL, or of recon + beta * |KL - C|

    `loss_function` of each class is replaced, and with it that of subclasses without their own; numbers and gradients
    stay what they were. What it brings: one pass over the images, without a [B, D] tensor of errors; float32 arithmetic
    on 16-bit tensors, and a KL that does not cancel near N(0, I); "bce" under autocast on a GPU, where torch's raises.
    The latent is sampled as before: `_sample_gauss` has to return its noise, too.

    Models whose terms are not sums over elements (beta-TC-VAE, FactorVAE, IWAE, ...) stay as they are.

    Returns:
        Patch: `undo()`, or the end of its `with` block, puts pythae's functions back.

    Raises:
        ImportError: pythae is not installed.
        RuntimeError: it is patched already.

    Source: pythae.models of pythae 0.1.2; DisentangledBetaVAE: Burgess et al., arXiv:1804.03599.
    """
    models = imported("pythae.models")
    losses = {models.VAE: _vae, models.BetaVAE: _beta_vae, models.DisentangledBetaVAE: _disentangled_beta_vae}
    return Patch("patch_pythae", [Replacement(model, "loss_function", loss) for model, loss in losses.items()])


LIKELIHOODS: dict[str, likelihoods.Likelihood] = {
    # a byte is a number from 0 to 255 to pythae's mse, not a fraction
    "mse": likelihoods.Gaussian(logvar=0.0, target_scale=1.0),
    "bce": likelihoods.BernoulliProbs(),
}


def _vae(self: Model, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> VAELossTerms:
    return _loss(self, recon_x, x, mu, log_var)


def _beta_vae(self: Model, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> VAELossTerms:
    return _loss(self, recon_x, x, mu, log_var, beta=self.beta)


def _disentangled_beta_vae(
    self: Model, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
) -> VAELossTerms:
    reached = min(epoch / (self.warmup_epoch + 1), 1)
    return _loss(self, recon_x, x, mu, log_var, beta=self.beta, capacity=Capacity(self.C * reached, "sample"))


def _loss(model: Model, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, **regularizers: Any) -> VAELossTerms:
    name = model.model_config.reconstruction_loss
    _checks.choice("reconstruction_loss", name, LIKELIHOODS)
    return functional.vae_loss(recon_x.reshape(x.shape), x, mu, log_var, likelihood=LIKELIHOODS[name], **regularizers)
