"""What other projects compute, written anew from their sources in plain PyTorch; float64 in, float64 out.

Where each stands is said in `fastvae.presets`. `recon` and `kl` are what the project reports or names so, in its own
units and sign; None where it has no such number. Perceptual terms `p_loss` are [B, 1, 1, 1], as LPIPS returns them.
"""

from typing import NamedTuple

import torch
import torch.distributions as dist
from torch import Tensor
from torch.nn import functional as F


class Terms(NamedTuple):
    loss: Tensor
    recon: Tensor | None
    kl: Tensor | None


def pytorch_examples(recon, target, mu, logvar):
    bce = F.binary_cross_entropy(recon, target, reduction="sum")
    kld = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    return Terms(bce + kld, bce, kld)


def _pythae(error_rows, mu, logvar):
    kl_rows = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=-1)
    return Terms((error_rows + kl_rows).mean(), error_rows.mean(), kl_rows.mean())


def pythae(recon, target, mu, logvar):
    return _pythae(0.5 * F.mse_loss(recon, target, reduction="none").flatten(1).sum(-1), mu, logvar)


def pythae_bce(recon, target, mu, logvar):
    return _pythae(F.binary_cross_entropy(recon, target, reduction="none").flatten(1).sum(-1), mu, logvar)


def pytorch_vae(recon, target, mu, logvar, kld_weight=0.00025):
    mse = F.mse_loss(recon, target)
    kl = (-0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(dim=1)).mean(dim=0)
    return Terms(mse + kld_weight * kl, mse, -kl)  # logged with its sign turned


def _autoencoder_kl(mu, logvar):
    """[B]: the posterior that latent diffusion and diffusers share, for images alone."""
    logvar = torch.clamp(logvar, -30.0, 20.0)
    return 0.5 * (mu.pow(2) + logvar.exp() - 1.0 - logvar).sum(dim=[1, 2, 3])


def ldm(recon, target, mu, logvar, log_scale, p_loss=0.0, perceptual_weight=1.0, kl_weight=1e-6):
    batch = target.shape[0]
    rec = (target - recon).abs() + perceptual_weight * p_loss
    nll = (rec / log_scale.exp() + log_scale).sum() / batch
    kl = _autoencoder_kl(mu, logvar).sum() / batch
    return Terms(nll + kl_weight * kl, nll, kl)


def diffusers(recon, target, mu, logvar, rec_loss="l2", p_loss=0.0, perceptual_scale=0.5, kl_scale=1e-6):
    error = {"l2": F.mse_loss, "l1": F.l1_loss}[rec_loss](recon, target, reduction="none")
    nll = (error + perceptual_scale * p_loss).sum() / target.shape[0]
    kl = _autoencoder_kl(mu, logvar).sum() / target.shape[0]
    return Terms(nll + kl_scale * kl, nll, kl)


def _disvae(total_error, target, mu, logvar, beta, capacity):
    recon = total_error / target.shape[0]
    kl = (0.5 * (-1 - logvar + mu.pow(2) + logvar.exp())).mean(dim=0).sum()
    return Terms(recon + beta * (kl if capacity is None else (kl - capacity).abs()), recon, kl)


def disvae_bernoulli(recon, target, mu, logvar, beta=1.0, capacity=None):
    return _disvae(F.binary_cross_entropy(recon, target, reduction="sum"), target, mu, logvar, beta, capacity)


def disvae_gaussian(recon, target, mu, logvar, beta=1.0, capacity=None):
    error = F.mse_loss(255 * recon, 255 * target, reduction="sum") / 255
    return _disvae(error, target, mu, logvar, beta, capacity)


def disvae_laplace(recon, target, mu, logvar, beta=1.0, capacity=None):
    error = 3 * F.l1_loss(recon, target, reduction="sum")
    return _disvae(error * (error != 0), target, mu, logvar, beta, capacity)


