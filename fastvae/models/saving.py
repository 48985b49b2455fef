"""Weights and config of a model in a directory: safetensors and JSON, no pickle, never half a file."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_bytes, write_json
from .config import VAEConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save(directory: Path, config: VAEConfig, state: dict[str, Tensor]) -> None:
    """Write both files, each replaced as a whole; the weights carry the config too, so a wrong pair shows."""
    safetensors = _safetensors()
    metadata = {"format": "pt", "config": json.dumps(config.to_dict())}
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}, metadata)
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / WEIGHTS, weights)
    write_json(directory / CONFIG, config.to_dict())


def load(directory: Path, device: torch.device | str) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Read both files and check that they belong together.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file, an unknown config key, or config and weights of different models.
    """
    safetensors = _safetensors()
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}. Pass one that save_pretrained wrote.")
    missing = [name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {' and '.join(missing)}. Pass a directory that save_pretrained wrote."
        )
    config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Copy or save it again.") from error
    if "config" in metadata and VAEConfig.from_dict(json.loads(metadata["config"])) != config:
        raise ValueError(
            f"{directory / CONFIG} and {path} belong to different models: a save was interrupted between them, or one "
            f"was edited. The weights were saved with {metadata['config']}; put that into {CONFIG}, or save again."
        )
    return config, state


def _read_config(path: Path) -> VAEConfig:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or save it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object with the fields of VAEConfig; got {type(values).__name__}.")
    try:
        return VAEConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('saving and loading models needs safetensors: pip install "fastvae-triton[train]"') from error
    return safetensors
