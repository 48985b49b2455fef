"""fastvae: sampling and loss of variational autoencoders at the cost of a copy."""

import importlib
from typing import TYPE_CHECKING, Any

from . import integrations, likelihoods, nn, parametrizations, presets, regularizers, schedules
from ._backend import set_backend, use_backend
from .capture import CapturedStep, capture_step
from .distributions import DiagonalGaussian
from .functional import (
    VAELossTerms,
    gaussian_kl,
    philox_normal,
    reconstruction_loss,
    reparameterize,
    reparameterize_kl,
    vae_loss,
)
from .input_checks import InputReport, check_inputs
from .iwae import iwae_loss
from .loss import VAELoss
from .noise_state import NoiseState
from .norms import group_norm_silu
from .statistics import LatentStats, latent_stats

if TYPE_CHECKING:
    from . import data, evaluation, models, training

__version__ = "0.1.0"

_LAZY = ("data", "evaluation", "models", "training")  # imported on first access

__all__ = [
    "CapturedStep",
    "DiagonalGaussian",
    "InputReport",
    "LatentStats",
    "NoiseState",
    "VAELoss",
    "VAELossTerms",
    "capture_step",
    "check_inputs",
    "data",
    "evaluation",
    "gaussian_kl",
    "group_norm_silu",
    "integrations",
    "iwae_loss",
    "latent_stats",
    "likelihoods",
    "models",
    "nn",
    "parametrizations",
    "philox_normal",
    "presets",
    "reconstruction_loss",
    "regularizers",
    "reparameterize",
    "reparameterize_kl",
    "schedules",
    "set_backend",
    "training",
    "use_backend",
    "vae_loss",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
