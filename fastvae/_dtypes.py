"""Numbers and tensors in the dtype of arithmetic."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from fastvae_kernels.types import compute_dtype as compute_dtype

Value = TypeVar("Value", float, Tensor, float | Tensor)


def in_dtype(value: Value, dtype: torch.dtype) -> Value:
    """A tensor in `dtype`, or a number that torch can convert to it: infinite where `dtype` has none as large."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return value if abs(value) <= torch.finfo(dtype).max or math.isnan(value) else math.copysign(math.inf, value)