def sigma_vae(recon, target, mu, logvar, log_sigma=None):
    log_sigma = torch.zeros((), dtype=recon.dtype) if log_sigma is None else log_sigma
    log_sigma = -6 + F.softplus(log_sigma + 6)
    rec = -dist.Normal(recon, log_sigma.exp()).log_prob(target).sum()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    return Terms(rec + kl, rec, kl)


def sigma_vae_optimal(recon, target, mu, logvar):
    return sigma_vae(recon, target, mu, logvar, log_sigma=(target - recon).square().mean().sqrt().log())


def pyro(recon, target, mu, logvar):
    """Sites "latent" and "obs" in a plate over the batch; the encoder's scale is positive already."""
    posterior = dist.Independent(dist.Normal(mu, (0.5 * logvar).exp()), 1)
    prior = dist.Independent(dist.Normal(torch.zeros_like(mu), torch.ones_like(mu)), 1)
    observed = dist.Independent(dist.Bernoulli(recon.flatten(1), validate_args=False), 1)
    elbo = observed.log_prob(target.flatten(1)).sum() - dist.kl_divergence(posterior, prior).sum()
    return Terms(-elbo, None, None)


def lightning_bolts(recon, target, mu, logvar, kl_coeff=0.1):
    prior = dist.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    kl = kl_coeff * dist.kl_divergence(dist.Normal(mu, torch.exp(logvar / 2)), prior).mean()
    error = F.mse_loss(recon, target, reduction="mean")
    return Terms(kl + error, error, kl)  # kl logged with its coefficient


def monai(recon, target, mu, logvar, kl_weight=1e-6):
    sigma = torch.exp(torch.clamp(logvar, -30.0, 20.0) / 2)
    kl = 0.5 * torch.sum(mu.pow(2) + sigma.pow(2) - torch.log(sigma.pow(2)) - 1, dim=[1, 2, 3])
    kl = kl.sum() / kl.shape[0]
    error = F.l1_loss(recon, target)
    return Terms(error + kl_weight * kl, error, kl)


# not presets: one line of fastvae each, see test_presets.py


def beta_vae(recon, target, mu, logvar, gamma=1000.0, capacity=25.0):
    """1Konny/Beta-VAE 977a1ec, solver.py:27-49, 166-168: decoder_dist "gaussian", objective "B"."""
    error = F.mse_loss(torch.sigmoid(recon), target, reduction="sum") / target.shape[0]
    kl = (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).sum(1).mean(0)
    return Terms(error + gamma * (kl - capacity).abs(), error, kl)


def generative_models(recon, target, mu, logvar, log_scale, p_loss=0.0):
    """Stability-AI/generative-models 0ad7de9, sgm/modules/autoencoding/losses/discriminator_loss.py:230-235, 255-306;
    configs/example_training/autoencoder/kl-f4/imagenet-attnfree-logvar.yaml.
    """
    return ldm(recon, target, mu, logvar, log_scale, p_loss, perceptual_weight=0.25, kl_weight=1.0)


def world_models(recon, target, mu, logvar, kl_tolerance=0.5):
    """hardmaru/WorldModelsExperiments fd982b9, carracing/vae/vae.py:65-79."""
    error = (target - recon).square().sum(dim=[1, 2, 3]).mean()
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(dim=1)
    return Terms(error + torch.maximum(kl, torch.full_like(kl, kl_tolerance * mu.shape[1])).mean(), error, None)


def mosaic_diffusion(recon, target, mu, logvar, log_scale, kl_divergence_weight=1.0):
    """mosaicml/diffusion 49282fd, diffusion/models/autoencoder.py:539-584, without LPIPS."""
    nll = (F.l1_loss(recon, target, reduction="none") / log_scale.exp() + log_scale + 2).mean()
    kl = (-0.5 * (1 + logvar - mu.pow(2) - logvar.exp())).mean()
    return Terms(nll + kl_divergence_weight * (mu[0].numel() / target[0].numel()) * kl, nll, kl)
