"""Plots of a run: each is drawn by one function, for the PNG files of the run folder and, as SVG, for the report."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .elbo import Latents

# in the report, each colour is the variable of its style sheet of this name
COLOURS = {"train": "#3d6fd6", "validation": "#d9622b", "baseline": "#8a8d95", "soft": "#6a6d75", "line": "#e2e3e6"}
STYLE: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["line"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": COLOURS["soft"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["soft"],
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastvae",
    "text.color": COLOURS["soft"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
}
CURVES = {
    "nats": ("Negative ELBO", "nats per image"),
    "recon": ("Reconstruction", "nats per image"),
    "kl": ("KL", "nats per image"),
    "loss": ("Loss, as training weighs it", "loss"),
    "active_units": ("Active units", "latent dimensions"),
}
MOST_BARS = 256
MOST_CLASSES = 20
SETTLING = 0.05  # share of a curve's points, its first, that may lie outside the axis
Draw = Callable[[Axes], None]


def png(*plots: Draw, columns: int = 2) -> bytes:
    """Plots side by side, as a PNG."""
    rows = -(-len(plots) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * columns, 4.0 * rows), layout="constrained")
        for i, draw in enumerate(plots):
            draw(figure.add_subplot(rows, columns, i + 1))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def svg(draw: Draw, *, size: tuple[float, float] = (5.0, 3.2)) -> dict[str, Any]:
    """A plot as SVG with the colours of the report, and where its axes are.

    Returns:
        `svg`; `box`: left, top, width and height of the axes as shares of the picture; `x`, `y`: their limits.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    box = axes.get_position()
    shares = [box.x0, 1 - box.y1, box.width, box.height]
    return {"svg": text, "box": shares, "x": list(axes.get_xlim()), "y": list(axes.get_ylim())}


def curve(records: Sequence[dict[str, Any]], key: str, baseline: float | None = None) -> Draw:
    """A figure of the training and validation records over the steps; baseline: a level to mark."""
    known = [record for record in records if math.isfinite(record.get(key, math.nan))]
    lines = {}
    for split in ("train", "validation"):
        if points := [(record["step"], record[key]) for record in known if record["split"] == split]:
            lines[split] = np.array(points)

    def draw(axes: Axes) -> None:
        for split, points in lines.items():
            marker = "o" if split == "validation" or len(points) == 1 else None
            axes.plot(*points.T, color=COLOURS[split], marker=marker, markersize=3, linewidth=1.3, label=split)
        if baseline is not None and math.isfinite(baseline):
            label = "baseline without latents"
            axes.axhline(baseline, color=COLOURS["baseline"], linewidth=1, linestyle="--", label=label)
        if lines:
            level = [] if baseline is None or not math.isfinite(baseline) else [baseline]
            axes.set_ylim(*_limits(lines, level))
            axes.legend(fontsize="small")
        title, unit = CURVES[key]
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.ticklabel_format(useOffset=False)
        if key == "active_units":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))

    return draw


def _limits(lines: dict[str, npt.NDArray[np.float64]], level: list[float]) -> tuple[float, float]:
    """Limits of the values, without the first of the training where these would more than double the range."""
    whole = np.concatenate([points[:, 1] for points in lines.values()] + [level])
    start = {"train": SETTLING, "validation": 0.0}
    settled = [points[math.ceil(start[split] * (len(points) - 1)) :, 1] for split, points in lines.items()]
    values = np.concatenate([*settled, level])
    values = whole if np.ptp(whole) <= 2 * np.ptp(values) else values
    margin = 0.06 * np.ptp(values) or 0.1 * abs(values[0]) or 1.0
    return values.min() - margin, values.max() + margin


def curves(records: Sequence[dict[str, Any]], baseline: float) -> dict[str, Draw]:
    """The curves that the records hold, by key."""
    found = [key for key in CURVES if any(key in record for record in records)]
    return {key: curve(records, key, baseline if key == "nats" else None) for key in found}


def latent_map(plane: Tensor, share: float, labels: Tensor | None, names: Sequence[str] | None) -> Draw:
    """Posterior means in the plane of `principal_plane`, coloured by class, with the classes' names."""
    xs, ys = plane.T.numpy()

    def draw(axes: Axes) -> None:
        classes = [] if labels is None else np.unique(labels.numpy()).tolist()
        if labels is None:
            axes.scatter(xs, ys, s=7, color=COLOURS["train"])
        elif len(classes) > MOST_CLASSES:
            axes.scatter(xs, ys, s=7, c=labels.numpy(), cmap="hsv")
        else:
            for i, label in enumerate(classes):
                name = names[label] if names and 0 <= label < len(names) else str(label)
                marker = "o" if i < 10 else "^"  # there are ten colours
                of = (labels == label).numpy()
                axes.scatter(xs[of], ys[of], s=7, color=f"C{i % 10}", marker=marker, label=name)
            axes.legend(fontsize="small", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.2)
        axes.set(
            xlabel="first principal direction",
            ylabel="second principal direction",
            title=f"Posterior means of {len(xs)} validation images ({share:.0%} of variance)",
        )

    return draw


def kl_bars(latents: Latents, order: Sequence[int]) -> Draw:
    """KL of the latent dimensions, in this order; active ones in the colour of the training."""

    def draw(axes: Axes) -> None:
        colours = [COLOURS["train" if active else "baseline"] for active in latents.active[order].tolist()]
        axes.bar(range(1, len(order) + 1), latents.kl_per_dim[order].numpy(), color=colours)
        n_active, total = int(latents.active.sum()), len(latents.kl_per_dim)
        axes.set(
            xlabel="latent dimension, by KL",
            ylabel="nats per image",
            title=f"KL of each dimension: {n_active} of {total} active (blue)",
        )

    return draw


def by_kl(latents: Latents, most: int = MOST_BARS) -> list[int]:
    """The dimensions with the largest KL, largest first."""
    order: list[int] = latents.kl_per_dim.argsort(descending=True)[:most].tolist()
    return order


def principal_plane(mu: Tensor) -> tuple[Tensor, float]:
    """Points [n, 2] along their two largest principal directions, and the share of the variance in these."""
    centred = (mu - mu.mean(dim=0)).double()
    # not pca_lowrank: it draws from torch's default generator
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    plane = centred @ directions[:2].T
    if plane.shape[1] < 2:
        plane = torch.cat([plane, torch.zeros(len(plane), 2 - plane.shape[1], dtype=plane.dtype)], dim=1)
    return plane, float(singular[:2].square().sum() / singular.square().sum().clamp_min(1e-300))
