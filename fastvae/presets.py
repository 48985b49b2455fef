"""The losses of other projects as options of `VAELoss`: the same number, the same gradient.

d = x' - x, of an image's element; bce(p) is the binary cross entropy of x' = p; k = ½ (mu² + exp(logvar) - 1 - logvar),
of a latent; B is the batch. Sums and means run over everything.

    preset             loss                                                       what the project calls it
    pytorch_examples   Σ bce(p) + Σ k                                             the VAE example of PyTorch
    pythae             (½ Σ d² + Σ k) / B                                         VAE, reconstruction_loss="mse"
    pythae_bce         (Σ bce(p) + Σ k) / B                                       VAE, reconstruction_loss="bce"
    pytorch_vae        mean d² + 0.00025 Σ k / B                                  PyTorch-VAE's VanillaVAE, training
    ldm                (Σ (|d| / exp(s) + s) + 1e-6 Σ k) / B, s learned, from 0   latent diffusion's first stage
    diffusers          (Σ d² + 1e-6 Σ k) / B                                      train_autoencoderkl.py
    disvae_bernoulli   (Σ bce(p) + Σ k) / B                                       disentangling-vae, loss "VAE"
    disvae_gaussian    (255 Σ d² + Σ k) / B
    disvae_laplace     (3 Σ |d| + Σ k) / B
    sigma_vae          Σ (½ d² / σ² + log σ + ½ log 2π) + Σ k, σ = 1              σ-VAE's gaussian_vae
    sigma_vae_optimal  the same, σ² = mean d²                                     σ-VAE's optimal_sigma_vae
    pyro               Σ bce(p) + Σ k                                             TraceMeanField_ELBO, Bernoulli(probs)
    lightning_bolts    mean d² + 0.1 mean k                                       VAE of Lightning Bolts
    monai              mean |d| + 1e-6 Σ k / B                                    MONAI's 2-D AutoencoderKL tutorial

Of counts, target x, logits x':

    scvi               (Σ -log NB(x) + beta Σ k) / B, beta from 0 to 1            scvi-tools' SCVI, "nb" and "zinb"
    multvae            (Σ -x log softmax(x') + beta Σ k) / B, beta from 0 to 0.2  Mult-VAE

What is the project's own and needs an argument:

- Perceptual and adversarial terms are the caller's. A perceptual term that the project adds to each pixel goes into
  `extra`, [B]: `perceptual_weight * p_loss.flatten()` for ldm, `0.5 * p_loss.flatten()` for diffusers.
- `beta=`: PyTorch-VAE validates with 1.0, disvae's loss "betaH" trains with 4; `capacity=Capacity(nats, "batch")` with
  beta 100 is its "betaB". `likelihood="l1"` is `--rec_loss l1` of diffusers.
- ldm, diffusers and monai clamp logvar to (-30, 20). With `kl=` the clamp belongs into `reparameterize_kl`: pass
  `logvar_clamp=None` here. MONAI's encoder returns σ: pass `logvar_from_std(sigma)`.
- s of ldm is a parameter of the loss, trained if an optimiser is given it; that of latent diffusion is not.
- σ-VAE bounds log σ softly by -6, so σ = 1 is 1.0025, and so it is here. For its learned σ pass
  `likelihood=Gaussian(torch.nn.Parameter(torch.zeros(())), full=True, softclip=-6.0)`, whose logvar is 2 log σ.
- scvi takes log_theta, log_library and, for "zinb", zero_logits by `likelihood_args`, or `likelihood=` with a
  `NegativeBinomial` of its own.
  Its beta is a schedule of 400 steps, to be called once an epoch, as SCVI warms up its KL; multvae's takes 40 000, once
  a batch.

What differs:

- The terms are `recon` before its weight and `kl` before beta. disvae reports 255 and 3 times this `recon`, Lightning
  Bolts 0.1 times this `kl`, PyTorch-VAE its negative; Pyro reports no terms.
- A logarithm of bce(p) is at least -100, as in PyTorch. Pyro clamps p into [ε, 1 - ε] instead, so it differs where p is
  0 or 1.
- scvi-tools adds 1e-8 to mean and dispersion, which halves the gradient of a mean of 1e-8.
- `weight` weighs both terms of a sample; the `weights` of latent diffusion weigh the reconstruction alone.

Faults of these and other projects are not reproduced: the sign and the factor of the KL in the audio autoencoder of
diffusers, PyTorch-VAE's log-cosh that overflows, and the estimators of importance-weighted losses (Pythae's IWAE
reports a number that is not the bound, its MIWAE normalises over the wrong dimension, PyTorch-VAE's IWAE favours bad
samples).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import _checks
from .likelihoods import Gaussian, Multinomial, NegativeBinomial, Scaled
from .schedules import Linear

AUTOENCODER_CLAMP = (-30.0, 20.0)

# functions, because a likelihood with a parameter belongs to one loss
PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    # pytorch/examples 77f55b9, vae/main.py:80-89
    "pytorch_examples": lambda: {"likelihood": "bernoulli_probs", "reduction": "sum"},
    # clementchadebec/benchmark_VAE 6419e21, src/pythae/models/vae/vae_model.py:99-116
    "pythae": lambda: {"likelihood": Gaussian()},
    "pythae_bce": lambda: {"likelihood": "bernoulli_probs"},
    # AntixK/PyTorch-VAE a6896b9, models/vanilla_vae.py:139-145; configs/vae.yaml:19
    "pytorch_vae": lambda: {"beta": 0.00025, "recon_reduction": "mean"},
    # CompVis/latent-diffusion a506df5, ldm/modules/losses/contperceptual.py:48-60, 83; configs/autoencoder/*.yaml:11
    "ldm": lambda: {
        "beta": 1e-6,
        "likelihood": Scaled("l1", nn.Parameter(torch.zeros(()))),
        "logvar_clamp": AUTOENCODER_CLAMP,
    },
    # huggingface/diffusers 58eb52c, examples/research_projects/autoencoderkl/train_autoencoderkl.py:902-929
    "diffusers": lambda: {"beta": 1e-6, "logvar_clamp": AUTOENCODER_CLAMP},
    # YannDubs/disentangling-vae f045219, disvae/models/losses.py:139-148, 429-444, 472
    "disvae_bernoulli": lambda: {"likelihood": "bernoulli_probs"},
    "disvae_gaussian": lambda: {"recon_weight": 255.0},
    "disvae_laplace": lambda: {"likelihood": "l1", "recon_weight": 3.0},
    # orybkin/sigma-vae-pytorch 4748a3a, model.py:8-12, 107-149; train_vae.py:64
    "sigma_vae": lambda: {"likelihood": Gaussian(full=True, softclip=-6.0), "reduction": "sum"},
    "sigma_vae_optimal": lambda: {"likelihood": Gaussian("optimal", full=True, softclip=-6.0), "reduction": "sum"},
    # pyro-ppl/pyro ff6ae1c, pyro/infer/trace_mean_field_elbo.py:104-156; examples/vae/vae.py:84-112
    "pyro": lambda: {"likelihood": "bernoulli_probs", "reduction": "sum"},
    # Lightning-Universe/lightning-bolts 34958a8, src/pl_bolts/models/autoencoders/basic_vae/basic_vae_module.py:135-141
    "lightning_bolts": lambda: {"beta": 0.1, "reduction": "mean"},
    # Project-MONAI/GenerativeModels 7428fce, generative/networks/nets/autoencoderkl.py:733;
    # tutorials/generative/2d_autoencoderkl/2d_autoencoderkl_tutorial.py:191-199
    "monai": lambda: {
        "beta": 1e-6,
        "likelihood": "l1",
        "recon_reduction": "mean",
        "logvar_clamp": AUTOENCODER_CLAMP,
    },
}

COUNT_PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    # scverse/scvi-tools 1.4.2, src/scvi/module/_vae.py:446-600, train/_trainingplans.py:32-73
    "scvi": lambda: {"beta": Linear(0.0, 1.0, 400), "likelihood": NegativeBinomial(None)},
    # dawenl/vae_cf, VAE_ML20M_WWW2018.ipynb: total_anneal_steps = 200000, anneal_cap = 0.2
    "multvae": lambda: {"beta": Linear(0.0, 0.2, 40_000), "likelihood": Multinomial()},
}


def preset_options(name: str) -> dict[str, Any]:
    """Keyword arguments that make `VAELoss` the loss of a project, with likelihood objects of their own.

    Args:
        name: One of `PRESETS` or `COUNT_PRESETS`.

    Raises:
        ValueError: unknown name.
    """
    presets = PRESETS | COUNT_PRESETS
    _checks.choice("preset", name, presets)
    return presets[name]()
