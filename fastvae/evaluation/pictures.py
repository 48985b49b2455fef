"""What a model learnt, as pictures: grids of images, the loss curve, the latent space."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.models import VAE

from .._files import write_bytes
from ..data.batches import labels_of, spread_images
from .elbo import Latents, as_unit_interval

GAP = 2  # pixels between two images of a grid
SMALLEST_TILE = 56  # images below this size are enlarged by a whole factor
PROGRESS, ORIGINALS = "progress", "originals.png"  # folder of a run, and its picture of the images as they are
FRAME, FRAMES = 10, 40  # images in a picture of the progress; pictures of a run, at most
TRAVERSAL_REACH = 3.0
MOST_BARS = 256


def grid_png(images: Tensor, *, columns: int, gap: int = GAP, enlarge: bool = True) -> bytes:
    """Images as one PNG, row by row.

    Args:
        images: [n, C, H, W], uint8 or float in [0, 1] (values outside are clipped). One channel is shown gray, three as
            RGB; of any other number, the mean.
        columns: Images in a row.
        gap: White pixels between two images and around all.
        enlarge: Repeat the pixels of small images, for viewers that would show them tiny.
    """
    pixels = (as_unit_interval(images.cpu()).clamp(0, 1) * 255).round().byte()
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.double().mean(dim=1, keepdim=True).round().byte()
    factor = -(-SMALLEST_TILE // max(pixels.shape[2:])) if enlarge else 1
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    height, width = pixels.shape[2:]
    rows = -(-len(pixels) // columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, pixels.shape[1])
    canvas = torch.full(shape, 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(canvas.squeeze(2).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(path: Path, images: Tensor, *, columns: int) -> Path:
    """Write `grid_png` of images."""
    write_bytes(path, grid_png(images, columns=columns))
    return path


def save_reconstructions(path: Path, model: VAE, images: Tensor, *, columns: int = 10) -> Path:
    """Write a grid of originals, each with its reconstruction below it."""
    columns = min(columns, len(images))
    originals = as_unit_interval(images).float()
    reconstructions = model.reconstruct(images.to(_device(model))).float().cpu()
    rows = []
    for i in range(0, len(images), columns):
        for row in (originals[i : i + columns], reconstructions[i : i + columns]):
            missing = columns - len(row)  # in the last pair of rows: white
            rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
    return save_grid(path, torch.cat(rows), columns=columns)


def save_samples(path: Path, model: VAE, *, n: int = 64, seed: int = 0) -> Path:
    """Write a grid of `n` images decoded from the prior; the same seed gives the same latents on every device."""
    return save_grid(path, model.sample(n, seed=seed), columns=min(n, 10 if n % 10 == 0 else 8))


def save_interpolations(path: Path, model: VAE, images: Tensor, *, steps: int = 9, mode: Any = "spherical") -> Path:
    """Write a grid whose rows go through the latent space from one image to another.

    Args:
        path: File to write.
        model: Encodes the ends and decodes the way.
        images: [2 * rows, C, H, W]; the first half are the left ends, the second half the right ends.
        steps: Images in a row, ends included.
        mode: "spherical" or "linear".
    """
    rows = len(images) // 2
    images = images[: 2 * rows].to(_device(model))
    left, right = images[:rows], images[rows:]
    return save_grid(path, model.interpolate(left, right, steps=steps, mode=mode).flatten(0, 1), columns=steps)


def save_loss_curve(path: Path, records: list[dict[str, Any]], baseline: float) -> Path:
    """Plot the records of metrics.jsonl: both terms on training and validation images, and the baseline."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for split, style, marker in (("train", "-", None), ("validation", "--", "o")):
        lines = [record for record in records if record["split"] == split]
        steps = [record["step"] for record in lines]
        for term, colour in (("nats", "black"), ("recon", "tab:blue"), ("kl", "tab:orange")):
            label = f"{split} {'negative ELBO' if term == 'nats' else term}"
            values = [record[term] for record in lines]
            axes.plot(steps, values, style, marker=marker, markersize=3, linewidth=1, color=colour, label=label)
    axes.axhline(baseline, color="gray", linewidth=1, linestyle=":", label="baseline (per-pixel mean)")
    axes.set(xlabel="step", ylabel="nats per image", title="Negative ELBO and its terms")
    heights = [baseline, *(record["nats"] for record in records if record["split"] == "validation")]
    axes.set_ylim(0, 1.5 * max((height for height in heights if math.isfinite(height)), default=1.0))
    axes.legend(fontsize="small")
    return _save_figure(path, figure)


