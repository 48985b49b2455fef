"""What a call of the loss comes to: checked, resolved and laid out once, and found again by its cache key."""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from operator import itemgetter
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from fastvae_kernels.types import (
    Clamp,
    ElboNumbers,
    ElboOptions,
    ElboTensors,
    ErrorOptions,
    FreeBitsOptions,
    TensorMeta,
    compute_dtype,
)

from .. import _backend, _checks
from .._dtypes import in_dtype
from .._strides import needs_copy
from ..likelihoods import SPECS, LikelihoodSpec
from ..regularizers import FreeBits


class LossSpec(NamedTuple):
    """The options of a loss, all but tensors and numbers; hashable."""

    likelihood: str | LikelihoodSpec | None = None  # None: no reconstruction
    recon_reduction: str = "sum"
    kl_reduction: str = "sum"
    logvar_clamp: Clamp | None = None
    free_bits: FreeBits | None = None
    capacity_mode: Any = None
    one_pass: bool = False
    inplace: bool = False
    n_latents: int | None = None  # of a batch, for kl_reduction="mean" where `kl` is given


class Reach(IntEnum):
    """Which upstream gradients reach an input."""

    RECON = 0  # those of the loss and of the reconstruction term
    KL = 1  # those of the loss and of the KL term
    BOTH = 2
    LOSS = 3


_OF_RECON = ("recon", "target", "log_scale", "extra_map", "extra", "sample_log_scale")
_OF_LOSS = ("betas", "recon_weights")
_REACH = [
    *(
        Reach.RECON if f in _OF_RECON else Reach.BOTH if f == "weight" else Reach.LOSS if f in _OF_LOSS else Reach.KL
        for f in ElboTensors._fields
    ),
    *(Reach.LOSS for _ in ElboNumbers._fields),
]


class Plan(NamedTuple):
    """What a call comes to.

    The autograd function takes the tensors that are given, and behind them the numbers that are tensors: `places` are
    their places in (*ElboTensors, *ElboNumbers), and the other tuples are in the same order.
    """

    backend: ModuleType | None  # None: the reference formula
    launches: Any  # the backend's plan
    options: ElboOptions
    copies_inputs: bool  # some inputs cannot be read in place
    writes_gradient: bool  # the forward pass writes the gradient of recon
    inplace: bool  # into recon itself
    n_tensors: int
    places: tuple[int, ...]
    arrange: Callable[[Sequence[Any]], tuple[Any, ...]]  # inputs and None -> (*ElboTensors, *ElboNumbers)
    strides: tuple[tuple[int, ...], ...]
    differentiable: tuple[tuple[int, int], ...]  # which require a gradient, and the `Reach` of each
    recon_strides: tuple[int, ...]  # of the gradient of recon


def normalizer(reduction: str, numel: int, batch: int) -> float:
    """Factor on the sum of a term; NaN where torch's mean over nothing is."""
    if reduction == "sum" or reduction == "none":
        return 1.0
    divisor: Any = batch if reduction == "batchmean" else numel
    if isinstance(divisor, Tensor):  # torch.jit.trace keeps sizes variable
        divisor = divisor.double()
    return 1.0 / divisor if divisor else math.nan


def resolve(spec: LossSpec, tensors: ElboTensors) -> ElboOptions:
    """The options of the op for these tensors (or metas)."""
    likelihood = SPECS[spec.likelihood] if isinstance(spec.likelihood, str) else spec.likelihood
    like = tensors.recon if tensors.kl is None and tensors.mu is None else tensors.mu
    like = tensors.kl if like is None else like
    n_latents = like.numel() if spec.n_latents is None else spec.n_latents
    options = ElboOptions(
        kl_normalizer=normalizer(spec.kl_reduction, n_latents, like.shape[0]),
        per_sample="none" in (spec.kl_reduction, spec.recon_reduction),
        logvar_clamp=spec.logvar_clamp,
        free_bits=_free_bits(spec, tensors),
        capacity_mode=spec.capacity_mode,
    )
    if likelihood is None:
        return options
    inverse_scale = _exp(-likelihood.log_scale)
    recon = tensors.recon
    return options._replace(
        error=_error(likelihood, tensors),
        error_weight=likelihood.nll_weight * inverse_scale * likelihood.factor,
        extra_weight=likelihood.nll_weight * inverse_scale,
        nll_weight=likelihood.nll_weight,
        constant=likelihood.nll_weight * likelihood.log_scale + likelihood.constant,
        softclip=likelihood.softclip,
        recon_normalizer=normalizer(spec.recon_reduction, recon.numel(), recon.shape[0]),
        mask_normalize=likelihood.mask_normalize and tensors.mask is not None,
    )


