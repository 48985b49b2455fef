"""`fastvae sample`, `reconstruct`, `interpolate`: a picture each.

matplotlib comes in with the functions, since loading it would slow down every command and `--help`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastvae.data.batches import spread_images
from fastvae.models import VAE
from fastvae.training.config import SEEDS

from .inputs import (
    DataOptions,
    OutputOptions,
    load_images,
    load_model,
    require_free,
    require_picture,
    require_positive,
)

SAMPLE_HELP = """Draw new images from the prior, as a grid in a PNG.

Examples:
  fastvae sample --model runs/first
  fastvae sample --model my-model --n 100 --seed 7 --out grid.png
"""
RECONSTRUCT_HELP = """Show images above their reconstructions, as a grid in a PNG.

Examples:
  fastvae reconstruct --model runs/first
  fastvae reconstruct --model my-model --data my-photos/ --n 20 --out grid.png
"""
INTERPOLATE_HELP = """Walk through the latent space from one image to another, a row each, as a PNG.

Examples:
  fastvae interpolate --model runs/first
  fastvae interpolate --model my-model --data images.npy --n 4 --steps 15 --mode linear
"""


@dataclass(frozen=True, kw_only=True)
class Sample(OutputOptions):
    """Options of `fastvae sample`."""

    n: int = 64
    """Images to draw."""
    seed: int = 0
    """Seed of the latents; the same seed gives the same latents on every device."""
    out: Path = Path("samples.png")
    """PNG file to write."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct(DataOptions):
    """Options of `fastvae reconstruct`."""

    n: int = 40
    """Images to reconstruct."""
    out: Path = Path("reconstructions.png")
    """PNG file to write."""


@dataclass(frozen=True, kw_only=True)
class Interpolate(DataOptions):
    """Options of `fastvae interpolate`."""

    n: int = 8
    """Rows, each between two images."""
    steps: int = 9
    """Images in a row, both ends included."""
    mode: Literal["spherical", "linear"] = "spherical"
    """Way through the latent space; "spherical" stays where the prior has its mass."""
    out: Path = Path("interpolations.png")
    """PNG file to write."""


def sample(options: Sample) -> int:
    """Write the picture of `fastvae sample`."""
    from fastvae.evaluation import pictures

    require_positive("n", options.n)
    require_positive("seed", options.seed, least=0, most=SEEDS - 1)
    model = _model(options, options.n)
    print(pictures.save_samples(options.out, model, n=options.n, seed=options.seed))
    return 0


def reconstruct(options: Reconstruct) -> int:
    """Write the picture of `fastvae reconstruct`."""
    from fastvae.evaluation import pictures

    require_positive("n", options.n)
    model = _model(options, options.n)
    images, _, _ = load_images(options.model, model, options.data)
    print(pictures.save_reconstructions(options.out, model, spread_images(images, options.n)))
    return 0


def interpolate(options: Interpolate) -> int:
    """Write the picture of `fastvae interpolate`."""
    from fastvae.evaluation import pictures

    require_positive("n", options.n)
    require_positive("steps", options.steps, least=2)
    model = _model(options, options.n * options.steps)
    dataset, _, _ = load_images(options.model, model, options.data)
    images = spread_images(dataset, 2 * options.n)
    print(pictures.save_interpolations(options.out, model, images, steps=options.steps, mode=options.mode))
    return 0


def _model(options: OutputOptions, n: int) -> VAE:
    """The model, if a picture of n images can be drawn and written."""
    model = load_model(options.model, options.device)
    require_free(options.out, force=options.force)
    require_picture(n, model)
    return model
