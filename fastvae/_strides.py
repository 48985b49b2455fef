"""What a tensor's strides allow."""

from typing import Any

import torch
from torch import Tensor

_MAX_DIMS = 5  # that kernels read in place, whatever their strides


def is_dense(tensor: Any) -> bool:
    """Whether the elements of a tensor (or of a `TensorMeta`) fill one stretch of memory, each place once."""
    if 0 in tensor.shape:
        return True
    strides = tensor.stride() if isinstance(tensor, Tensor) else tensor.strides
    expected = 1
    for stride, size in sorted(zip(strides, tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def needs_copy(meta: Any) -> bool:
    """Whether a tensor of this meta cannot be read in place: its negation is still to be done, its dimensions are too
    many, or it holds one value per sample in strides.
    """
    if meta.ndim == 1:
        return bool(meta.negated or (meta.shape[0] > 1 and meta.strides[0] != 1))
    return bool(meta.negated or (meta.ndim > _MAX_DIMS and not _is_contiguous(meta)))


def _is_contiguous(meta: Any) -> bool:
    return bool(torch.empty_strided(meta.shape, meta.strides, device="meta").is_contiguous())


def readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that can be read in place."""
    tensor = tensor.resolve_neg()
    return tensor.contiguous() if tensor.ndim == 1 or tensor.ndim > _MAX_DIMS else tensor


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, or a copy with these strides. A saved-tensor hook may have brought it back with others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
