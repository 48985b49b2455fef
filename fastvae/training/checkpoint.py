"""Checkpoints: all that a run needs to go on as if it had never stopped."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .._files import atomic_write, remove_leftovers, require_regular
from .config import TrainConfig

CHECKPOINT_FILE = "checkpoint.pt"
SHARDS = "checkpoint-"  # then the step: folder of the sharded tensors of a checkpoint
FORMAT = "fastvae training checkpoint 3"
# the first format has neither a loss with state nor averaged weights, and no options that would need them; neither it
# nor the second has a checksum
WITHOUT_CHECKSUM = ("fastvae training checkpoint 2", "fastvae training checkpoint 1")
# what follows torch's file, which torch.load does not mind: the SHA-256 of all bytes before
TRAILER = b"\nsha256 "
TRAILER_BYTES = len(TRAILER) + 2 * hashlib.sha256().digest_size + 1


def save_checkpoint(path: Path, *, config: TrainConfig, images: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` whole, with the state of torch's default random generators and a checksum.

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
    remove_leftovers(path)
    with atomic_write(path) as file:
        hashing = _HashingWriter(file)
        _write(content, hashing)
        file.write(TRAILER + hashing.digest.hexdigest().encode() + b"\n")
    for folder in path.parent.glob(f"{SHARDS}*"):
        if folder.name != state.get("shards", {}).get("folder"):
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(path: Path, *, config: TrainConfig, images: dict[str, Any]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote; sets torch's default random generators back to it.

    Raises:
        ValueError: the file is damaged or no checkpoint, or belongs to other options or images (says which).
    """
    content = _read(path)
    try:
        saved = TrainConfig.from_json(content["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    saved.require_same(config, f"the run of {path}")
    if content["images"] != images:
        raise ValueError(
            f"{path} belongs to a run on other images: {content['images']}, now {images}. "
            f"Restore the data of {config.data!r}, or start a new run."
        )
    state: dict[str, Any] = content["state"]
    torch.set_rng_state(content["random"]["cpu"])
    if "cuda" in content["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["random"]["cuda"])
    return state


def load_part(path: Path, name: str) -> dict[str, Any]:
    """One part of the state that `save_checkpoint` wrote; the random generators stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or no checkpoint, or has no such part.
    """
    state = _read(path)["state"]
    if not isinstance(state.get(name), dict):
        raise ValueError(f"{path} has no state of {name!r}, which the run's options ask for. Copy the run again.")
    part: dict[str, Any] = state[name]
    return part


def restore(path: Path, state: dict[str, Any], stateful: dict[str, Any]) -> int:
    """Load the state of a checkpoint into the objects of a run, by name, and return its step.

    Args:
        path: The checkpoint, for errors.
        state: What `load_checkpoint` returned.
        stateful: Objects with `load_state_dict`.

    Raises:
        ValueError: something is missing or does not fit.
    """
    try:
        for name, part in stateful.items():
            part.load_state_dict(state.get(name, {}))
        return int(state["step"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the state in {path} does not fit its run: {error}. Start a new run.") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _HashingWriter:
    """A file to write to that takes the checksum of what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _write(content: dict[str, Any], file: Any) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch hides what the system said, a full disk say, behind "unexpected pos"
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror) from error
        raise


def _read(path: Path) -> dict[str, Any]:
    require_regular(path)
    damaged = (
        f"the checkpoint {path} is damaged or cut off, or is no checkpoint. fastvae replaces it only whole, so "
        "a copy or the disk did this: copy it again, or start a new run."
    )
    with path.open("rb") as file:
        is_checked = _verify(file, damaged)
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load answers broken bytes with almost any exception, IndexError among them
            raise ValueError(damaged) from error
    readable = (FORMAT, *WITHOUT_CHECKSUM)
    if not isinstance(content, dict) or content.get("format") not in readable:
        raise ValueError(f"{path} is not a {FORMAT!r}; use the version of fastvae that wrote it.")
    if content["format"] == FORMAT and not is_checked:  # the checksum was cut off
        raise ValueError(damaged)
    for name in ("config", "images", "random", "state"):
        if not isinstance(content.get(name), dict):
            raise ValueError(f"the checkpoint {path} has no {name!r}: something else wrote it. Start a new run.")
    return content


def _verify(file: BinaryIO, damaged: str) -> bool:
    """Whether the file has a checksum; ValueError if it is another one than that of the file's content."""
    size = file.seek(0, os.SEEK_END) - TRAILER_BYTES
    file.seek(max(size, 0))
    trailer = file.read()
    if not trailer.startswith(TRAILER):
        return False
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(min(size, 1 << 20)):
        digest.update(chunk)
        size -= len(chunk)
    if trailer != TRAILER + digest.hexdigest().encode() + b"\n":
        raise ValueError(damaged)
    return True
