"""What a call of the loss comes to: checked, resolved and laid out once, and found again by its cache key."""

import math
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, ElboNumbers, ElboOptions, ElboTensors, FreeBitsOptions, TensorMeta

from .. import _backend, _checks
from .._strides import needs_copy
from ..likelihoods import LikelihoodSpec
from ..regularizers import FreeBits


class LossSpec(NamedTuple):
    """The options of a loss, all but tensors and numbers; hashable."""

    likelihood: LikelihoodSpec | None = None  # None: no reconstruction
    recon_reduction: str = "sum"
    kl_reduction: str = "sum"
    logvar_clamp: Clamp | None = None
    free_bits: FreeBits | None = None
    capacity_mode: Any = None
    one_pass: bool = False
    inplace: bool = False
    n_latents: int | None = None  # of a batch, for kl_reduction="mean" where `kl` is given


class Plan(NamedTuple):
    backend: ModuleType | None  # None: the reference formula
    launches: Any  # the backend's plan
    options: ElboOptions
    copies_inputs: bool  # some inputs cannot be read in place
    writes_gradient: bool  # the forward pass writes the gradient of recon
    inplace: bool  # into recon itself
    differentiable: tuple[int, ...]  # places of tensors and numbers that require a gradient
    strides: tuple[Any, ...]  # of each tensor


def normalizer(reduction: str, numel: int, batch: int) -> float:
    """Factor on the sum of a term; NaN where torch's mean over nothing is."""
    if reduction == "sum" or reduction == "none":
        return 1.0
    divisor = batch if reduction == "batchmean" else numel
    return 1.0 / divisor if divisor else math.nan


def resolve(spec: LossSpec, tensors: ElboTensors) -> ElboOptions:
    """The options of the op for these tensors (or metas)."""
    likelihood, like = spec.likelihood, tensors.recon if tensors.kl is None and tensors.mu is None else tensors.mu
    like = tensors.kl if like is None else like
    n_latents = like.numel() if spec.n_latents is None else spec.n_latents
    options = ElboOptions(
        kl_normalizer=normalizer(spec.kl_reduction, n_latents, like.shape[0]),
        per_sample="none" in (spec.kl_reduction, spec.recon_reduction),
        logvar_clamp=spec.logvar_clamp,
        free_bits=None if spec.free_bits is None else FreeBitsOptions(float(spec.free_bits.nats), spec.free_bits.mode),
        capacity_mode=spec.capacity_mode,
    )
    if likelihood is None:
        return options
    inverse_scale = math.exp(-likelihood.log_scale)
    recon = tensors.recon
    return options._replace(
        error=likelihood.error,
        error_weight=likelihood.nll_weight * inverse_scale * likelihood.factor,
        extra_weight=likelihood.nll_weight * inverse_scale,
        nll_weight=likelihood.nll_weight,
        constant=likelihood.nll_weight * likelihood.log_scale + likelihood.constant,
        softclip=likelihood.softclip,
        recon_normalizer=normalizer(spec.recon_reduction, recon.numel(), recon.shape[0]),
        mask_normalize=likelihood.mask_normalize and tensors.mask is not None,
    )


@lru_cache(maxsize=1024)
def plan(
    choice: str, spec: LossSpec, metas: tuple[Any, ...], number_metas: tuple[Any, ...], grad_enabled: bool
) -> Plan:
    """The plan of a call.

    Args:
        choice: Which backend was asked for.
        spec: The options.
        metas, number_metas: Fields of `TensorMeta` of each tensor, and of each number that is a tensor.
        grad_enabled: Gradients are recorded.

    Raises:
        ValueError, TypeError: inputs or options that do not fit; nothing is cached then.
    """
    tensors = ElboTensors(*(None if meta is None else TensorMeta(*meta) for meta in metas))
    numbers = ElboNumbers(*(None if meta is None else TensorMeta(*meta) for meta in number_metas))
    _checks.loss_inputs(tensors, numbers, spec)
    given = [meta for meta in (*tensors, *numbers) if meta is not None]
    like = given[0]
    options = resolve(spec, tensors)
    copies = any(needs_copy(meta) for meta in given)
    if not grad_enabled:
        tensors, numbers = (type(ts)(*(t and t._replace(requires_grad=False) for t in ts)) for ts in (tensors, numbers))
    writes = (
        grad_enabled
        and spec.one_pass
        and tensors.recon is not None
        and tensors.recon.requires_grad
        and _checks.one_pass_is_right(tensors, numbers, options)
    )
    plain = all(meta.kind is Tensor or meta.kind is torch.nn.Parameter for meta in given)
    backend = _backend.load_backend(_backend.backend_of(like), "elbo") if plain else None
    return Plan(
        backend=backend,
        launches=None if backend is None or copies else backend.plan_elbo(tensors, numbers, options, writes),
        options=options,
        copies_inputs=copies,
        writes_gradient=writes,
        inplace=spec.inplace and writes,
        differentiable=tuple(i for i, meta in enumerate((*tensors, *numbers)) if meta and meta.requires_grad),
        strides=tuple(meta and meta.strides for meta in tensors),
    )
