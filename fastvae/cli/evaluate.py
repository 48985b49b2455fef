"""`fastvae evaluate`: how good a model is on images."""

from dataclasses import asdict, dataclass
from pathlib import Path

from fastvae.training import Evaluation
from fastvae.training.evaluation import baseline_nats, evaluate

from .._files import write_json
from .inputs import load_images, load_objective, require_free

HELP = """Measure a model on images: negative ELBO, its terms, active units, and a baseline.

Of the data that the run was trained on, only the validation images are used.

Examples:
  fastvae evaluate --model runs/fashion-mnist-20260101-120000
  fastvae evaluate --model my-model --data idx:mnist/ --out mnist.json
"""


@dataclass(frozen=True)
class Evaluate:
    """Options of `fastvae evaluate`."""

    model: Path
    """Run folder of `fastvae train`, or a folder that save_pretrained made."""
    data: str | None = None
    """Images, as in `fastvae train --data`; the run's own validation images if not given."""
    out: Path = Path("evaluation.json")
    """JSON file to write."""
    force: bool = False
    """Overwrite the file if it exists."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", ..."""


def run(options: Evaluate) -> int:
    """Print the figures and write them to a file."""
    require_free(options.out, force=options.force)
    objective = load_objective(options.model, options.device)
    images, baseline_images, words = load_images(options.model, objective.model, options.data)
    evaluation = evaluate(objective, images).evaluation
    baseline = baseline_nats(baseline_images, images, objective.likelihood)
    write_json(options.out, {"data": words, **asdict(evaluation), "baseline": baseline})
    print(f"on {words}:\n{summary(evaluation, baseline)}\nwritten to {options.out}")
    return 0


def summary(evaluation: Evaluation, baseline: float) -> str:
    """Three lines: the negative ELBO and its terms, the baseline, the active units."""
    return (
        f"  negative ELBO  {evaluation.nats:8.2f} nats/image ({evaluation.bits_per_dim:.4f} bits/dim)"
        f" = {evaluation.recon:.2f} reconstruction + {evaluation.kl:.2f} KL\n"
        f"  baseline       {baseline:8.2f} nats/image (no latents: the per-pixel mean of the training images)\n"
        f"  active units   {evaluation.active_units:5d} of {evaluation.latent_dim} latent dimensions"
    )
