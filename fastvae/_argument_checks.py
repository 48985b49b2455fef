"""Checks of one or two arguments, whatever they are for; see `_checks`."""

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, TensorMeta

from . import _numbers
from ._dtypes import compute_dtype, in_dtype

SCHEDULES = ("Linear", "Cosine", "Sigmoid", "Cyclical")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = ("Linear", "Cosine", "Sigmoid", "Cyclical")


def names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def choice(name: str, value: object, known: Iterable[str], synonyms: Mapping[str, str] = {}) -> None:
    """Check that value is one of the known names; `synonyms` says in code what to pass for other names."""
    known = list(known)
    if value in known:
        return
    word = str(value).lower()
    close = difflib.get_close_matches(word, known, n=1)
    meant = synonyms.get(word) or (repr(close[0]) if close else None)
    hint = f" Did you mean {meant}?" if meant else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.{hint}")


def kind(value: object) -> str:
    """What a caller passed, in an error about its type."""
    return f"the class {value.__name__}, not an object of it" if isinstance(value, type) else type(value).__name__


def float_tensor(name: str, tensor: Any, *, also: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(tensor, Tensor | TensorMeta):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}. Convert it with torch.as_tensor.")
    if tensor.dtype not in FLOATS and tensor.dtype not in also:
        raise TypeError(
            f"{name} must be one of {names(FLOATS + also)}; got {names([tensor.dtype])}. "
            "Convert it, for example with .float()."
        )
    if tensor.ndim == 0:
        raise ValueError(
            f"{name} must have a batch dimension, [B, ...]; got a 0-dimensional tensor. Pass {name}.reshape(1)."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got layout {tensor.layout}. Pass {name}.to_dense().")


def same_shape(first: str, a: Any, second: str, b: Any) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{first} and {second} must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}. "
            f"Nothing is broadcast: reshape or expand one of them."
        )


def same_device(first: str, a: Any, second: str, b: Any) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{first} and {second} must be on one device; got {a.device} and {b.device}. "
            f"Move one with .to({str(a.device)!r})."
        )


def gaussian(mu: Any, logvar: Any) -> None:
    float_tensor("mu", mu)
    float_tensor("logvar", logvar)
    same_shape("mu", mu, "logvar", logvar)
    same_device("mu", mu, "logvar", logvar)


def halves(packed: Tensor, dim: int) -> int:
    """The dimension, counted from the front, that mean and logvar share."""
    float_tensor("packed", packed)
    if not -packed.ndim <= dim < packed.ndim or dim % packed.ndim == 0 or packed.shape[dim] % 2:
        fail(
            f"packed must hold mean and logvar as the two halves of dimension dim, which is not the batch's; got shape "
            f"{tuple(packed.shape)} and dim={dim}. Pass the dimension of 2 C channels."
        )
    return dim % packed.ndim


def expanded(name: str, tensor: Tensor, other: str, like: Tensor) -> Tensor:
    """`tensor` in the shape of `like`."""
    same_device(name, tensor, other, like)
    if tensor.is_floating_point() and tensor.shape != like.shape:
        tensor = tensor.to(compute_dtype(tensor))  # its gradient is a sum, which is rounded once
    try:
        return tensor.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to {other}'s shape {tuple(like.shape)}; got {tuple(tensor.shape)}. Insert "
            "dimensions of size 1 where it is the same for all."
        ) from None


def fail(message: str) -> NoReturn:
    """For options whose combination has no meaning."""
    raise ValueError(message)


def log_scale(name: str, value: Any, *, also: str | None = None) -> Any:
    """The log of a decoder's scale: a float, a tensor, or `also`."""
    if isinstance(value, str) and value == also:
        return value
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be one of {names(FLOATS)}; got {names([value.dtype])}. Convert it.")
        return value
    if isinstance(value, str):
        fail(f"{name} must be a float{f', {also!r}' if also else ''} or a tensor; got {value!r}.")
    if math.isnan(log_scale := _numbers.number(name, value)):
        fail(f"{name} must be a number; got {value!r}.")
    return log_scale


def weight(name: str, value: Any) -> float | Tensor:
    """beta, recon_weight, capacity: a number of at least 0, as a float, or a 0-dimensional tensor."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            fail(
                f"{name} must be a float or a 0-dimensional floating point tensor; got {names([value.dtype])} "
                f"of shape {tuple(value.shape)}. Pass one value."
            )
        return value
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float | Real)):
        hint = ""
        if name == "beta":
            (schedule, *_) = [*difflib.get_close_matches(str(value).title(), SCHEDULES, n=1), "Linear"]
            call = f"fastvae.schedules.{schedule}(0.0, 1.0, steps)"
            hint = f" For a schedule, use VAELoss(beta={call}), or pass its .value to a function."
        raise TypeError(f"{name} must be a float or a 0-dimensional tensor; got {kind(value)}.{hint}")
    number = _numbers.number(name, value)
    if not number >= 0:
        fail(f"{name} must be 0 or more; got {value!r}. To subtract a term, negate the result instead.")
    return number


def logvar_clamp(value: Any) -> Clamp | None:
    if value is None:
        return None
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    low, high = in_dtype(low, torch.float32), in_dtype(high, torch.float32)  # no variance needs more
    if not low < high:
        raise ValueError(
            f"logvar_clamp must be None or (lo, hi) with lo < hi; got {value!r}. For example (-30.0, 20.0)."
        )
    return low, high
