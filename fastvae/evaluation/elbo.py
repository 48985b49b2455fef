"""What a model is worth on images: its ELBO, what the latent space is used for, and a baseline without latents."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

import fastvae
from fastvae.likelihoods import L2, Gaussian, Likelihood, Scaled
from fastvae.models import VAE
from fastvae.statistics import ACTIVE_VARIANCE

from .._distributed import ALONE, World
from ..data.batches import all_batches
from .density import Density, of_means
from .objective import Objective

EVALUATION_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of images; per image, in nats of the likelihood that it was trained with.

    The nats leave out the constant of the likelihood ("l2": of a Gaussian of variance 1/2). `bits_per_dim` counts it,
    and the 256 levels of 8-bit images, see `fastvae.training.bits_per_dim`.
    """

    images: int
    nats: float
    """Negative ELBO: recon + kl."""
    recon: float
    kl: float
    bits_per_dim: float
    active_units: int
    """Latent dimensions whose mean has a variance of at least 0.01 over the images, as in `fastvae.latent_stats`."""
    latent_dim: int


@dataclass(frozen=True)
class Latents:
    """Posteriors of a set of images, as mean and log variance; each [images, latent_dim]."""

    mu: Tensor
    logvar: Tensor

    @cached_property
    def stats(self) -> fastvae.LatentStats:
        """KL and variance of each dimension over the images."""
        return fastvae.latent_stats(self.mu, self.logvar)

    @property
    def kl_per_dim(self) -> Tensor:
        """[latent_dim], nats, mean over the images."""
        return self.stats.kl

    @property
    def active(self) -> Tensor:
        """Which dimensions `fastvae.latent_stats` counts as active; [latent_dim] bool."""
        return self.stats.variance >= ACTIVE_VARIANCE


class Scores(NamedTuple):
    """What `evaluate` gives."""

    evaluation: Evaluation
    latents: Latents
    loss: float  # what training minimises, with its weights and regularisers; mean over the batches
    log_scale: float | None  # the optimal one of all images, where the likelihood has such a scale


@torch.no_grad()
def evaluate(
    model: VAE | Objective,
    dataset: Dataset[Any],
    *,
    batch_size: int = 512,
    workers: int = 0,
    world: World = ALONE,
) -> Scores:
    """Negative ELBO of `model` on all images of `dataset`, one posterior sample each, and their posteriors.

    The noise is a function of the image's index, so the result does not depend on the batch size (its `loss` does where
    the loss does), and torch's default generator is not touched. The optimal variance of "gaussian_optimal" is that of
    all images. The model is evaluated in eval mode and left in the mode that it came in.

    Args:
        model: The model, on the device to use; a bare one with "l2".
        dataset: Images [channels, height, width], uint8 or float in [0, 1].
        batch_size: Images at once.
        workers: Processes that load images.
        world: Processes that share the images; all get the result.
    """
    objective = model if isinstance(model, Objective) else Objective(model)
    device = next(objective.parameters()).device
    likelihood = objective.likelihood
    loss = recon = kl = error = 0.0
    dimensions, latent_dim = (
        math.prod(objective.model.config.image_shape),
        math.prod(objective.model.config.latent_shape),
    )
    own = world.shard_range(len(dataset))  # type: ignore[arg-type]
    place = own.start
    posteriors = [torch.empty(0, 2, latent_dim)]
    with evaluation_mode(objective):
        for batch in all_batches(Subset(dataset, own), batch_size, workers=workers, device=device):
            images = batch.to(device, non_blocking=True)
            out, terms = objective(images, seed=EVALUATION_SEED, offset=place * latent_dim)
            loss += terms.loss.item() * len(images)
            recon += terms.recon.item() * len(images)
            kl += terms.kl.item() * len(images)
            if has_optimal_scale(likelihood):
                error += error_sum(likelihood.base, out.recon, images)
            posteriors.append(torch.stack([out.mu, out.logvar], dim=1).float().flatten(2).cpu())
            place += len(images)
    sums = torch.tensor([loss, recon, kl, error, place - own.start], dtype=torch.float64)
    loss, recon, kl, error, n_images = world.sum(sums).tolist()
    n_images = int(n_images)
    log_scale = None
    if has_optimal_scale(likelihood):
        log_scale = best_log_scale(error, n_images * dimensions)
        recon = nats_at_scale(likelihood, log_scale, error, n_images * dimensions)
    latents = Latents(*world.all_gather(torch.cat(posteriors)).unbind(1))
    nats = recon / n_images + kl / n_images
    evaluation = Evaluation(
        images=n_images,
        nats=nats,
        recon=recon / n_images,
        kl=kl / n_images,
        bits_per_dim=Density.of(likelihood).bits_per_dim(nats, dimensions),
        active_units=int(latents.stats.active),
        latent_dim=latent_dim,
    )
    return Scores(evaluation, latents, loss / n_images, log_scale)


