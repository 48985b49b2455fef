"""The only place that raises on what a caller passes. No check reads a tensor's values, so none costs a sync."""

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _numbers
from ._dtypes import compute_dtype, in_dtype
from ._options import Clamp
from ._strides import is_dense

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def choice(name: str, value: object, known: Iterable[str]) -> None:
    known = list(known)
    if value in known:
        return
    close = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.{hint}")


def reductions(reduction: str, recon_reduction: str | None, kl_reduction: str | None) -> tuple[str, str]:
    """The reductions of the two terms."""
    both = (recon_reduction or reduction, kl_reduction or reduction)
    for name, value in (("recon_reduction", both[0]), ("kl_reduction", both[1])):
        if value not in REDUCTIONS:
            choice("reduction" if value == reduction else name, value, REDUCTIONS)
    if (both[0] == "none") != (both[1] == "none"):
        fail(
            f'recon_reduction and kl_reduction must both be "none" or neither; got {both[0]!r} and {both[1]!r}. '
            "A value per sample and a scalar do not add up to one loss."
        )
    return both


def float_tensor(name: str, tensor: object, *, also: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}. Convert it with torch.as_tensor.")
    if tensor.dtype not in FLOATS and tensor.dtype not in also:
        raise TypeError(
            f"{name} must be one of {_names(FLOATS + also)}; got {_names([tensor.dtype])}. "
            "Convert it, for example with .float()."
        )
    if tensor.ndim == 0:
        raise ValueError(
            f"{name} must have a batch dimension, [B, ...]; got a 0-dimensional tensor. Pass {name}.reshape(1)."
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got layout {tensor.layout}. Pass {name}.to_dense().")


def same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{first} and {second} must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}. "
            f"Nothing is broadcast: reshape or expand one of them."
        )


def same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{first} and {second} must be on one device; got {a.device} and {b.device}. "
            f"Move one with .to({str(a.device)!r})."
        )


def gaussian(mu: Tensor, logvar: Tensor) -> None:
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


def images(recon: Tensor, target: Tensor) -> None:
    float_tensor("recon", recon)
    float_tensor("target", target, also=(torch.uint8,))
    same_shape("recon", recon, "target", target)
    same_device("recon", recon, "target", target)


def log_scale(name: str, value: Any, *, also: str | None = None) -> Any:
    """The log of a decoder's scale: a float, a tensor, or `also`."""
    if isinstance(value, str) and value == also:
        return value
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be one of {_names(FLOATS)}; got {_names([value.dtype])}. Convert it.")
        return value
    if isinstance(value, str):
        fail(f"{name} must be a float{f', {also!r}' if also else ''} or a tensor; got {value!r}.")
    if math.isnan(log_scale := _numbers.number(name, value)):
        fail(f"{name} must be a number; got {value!r}.")
    return log_scale


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


def mask(value: object, recon: Tensor) -> Tensor:
    """`value` in the shape of recon."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        came = _names([value.dtype]) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"mask must be a bool tensor; got {came}. Compare, for example mask > 0.5.")
    return expanded("mask", value, "recon", recon)


def prior(value: Any, mu: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of the prior in the shape of the posterior's."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"prior must be None or a pair of tensors (mu, logvar); got {type(value).__name__}.")
    for name, tensor in zip(("prior's mu", "prior's logvar"), value, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            came = _names([tensor.dtype]) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of {_names(FLOATS)}; got {came}.")
    return expanded("prior's mu", value[0], "mu", mu), expanded("prior's logvar", value[1], "mu", mu)


def one_a_sample(name: str, tensor: object, like: Tensor) -> None:
    """weight, extra, kl: [B]."""
    float_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.shape != like.shape[:1]:
        fail(
            f"{name} must have shape [B] = ({like.shape[0]},), one value a sample; got {tuple(tensor.shape)}. "
            "Reduce or flatten it."
        )
    same_device(name, tensor, "the inputs", like)


def posterior(recon: Tensor, mu: Tensor | None, logvar: Tensor | None, kl: Tensor | None, kl_reduction: str) -> None:
    """What a loss is told of the posterior: mu and logvar, or kl."""
    if kl is None:
        if mu is None or logvar is None:
            fail(
                "the KL needs mu and logvar, or kl=; got neither. For a reconstruction alone, call reconstruction_loss."
            )
        gaussian(mu, logvar)
    else:
        one_a_sample("kl", kl, recon)
        if logvar is not None:
            fail("kl= replaces logvar; got both. Pass one of them (mu may stay, for its element count).")
        if mu is None:
            if kl_reduction == "mean":
                fail('kl_reduction="mean" divides by the number of latents, which kl= does not tell. Pass mu too.')
            return
        float_tensor("mu", mu)
    same_device("recon", recon, "mu", mu)
    if mu.shape[0] != recon.shape[0]:
        fail(
            f"recon and mu must have one batch size; got {recon.shape[0]} and {mu.shape[0]}. Repeat one of them for "
            "each sample."
        )


def measured(**per_element: object) -> None:
    """kl= is a sum already: options that act on its elements are not there."""
    for name, value in per_element.items():
        if value is not None:
            fail(f"{name} cannot act on kl=, which is already measured. Pass mu and logvar instead.")


def weight(name: str, value: Any, like: Tensor | None) -> float | Tensor:
    """beta, recon_weight, capacity: a number of at least 0, or a 0-dimensional tensor on the device of `like`.

    Returns it as the ops take it: a float, or a tensor without a pending negation.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a float or a 0-dimensional floating point tensor; got {_names([value.dtype])} "
                f"of shape {tuple(value.shape)}. Pass one value."
            )
        if like is not None:
            same_device(name, value, "the inputs", like)
        return value.resolve_neg()
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float | Real)):
        raise TypeError(f"{name} must be a float or a 0-dimensional tensor; got {type(value).__name__}.")
    number = _numbers.number(name, value)
    if not number >= 0:
        fail(f"{name} must be 0 or more; got {value!r}. To subtract a term, negate the result instead.")
    return number


