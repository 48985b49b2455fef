"""`fastvae train`: the training loop with words around it."""

from fastvae.training import TrainConfig, train

from .evaluate import summary
from .progress import reporter

HELP = """Train a VAE on images and show what it learnt.

Leaves a run folder with weights, metrics, a checkpoint and pictures. Ctrl-C stops it after a last checkpoint; --resume
goes on from there as if nothing had happened.

Examples:
  fastvae train
  fastvae train --data my-photos/ --image-size 64 64 --out runs/photos
  fastvae train --data images.npy --backbone mlp --latent-dim 16 --beta 4
  fastvae train --resume runs/photos
"""

WORDS = {
    "reconstructions.png": "validation images above their reconstructions",
    "samples.png": "new images from the prior",
    "interpolations.png": "walks from one image to another",
    "loss.png": "the loss and its terms over time",
    "latent.png": "the latent space",
}


def run(config: TrainConfig) -> int:
    """Train, report progress, and say where the results are."""
    with reporter() as report:
        result = train(config, on_event=report)
    print(f"\non {result.evaluation.images} validation images:\n{summary(result.evaluation, result.baseline)}")
    print(f"\nresults in {result.run}:")
    for path in result.pictures:
        print(f"  {path}  {WORDS[path.name]}")
    print(f"  {result.run / 'metrics.jsonl'}  every figure; weights in {result.run / 'model'}")
    print(f"\nnext: fastvae sample --model {result.run}")
    return 0
