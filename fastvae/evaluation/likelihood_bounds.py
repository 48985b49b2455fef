"""Bounds on log p(x) of images under a model."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastvae

from ..data.batches import all_batches
from .density import Density
from .elbo import EVALUATION_SEED, evaluation_mode, has_optimal_scale
from .objective import Objective


@torch.no_grad()
def importance_weighted_nats(
    objective: Objective,
    dataset: Dataset[Any],
    *,
    samples: int = 16,
    chunk: int = 8,
    batch_size: int = 128,
    workers: int = 0,
) -> Tensor:
    """Upper bounds on -log p(x), [images] float64, in nats: the importance-weighted bound of `samples` latents.

        -log (1/K sum_k p(x | z_k) p(z_k) / q(z_k | x)),  z_k ~ q(z | x)

    One sample makes it the negative ELBO (with a sampled KL); more make it tighter, towards -log p(x) itself. The
    likelihood's constants are counted (`Density`). Noise is a function of (image, k): the result depends neither on
    `batch_size` nor on `chunk`. The model is evaluated in eval mode and left in the mode that it came in.

    Args:
        objective: The model with its likelihood, whose scale is one number.
        dataset: Images [channels, height, width], uint8 or float in [0, 1].
        samples: K, the latents of each image.
        chunk: Latents of an image that are decoded at once.
        batch_size: Images at once.
        workers: Processes that load images.

    Raises:
        ValueError: the likelihood has no `Density`, or an optimal scale, which is another one for each batch.

    Source: Burda et al., Importance Weighted Autoencoders, arXiv:1509.00519, eq. 8.
    """
    density = Density.of(objective.likelihood)
    if has_optimal_scale(objective.likelihood):
        raise ValueError(
            "an optimal scale is known only after the images are. Set the value that it had with fix_scale."
        )
    device = next(objective.parameters()).device
    shape, n_images = objective.model.config.latent_shape, len(dataset)  # type: ignore[arg-type]
    n_latents = math.prod(shape)
    bounds = []
    done = 0
    with evaluation_mode(objective):
        for batch in all_batches(dataset, batch_size, workers=workers, device=device):
            images = batch.to(device, non_blocking=True)
            mu, logvar = (t.float() for t in objective.encode(images))
            log_weights = []
            for first in range(0, samples, chunk):
                n = min(chunk, samples - first)
                # one stretch of the noise for each k, so that neither kind of piece moves it
                starts = [(k * n_images + done) * n_latents for k in range(first, first + n)]
                noise = torch.stack([_normal(mu, start) for start in starts])
                z = mu + torch.exp(0.5 * logvar) * noise
                nats = objective.reconstruction_nats(z.flatten(0, 1), images.repeat(n, 1, 1, 1)).reshape(n, -1)
                # log p(z) - log q(z | x)
                ratio = 0.5 * (logvar + noise.square() - z.square()).double().flatten(2).sum(2)
                log_weights.append(ratio - nats.double() - images[0].numel() * density.constant)
            bounds.append(math.log(samples) - torch.cat(log_weights).logsumexp(0).cpu())
            done += len(images)
    return torch.cat(bounds)


def _normal(like: Tensor, offset: int) -> Tensor:
    return fastvae.philox_normal(like.shape, seed=EVALUATION_SEED, offset=offset, device=like.device)
