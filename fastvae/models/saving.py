"""Weights and config of a model in a directory: safetensors and JSON, no pickle, never half a file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import dump_json, parse_json, read_json_object, require_object, write_bytes, write_json
from .config import VAEConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save(directory: Path, config: VAEConfig, state: dict[str, Tensor], training: dict[str, Any] | None = None) -> None:
    """Write both files, each replaced as a whole.

    The file of weights also holds the config, to detect a wrong pair, a checksum, and `training`: JSON values that a
    training run keeps with these weights (see `read_training`).
    """
    values = config.to_dict()
    metadata = {"config": dump_json(values), "training": dump_json(training or {})}
    metadata["sha256"] = checksum(state, metadata["training"])
    write_files(directory, WEIGHTS, state, values, metadata)


def load(directory: Path, device: torch.device | str) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Read both files and check that they belong together.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file, an unknown config key, or config and weights of different models.
    """
    values, state, metadata = read_files(directory, WEIGHTS, "cpu", writer="save_pretrained")
    if "sha256" in metadata and metadata["sha256"] != checksum(state, metadata.get("training", "")):
        raise ValueError(
            f"{directory / WEIGHTS} is damaged: its weights are not those that were saved. Copy or save it again."
        )
    state = {name: tensor.to(device) for name, tensor in state.items()}
    path = directory / CONFIG
    try:
        config = VAEConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    source = f"the config in {directory / WEIGHTS}"
    if (
        "config" in metadata
        and VAEConfig.from_dict(require_object(parse_json(metadata["config"], source), source)) != config
    ):
        raise ValueError(
            f"{path} and {directory / WEIGHTS} belong to different models: a save was interrupted between them, or one "
            f"was edited. The weights were saved with {metadata['config']}; put that into {CONFIG}, or save again."
        )
    return config, state


def read_training(directory: Path) -> dict[str, Any]:
    """What a training run keeps with the weights; empty for weights that were saved otherwise.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    text = read_files(directory, WEIGHTS, "cpu", writer="save_pretrained")[2].get("training", "{}")
    return require_object(parse_json(text, str(directory / WEIGHTS)), str(directory / WEIGHTS))


def checksum(state: dict[str, Tensor], text: str) -> str:
    """SHA-256 of `text` and the names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_files(
    directory: Path, weights: str, state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write config.json, then the file of weights, each replaced as a whole."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    content = _safetensors().torch.save(tensors, {"format": "pt"} | metadata)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, config)
    write_bytes(directory / weights, content)


def read_files(
    directory: Path, weights: str, device: torch.device | str, *, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """The object in config.json, the weights on `device`, and the metadata beside them; `writer` wrote such files.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file.
    """
    safetensors = _safetensors()
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {directory}. Pass one that {writer} wrote.")
    missing = [name for name in (CONFIG, weights) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} lacks {' and '.join(missing)}. Pass a directory that {writer} wrote.")
    config = read_json_object(directory / CONFIG)
    path = directory / weights
    try:
        with _opened(path) as name, safetensors.safe_open(name, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Copy or save it again.") from error
    return config, state, metadata


@contextmanager
def _opened(path: Path) -> Iterator[str]:
    """A name of the file that safetensors takes: it wants UTF-8, which a name on Linux need not be."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        yield str(path)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('saving and loading models needs safetensors: pip install "fastvae-triton[train]"') from error
    return safetensors
