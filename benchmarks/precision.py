"""Storage types as training code meets them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    name: str
    recon: torch.dtype
    target: torch.dtype
    latent: torch.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The mode of 16-bit training; without it PyTorch would sum the squares of 16-bit images in 16 bits."""
        return nullcontext() if self.recon == torch.float32 else torch.autocast(device.type, dtype=self.recon)


FP32 = Precision("fp32", torch.float32, torch.float32, torch.float32)
BF16 = Precision("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16)
AUTOCAST = Precision("autocast", torch.bfloat16, torch.float32, torch.bfloat16)  # bf16 decoder, images as loaded
BYTES = Precision("bytes", torch.bfloat16, torch.uint8, torch.bfloat16)  # the same, images left as uint8
