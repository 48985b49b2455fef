"""What a run is made of: its device, its model, its optimizer, its averaged weights."""

import os
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from fastvae import _backend
from fastvae.evaluation.objective import Objective
from fastvae.models import VAE, VAEConfig

from .config import TrainConfig

# Adam moves a learned log scale by about the learning rate in a step, so by that of the networks, 2e-3, it would take
# thousands of steps to reach its optimum
LOSS_LEARNING_RATE = 10.0  # in learning rates of the model


def resolve_device(name: str) -> torch.device:
    """The device of an option such as "auto", "cpu" or "cuda:1".

    Raises:
        ValueError: unknown, or not there on this machine, or not served by the backend that is chosen.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = (accelerator or torch.device("cpu")) if name == "auto" else _named_device(name, accelerator)
    try:
        _backend.backend_of(torch.empty(0, device=device))
    except RuntimeError as error:
        raise ValueError(f"{error} The environment variable FASTVAE_BACKEND chooses it.") from error
    return device


def _named_device(name: str, accelerator: torch.device | None) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto", "cpu", "cuda", "cuda:1", "mps", ...; got {name!r}.') from error
    if device.type != "cpu":
        count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {name!r} is not there: this machine has {count} of that kind. Use auto or cpu.")
    return device


def make_optimizer(config: TrainConfig, objective: Objective) -> torch.optim.Optimizer:
    """AdamW; `initial_lr` of each group is its peak. The parameters of the loss learn faster and do not decay."""
    rates = {"lr": config.learning_rate, "initial_lr": config.learning_rate}
    groups: list[dict[str, Any]] = [{"params": list(objective.model.parameters()), **rates}]
    if scales := list(objective.criterion.parameters()):
        fast = LOSS_LEARNING_RATE * config.learning_rate
        groups.append({"params": scales, "weight_decay": 0.0, "lr": fast, "initial_lr": fast})
    fused = next(objective.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def averaged_over_steps(objective: Objective, decay: float, *, sharded: bool) -> AveragedModel:
    """Exponential moving average of model and loss, which begins with the weights after the first step.

    After n steps the decay is at most (1 + n) / (10 + n), so that a short run forgets its first weights too.
    """
    # all tensors at once, unless some are sharded and some are not
    average_of: Any = get_ema_avg_fn if sharded else get_ema_multi_avg_fn

    def average(averaged: Any, current: Any, steps: int | Tensor) -> Any:
        n = int(steps)
        return average_of(min(decay, (1 + n) / (10 + n)))(averaged, current, steps)

    # without `device`, its count of steps stays on the host, and averaging waits for nothing
    if sharded:
        return AveragedModel(objective, avg_fn=average)
    return AveragedModel(objective, multi_avg_fn=average)


def model_config(config: TrainConfig, shape: tuple[int, ...]) -> VAEConfig:
    """The model that the options ask for, for images of `shape`, (channels, height, width)."""
    channels, height, width = shape
    return VAEConfig(
        image_size=(height, width),
        channels=channels,
        backbone=config.backbone,
        latent_dim=config.latent_dim,
        width=config.width,
        residual=config.residual,
        hidden=config.hidden,
        latent_channels=config.latent_channels,
        checkpointing=config.checkpointing,
    )


def require_memory(config: VAEConfig, device: torch.device) -> None:
    """Refuse a model whose training cannot fit the device.

    Raises:
        ValueError: weights, gradients and the optimizer's two averages, in fp32, are more than all of its memory.
    """
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in VAE(config).parameters())
    except RuntimeError as error:  # a size that int64 cannot count
        raise ValueError(f"a model of these sizes is too large: {error}. Choose a smaller one.") from error
    require_fits(16 * parameters, device, f"to train a model of these sizes, {parameters:,} parameters,")


def require_fits(needed: int, device: torch.device, what: str) -> None:
    """Refuse what needs more bytes than the device has: the system may kill a process that takes too much.

    Raises:
        ValueError: says that `what` takes too much.
    """
    total = total_bytes(device)
    if total is not None and needed > total:
        raise ValueError(
            f"{what} takes {needed / 2**30:,.0f} GiB or more; {device} has {total / 2**30:,.0f} GiB. "
            "Choose smaller sizes."
        )


def total_bytes(device: torch.device) -> int | None:
    """All memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
