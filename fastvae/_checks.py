"""The only place that raises on what a caller passes.

A tensor may be given as its `TensorMeta`. No check reads a tensor's values, so none waits for a device.
"""

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, ElboNumbers, ElboOptions, ElboTensors, TensorMeta

from . import _numbers
from ._dtypes import compute_dtype, in_dtype
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


def reduction(value: str) -> str:
    choice("reduction", value, REDUCTIONS)
    return value


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


def float_tensor(name: str, tensor: Any, *, also: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(tensor, Tensor | TensorMeta):
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


def images(recon: Any, target: Any) -> None:
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


def mask(value: object, like: Tensor, name: str = "mask", other: str = "recon") -> Tensor:
    """`value` in the shape of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        passed = _names([value.dtype]) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool tensor; got {passed}. Compare, for example {name} > 0.5.")
    if value.shape != like.shape:
        return expanded(name, value, other, like)
    same_device(name, value, other, like)
    return value


def prior(value: Any, mu: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of the prior in the shape of the posterior's."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"prior must be None or a pair of tensors (mu, logvar); got {type(value).__name__}.")
    for name, tensor in zip(("prior's mu", "prior's logvar"), value, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            came = _names([tensor.dtype]) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of {_names(FLOATS)}; got {came}.")
    return expanded("prior's mu", value[0], "mu", mu), expanded("prior's logvar", value[1], "mu", mu)


def per_sample(name: str, tensor: Any, like: Any) -> None:
    """weight, extra, kl: [B]."""
    float_tensor(name, tensor)
    if tensor.shape != like.shape[:1]:
        fail(
            f"{name} must have shape [B] = ({like.shape[0]},), one value a sample; got {tuple(tensor.shape)}. "
            "Reduce or flatten it."
        )
    same_device(name, tensor, "the inputs", like)


def loss_inputs(tensors: ElboTensors, numbers: ElboNumbers, spec: Any) -> None:
    """Tensors (or metas) and options of a loss, `LossSpec`, before anything is computed."""
    both = reductions(spec.recon_reduction, spec.recon_reduction, spec.kl_reduction)
    like = tensors.recon
    if spec.likelihood is not None:
        images(tensors.recon, tensors.target)
        if tensors.kl is not None:
            per_sample("kl", tensors.kl, tensors.recon)
        elif tensors.mu is not None or tensors.logvar is not None:
            posterior(tensors.recon, tensors.mu, tensors.logvar)
    elif tensors.kl is None:
        gaussian(tensors.mu, tensors.logvar)
        like = tensors.mu
    else:
        per_sample("kl", tensors.kl, tensors.kl)
        like = tensors.kl
    for name in ("weight", "extra"):
        if getattr(tensors, name) is not None:
            per_sample(name, getattr(tensors, name), like)
    for name, number in zip(numbers._fields, numbers, strict=True):
        if isinstance(number, Tensor | TensorMeta):
            same_device(name, number, "the inputs", like)
    mask_normalize = getattr(spec.likelihood, "mask_normalize", False)  # no likelihood that is given by name has it
    defined(spec.free_bits, spec.capacity_mode, mask_normalize, both)


def posterior(recon: Any, mu: Any, logvar: Any) -> None:
    if mu is None or logvar is None:
        fail("the KL needs mu and logvar, or kl=; got neither. For a reconstruction alone, call reconstruction_loss.")
    gaussian(mu, logvar)
    same_device("recon", recon, "mu", mu)
    same_batch(recon, mu)


def same_batch(recon: Any, mu: Any) -> None:
    if mu.shape[0] != recon.shape[0]:
        fail(
            f"recon and mu must have one batch size; got {recon.shape[0]} and {mu.shape[0]}. Repeat one of them for "
            "each sample."
        )


def kl_given(
    recon: Any,
    mu: Any,
    logvar: Any,
    prior: object,
    logvar_clamp: object,
    free_bits: Any,
    kl_mask: object,
    kl_reduction: str,
) -> None:
    """kl= is a sum over each sample: what acts on its elements cannot be given beside it."""
    if logvar is not None:
        fail("Drop logvar: kl= replaces it, and both were passed. mu may stay, for its element count.")
    if free_bits is not None and getattr(free_bits, "mode", None) == "sample":
        free_bits = None
    if not (logvar_clamp is None and prior is None and free_bits is None and kl_mask is None):
        given = {"logvar_clamp": logvar_clamp, "prior": prior, "free_bits": free_bits, "kl_mask": kl_mask}
        names = ", ".join(name for name, value in given.items() if value is not None)
        fail(f"{names} cannot act on kl=, which is already measured. Pass mu and logvar instead.")
    if mu is not None:
        float_tensor("mu", mu)
        float_tensor("recon", recon)
        same_device("recon", recon, "mu", mu)
        same_batch(recon, mu)
    elif kl_reduction == "mean":
        fail('kl_reduction="mean" divides by the number of latents, which kl= does not tell. Pass mu too.')


def weight(name: str, value: Any) -> float | Tensor:
    """beta, recon_weight, capacity: a number of at least 0, as a float, or a 0-dimensional tensor."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            fail(
                f"{name} must be a float or a 0-dimensional floating point tensor; got {_names([value.dtype])} "
                f"of shape {tuple(value.shape)}. Pass one value."
            )
        return value
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