def _free_bits(spec: LossSpec, tensors: ElboTensors) -> FreeBitsOptions | None:
    if spec.free_bits is None:
        return None
    nats = in_dtype(float(spec.free_bits.nats), compute_dtype(*tensors[4:8], tensors.kl))
    return FreeBitsOptions(nats, spec.free_bits.mode)


def _error(likelihood: LikelihoodSpec, tensors: ElboTensors) -> ErrorOptions:
    """With constants that the dtype of arithmetic can represent."""
    name, *constants = likelihood.error
    dtype = compute_dtype(tensors.recon, tensors.target)
    return ErrorOptions(name, *(in_dtype(constant, dtype) for constant in constants))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@lru_cache(maxsize=1024)
def plan(
    choice: str, spec: tuple[Any, ...], metas: tuple[Any, ...], number_metas: tuple[Any, ...], grad_enabled: bool
) -> Plan:
    """The plan of a call.

    Args:
        choice: Which backend was asked for.
        spec: The fields of `LossSpec`.
        metas, number_metas: Fields of `TensorMeta` of each tensor, and of each number that is a tensor.
        grad_enabled: Gradients are recorded.

    Raises:
        ValueError, TypeError: inputs or options that do not fit; nothing is cached then.
    """
    spec = LossSpec(*spec)
    tensors = ElboTensors(*(None if meta is None else TensorMeta(*meta) for meta in metas))
    numbers = ElboNumbers(*(None if meta is None else TensorMeta(*meta) for meta in number_metas))
    _checks.loss_inputs(tensors, numbers, spec)
    given = [meta for meta in (*tensors, *numbers) if meta is not None]
    like = given[0]
    options = resolve(spec, tensors)
    copies = any(needs_copy(meta) for meta in given)
    if not grad_enabled:
        tensors = ElboTensors(*(t and t._replace(requires_grad=False) for t in tensors))
        numbers = ElboNumbers(*(t and t._replace(requires_grad=False) for t in numbers))
    writes = (
        grad_enabled
        and spec.one_pass
        and tensors.recon is not None
        and tensors.recon.requires_grad
        and _checks.one_pass_is_right(tensors, numbers, options)
    )
    plain = all(meta.kind in _backend.PLAIN for meta in given)
    # no kernel computes the gradient of a map of weights
    plain = plain and not (tensors.weight_map is not None and tensors.weight_map.requires_grad)
    backend = _backend.load_backend(_backend.backend_of(like), "elbo") if plain else None
    everything = (*tensors, *numbers)
    places = tuple(place for place, meta in enumerate(everything) if meta is not None)
    return Plan(
        backend=backend,
        launches=None if backend is None or copies else backend.plan_elbo(tensors, numbers, options, writes),
        options=options,
        copies_inputs=copies,
        writes_gradient=writes,
        inplace=spec.inplace and writes,
        n_tensors=sum(meta is not None for meta in tensors),
        places=places,
        arrange=itemgetter(*(places.index(i) if i in places else len(places) for i in range(len(everything)))),
        strides=tuple(meta.strides for meta in given),
        differentiable=tuple((i, int(_REACH[p])) for i, p in enumerate(places) if everything[p].requires_grad),
        recon_strides=() if tensors.recon is None else tensors.recon.like().strides,
    )
