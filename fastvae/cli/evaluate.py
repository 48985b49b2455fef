"""`fastvae evaluate`: how good a model is on images."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from fastvae.data.batches import load_batches
from fastvae.evaluation.density import Density, bits_per_dim
from fastvae.evaluation.elbo import Evaluation, baseline_nats, evaluate
from fastvae.evaluation.likelihood_bounds import importance_weighted_nats
from fastvae.evaluation.objective import Objective, decode_to_images
from fastvae.training.setup import require_fits

from .._files import null_non_finite, write_json
from .inputs import DataOptions, load_images, load_objective, require_free, require_positive

HELP = """Measure a model on images: ELBO, importance-weighted likelihood, active units, PSNR, SSIM, and a baseline.

Of the data that the run was trained on, only the validation images are used. Everything is written as JSON; the images
that the model finds least likely go into a picture beside it.

Examples:
  fastvae evaluate --model runs/first
  fastvae evaluate --model runs/first --samples 500 --chunk 50
  fastvae evaluate --model my-model --data idx:mnist/ --out mnist.json --outliers 0
"""


@dataclass(frozen=True, kw_only=True)
class Evaluate(DataOptions):
    """Options of `fastvae evaluate`."""

    samples: int = 16
    """Latents of each image in the importance-weighted bound on its log-likelihood; more make it tighter."""
    chunk: int = 8
    """Latents of an image that are decoded at once."""
    batch_size: int = 128
    """Images at once; no figure depends on it."""
    outliers: int = 20
    """Images to show that the model finds least likely, above their reconstructions; 0 draws no picture."""
    out: Path = Path("evaluation.json")
    """JSON file to write; the picture of outliers takes its name, ending in -outliers.png."""


def run(options: Evaluate) -> int:
    """Print the figures and write them to a file."""
    for name in ("samples", "chunk", "batch_size"):
        require_positive(name.replace("_", "-"), getattr(options, name))
    require_positive("outliers", options.outliers, least=0)
    picture = options.out.with_name(f"{options.out.stem}-outliers.png")
    objective = load_objective(options.model, options.device)
    for path in (options.out, picture)[: 1 + (options.outliers > 0)]:
        require_free(path, force=options.force)
    images, baseline_images, words = load_images(options.model, objective.model, options.data)
    decoded = min(options.chunk, options.samples) * min(options.batch_size, len(images))  # type: ignore[arg-type]
    elements = math.prod(objective.model.config.image_shape) + math.prod(objective.model.config.latent_shape)
    device = next(objective.parameters()).device
    require_fits(8 * decoded * elements, device, f"to decode {decoded} latents at once (--chunk, --batch-size)")
    found = evaluate(objective, images, batch_size=options.batch_size)
    baseline = baseline_nats(baseline_images, images, objective.likelihood)
    if found.log_scale is not None:
        objective.fix_scale(found.log_scale)
    bounds = importance_weighted_nats(
        objective, images, samples=options.samples, chunk=options.chunk, batch_size=options.batch_size
    )
    worst = bounds.argsort(descending=True)[: options.outliers].tolist()
    likelihood = likelihood_figures(objective, found.evaluation, bounds, options.samples)
    decode_to_images(objective)
    quality = quality_figures(objective, images, options.batch_size)
    outliers = [{"image": i, "nll": float(bounds[i])} for i in worst]
    figures = {"data": words, **asdict(found.evaluation), "baseline": baseline, "likelihood": likelihood, **quality}
    if worst:
        _draw(picture, objective, images, worst)
    write_json(options.out, null_non_finite({**figures, "outliers": outliers}))
    print(f"on {words}:\n{summary(found.evaluation, baseline)}\n{more(figures)}\nwritten to {options.out}")
    if worst:
        print(f"the {len(worst)} least likely images: {picture}")
    return 0


def likelihood_figures(
    objective: Objective, evaluation: Evaluation, bounds: Tensor, samples: int
) -> dict[str, float | int | str]:
    """-log p(x) of an image in nats, from above, with all constants: by the ELBO and importance-weighted."""
    density = Density.of(objective.likelihood)
    n = math.prod(objective.model.config.image_shape)
    nll = float(bounds.mean())
    return {
        "nll": nll,
        "nll_standard_error": float(bounds.std() / len(bounds) ** 0.5) if len(bounds) > 1 else 0.0,
        "nll_elbo": density.nll(evaluation.nats, n),
        "samples": samples,
        "bits_per_dim": bits_per_dim(nll, n, discrete=density.discrete),
        "of": "probability of binary images" if density.discrete else "density of values in [0, 1], 256 levels",
    }


def quality_figures(objective: Objective, images: Dataset[Any], batch_size: int) -> dict[str, float | None]:
    """PSNR and SSIM; None where scikit-image is missing."""
    from fastvae.evaluation.image_quality import reconstruction_quality

    try:
        return reconstruction_quality(objective.model, images, batch_size=batch_size)._asdict()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "skimage":
            raise
        return {"psnr": None, "ssim": None}


def more(figures: dict[str, Any]) -> str:
    """Two lines: the likelihood, and the quality of reconstructions."""
    found = figures["likelihood"]
    lines = (
        f"  -log p(x) <=   {found['nll']:8.2f} nats/image +- {found['nll_standard_error']:.2f}"
        f" ({found['bits_per_dim']:.4f} bits/dim), importance-weighted, K = {found['samples']}; by the ELBO"
        f" {found['nll_elbo']:.2f}; {found['of']}\n"
    )
    if figures["psnr"] is None:
        return lines + '  PSNR and SSIM need scikit-image: pip install "fastvae-triton[photos]"'
    ssim = "images too small for it" if figures["ssim"] is None else f"{figures['ssim']:.4f}"
    return f"{lines}  PSNR           {figures['psnr']:8.2f} dB, SSIM {ssim}"


def _draw(path: Path, objective: Objective, images: Dataset[Any], worst: list[int]) -> None:
    from fastvae.evaluation.pictures import save_reconstructions

    save_reconstructions(path, objective.model, next(iter(load_batches(images, [worst]))))


def summary(evaluation: Evaluation, baseline: float) -> str:
    """Three lines: the negative ELBO and its terms, the baseline, the active units."""
    return (
        f"  negative ELBO  {evaluation.nats:8.2f} nats/image ({evaluation.bits_per_dim:.4f} bits/dim)"
        f" = {evaluation.recon:.2f} reconstruction + {evaluation.kl:.2f} KL\n"
        f"  baseline       {baseline:8.2f} nats/image (no latents: the per-pixel mean of the training images)\n"
        f"  active units   {evaluation.active_units:5d} of {evaluation.latent_dim} latent dimensions"
    )
