"""What several subcommands need: the model, images for it, and a free place for the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastvae import data
from fastvae.evaluation.objective import Objective, decode_to_images
from fastvae.models import VAE
from fastvae.training import TrainConfig
from fastvae.training.checkpoint import BEST, LAST
from fastvae.training.config import MOST
from fastvae.training.objective import trained_objective
from fastvae.training.run_folder import METRICS_FILE
from fastvae.training.setup import require_fits, resolve_device
from fastvae.training.split import Split

from .._files import require_regular


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every subcommand that uses a model."""

    model: Path
    """Run folder of `fastvae train`, or a folder that save_pretrained made."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", ..."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(ModelOptions):
    """Options of a subcommand that writes a file."""

    out: Path
    """File to write."""
    force: bool = False
    """Overwrite the file if it exists."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(OutputOptions):
    """Options of a subcommand that uses images too."""

    data: str | None = None
    """Images, as in `fastvae train --data`; the run's own validation images if not given."""


def load_model(path: Path, device: str) -> VAE:
    """The model of a run folder, or of a folder that `save_pretrained` made; it decodes to images.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: unknown device, or a damaged model.
    """
    objective = load_objective(path, device)
    decode_to_images(objective)
    return objective.model


def load_objective(path: Path, device: str) -> Objective:
    """The model with the likelihood that its run trained it with; "l2" for a folder outside a run.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: unknown device, or a damaged model or checkpoint.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no model: {path} is not a folder. Pass a run folder, or a folder of save_pretrained.")
    run = run_of(path)
    weights = path / LAST if path == run else path
    model = VAE.from_pretrained(weights, device=resolve_device(device)).eval()
    return Objective(model) if run is None else trained_objective(run, model, weights)


def run_of(path: Path) -> Path | None:
    """The run whose folder, or whose folder of weights, `path` is; None for weights outside a run."""
    if (path / LAST).is_dir():
        return path
    run = path.resolve().parent
    return run if path.resolve().name in (LAST, BEST) and (run / METRICS_FILE).is_file() else None


def load_images(model_path: Path, model: VAE, source: str | None) -> tuple[Dataset[Any], Dataset[Any], str]:
    """Images to use the model on, images that a baseline may learn from, and words for the first.

    The first are images that the run was not trained on, see `Split.unseen`; of a model outside a run, both are all
    images. Images are resized to the model's size.

    Raises:
        ValueError: no data to take, none that the run was not trained on, or another number of channels than the
            model's.
    """
    folder = run_of(model_path)
    run = None if folder is None else TrainConfig.from_run(folder)
    if source is None and run is None:
        raise ValueError(f"{model_path} is not a run folder, so it does not say which images to take. Pass --data.")
    name = run.data if run and source is None else str(source)
    images = data.load(name, image_size=model.config.image_size, strict=run.strict if run else False)
    if images.shape[0] != model.config.channels:
        raise ValueError(
            f"the model is for {model.config.channels} channels, the images of {name} have {images.shape[0]}. "
            "Pass --data with images like those it was trained on."
        )
    here = data.absolute_source(name)
    split = None if folder is None else Split.load(folder)
    if split is None and run and here == data.absolute_source(run.data):  # a run of a version that kept no split
        split = Split.of(images, here, validation=run.validation)
    if split is None:
        return images, images, f"all {len(images)} images of {name}"
    return split.unseen(images, name, is_own=source is None or here == split.source)


def require_free(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file unless told to, and make the folder for it.

    Raises:
        FileExistsError: `path` exists, and `force` is not set or it is no regular file.
    """
    require_regular(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already. Choose another --out, or overwrite it with --force.")
    path.parent.mkdir(parents=True, exist_ok=True)


def require_picture(n: int, model: VAE) -> None:
    """Refuse a picture of more images than memory holds; the smallest are enlarged to about 56 pixels.

    Raises:
        ValueError: `n` images are too many.
    """
    channels, height, width = model.config.image_shape
    pixels = channels * max(height, 56) * max(width, 56)
    require_fits(6 * n * pixels, next(model.parameters()).device, f"a picture of {n} images")


def require_positive(name: str, value: int, *, least: int = 1, most: int = MOST) -> None:
    """Refuse a count that is too small or too large.

    Raises:
        ValueError: `value` is below `least` or above `most`.
    """
    if not least <= value <= most:
        allowed = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"--{name} must be {allowed}; got {value}.")
