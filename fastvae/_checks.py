"""Checks of arguments. Only this module and the two that it uses raise errors for them.

A tensor may be given as its `TensorMeta`. No check reads a tensor's values, so none waits for a device.
"""

from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import ElboNumbers, ElboOptions, ElboTensors, TensorMeta

from ._argument_checks import FLOATS as FLOATS
from ._argument_checks import choice as choice
from ._argument_checks import expanded as expanded
from ._argument_checks import fail as fail
from ._argument_checks import float_tensor as float_tensor
from ._argument_checks import gaussian as gaussian
from ._argument_checks import halves as halves
from ._argument_checks import kind as kind
from ._argument_checks import log_scale as log_scale
from ._argument_checks import logvar_clamp as logvar_clamp
from ._argument_checks import names
from ._argument_checks import same_device as same_device
from ._argument_checks import same_shape as same_shape
from ._argument_checks import weight as weight
from ._strides import is_dense

REDUCTIONS = ("batchmean", "sum", "mean", "none")


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


def images(recon: Any, target: Any) -> None:
    float_tensor("recon", recon)
    float_tensor("target", target, also=(torch.uint8,))
    same_shape("recon", recon, "target", target)
    same_device("recon", recon, "target", target)


def mask(value: object, like: Tensor, name: str = "mask", other: str = "recon") -> Tensor:
    """`value` in the shape of `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        passed = names([value.dtype]) if isinstance(value, Tensor) else type(value).__name__
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
            passed = names([tensor.dtype]) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of {names(FLOATS)}; got {passed}.")
    return expanded("prior's mu", value[0], "mu", mu), expanded("prior's logvar", value[1], "mu", mu)


def per_sample(name: str, tensor: Any, like: Any) -> None:
    """weight, kl: [B]."""
    batch = like.shape[0]
    if isinstance(tensor, Tensor | TensorMeta) and tensor.ndim == 0:
        fail(
            f"{name} must have shape [B] = ({batch},), one value per sample; got a 0-dimensional tensor. Reduce over "
            f"each sample only, or pass {name}.expand({batch}) if the value is that of every sample."
        )
    float_tensor(name, tensor)
    if tensor.shape != like.shape[:1]:
        fail(
            f"{name} must have shape [B] = ({batch},), one value per sample; got {tuple(tensor.shape)}. "
            "Reduce or flatten it."
        )
    same_device(name, tensor, "the inputs", like)


def per_sample_or_element(name: str, tensor: Any, recon: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """extra, recon_weight: ([B], None), or (None, a map in the shape of recon)."""
    float_tensor("recon", recon)
    batch = recon.shape[0]
    if isinstance(tensor, Tensor) and tensor.ndim == 0:
        fail(
            f"{name} must have shape [B] = ({batch},) or broadcast to recon's shape; got a 0-dimensional tensor. Pass "
            f"{name}.expand({batch}) if the value is that of every sample."
        )
    float_tensor(name, tensor)
    same_device(name, tensor, "recon", recon)
    if tensor.shape == (batch,):
        return tensor, None
    if tensor.shape == (batch, *[1] * (recon.ndim - 1)):
        return tensor.reshape(batch), None
    try:
        torch.broadcast_shapes(tensor.shape, recon.shape)  # type: ignore[no-untyped-call]
        return None, expanded(name, tensor, "recon", recon)
    except (RuntimeError, ValueError):
        raise ValueError(
            f"{name} must have shape [B] = ({batch},), one value per sample, or broadcast to recon's shape "
            f"{tuple(recon.shape)}; got {tuple(tensor.shape)}. Insert dimensions of size 1 where it is the same."
        ) from None


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
    if tensors.weight is not None:
        per_sample("weight", tensors.weight, like)
    of_batch = spec.capacity_mode == "batch" or getattr(spec.free_bits, "mode", None) == "dim_batch"
    if tensors.betas is not None and of_batch:
        fail(
            "beta of each sample has no meaning where free bits or the capacity are of the batch; got a beta of shape "
            f"{tuple(tensors.betas.shape)}. Pass one beta, or choose the mode of samples."
        )
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
    if logvar_clamp is not None:
        fail(
            f"logvar_clamp cannot act on kl=, which is already measured; got {logvar_clamp!r}. Pass logvar_clamp=None "
            "here (to VAELoss.preset too) and the bounds to reparameterize_kl."
        )
    if not (prior is None and free_bits is None and kl_mask is None):
        given = {"prior": prior, "free_bits": free_bits, "kl_mask": kl_mask}
        names = ", ".join(name for name, value in given.items() if value is not None)
        fail(f"{names} cannot act on kl=, which is a KL already. Pass mu and logvar instead.")
    if mu is not None:
        float_tensor("mu", mu)
        float_tensor("recon", recon)
        same_device("recon", recon, "mu", mu)
        same_batch(recon, mu)
    elif kl_reduction == "mean":
        fail('kl_reduction="mean" divides by the number of latents, which kl= does not contain. Pass mu too.')


def beta(value: Any, recon: Tensor) -> tuple[float | Tensor, Tensor | None]:
    """(the number, [B] or None)"""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return weight("beta", value), None
    float_tensor("recon", recon)
    float_tensor("beta", value)
    if value.shape != recon.shape[:1]:
        fail(
            f"beta must be a number, a 0-dimensional tensor or of shape [B] = ({recon.shape[0]},); got shape "
            f"{tuple(value.shape)}. If it is one value, pass beta.reshape(())."
        )
    same_device("beta", value, "recon", recon)
    return 1.0, value


def recon_weight(value: Any, recon: Tensor) -> tuple[float | Tensor, Tensor | None]:
    """(the number, [B] or a map in the shape of recon or None)"""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return weight("recon_weight", value), None
    of_samples, of_elements = per_sample_or_element("recon_weight", value, recon)
    return 1.0, of_elements if of_samples is None else of_samples


def regularizers(free_bits: Any, free_bits_type: type, capacity: Any, capacity_type: type) -> None:
    for name, value, cls in (("free_bits", free_bits, free_bits_type), ("capacity", capacity, capacity_type)):
        if value is not None and not isinstance(value, cls):
            raise TypeError(
                f"{name} must be None or a {cls.__module__}.{cls.__name__}; got {kind(value)}. "
                f"For example {cls.__name__}(0.5)."
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
            f"recon_weight that is a float other than 0; got one_pass={one_pass}, {names([recon.dtype])}, "
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
