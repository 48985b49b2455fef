"""`fastvae train`: the training loop with words around it."""

import sys
from dataclasses import fields

from fastvae._distributed import is_first_process
from fastvae.presets import PRESETS
from fastvae.training import TrainConfig, train
from fastvae.training.loss_config import LossConfig
from fastvae.training.run_folder import METRICS_FILE

from .evaluate import summary
from .malloc import keep_freed_memory
from .output import Output
from .progress import reporter

HELP = f"""Train a VAE on images and show what it learnt.

Leaves a run folder with weights, metrics, a checkpoint, pictures and a report. Ctrl-C stops it after a last checkpoint;
--resume goes on from there as if nothing had happened.

It minimises recon_weight * reconstruction + beta * KL, by default the negative ELBO. Both terms are reported in nats
per image, whatever their weights and reductions.

Likelihoods: gaussian learns one variance, gaussian_fixed keeps it, gaussian_optimal uses the best one of each batch;
scaled_l1 and scaled_l2 learn a scale. With bernoulli, bernoulli_probs, l2_logits and l1_logits the decoder returns
logits, and pictures show probabilities. The likelihood parameter is delta of huber, beta of smooth_l1, alpha of
log_cosh, the log variance of gaussian and gaussian_fixed, and the log scale of scaled_l1 and scaled_l2.

Presets: {", ".join(PRESETS)}.

Examples:
  fastvae train
  fastvae train --data my-photos/ --image-size 64 64 --out runs/photos
  fastvae train --data images.npy --backbone mlp --latent-dim 16 --beta 4
  fastvae train --likelihood bernoulli --beta-schedule linear --ema 0.999
  fastvae train --preset ldm --beta 1e-4 --free-bits 0.1 --free-bits-mode dim
  fastvae train --resume runs/photos
"""

GROUPS = {
    "data": "data image_size flip strict validation",
    "model": "backbone latent_dim width residual hidden latent_channels",
    "loss": " ".join(field.name for field in fields(LossConfig)),
    "optimisation": "epochs batch_size learning_rate warmup_steps weight_decay clip_norm ema seed",
    "run and logging": "out resume init_from log log_every checkpoint_every",
    "scale": "device precision workers cache channels_last accumulate checkpointing compile shard",
}

WORDS = {
    "report.html": "all of it as one page, with the latent space to explore",
    "reconstructions.png": "validation images above their reconstructions",
    "samples.png": "new images from the prior",
    "interpolations.png": "walks from one image to another",
    "loss.png": "the loss and its terms over time",
    "latent.png": "the latent space",
}


def run(config: TrainConfig) -> int:
    """Train, report progress, and say where the results are."""
    keep_freed_memory()
    if not is_first_process():
        train(config)
        return 0
    if isinstance(sys.stdout, Output):
        sys.stdout.notice = "the training goes on"
    with reporter() as report:
        result = train(config, on_event=report)
    print(f"\non {result.evaluation.images} validation images:\n{summary(result.evaluation, result.baseline)}")
    print(f"\nresults in {result.run}:")
    for path in result.pictures:
        print(f"  {path}  {WORDS[path.name]}")
    print(f"  {result.run / METRICS_FILE}  every figure; weights in {result.run / 'model'}")
    print(f"\nnext: fastvae sample --model {result.run}")
    return 0
