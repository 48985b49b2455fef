"""What a model is worth on images: its ELBO, what the latent space is used for, and a baseline without latents."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastvae
from fastvae.models import VAE

from .batches import all_batches
from .metrics import bits_per_dim

ACTIVE_VARIANCE = 0.01
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of images; per image, in nats, the Gaussian decoder's constant left out.

    `bits_per_dim` is `nats / (elements of an image * ln 2)`.
    """

    images: int
    nats: float
    """Negative ELBO: recon + kl."""
    recon: float
    kl: float
    bits_per_dim: float
    active_units: int
    """Latent dimensions j with Var(mu_j) > 0.01 over the images (Burda et al., arXiv:1509.00519, section 5.1)."""
    latent_dim: int


@dataclass(frozen=True)
class Latents:
    """Posteriors of a set of images."""

    mu: Tensor  # [images, latent_dim]
    kl_per_dim: Tensor  # [latent_dim], nats, mean over the images

    @property
    def active(self) -> Tensor:
        """Which dimensions carry information: Var(mu_j) > 0.01; [latent_dim] bool."""
        return self.mu.var(dim=0, correction=0) > ACTIVE_VARIANCE


@torch.no_grad()
def evaluate(
    model: VAE, dataset: Dataset[Any], *, batch_size: int = 512, workers: int = 0
) -> tuple[Evaluation, Latents]:
    """Negative ELBO of `model` on all images of `dataset`, one posterior sample each, and their posteriors.

    The noise is a function of the image's index, so the result does not depend on the batch size, and torch's default
    generator is not touched. The model is evaluated in eval mode and left in the mode that it came in.

    Args:
        model: The model, on the device to use.
        dataset: Images [channels, height, width], uint8 or float in [0, 1].
        batch_size: Images at once.
        workers: Processes that load images.
    """
    device = next(model.parameters()).device
    criterion = fastvae.VAELoss(reduction="sum", return_terms=True)
    latent_dim = model.config.latent_dim
    recon = kl = 0.0
    dimensions = 1
    n_images = 0
    means = []
    kl_per_dim = torch.zeros(latent_dim)
    was_training = model.training
    model.eval()
    for batch in all_batches(dataset, batch_size, workers=workers, device=device):
        images = batch.to(device, non_blocking=True)
        dimensions = images[0].numel()
        out = model(images, seed=EVALUATION_SEED, offset=n_images * latent_dim)
        terms = criterion(out.recon, images, kl=out.kl)
        recon += terms.recon.item()
        kl += terms.kl.item()
        means.append(out.mu.float().cpu())
        kl_per_dim += kl_elements(out.mu.float(), out.logvar.float()).sum(dim=0).cpu()
        n_images += len(images)
    model.train(was_training)
    latents = Latents(torch.cat(means), kl_per_dim / n_images)
    nats = (recon + kl) / n_images
    evaluation = Evaluation(
        images=n_images,
        nats=nats,
        recon=recon / n_images,
        kl=kl / n_images,
        bits_per_dim=bits_per_dim(nats, dimensions),
        active_units=int(latents.active.sum()),
        latent_dim=latent_dim,
    )
    return evaluation, latents


def kl_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL of each latent element from N(0, 1), in nats: (mu^2 + expm1(logvar) - logvar) / 2."""
    return 0.5 * (mu.square() + (torch.expm1(logvar) - logvar))


def baseline_nats(train: Dataset[Any], validation: Dataset[Any], *, batch_size: int = 512, workers: int = 0) -> float:
    """Nats per validation image of the best model without latents: the per-pixel mean of the training images.

        sum over elements of (mean - x)^2, mean over the validation images

    It is the reconstruction term of "l2" for a decoder that always says the mean, with a KL of zero.
    """
    total, n_train, error, n_validation = torch.zeros(()), 0, 0.0, 0
    for images in all_batches(train, batch_size, workers=workers):
        total = total + as_unit_interval(images).sum(dim=0)
        n_train += len(images)
    mean = total / n_train
    for images in all_batches(validation, batch_size, workers=workers):
        error += (as_unit_interval(images) - mean).square().sum().item()
        n_validation += len(images)
    return error / n_validation


def as_unit_interval(images: Tensor) -> Tensor:
    """Images as float64 in [0, 1]; uint8 are divided by 255."""
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()
