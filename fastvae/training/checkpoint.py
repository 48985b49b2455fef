"""Checkpoints: all that a run needs to continue as if it had never stopped."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from .._files import atomic_write, remove_leftovers, require_regular
from .config import TrainConfig

CHECKPOINT_FILE = "checkpoint.pt"
LAST, BEST = "model", "best"  # folders of exported weights: of the last checkpoint, of the best validation
FORMAT = "fastvae training checkpoint 4"
# after the bytes of torch.save, which torch.load ignores: the SHA-256 of these bytes
TRAILER = b"\nsha256 "
TRAILER_BYTES = len(TRAILER) + 2 * hashlib.sha256().digest_size + 1


def save_checkpoint(path: Path, *, config: TrainConfig, images: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` whole, with the state of torch's default random generators and a checksum.

    Args:
        path: File to write.
        config: Options of the run.
        images: What identifies the training images; compared on resume.
        state: Tensors, numbers and containers of them, as `state_dict` methods return them.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    content = {"format": FORMAT, "config": config.to_json(), "images": images, "random": random, "state": state}
    torch.save(content, buffer)
    remove_leftovers(path)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
        file.write(_trailer(buffer.getbuffer()))


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


def _read(path: Path) -> dict[str, Any]:
    require_regular(path)
    content = memoryview(path.read_bytes())
    saved, trailer = content[:-TRAILER_BYTES], content[-TRAILER_BYTES:]
    if trailer != _trailer(saved):
        raise ValueError(
            f"the checkpoint {path} is damaged or cut off, or is no checkpoint of this version. fastvae replaces it "
            "only whole, so a copy or the disk did this: copy it again, or start a new run."
        )
    found = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {FORMAT!r}; use the version of fastvae that wrote it.")
    for name in ("config", "images", "random", "state"):
        if not isinstance(found.get(name), dict):
            raise ValueError(f"the checkpoint {path} has no {name!r}: something else wrote it. Start a new run.")
    return found


def _trailer(content: memoryview) -> bytes:
    return TRAILER + hashlib.sha256(content).hexdigest().encode() + b"\n"
