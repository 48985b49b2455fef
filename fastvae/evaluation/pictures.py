"""What a model learnt, as grids of images."""

import io
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.models import VAE

from .._files import write_bytes
from ..data.batches import spread_images
from .elbo import as_unit_interval

GAP = 2  # pixels between two images of a grid
TITLE = 22  # height of a title in pixels
SMALLEST_TILE = 56  # images below this size are enlarged by a whole factor
LARGEST_TILE = 128  # images of the report above this size are scaled down
PROGRESS, ORIGINALS = "progress", "originals.webp"  # folder of a run, and its picture of the images as they are
FRAME, FRAMES = 10, 40  # images in a picture of the progress; pictures of a run, at most
TRAVERSAL_REACH = 3.0


def grid(images: Tensor, *, columns: int, gap: int = GAP, factor: int = 1, title: str = "") -> Image.Image:
    """Images as one picture, row by row.

    Args:
        images: [n, C, H, W], uint8 or float in [0, 1] (values outside are clipped). One channel is shown gray, three as
            RGB; of any other number, the mean.
        columns: Images in a row.
        gap: White pixels between two images and around all.
        factor: How often each pixel is repeated.
        title: Text above the images.
    """
    pixels = (as_unit_interval(images.cpu()).clamp(0, 1) * 255).round().byte()
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.double().mean(dim=1, keepdim=True).round().byte()
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    height, width = pixels.shape[2:]
    font = ImageFont.load_default(12)
    above = TITLE if title else 0
    wide = max(columns * (width + gap) + gap, math.ceil(font.getlength(title)) + 2 * gap)
    rows = -(-len(pixels) // columns)
    canvas = torch.full((above + rows * (height + gap) + gap, wide, pixels.shape[1]), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top = above + gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    picture = Image.fromarray(canvas.squeeze(2).numpy())
    if title:
        black = 0 if picture.mode == "L" else (0, 0, 0)
        ImageDraw.Draw(picture).text((gap, TITLE // 2), title, fill=black, font=font, anchor="lm")
    return picture


def save_grid(path: Path, images: Tensor, *, columns: int, title: str = "") -> Path:
    """Write a grid of images as PNG; small images are enlarged, for viewers that would show them tiny."""
    factor = -(-SMALLEST_TILE // max(images.shape[2:]))
    write_bytes(path, _encoded(grid(images, columns=columns, factor=factor, title=title), "PNG"))
    return path


def grid_webp(images: Tensor, *, columns: int, gap: int = GAP) -> bytes:
    """A grid for the report: WebP, which takes about a fifth of the bytes of PNG; large images are scaled down."""
    return _encoded(grid(scaled_down(images, LARGEST_TILE), columns=columns, gap=gap), "WEBP", quality=90)


def scaled_down(images: Tensor, side: int) -> Tensor:
    """Images whose longer side is at most `side` pixels, float in [0, 1]."""
    height, width = images.shape[2:]
    scale = min(1.0, side / max(height, width))
    size = (max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    return F.interpolate(as_unit_interval(images), size=size, mode="area")


def reconstructions(model: VAE, images: Tensor, *, columns: int) -> Tensor:
    """Rows of originals, each above the row of its reconstructions."""
    originals = as_unit_interval(images).float()
    decoded = model.reconstruct(images.to(_device(model))).float().cpu()
    rows = []
    for i in range(0, len(images), columns):
        for row in (originals[i : i + columns], decoded[i : i + columns]):
            missing = columns - len(row)  # in the last pair of rows: white
            rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
    return torch.cat(rows)


def save_reconstructions(
    path: Path, model: VAE, images: Tensor, *, title: str = "Images, each above its reconstruction"
) -> Path:
    """Write a grid of originals, each with its reconstruction below it."""
    columns = min(10, len(images))
    return save_grid(path, reconstructions(model, images, columns=columns), columns=columns, title=title)


def save_samples(path: Path, model: VAE, *, n: int = 64, seed: int = 0) -> Path:
    """Write a grid of `n` images decoded from the prior; the same seed gives the same latents on every device."""
    columns, title = min(n, 10 if n % 10 == 0 else 8), f"{n} samples from the prior, seed {seed}"
    return save_grid(path, model.sample(n, seed=seed), columns=columns, title=title)


def interpolations(model: VAE, images: Tensor, *, steps: int = 9, mode: Any = "spherical") -> Tensor:
    """Rows that go through the latent space from one image to another, [rows * (steps + 2), C, H, W].

    Args:
        model: Encodes the ends and decodes the way.
        images: [2 * rows, C, H, W]; the first half are the left ends, the second half the right ends.
        steps: Decoded images in a row; the originals stand before and after them.
        mode: "spherical" or "linear".
    """
    rows = len(images) // 2
    left, right = (half.to(_device(model)) for half in (images[:rows], images[rows : 2 * rows]))
    decoded = model.interpolate(left, right, steps=steps, mode=mode).float()
    ends = (as_unit_interval(half.cpu()).float().to(decoded.device)[:, None] for half in (left, right))
    first, last = ends
    return torch.cat([first, decoded, last], dim=1).flatten(0, 1).cpu()


def save_interpolations(path: Path, model: VAE, images: Tensor, *, steps: int = 9, mode: Any = "spherical") -> Path:
    """Write a grid of `interpolations`."""
    title = f"From image to image ({mode}), originals at both ends"
    rows = interpolations(model, images, steps=steps, mode=mode)
    return save_grid(path, rows, columns=steps + 2, title=title)


def save_progress(run: Path, model: VAE, validation: Dataset[Any], epoch: int) -> Path:
    """Write how far the model has come: reconstructions of the same few validation images after an epoch."""
    folder = run / PROGRESS
    images = spread_images(validation, FRAME)
    folder.mkdir(exist_ok=True)
    if not (folder / ORIGINALS).exists():
        write_bytes(folder / ORIGINALS, grid_webp(images, columns=FRAME))
    path = folder / f"epoch-{epoch:05d}.webp"
    write_bytes(path, grid_webp(model.reconstruct(images.to(_device(model))), columns=FRAME))
    return path


def is_in_progress(epoch: int, epochs: int) -> bool:
    """Whether `save_progress` is due: after every epoch, or at even distances if there are many, and the last."""
    return epoch % -(-epochs // FRAMES) == 0 or epoch == epochs


def traversals(model: VAE, mu: Tensor, dims: list[int], *, steps: int, reach: float = TRAVERSAL_REACH) -> Tensor:
    """What each of `dims` does: a row of `steps` images each, in which it goes from -reach to reach.

    Args:
        model: Decodes.
        mu: [latent_dim]; where all other dimensions stay.
        dims: Dimensions to change, of the flattened latent.
        steps: Images in a row.
        reach: In standard deviations of the prior.

    Returns:
        [len(dims) * steps, C, H, W] in [0, 1].
    """
    z = mu.repeat(len(dims), steps, 1)
    z[torch.arange(len(dims)), :, dims] = torch.linspace(-reach, reach, steps)
    with torch.no_grad():
        rows = [model.decode(row.to(_device(model)).reshape(-1, *model.config.latent_shape)) for row in z]
    return torch.cat(rows).clamp(0, 1).float().cpu()


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def _device(model: VAE) -> torch.device:
    return next(model.parameters()).device
