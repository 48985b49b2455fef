"""Reconstruction errors as pairs of small device functions: the error of an element and its gradient by recon.

One generic kernel takes a pair as constants, so a new likelihood is a new pair here and not a new kernel. The error of
(0, 0), which lanes outside the tensors hold, has to be 0.
"""

import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it where device code stands
from torch import Tensor

BYTE_SCALE = 1 / 255  # a uint8 target stands for the values 0, 1/255, ..., 1


def target_scale(target: Tensor | None) -> float:
    return BYTE_SCALE if target is not None and target.dtype == torch.uint8 else 1.0


@triton.jit
def l2_error(recon, target):
    """(recon - target)^2"""
    difference = recon - target
    return difference * difference


@triton.jit
def l2_gradient(recon, target):
    return 2.0 * (recon - target)
