"""The options that make the loss of a run: what they may be, and what they make of a preset."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastvae.likelihoods import L1, L2, Gaussian, Huber, Likelihood, LogCosh, Scaled, SmoothL1
from fastvae.presets import preset_options

if TYPE_CHECKING:
    from .config import TrainConfig

Reduction = Literal["batchmean", "sum", "mean"]
ScheduleName = Literal["constant", "linear", "cyclical", "cosine", "sigmoid"]
RampShape = Literal["linear", "cosine", "sigmoid"]
FreeBitsMode = Literal["dim", "dim_batch", "dim_mask", "sample"]
CapacityMode = Literal["sample", "batch"]
LikelihoodName = Literal[
    "l2",
    "l1",
    "huber",
    "smooth_l1",
    "log_cosh",
    "bernoulli",
    "bernoulli_probs",
    "l2_logits",
    "l1_logits",
    "gaussian",
    "gaussian_fixed",
    "gaussian_optimal",
    "scaled_l1",
    "scaled_l2",
]

GAUSSIANS = ("gaussian", "gaussian_fixed", "gaussian_optimal")
WITH_WIDTH = ("huber", "smooth_l1", "log_cosh")
WITH_PARAMETER = (*WITH_WIDTH, "gaussian", "gaussian_fixed", "scaled_l1", "scaled_l2")
OF_CYCLES = ("beta_cycles", "beta_ratio", "beta_zero_ratio", "beta_shape")
OF_SCHEDULES = ("beta_start", "beta_steps", "beta_delay", *OF_CYCLES)


def loss_options(config: "TrainConfig") -> dict[str, Any]:
    """The preset's arguments of `VAELoss`, with those that the config gives in their place; what neither has is absent.

    The schedule of beta, free bits and the capacity, which no preset has, are not among them.
    """
    options = {} if config.preset is None else preset_options(config.preset)
    if config.likelihood is not None:
        options["likelihood"] = likelihood_of(config)
    for name in ("beta", "recon_weight", "reduction", "recon_reduction", "kl_reduction", "logvar_clamp"):
        if getattr(config, name) is not None:
            options[name] = getattr(config, name)
    return options


def likelihood_of(config: "TrainConfig") -> str | Likelihood:
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


def check_objective(config: "TrainConfig") -> None:
    """Check the options of the loss, one by one and together.

    Raises:
        ValueError: names the option, what is allowed, and what it needs beside it.
    """
    if config.preset is not None:
        preset_options(config.preset)  # knows the names
    for name in ("beta", "beta_start", "recon_weight", "perceptual", "free_bits", "capacity"):
        value = getattr(config, name)
        _require(value is None or value >= 0, config, name, "a finite number, at least 0")
    _require(0 < config.beta_ratio <= 1, config, "beta_ratio", "above 0 and at most 1")
    rest = 1 - config.beta_ratio
    _require(0 <= config.beta_zero_ratio <= rest, config, "beta_zero_ratio", "at least 0, and at most 1 - beta_ratio")
    clamp = config.logvar_clamp
    _require(clamp is None or clamp[0] < clamp[1], config, "logvar_clamp", "a lower and a larger upper bound")
    _check_likelihood(config)
    if config.beta_schedule == "constant":
        _require_unset(config, OF_SCHEDULES, "a --beta-schedule: linear, cyclical, cosine or sigmoid")
    elif config.beta_schedule != "cyclical":
        _require_unset(config, OF_CYCLES, "--beta-schedule cyclical")
    if config.free_bits is None:
        _require_unset(config, ("free_bits_mode",), "--free-bits NATS")
    if config.capacity is None:
        _require_unset(config, ("capacity_mode", "capacity_steps"), "--capacity NATS")


def _check_likelihood(config: "TrainConfig") -> None:
    number = config.likelihood_parameter
    if config.likelihood not in WITH_PARAMETER:
        _require_unset(config, ("likelihood_parameter",), f"--likelihood {', '.join(WITH_PARAMETER)}")
    elif number is not None:
        is_width = config.likelihood in WITH_WIDTH
        _require(
            number > 0 or not is_width,
            config,
            "likelihood_parameter",
            f"a positive finite number for {config.likelihood}",
        )
    if config.likelihood not in GAUSSIANS:
        _require_unset(config, ("likelihood_full", "likelihood_softclip"), f"--likelihood {', '.join(GAUSSIANS)}")


def _require_unset(config: "TrainConfig", names: tuple[str, ...], needed: str) -> None:
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no meaning without {needed}. Add it or leave {name} away."
            )


def _require(holds: bool, config: "TrainConfig", name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}; got {getattr(config, name)!r}.")
