"""The options that make the loss of a run."""

from dataclasses import dataclass
from typing import Any, Literal

from fastvae.presets import preset_options

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


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Likelihood, weights, schedules and regularisers of a run's loss."""

    preset: str | None = None
    """Loss of another project, such as pythae or ldm; options below that are given replace its own."""
    likelihood: LikelihoodName | None = None
    """Error of a reconstruction. With neither it nor a preset: gaussian_fixed, of log variance -4.25."""
    likelihood_parameter: float | None = None
    """delta, beta or alpha (1); log variance or log scale, where a learned one begins (0)."""
    likelihood_full: bool = False
    """Count the constant log(2 pi) / 2 of each element too (gaussian...)."""
    likelihood_softclip: float | None = None
    """Soft lower bound of log sigma (gaussian...)."""
    perceptual: float | None = None
    """Weight of a perceptual distance, LPIPS, that is added to the error of each element while training, as latent
    diffusion does with 1; needs the package lpips. The figures of validation are without it."""
    recon_weight: float | None = None
    """Weight of the reconstruction term in the loss; 1 unless the preset has another."""
    reduction: Reduction | None = None
    """Of both terms in the loss, not in what is logged; batchmean unless the preset has another."""
    recon_reduction: Reduction | None = None
    """Reduction of the reconstruction term alone."""
    kl_reduction: Reduction | None = None
    """Reduction of the KL term alone."""
    beta: float | None = None
    """Weight of the KL term in the loss, or what its schedule ends at; 1 unless the preset has another. With neither a
    preset nor a likelihood, 8."""
    beta_schedule: ScheduleName = "constant"
    """Way of beta from beta_start to beta."""
    beta_start: float = 0.0
    """Beta at the first step of a schedule."""
    beta_steps: int | None = None
    """Steps of the schedule; half the run if not given, all of it for cyclical."""
    beta_delay: int = 0
    """Steps at beta_start before the schedule begins."""
    beta_cycles: int = 4
    """Ramps, one after the other (cyclical)."""
    beta_ratio: float = 0.5
    """Share of a cycle that its ramp takes (cyclical)."""
    beta_zero_ratio: float = 0.0
    """Share of a cycle at beta_start before its ramp (cyclical)."""
    beta_shape: RampShape = "linear"
    """Shape of the ramps (cyclical)."""
    free_bits: float | None = None
    """Nats of KL that cost nothing."""
    free_bits_mode: FreeBitsMode = "dim"
    """Whose: of each latent dimension, of its mean over the batch, by leaving out what costs less, of an image."""
    capacity: float | None = None
    """Nats at which beta holds the KL: |KL - capacity| takes the KL's place in the loss."""
    capacity_mode: CapacityMode = "sample"
    """Of each image, or of the mean over the batch."""
    capacity_steps: int = 0
    """Steps in which the capacity grows from 0; 0 has it there at once."""
    logvar_clamp: tuple[float, float] | None = None
    """Bounds of the posterior's log variance."""


def check_loss(config: LossConfig) -> None:
    """Check the options of the loss, one by one and together.

    Raises:
        ValueError: names the option, what is allowed, and what it needs beside it.
    """
    if config.preset is not None:
        preset_options(config.preset)  # knows the names
    for name in ("beta", "beta_start", "recon_weight", "perceptual", "free_bits", "capacity"):
        value = getattr(config, name)
        require(value is None or value >= 0, config, name, "a finite number, at least 0")
    require(0 < config.beta_ratio <= 1, config, "beta_ratio", "above 0 and at most 1")
    rest = 1 - config.beta_ratio
    require(0 <= config.beta_zero_ratio <= rest, config, "beta_zero_ratio", "at least 0, and at most 1 - beta_ratio")
    clamp = config.logvar_clamp
    require(clamp is None or clamp[0] < clamp[1], config, "logvar_clamp", "a lower and a larger upper bound")
    _check_likelihood(config)
    if config.beta_schedule == "constant":
        _require_unset(config, OF_SCHEDULES, "a --beta-schedule: linear, cyclical, cosine or sigmoid")
    elif config.beta_schedule != "cyclical":
        _require_unset(config, OF_CYCLES, "--beta-schedule cyclical")
    if config.free_bits is None:
        _require_unset(config, ("free_bits_mode",), "--free-bits NATS")
    if config.capacity is None:
        _require_unset(config, ("capacity_mode", "capacity_steps"), "--capacity NATS")


def _check_likelihood(config: LossConfig) -> None:
    number = config.likelihood_parameter
    if config.likelihood not in WITH_PARAMETER:
        _require_unset(config, ("likelihood_parameter",), f"--likelihood {', '.join(WITH_PARAMETER)}")
    elif number is not None:
        is_width = config.likelihood in WITH_WIDTH
        require(
            number > 0 or not is_width,
            config,
            "likelihood_parameter",
            f"a positive finite number for {config.likelihood}",
        )
    if config.likelihood not in GAUSSIANS:
        _require_unset(config, ("likelihood_full", "likelihood_softclip"), f"--likelihood {', '.join(GAUSSIANS)}")


def _require_unset(config: LossConfig, names: tuple[str, ...], needed: str) -> None:
    for name in names:
        if getattr(config, name) != type(config).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name} {getattr(config, name)!r} has no meaning without {needed}. Add it or leave {name} away."
            )


def require(holds: bool, config: Any, name: str, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}; got {getattr(config, name)!r}.")
