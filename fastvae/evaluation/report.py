"""What became of a run: its evaluation, its pictures, and all of it as one page that needs no other file."""

import base64
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from .._files import CONFIG_FILE, dump_json, null_non_finite, read_json_object, write_bytes, write_json
from ..data.batches import class_names_of, labels_of, load_batches, spread, spread_images
from . import pictures, plots
from .elbo import Evaluation, Latents, Scores
from .objective import Objective, decode_to_images

REPORT = "report.html"
TRAVERSED, STEPS = 32, 11  # dimensions, at most; images of each
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
        The report and the pictures.
    """
    evaluation, latents = scores.evaluation, scores.latents
    write_json(run / "evaluation.json", null_non_finite({**asdict(evaluation), "baseline": baseline}))
    shown = spread(len(latents.mu), MAPPED)
    plane, share = plots.principal_plane(latents.mu)
    labels, names = labels_of(validation), class_names_of(validation)
    labels = None if labels is None else labels[shown]
    curves = plots.curves(records, baseline)
    order = plots.by_kl(latents)
    latent = (plots.latent_map(plane[shown], share, labels, names), plots.kl_bars(latents, order))
    config = read_json_object(run / CONFIG_FILE)
    model, ends = objective.model, spread_images(validation, 16)
    with decode_to_images(objective):
        drawn = [
            pictures.save_reconstructions(run / "reconstructions.png", model, spread_images(validation, 40)),
            pictures.save_samples(run / "samples.png", model),
            pictures.save_interpolations(run / "interpolations.png", model, ends),
            _save(run / "loss.png", plots.png(*curves.values())),
            _save(run / "latent.png", plots.png(*latent)),
        ]
        page = {
            "title": f"fastvae run {run.resolve().name}",
            "facts": facts(config, objective, records, evaluation.images),
            "cards": _cards(evaluation, baseline),
            "records": records,
            "curves": {key: plots.svg(draw) for key, draw in curves.items()},
            "samples": _uri(pictures.grid_webp(model.sample(64, seed=0), columns=8)),
            "interpolations": _uri(pictures.grid_webp(pictures.interpolations(model, ends), columns=11)),
            "progress": _progress(run),
            "traversals": _traversals(objective, latents, order[:TRAVERSED]),
            "map": plots.svg(latent[0]) | _map(plane, shown, labels, names, validation),
            "bars": plots.svg(latent[1]) | {"dims": order, "kl": latents.kl_per_dim[order].tolist()},
            "config": config,
        }
    # in a script element only its end tag is special
    content = dump_json(null_non_finite(page)).replace("</", "<\\/")
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return [_save(run / REPORT, template.replace("/*DATA*/", content).encode()), *drawn]


def facts(
    config: dict[str, Any], objective: Objective, records: Sequence[dict[str, Any]], n_images: int
) -> list[tuple[str, str]]:
    """The header of the report: data set, model, loss, beta and duration of a run."""
    model, schedule = objective.model.config, config.get("beta_schedule", "constant")
    parameters = sum(p.numel() for p in objective.model.parameters())
    image, latent = (" x ".join(map(str, shape)) for shape in (model.image_shape, model.latent_shape))
    likelihood, preset = objective.criterion.likelihood, config.get("preset")
    likelihood = config.get("likelihood") or (likelihood if isinstance(likelihood, str) else type(likelihood).__name__)
    last = records[-1] if records else {}
    beta = f"{last['beta']:.3g}" if "beta" in last else "unknown"
    if schedule != "constant":
        beta = f"{schedule}, from {config.get('beta_start', 0):.3g}; at the end {beta}"
    minutes, seconds = divmod(round(seconds_of_training(records, config.get("batch_size", 0))), 60)
    return [
        ("Data set", f"{Path(str(config.get('data'))).name}, images of {image}"),
        ("Model", f"{model.backbone}, {parameters:,} parameters, latents of {latent}"),
        ("Loss", likelihood if preset is None else f"{likelihood}, of the preset {preset}"),
        ("Beta", beta),
        ("Training", f"{last.get('epoch', 0)} epochs, {last.get('step', 0)} steps, {minutes} min {seconds} s"),
        ("Figures", f"of {n_images:,} validation images"),
    ]


def seconds_of_training(records: Sequence[dict[str, Any]], batch_size: int) -> float:
    """Time in training steps, without validation and pauses between resumed parts."""
    seconds, step = 0.0, 0
    for record in records:
        if record["split"] == "train" and record.get("images_per_second", 0) > 0:
            seconds += (record["step"] - step) * batch_size / record["images_per_second"]
            step = record["step"]
    return seconds


def three_digits(x: float) -> str:
    """A figure with three significant digits, thousands separated."""
    if x == 0 or not math.isfinite(x):
        return str(x)
    decimals = 2 - math.floor(math.log10(abs(x)))
    return f"{x:.2e}" if decimals > 6 else f"{round(x, decimals):,.{max(0, decimals)}f}"


def _cards(evaluation: Evaluation, baseline: float) -> list[tuple[str, str]]:
    return [
        (three_digits(evaluation.nats), "negative ELBO, nats/image"),
        (three_digits(evaluation.recon), "reconstruction, nats/image"),
        (three_digits(evaluation.kl), "KL, nats/image"),
        (three_digits(evaluation.bits_per_dim), "bits/dim"),
        (three_digits(baseline), "baseline without latents, nats/image"),
        (f"{evaluation.active_units} of {evaluation.latent_dim}", "active units"),
    ]


def _save(path: Path, content: bytes) -> Path:
    write_bytes(path, content)
    return path


def _uri(webp: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _progress(run: Path) -> dict[str, Any]:
    folder = run / pictures.PROGRESS
    paths = sorted(folder.glob("epoch-*.webp"))
    frames = [{"epoch": int(path.stem.rpartition("-")[2]), "picture": _uri(path.read_bytes())} for path in paths]
    return {"frames": frames, "originals": _uri((folder / pictures.ORIGINALS).read_bytes()) if frames else None}


def _traversals(objective: Objective, latents: Latents, dims: list[int]) -> dict[str, Any]:
    images = pictures.traversals(objective.model, latents.mu[0], dims, steps=STEPS)
    kl = latents.kl_per_dim[dims].tolist()
    picture = _uri(pictures.grid_webp(images, columns=STEPS))
    return {"dims": dims, "kl": kl, "picture": picture, "reach": pictures.TRAVERSAL_REACH, "steps": STEPS}


def _map(
    plane: Tensor, shown: list[int], labels: Tensor | None, names: Sequence[str] | None, validation: Dataset[Any]
) -> dict[str, Any]:
    """Points of the map, what to say of each, and a sheet of thumbnails to show at them."""
    images: Tensor = next(iter(load_batches(validation, [shown])))
    thumbnails = pictures.scaled_down(images, THUMBNAIL)
    columns = min(SPRITES, len(shown))
    words = [f"image {index}" for index in shown]
    if labels is not None:
        known = dict(enumerate(names or []))
        words = [f"{word}: {known.get(label, label)}" for word, label in zip(words, labels.tolist(), strict=True)]
    return {
        "points": [[float(f"{value:.5g}") for value in point] for point in plane[shown].tolist()],
        "words": words,
        "sprites": _uri(pictures.grid_webp(thumbnails, columns=columns, gap=0)),
        "tile": list(thumbnails.shape[2:]),
        "columns": columns,
    }