@contextmanager
def evaluation_mode(objective: Objective) -> Iterator[None]:
    """Eval mode inside the block; afterwards the mode that the model came in."""
    was_training = objective.model.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)


def baseline_nats(
    train: Dataset[Any],
    validation: Dataset[Any],
    likelihood: Likelihood | None = None,
    *,
    batch_size: int = 512,
    workers: int = 0,
) -> float:
    """Nats per validation image of a model without latents: the per-pixel mean of the training images.

    It is the reconstruction term for a decoder that always says the mean, with a KL of zero. A learned or optimal scale
    is the best one for the validation images.

    Args:
        train: Images to take the mean of.
        validation: Images to measure.
        likelihood: That of the model; "l2" if None: sum over elements of (mean - x)^2, mean over the images.
        batch_size: Images at once.
        workers: Processes that load images.

    Raises:
        ValueError: an image holds NaN or infinity.
    """
    likelihood = L2() if likelihood is None else likelihood
    base = of_means(likelihood.base if isinstance(likelihood, Gaussian | Scaled) else likelihood)
    total, n_train, error, n_validation, dimensions = torch.zeros(()), 0, 0.0, 0, 1
    for images in all_batches(train, batch_size, workers=workers):
        require_finite(images, "training")
        total = total + as_unit_interval(images).sum(dim=0)
        n_train += len(images)
    mean = total / n_train
    for images in all_batches(validation, batch_size, workers=workers):
        require_finite(images, "validation")
        error += error_sum(base, mean.expand(images.shape), as_unit_interval(images))
        n_validation += len(images)
        dimensions = images[0].numel()
    if isinstance(likelihood, Gaussian | Scaled):
        fixed, n_elements = likelihood.log_scale, n_validation * dimensions
        log_scale = fixed if isinstance(fixed, float) else best_log_scale(error, n_elements)
        error = nats_at_scale(likelihood, log_scale, error, n_elements)
    return error / n_validation


def has_optimal_scale(likelihood: Likelihood) -> TypeGuard[Gaussian | Scaled]:
    return isinstance(likelihood, Gaussian | Scaled) and isinstance(likelihood.log_scale, str)


def error_sum(likelihood: Likelihood, recon: Tensor, images: Tensor) -> float:
    return fastvae.reconstruction_loss(recon, images, likelihood=likelihood, reduction="sum").item()


def best_log_scale(error: float, n_elements: int) -> float:
    """Log of the scale under which elements whose errors sum up to `error` cost least: of the mean error."""
    return math.log(max(error / n_elements, torch.finfo(torch.float64).tiny))


def nats_at_scale(likelihood: Gaussian | Scaled, log_scale: float, error: float, n_elements: int) -> float:
    """Nats of elements whose errors sum up to `error`."""
    s = likelihood.clipped(log_scale)
    return float(likelihood.nll_weight) * (error * math.exp(-s) + n_elements * s) + n_elements * likelihood.constant


def require_finite(images: Tensor, words: str) -> None:
    """Refuse images that no model can learn.

    Raises:
        ValueError: NaN or infinity.
    """
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError(f"the {words} images hold NaN or infinite values. Repair or remove those images.")


def as_unit_interval(images: Tensor) -> Tensor:
    """Images as float64 in [0, 1]; uint8 are divided by 255."""
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()
