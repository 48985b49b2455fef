"""A perceptual distance beside the pixels' error: LPIPS, a package of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # of reconstructions and images [B, C, H, W] in [0, 1]: [B]


def lpips_distance(weight: float, device: torch.device) -> Distance:
    """`weight` times LPIPS with VGG, whose weights stay as they are: no part of what is trained, averaged or saved.

    Source: Zhang et al., arXiv:1801.03924; added to the pixels' error as in latent diffusion, Rombach et al.,
    arXiv:2112.10752.

    Raises:
        ImportError: lpips is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError("--perceptual needs lpips, which brings torchvision: pip install lpips") from error
    network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

    def distance(recon: Tensor, images: Tensor) -> Tensor:  # a function, so that copies of an objective share the net
        if images.dtype == torch.uint8:
            images = images / 255
        three = [x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (recon, images.to(recon.dtype))]
        found: Tensor = network(*three, normalize=True)
        return weight * found.flatten()

    return distance