def save_latent_space(path: Path, latents: Latents, dataset: Dataset[Any]) -> Path:
    """Plot the posterior means along their two largest principal directions, and the KL of each dimension.

    Args:
        path: File to write.
        latents: Posteriors of the images of `dataset`.
        dataset: Colours the points by its `labels`, if it has any.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_principal_plane(left, latents.mu, labels_of(dataset))
    order = latents.kl_per_dim.argsort(descending=True)[:MOST_BARS]
    colours = np.where(latents.active[order].numpy(), "tab:blue", "lightgray")
    right.bar(range(len(order)), latents.kl_per_dim[order].numpy(), color=colours.tolist())
    n_active = int(latents.active.sum())
    right.set(
        xlabel="latent dimension, sorted",
        ylabel="KL in nats",
        title=f"KL per dimension: {n_active} of {len(latents.kl_per_dim)} active (blue)",
    )
    return _save_figure(path, figure)


def save_all(run: Path, model: VAE, validation: Dataset[Any], latents: Latents, **curve: Any) -> list[Path]:
    """Write the five pictures of a run folder; `curve` has the records and the baseline of the loss curve."""
    images = spread_images(validation, 40)
    ends = spread_images(validation, 16)
    return [
        save_reconstructions(run / "reconstructions.png", model, images),
        save_samples(run / "samples.png", model),
        save_interpolations(run / "interpolations.png", model, ends),
        save_loss_curve(run / "loss.png", **curve),
        save_latent_space(run / "latent.png", latents, validation),
    ]


def save_progress(run: Path, model: VAE, validation: Dataset[Any], epoch: int) -> None:
    """Write how far the model has come: the same few validation images, and their reconstructions after an epoch."""
    folder = run / PROGRESS
    images = spread_images(validation, FRAME)
    folder.mkdir(exist_ok=True)
    if not (folder / ORIGINALS).exists():
        write_bytes(folder / ORIGINALS, grid_png(images, columns=FRAME, enlarge=False))
    reconstructions = model.reconstruct(images.to(_device(model)))
    write_bytes(folder / f"epoch-{epoch:05d}.png", grid_png(reconstructions, columns=FRAME, enlarge=False))


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


def principal_plane(mu: Tensor) -> tuple[Tensor, float]:
    """Points [n, 2] along their two largest principal directions, and the share of the variance in these."""
    centred = (mu - mu.mean(dim=0)).double()
    # not pca_lowrank: it draws from torch's default generator
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ directions[:2].T
    if plane.shape[1] < 2:
        plane = torch.cat([plane, torch.zeros(len(plane), 2 - plane.shape[1], dtype=plane.dtype)], dim=1)
    return plane, float(singular[:2].square().sum() / singular.square().sum().clamp_min(1e-300))


def _plot_principal_plane(axes: Axes, mu: Tensor, labels: Tensor | None) -> None:
    plane, share = principal_plane(mu)
    colours = None if labels is None else labels.numpy()
    points = axes.scatter(
        plane[:, 0].numpy(), plane[:, 1].numpy(), s=6, c=colours, cmap=None if labels is None else "tab10"
    )
    if labels is not None:
        axes.figure.colorbar(points, ax=axes, label="label")
    axes.set(
        xlabel="first principal direction",
        ylabel="second",
        title=f"Posterior means, {len(mu)} validation images ({share:.0%} of variance)",
    )


def _save_figure(path: Path, figure: Figure) -> Path:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path


def _device(model: VAE) -> torch.device:
    return next(model.parameters()).device
