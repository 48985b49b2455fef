"""The loss that the options of a run ask for, and that of a run that is done."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastvae
from fastvae import schedules
from fastvae.evaluation.objective import Objective, by_dimension
from fastvae.likelihoods import L1, L2, Gaussian, Huber, Likelihood, LogCosh, Scaled, SmoothL1
from fastvae.models import VAE
from fastvae.presets import preset_options
from fastvae.regularizers import Capacity, FreeBits

from .checkpoint import CHECKPOINT_FILE, load_part, restore
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


def trained_objective(run: Path, model: VAE) -> Objective:
    """`model`, which a run exported, with the run's likelihood, learned scale and clamp; weight of the KL is 1.

    Raises:
        FileNotFoundError: a learned scale is asked of a run that has no checkpoint any more.
        ValueError: the run's config or its checkpoint cannot be read.
    """
    config = TrainConfig.from_run(run)
    options = loss_options(config)
    criterion = fastvae.VAELoss(likelihood=options.get("likelihood", "l2"), return_terms=True)
    own = criterion.state_dict()
    if own:
        part, prefix = ("ema", "module.criterion.") if config.ema else ("criterion", "")
        saved = load_part(run / CHECKPOINT_FILE, part)
        named = {name: saved[prefix + name] for name in own if prefix + name in saved}
        restore(run / CHECKPOINT_FILE, {"step": 0, "criterion": named}, {"criterion": criterion})
    device = next(model.parameters()).device
    return Objective(model, criterion.to(device), logvar_clamp=options.get("logvar_clamp"))


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
