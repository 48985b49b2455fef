"""What became of a run: its evaluation, its pictures, and all of it as one page that needs nothing beside it."""

import base64
import math
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.models import VAE

from .._files import CONFIG_FILE, dump_json, null_non_finite, read_json_object, write_bytes, write_json
from ..data.batches import labels_of, load_batches, spread
from .elbo import Latents, Scores, as_unit_interval
from .objective import Objective, decode_to_images
from .pictures import MOST_BARS, ORIGINALS, PROGRESS, TRAVERSAL_REACH, grid_png, principal_plane, save_all, traversals

REPORT = "report.html"
TRAVERSED = 32  # dimensions, at most
MAPPED, THUMBNAIL, SPRITES = 1000, 32, 40  # images on the map; their longer side in pixels; how many in a row


def summarize(
    run: Path,
    objective: Objective,
    validation: Dataset[Any],
    scores: Scores,
    *,
    records: list[dict[str, Any]],
    baseline: float,
) -> list[Path]:
    """Write evaluation.json, the pictures and report.html of a run.

    Args:
        run: Its folder.
        objective: What it trained.
        validation: Images to show.
        scores: Of the objective on these images.
        records: Lines of metrics.jsonl.
        baseline: Nats per validation image of the latent-free baseline.

    Returns:
        The pictures and the report.
    """
    evaluation, latents = scores.evaluation, scores.latents
    write_json(run / "evaluation.json", null_non_finite({**asdict(evaluation), "baseline": baseline}))
    with decode_to_images(objective):
        drawn = save_all(run, objective.model, validation, latents, records=records, baseline=baseline)
        page = {
            "title": f"fastvae run {run.resolve().name}",
            "summary": _summary(objective.model, evaluation.images),
            "cards": [
                (f"{evaluation.nats:.2f}", "negative ELBO, nats/image"),
                (f"{evaluation.recon:.2f}", "reconstruction, nats/image"),
                (f"{evaluation.kl:.2f}", "KL, nats/image"),
                (f"{evaluation.bits_per_dim:.4f}", "bits/dim"),
                (f"{baseline:.2f}", "baseline without latents, nats/image"),
                (f"{evaluation.active_units} of {evaluation.latent_dim}", "active units"),
            ],
            "records": records,
            "baseline": baseline,
            "samples": data_uri((run / "samples.png").read_bytes()),
            "interpolations": data_uri((run / "interpolations.png").read_bytes()),
            "active": evaluation.active_units,
            "dims": evaluation.latent_dim,
            **_progress(run),
            **_dimensions(objective.model, latents),
            "map": _map(latents, validation),
            "config": read_json_object(run / CONFIG_FILE),
        }
    # in a script element only its end tag is special
    content = dump_json(null_non_finite(page)).replace("</", "<\\/")
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    write_bytes(run / REPORT, template.replace("/*DATA*/", content).encode())
    return [run / REPORT, *drawn]


def data_uri(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _summary(model: VAE, images: int) -> str:
    config, parameters = model.config, sum(p.numel() for p in model.parameters())
    return (
        f"{config.backbone}, {parameters:,} parameters, images {' x '.join(map(str, config.image_shape))}, "
        f"latents {' x '.join(map(str, config.latent_shape))}; on {images} validation images:"
    )


def _progress(run: Path) -> dict[str, Any]:
    folder = run / PROGRESS
    frames = [
        {"epoch": int(path.stem.rpartition("-")[2]), "picture": data_uri(path.read_bytes())}
        for path in sorted(folder.glob("epoch-*.png"))
    ]
    return {"progress": frames, "originals": data_uri((folder / ORIGINALS).read_bytes()) if frames else None}


def _dimensions(model: VAE, latents: Latents) -> dict[str, Any]:
    """KL of the dimensions, and what the largest of them do."""
    order = latents.kl_per_dim.argsort(descending=True)
    steps = 11
    bars = [
        {"dim": dim, "kl": float(latents.kl_per_dim[dim]), "active": bool(latents.active[dim])}
        for dim in order[:MOST_BARS].tolist()
    ]
    rows = bars[:TRAVERSED]
    images = traversals(model, latents.mu[0], [row["dim"] for row in rows], steps=steps)
    picture = data_uri(grid_png(images, columns=steps, enlarge=False))
    return {"kl": bars, "traversals": {"rows": rows, "picture": picture, "reach": TRAVERSAL_REACH}}


def _map(latents: Latents, validation: Dataset[Any]) -> dict[str, Any]:
    """Posterior means in a plane, and a sheet of thumbnails to show at them."""
    shown = spread(len(latents.mu), MAPPED)
    plane, share = principal_plane(latents.mu)
    labels = labels_of(validation)
    images: Tensor = next(iter(load_batches(validation, [shown])))
    height, width = images.shape[2:]
    scale = min(1.0, THUMBNAIL / max(height, width))
    tile = (max(1, math.floor(height * scale)), max(1, math.floor(width * scale)))
    thumbnails = F.interpolate(as_unit_interval(images), size=tile, mode="area")
    columns = min(SPRITES, len(shown))
    return {
        "points": [[float(f"{value:.5g}") for value in point] for point in plane[shown].tolist()],
        "indices": shown,
        "labels": None if labels is None else labels[shown].tolist(),
        "share": share,
        "sprites": data_uri(grid_png(thumbnails, columns=columns, gap=0, enlarge=False)),
        "tile": tile,
        "columns": columns,
    }
