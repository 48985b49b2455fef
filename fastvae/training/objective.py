"""The loss that the options of a run ask for, and that of a run that is done."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae import schedules
from fastvae.evaluation.density import of_means
from fastvae.evaluation.elbo import as_unit_interval, best_log_scale, error_sum
from fastvae.evaluation.objective import Objective, by_dimension
from fastvae.likelihoods import L1, L2, Gaussian, Huber, Likelihood, LogCosh, Scaled, SmoothL1
from fastvae.models import VAE, saving
from fastvae.presets import preset_options
from fastvae.regularizers import Capacity, FreeBits

from .checkpoint import LAST
from .config import TrainConfig
from .loss_config import LossConfig
from .perceptual import lpips_distance

# of a run that names neither a likelihood nor a preset; docs/training.md compares them with others
DEFAULT_LOG_VARIANCE, DEFAULT_BETA = -4.25, 8.0


def build_objective(config: TrainConfig, model: VAE, *, batch_size: int, total_steps: int) -> Objective:
    """The model and the loss of a run."""
    options = loss_options(config)
    reduction = options.pop("reduction", "batchmean")
    recon_reduction = options.pop("recon_reduction", reduction)
    kl_reduction = options.pop("kl_reduction", reduction)
    clamp = options.pop("logvar_clamp", None)
    # the other reductions are weights on the terms per image, which so keep their unit in the logs
    n_pixels, n_latents = math.prod(model.config.image_shape), math.prod(model.config.latent_shape)
    beta_unit = _unit(kl_reduction, batch_size, n_latents)
    beta = _beta(config, options.pop("beta", 1.0), beta_unit, total_steps)
    recon_weight = options.pop("recon_weight", 1.0) * _unit(recon_reduction, batch_size, n_pixels)
    free_bits = None if config.free_bits is None else FreeBits(config.free_bits, config.free_bits_mode)
    criterion = fastvae.VAELoss(
        beta,
        return_terms=True,
        recon_weight=recon_weight,
        free_bits=free_bits,
        capacity=_capacity(config, total_steps),
        logvar_clamp=clamp if by_dimension(free_bits) else None,
        **options,
    )
    return Objective(
        model,
        criterion,
        logvar_clamp=clamp,
        beta_unit=beta_unit,
        perceptual=lpips_distance(config.perceptual, next(model.parameters()).device) if config.perceptual else None,
    )


def trained_objective(run: Path, model: VAE, weights: Path) -> Objective:
    """The objective that a run evaluates: its likelihood, its learned scale and its clamp; weight of the KL is 1.

    Args:
        run: Folder of the run.
        model: The model that is loaded from `weights`.
        weights: The run's folder "model" or "best".

    Raises:
        ValueError: the run's config cannot be read, or `weights` lack the learned scale.
    """
    options = loss_options(TrainConfig.from_run(run))
    criterion = fastvae.VAELoss(likelihood=options.get("likelihood", "l2"), return_terms=True)
    objective = Objective(model, criterion, logvar_clamp=options.get("logvar_clamp"))
    load_scales(objective, weights)
    return objective.to(next(model.parameters()).device)


def load_scales(objective: Objective, weights: Path) -> None:
    """Set learned scales of the likelihood to those that a run saved with its weights.

    Raises:
        ValueError: `weights` has not the scales of this likelihood.
    """
    found, own = saving.read_training(weights).get("scales", {}), objective.scales()
    if own and found.keys() != own.keys():
        raise ValueError(
            f"{weights} has no scale of the likelihood {objective.likelihood}, which its run learned. Copy the run "
            "again, or train it with this version."
        )
    for name, scale in own.items():
        scale.data.copy_(torch.tensor(found[name]))


def load_weights(objective: Objective, source: Path) -> None:
    """Start from the weights of another run, and from its learned scales if the likelihood is the same.

    Args:
        objective: Gets them.
        source: Run folder, its folder "best", or a folder of `VAE.save_pretrained`.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: they are damaged, or of a model of other sizes.
    """
    folder = source / LAST if (source / LAST).is_dir() else source
    config, weights = saving.load(folder, "cpu")
    own = objective.model.config
    different = [
        f"{name} {theirs!r}, here {getattr(own, name)!r}"
        for name, theirs in config.to_dict().items()
        if name != "checkpointing" and theirs != own.to_dict()[name]
    ]
    if different:
        raise ValueError(f"the model in {folder} has {'; '.join(different)}. Give this run the same options.")
    objective.model.load_state_dict(weights)
    if saving.read_training(folder).get("scales", {}).keys() == objective.scales().keys():
        load_scales(objective, folder)


def initialize_scale(objective: Objective, images: Tensor) -> None:
    """Start a learned scale where it is best for a model that always answers the mean of `images`, [n, C, H, W]."""
    likelihood = objective.likelihood
    if not isinstance(likelihood, Gaussian | Scaled):
        return
    pixels = as_unit_interval(images)
    error = error_sum(of_means(likelihood.base), pixels.mean(0).expand_as(pixels), pixels)
    for scale in objective.scales().values():
        scale.data.fill_(best_log_scale(error, pixels.numel()))


def loss_options(config: LossConfig) -> dict[str, Any]:
    """The preset's arguments of `VAELoss`, with those that the config gives in their place; what neither has is absent.

    The schedule of beta, free bits and the capacity, which no preset has, are not among them.
    """
    options = {} if config.preset is None else preset_options(config.preset)
    if config.preset is None and config.likelihood is None:
        options |= {"likelihood": Gaussian(DEFAULT_LOG_VARIANCE), "beta": DEFAULT_BETA}
    elif config.likelihood is not None:
        options["likelihood"] = likelihood_of(config)
    for name in ("beta", "recon_weight", "reduction", "recon_reduction", "kl_reduction", "logvar_clamp"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    return options


def likelihood_of(config: LossConfig) -> str | Likelihood:
    """What `VAELoss` takes for the likelihood that the config names; a learned scale is a parameter of it."""
    name, number = config.likelihood, config.likelihood_parameter
    full, softclip = config.likelihood_full, config.likelihood_softclip
    log_scale = 0.0 if number is None else number
    width = 1.0 if number is None else number
    match name:
        case "huber":
            return Huber(width)
        case "smooth_l1":
            return SmoothL1(width)
        case "log_cosh":
            return LogCosh(width)
        case "l2_logits":
            return L2(from_logits=True)
        case "l1_logits":
            return L1(from_logits=True)
        case "gaussian":
            return Gaussian(nn.Parameter(torch.tensor(log_scale)), full=full, softclip=softclip)
        case "gaussian_fixed":
            return Gaussian(log_scale, full=full, softclip=softclip)
        case "gaussian_optimal":
            return Gaussian("optimal", full=full, softclip=softclip)
        case "scaled_l1" | "scaled_l2":
            return Scaled(name.removeprefix("scaled_"), nn.Parameter(torch.tensor(log_scale)))
    return name or "l2"


def _unit(reduction: str, batch_size: int, elements: int) -> float:
    """What 1 nat per image is under a reduction."""
    return {"batchmean": 1.0, "sum": float(batch_size), "mean": 1 / elements}[reduction]


def _beta(config: TrainConfig, end: float, unit: float, total_steps: int) -> float | schedules.Schedule:
    if config.beta_schedule == "constant":
        return end * unit
    start, end = config.beta_start * unit, end * unit
    delay = config.beta_delay
    schedule: schedules.Schedule
    if config.beta_schedule == "cyclical":
        steps = config.beta_steps or max(1, total_steps - delay)
        cycles, ratio, shape = config.beta_cycles, config.beta_ratio, config.beta_shape
        zero_ratio = config.beta_zero_ratio
        schedule = schedules.Cyclical(start, end, steps, cycles, ratio, shape, zero_ratio=zero_ratio, delay=delay)
    else:
        ramps = {"linear": schedules.Linear, "cosine": schedules.Cosine, "sigmoid": schedules.Sigmoid}
        steps = config.beta_steps or max(1, total_steps // 2)
        schedule = ramps[config.beta_schedule](start, end, steps, delay=delay)
    _warn_if_longer("beta", schedule.delay + schedule.steps, total_steps)
    return schedule


def _capacity(config: TrainConfig, total_steps: int) -> Capacity | None:
    if config.capacity is None:
        return None
    if config.capacity_steps == 0:
        return Capacity(config.capacity, config.capacity_mode)
    _warn_if_longer("capacity", config.capacity_steps, total_steps)
    return Capacity(schedules.Linear(0.0, config.capacity, config.capacity_steps), config.capacity_mode)  # type: ignore[arg-type]


def _warn_if_longer(name: str, steps: int, total_steps: int) -> None:
    if steps > total_steps:
        warnings.warn(
            f"the schedule of {name} takes {steps} steps and the run has {total_steps}, so {name} does not reach its "
            f"end. Lower --{name}-steps{' or --beta-delay' if name == 'beta' else ''}, or train for more --epochs.",
            stacklevel=2,
        )
