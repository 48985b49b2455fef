"""What one step of training computes: gradients, its share of them, and where its noise comes from."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvae import VAELossTerms
from fastvae.evaluation.objective import Objective

from .._distributed import World
from .config import TrainConfig


def train_step(
    config: TrainConfig,
    objective: Objective,
    module: nn.Module,
    images: Tensor,
    step: int,
    scaler: torch.amp.GradScaler,
    world: World,
) -> VAELossTerms:
    """Compute the gradients of one step, in `config.accumulate` parts, and return the means of its terms.

    Args:
        config: Options of the run.
        objective: Model and loss.
        module: The same, wrapped for several processes or compiled.
        images: This process's share of the batch.
        step: Updates done. With the process it decides the noise: all images of a run draw from one stream.
        scaler: Of the gradients, in fp16.
        world: The processes, which have equal shares.
    """
    n_latents = math.prod(objective.model.config.latent_shape)
    seed = noise_seed(config.seed)
    first = (step * world.size + world.rank) * len(images)  # number of the first image in the run
    found: list[VAELossTerms] = []
    for part in images.chunk(config.accumulate):
        last = len(found) == config.accumulate - 1
        with nullcontext() if last else world.without_averaging(module):
            with autocast(images.device, config.precision):
                _, terms = module(part, seed=seed, offset=first * n_latents)
            scaler.scale(terms.loss / config.accumulate if config.accumulate > 1 else terms.loss).backward()
        first += len(part)
        found.append(terms)
    if len(found) == 1:
        return found[0]
    return VAELossTerms(*(torch.stack([t.detach() for t in of_part]).mean() for of_part in zip(*found, strict=True)))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` without its pass over gradients that are short enough, where looking is free."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or not norm.item() <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@cache
def noise_seed(seed: int) -> int:
    """Of the noise of a run: another stream than that of samples, and of evaluations, under the same seed."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)  # an int64, as compilers want


def shared_batch_size(config: TrainConfig, n_images: int, n_processes: int) -> int:
    """Images in a step: what the config says or, if there are fewer images, as many as every part has one more of.

    Raises:
        ValueError: the processes and their parts cannot share the batch evenly; fewer images than parts.
    """
    parts = n_processes * config.accumulate
    if config.batch_size % parts or n_images < parts:
        raise ValueError(
            f"a batch is shared by {n_processes} processes in {config.accumulate} parts each, so batch_size must be a "
            f"multiple of {parts} and there must be as many images; got {config.batch_size} and {n_images} images."
        )
    return min(config.batch_size, n_images // parts * parts)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to the precision asked for; nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