def regularizers(free_bits: Any, free_bits_type: type, capacity: Any, capacity_type: type) -> None:
    for name, value, kind in (("free_bits", free_bits, free_bits_type), ("capacity", capacity, capacity_type)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"{name} must be None or a {kind.__module__}.{kind.__name__}; got {type(value).__name__}. "
                f"For example {kind.__name__}(0.5)."
            )


def defined(free_bits: Any, capacity: Any, mask_normalize: bool, reductions: tuple[str, str]) -> None:
    """Options that others leave without a meaning."""
    recon_reduction, kl_reduction = reductions
    if mask_normalize and recon_reduction in ("sum", "none"):
        fail(
            "mask_normalize divides by the mask's sum in place of another number, and "
            f'recon_reduction="{recon_reduction}" divides by none. Use "batchmean" or "mean".'
        )
    if free_bits is None and capacity is None:
        return
    of_batch = free_bits is not None and free_bits.mode == "dim_batch"
    if of_batch and capacity is not None and capacity.mode == "sample":
        fail('a capacity of each sample has no meaning after free bits of the batch. Use Capacity(..., mode="batch").')
    for option, whole in (("free_bits", of_batch), ("capacity", capacity is not None and capacity.mode == "batch")):
        if whole and kl_reduction == "none":
            fail(f'{option} of the batch has no value per sample; got kl_reduction="none". Choose another mode.')


def overwritable(recon: Tensor, target: Tensor, recon_weight: object, one_pass: bool) -> None:
    """inplace=True: the gradient takes recon's memory, so recon must be an intermediate result that owns it."""
    if not (recon.requires_grad and torch.is_grad_enabled()):
        return
    if recon.is_leaf:
        fail("inplace=True overwrites recon, which must not be a leaf; got one. Pass a decoder's output.")
    if not is_dense(recon):
        fail(f"inplace=True needs recon to fill its memory; got strides {recon.stride()}. Pass recon.contiguous().")
    if not one_pass or not one_pass_is_right(recon, target.requires_grad, recon_weight):
        fail(
            "inplace=True needs one_pass=True, a recon that is not float16, a target without gradient and a "
            f"recon_weight that is a float other than 0; got one_pass={one_pass}, {_names([recon.dtype])}, "
            f"target.requires_grad={target.requires_grad}, recon_weight={recon_weight!r}. Leave inplace out."
        )


def one_pass_is_right(recon: Tensor, target_wants_gradient: bool, recon_weight: object) -> bool:
    """Whether the forward pass may write recon's gradient.

    Not in float16, where an unscaled gradient underflows before a loss scaler can help; not under a weight that is 0 or
    lives on the device, because the backward pass divides by it; not for two gradients at once.
    """
    return (
        recon.dtype != torch.float16
        and not target_wants_gradient
        and not isinstance(recon_weight, Tensor)
        and recon_weight != 0
    )


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


def fail(message: str) -> NoReturn:
    """For options whose combination has no meaning."""
    raise ValueError(message)