def defined(free_bits: Any, capacity_mode: str | None, mask_normalize: bool, reductions: tuple[str, str]) -> None:
    """Options that others leave without a meaning."""
    recon_reduction, kl_reduction = reductions
    if mask_normalize and recon_reduction in ("sum", "none"):
        fail(
            "mask_normalize divides by the mask's sum in place of another number, and "
            f'recon_reduction="{recon_reduction}" divides by none. Use "batchmean" or "mean".'
        )
    if free_bits is None and capacity_mode is None:
        return
    of_batch = free_bits is not None and free_bits.mode == "dim_batch"
    if of_batch and capacity_mode == "sample":
        fail('a capacity of each sample has no meaning after free bits of the batch. Use Capacity(..., mode="batch").')
    for option, whole in (("free_bits", of_batch), ("capacity", capacity_mode == "batch")):
        if whole and kl_reduction == "none":
            fail(f'{option} of the batch has no value per sample; got kl_reduction="none". Choose another mode.')


def count_options(extra: object, inplace: bool) -> None:
    """Options that a likelihood of counts does not have."""
    if extra is not None:
        fail("extra has no meaning for a likelihood of counts, whose elements have no scale. Add it to the loss.")
    if inplace:
        fail("inplace=True does not work with a likelihood of counts, which reads recon again. Leave it out.")


def no_likelihood_args(arguments: object) -> None:
    if arguments is not None:
        fail(
            "likelihood_args are for likelihoods of counts: NegativeBinomial, Poisson and Multinomial of "
            "fastvae.likelihoods. Leave them out."
        )


def overwritable(recon: Tensor, target: Tensor, recon_weight: object, one_pass: bool) -> None:
    """inplace=True: the gradient takes recon's memory, so recon must be an intermediate result that owns it."""
    if not (recon.requires_grad and torch.is_grad_enabled()):
        return
    if recon.is_leaf:
        fail("inplace=True overwrites recon, which must not be a leaf; got one. Pass a decoder's output.")
    if not is_dense(recon):
        fail(f"inplace=True needs recon to fill its memory; got strides {recon.stride()}. Pass recon.contiguous().")
    if not one_pass or recon.dtype == torch.float16 or target.requires_grad or not _is_nonzero_float(recon_weight):
        fail(
            "inplace=True needs one_pass=True, a recon that is not float16, a target without gradient and a "
            f"recon_weight that is a float other than 0; got one_pass={one_pass}, {_names([recon.dtype])}, "
            f"target.requires_grad={target.requires_grad}, recon_weight={recon_weight!r}. Leave inplace out."
        )


def _is_nonzero_float(number: object) -> bool:
    return not isinstance(number, Tensor) and number != 0


def one_pass_is_right(tensors: ElboTensors, numbers: ElboNumbers, options: ElboOptions) -> bool:
    """Whether the forward pass may write recon's gradient, given metas.

    Not in float16, where an unscaled gradient underflows before a loss scaler can help; not under a weight or a
    normalizer that is known on the device alone; not for several gradients at once.
    """
    extra_map = tensors.extra_map is not None and tensors.extra_map.requires_grad
    one_gradient = not tensors.target.requires_grad and not extra_map
    known = numbers.recon_weight is None and not options.mask_normalize
    return tensors.recon.dtype != torch.float16 and one_gradient and known


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
