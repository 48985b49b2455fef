"""The density of images that a likelihood stands for, and what a model with latents makes of it: bounds on log p(x)."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastvae
from fastvae.likelihoods import Bernoulli, BernoulliProbs, Gaussian, Likelihood, Scaled

from ..data.batches import all_batches
from .elbo import EVALUATION_SEED, bits_per_dim, evaluation_mode, of_means
from .objective import Objective

# of the integral over distances, scale * sinh(u), whose steps grow with the distance
_FURTHEST, _N_POINTS = 25.0, 100_001


class Density(NamedTuple):
    """What turns a likelihood's nats into -log p(x | z).

    Attributes:
        constant: Nats of each element that the loss leaves out.
        discrete: A probability of binary images, not a density; of gray ones it is a cross entropy.
    """

    constant: float
    discrete: bool

    @classmethod
    def of(cls, likelihood: Likelihood) -> "Density":
        """p(x | x') = exp(-share e / exp(s)) / Z, e the likelihood's error of an element: loss + log Z - its constants.

        Z is integrated over all real x in float64; "l2" is a Gaussian of variance 1/2, "l1" a Laplace of scale 1.

        Raises:
            ValueError: a scale of each sample or element, which differs from image to image.
        """
        scaled = isinstance(likelihood, Gaussian | Scaled)
        base = likelihood.base if isinstance(likelihood, Gaussian | Scaled) else likelihood
        if isinstance(base, Bernoulli | BernoulliProbs):
            if scaled:
                raise ValueError("a Bernoulli likelihood with a scale is no probability. Choose another likelihood.")
            return cls(0.0, True)
        share, log_scale, counted = 1.0, 0.0, 0.0
        if isinstance(likelihood, Gaussian | Scaled):
            if isinstance(likelihood.log_scale, str):
                raise ValueError("an optimal scale is known only after the images are. Put in the number it came to.")
            scale = torch.as_tensor(likelihood.log_scale, dtype=torch.float64, device="cpu")
            if scale.numel() != 1:
                raise ValueError(f"the likelihood must have one scale; got a tensor of shape {tuple(scale.shape)}.")
            share, log_scale = likelihood.nll_weight, likelihood.clipped(float(scale.detach()))
            counted = share * log_scale + likelihood.constant
        u = torch.linspace(-_FURTHEST, _FURTHEST, _N_POINTS, dtype=torch.float64)
        step = math.exp(log_scale) * u.cosh()
        distances = math.exp(log_scale) * u.sinh()
        errors = fastvae.reconstruction_loss(
            distances, torch.zeros_like(u), likelihood=of_means(base), reduction="none"
        )
        integral = torch.trapezoid(torch.exp(-share * math.exp(-log_scale) * errors) * step, u)
        return cls(math.log(integral) - counted, False)


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
        ValueError: `Density` of the likelihood is not known.

    Source: Burda et al., Importance Weighted Autoencoders, arXiv:1509.00519, eq. 8.
    """
    density = Density.of(objective.likelihood)
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


def bits_per_dim_of_bytes(nats: float, dimensions: int, *, discrete: bool) -> float:
    """Bits for each element of an image of 256 levels, (nats + D log 256) / (D log 2): a level's probability is its
    density, of values in [0, 1], times its width of 1/256. Of binary images: nats / (D log 2).

    Args:
        nats: -log p(x), or a bound on it, with all constants.
        dimensions: D, elements of an image.
        discrete: `nats` are of a probability of binary images.
    """
    return bits_per_dim(nats, dimensions) + (0.0 if discrete else 8.0)
