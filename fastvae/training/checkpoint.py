"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .._files import atomic_write
from .config import TrainConfig

CHECKPOINT_FILE = "checkpoint.pt"
SHARDS = "checkpoint-"  # then the step: folder of the sharded tensors of a checkpoint
FORMAT = "fastvae training checkpoint 2"
# the first format has neither a loss with state nor averaged weights, and no options that would need them
READABLE = (FORMAT, "fastvae training checkpoint 1")


def save_checkpoint(path: Path, *, config: TrainConfig, images: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` whole, with the state of torch's default random generators.

    Args:
        path: File to write.
        config: Options of the run.
        images: What identifies the training images; compared on resume.
        state: Tensors, numbers and containers of them, as `state_dict` methods give them; "shards" names the folder of
            those that are sharded. The folders of former checkpoints are removed.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    content = {"format": FORMAT, "config": config.to_json(), "images": images, "random": random, "state": state}
    with atomic_write(path) as file:
        _write(content, file)
    for folder in path.parent.glob(f"{SHARDS}*"):
        if folder.name != state.get("shards", {}).get("folder"):
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(path: Path, *, config: TrainConfig, images: dict[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote; sets torch's default random generators back to it.

    Raises:
        ValueError: the file is damaged or no checkpoint, or belongs to other options or images (says which).
    """
    content = _read(path)
    TrainConfig.from_json(content["config"]).require_same(config, f"the run of {path}")
    if content["images"] != images:
        raise ValueError(
            f"{path} belongs to a run on other images: {content['images']}, now {images}. "
            f"Restore the data of {config.data!r}, or start a new run."
        )
    torch.set_rng_state(content["random"]["cpu"])
    if "cuda" in content["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["random"]["cuda"])
    state: dict[str, Any] = content["state"]
    return state


def load_part(path: Path, name: str) -> dict[str, Any]:
    """One part of the state that `save_checkpoint` wrote; the random generators stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or no checkpoint.
    """
    part: dict[str, Any] = _read(path)["state"][name]
    return part


def _write(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch hides what the system said, a full disk say, behind "unexpected pos"
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror) from error
        raise


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load answers broken bytes with almost any exception, IndexError among them
            raise ValueError(
                f"the checkpoint {path} is damaged or cut off, or is no checkpoint. fastvae replaces it only whole, so "
                "a copy or the disk did this: copy it again, or start a new run."
            ) from error
    if not isinstance(content, dict) or content.get("format") not in READABLE:
        raise ValueError(f"{path} is not a {FORMAT!r}; use the version of fastvae that wrote it.")
    return content
