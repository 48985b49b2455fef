"""The dtype of arithmetic, and numbers and tensors in it: the only place that decides."""

import math
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", float, Tensor, float | Tensor)


def compute_dtype(*tensors: object) -> torch.dtype:
    """Of arithmetic, losses and KL: float64 if any tensor is, else float32. What is no tensor decides nothing."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def in_dtype(value: Value, dtype: torch.dtype) -> Value:
    """A tensor in `dtype`, or a number that torch can convert to it: infinite where `dtype` has none as large."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return value if abs(value) <= torch.finfo(dtype).max or math.isnan(value) else math.copysign(math.inf, value)
