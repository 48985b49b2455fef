"""How close reconstructions come to images, by the measures of image processing; needs scikit-image."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fastvae.models import VAE

from ..data.batches import all_batches
from .elbo import as_unit_interval

SSIM_WINDOW = 7  # of scikit-image; smaller images have none


class Quality(NamedTuple):
    """Means over the images, of reconstructions from the posterior's mean, with values cut to [0, 1]."""

    psnr: float
    """Peak signal-to-noise ratio in dB, 10 log10(1 / mean squared error) of each image."""
    ssim: float | None
    """Structural similarity, 1 for equal images; None for images smaller than its window of 7x7 pixels."""


@torch.no_grad()
def reconstruction_quality(model: VAE, dataset: Dataset[Any], *, batch_size: int = 128, workers: int = 0) -> Quality:
    """PSNR and SSIM of `model`, which decodes to images in [0, 1], as scikit-image defines them.

    Raises:
        ImportError: scikit-image is not installed.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    device = next(model.parameters()).device
    psnr, ssim = [], []
    for batch in all_batches(dataset, batch_size, workers=workers, device=device):
        reconstructions = model.reconstruct(batch.to(device)).double().cpu().numpy()
        for image, reconstruction in zip(as_unit_interval(batch).numpy(), reconstructions, strict=True):
            # equal images have no noise: as much as float64 can tell
            psnr.append(min(peak_signal_noise_ratio(image, reconstruction, data_range=1.0), 300.0))  # type: ignore[no-untyped-call]
            if min(image.shape[1:]) >= SSIM_WINDOW:
                ssim.append(structural_similarity(image, reconstruction, data_range=1.0, channel_axis=0))  # type: ignore[no-untyped-call]
    return Quality(float(np.mean(psnr)), float(np.mean(ssim)) if ssim else None)
