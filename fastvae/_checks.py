"""The only place that raises on what a caller passes. No check reads a tensor's values, so none costs a sync."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._options import Clamp
from ._strides import is_dense

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("batchmean", "sum", "mean", "none")
LIKELIHOODS = ("l2",)


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
    for name, value in zip(("recon_reduction", "kl_reduction"), both, strict=True):
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


def latents(
    recon: Tensor, mu: Tensor | None, logvar: Tensor | None, kl: Tensor | None, kl_reduction: str, clamp: object
) -> int:
    """Check what a loss is told of the posterior; return its number of elements (0 where nothing asks for it)."""
    batch = recon.shape[0]
    if kl is None:
        if mu is None or logvar is None:
            fail(
                "the KL needs mu and logvar, or kl=; got neither. For a reconstruction alone, call reconstruction_loss."
            )
        gaussian(mu, logvar)
    else:
        float_tensor("kl", kl)
        same_device("recon", recon, "kl", kl)
        if kl.shape != (batch,):
            fail(
                f"kl must have shape [B] = ({batch},), one value a sample of recon; got {tuple(kl.shape)}. "
                "Pass what reparameterize_kl returned."
            )
        if clamp is not None:
            fail("logvar_clamp cannot act on kl=, which is already measured. Pass it to reparameterize_kl.")
        if logvar is not None:
            fail("kl= replaces logvar; got both. Pass one of them (mu may stay, for its element count).")
        if mu is None and kl_reduction == "mean":
            fail('kl_reduction="mean" divides by the number of latents, which kl= does not tell. Pass mu too.')
    if mu is None:
        return 0
    float_tensor("mu", mu)
    same_device("recon", recon, "mu", mu)
    if mu.shape[0] != batch:
        fail(
            f"recon and mu must have one batch size; got {batch} and {mu.shape[0]}. Repeat one of them for each sample."
        )
    return mu.numel()


def weight(name: str, value: object, like: Tensor) -> None:
    """beta, recon_weight: a float or a 0-dimensional tensor on the inputs' device."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a float or a 0-dimensional floating point tensor; got {_names([value.dtype])} "
                f"of shape {tuple(value.shape)}. Pass one value."
            )
        same_device(name, value, "the inputs", like)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float or a 0-dimensional tensor; got {type(value).__name__}.")


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


def at_least_one(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        fail(f"{name} must be an int of at least 1; got {value!r}.")
    return value


def logvar_clamp(value: Any) -> Clamp | None:
    if value is None:
        return None
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise ValueError(
            f"logvar_clamp must be None or (lo, hi) with lo < hi; got {value!r}. For example (-30.0, 20.0)."
        )
    return low, high


def noise_source(like: Tensor, generator: torch.Generator | None, seed: object, offset: object) -> None:
    if generator is not None and seed is not None:
        raise ValueError(
            "generator and seed exclude each other; got both. Pass the one that the noise shall come from."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator; got {type(generator).__name__}. For a number, pass seed=."
        )
    if generator is not None and generator.device.type not in ("cpu", like.device.type):
        raise ValueError(
            f"generator must be on the CPU or on the inputs' device {like.device}; got one on {generator.device}. "
            f"Make it with torch.Generator({str(like.device)!r})."
        )
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
            raise ValueError(
                f"a seed tensor must hold one int64 on {like.device}; got {_names([seed.dtype])} of shape "
                f"{tuple(seed.shape)} on {seed.device}. Pass an int, or move the tensor."
            )
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int or a one-element int64 tensor; got {type(seed).__name__}.")
    if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
        raise TypeError(f"offset must be an int, counted in elements; got {type(offset).__name__}.")
    if isinstance(offset, int) and not 0 <= offset < 2**62:
        raise ValueError(
            f"offset must lie in [0, 2^62); got {offset}. Count it in elements from the start of the whole batch."
        )
    if seed is None and isinstance(offset, int) and offset != 0:
        raise ValueError(f"offset selects a part of a seeded stream; got offset={offset} without seed. Pass seed= too.")


def fail(message: str) -> NoReturn:
    """For options whose combination has no meaning."""
    raise ValueError(message)
