"""What a training run reports; `train` itself prints nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvae.evaluation.elbo import Evaluation


@dataclass(frozen=True)
class Started:
    """Data, model and run folder are ready."""

    run: Path
    device: str
    train_images: int
    validation_images: int
    parameters: int
    step: int
    """Updates done already; 0 unless the run is resumed."""
    total_steps: int
    baseline: float
    """Validation nats per image of the latent-free baseline."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why each damaged or unsupported file or folder was left out, as in skipped.json of the run folder."""
    config: dict[str, Any] = field(default_factory=dict)
    """The options, as in config.json of the run folder."""


@dataclass(frozen=True)
class Stepped:
    """A training step was issued; a GPU may still be computing it."""

    step: int
    images: int
    """Images of one step, of all processes together."""


@dataclass(frozen=True)
class Logged:
    """A line went into metrics.jsonl."""

    record: dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A picture of the progress was written."""

    step: int
    name: str
    path: Path


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The run is complete."""

    run: Path
    evaluation: Evaluation
    pictures: list[Path]


Event = Started | Stepped | Logged | Drawn | Saved | Finished
