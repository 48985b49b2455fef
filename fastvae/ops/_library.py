"""Sampling as a torch.library op, for compilers, fake tensors, tensor subclasses and dispatch modes.

Eager code calls a backend directly, because the dispatcher takes as long as the loss of a small batch. Losses need no
op: there the reference formula serves, which a compiler fuses with its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, PhiloxNoise, compute_dtype, meta_of

from .. import _backend

_LIBRARY = torch.library.Library("fastvae", "DEF")
_SAMPLE = "Tensor mu, Tensor logvar"
_NOISE = "Tensor seed, SymInt offset, float? low, float? high"
_PRIOR = "Tensor? prior_mu=None, Tensor? prior_logvar=None"
_LIBRARY.define(f"reparam_kl({_SAMPLE}, {_NOISE}, bool with_kl, {_PRIOR}) -> (Tensor z, Tensor kl)")
_LIBRARY.define(f"reparam_kl_bwd({_SAMPLE}, Tensor? dz, Tensor? dkl, {_NOISE}, {_PRIOR}) -> Tensor[]")
_LIBRARY.define("philox_normal(Tensor seed, SymInt[] size, SymInt offset, ScalarType dtype) -> Tensor")


def reparam_kl(
    mu: Tensor,
    logvar: Tensor,
    noise: PhiloxNoise,
    logvar_clamp: Clamp | None,
    *,
    with_kl: bool,
    prior: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None), differentiable."""
    seed = _seed_tensor(noise.seed, mu.device)
    bounds = logvar_clamp or (None, None)
    z, kl = torch.ops.fastvae.reparam_kl(mu, logvar, seed, noise.offset, *bounds, with_kl, *prior)
    return z, kl if with_kl else None


def philox_normal(
    shape: Sequence[int], seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """As the functions of this name in the backends."""
    normals: Tensor = torch.ops.fastvae.philox_normal(_seed_tensor(seed, device), list(shape), offset, dtype)
    return normals


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


def _given(prior: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for t in prior if t is not None)


def _bounds(low: float | None, high: float | None) -> Clamp | None:
    return None if low is None or high is None else (low, high)


@torch.library.impl(_LIBRARY, "reparam_kl", "CompositeExplicitAutograd")
def _reparam_kl(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: int,
    low: float | None,
    high: float | None,
    with_kl: bool,
    *prior: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    prior = _given(prior)
    backend, plan = _planned(mu, logvar, z, _bounds(low, high), prior, with_kl=with_kl)
    kl, _ = backend.reparam_kl_fwd(plan, mu, logvar, PhiloxNoise(seed, offset), z, prior)
    return z, mu.new_empty(0) if kl is None else kl


@torch.library.register_fake("fastvae::reparam_kl", lib=_LIBRARY)
def _reparam_kl_fake(
    mu: Tensor,
    logvar: Tensor,
    seed: Tensor,
    offset: int,
    low: float | None,
    high: float | None,
    with_kl: bool,
    *prior: Tensor | None,
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    return z, mu.new_empty(mu.shape[0], dtype=compute_dtype(mu, logvar, *prior)) if with_kl else mu.new_empty(0)


@torch.library.impl(_LIBRARY, "reparam_kl_bwd", "CompositeExplicitAutograd")
def _reparam_kl_bwd(
    mu: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    offset: int,
    low: float | None,
    high: float | None,
    *prior: Tensor | None,
) -> list[Tensor]:
    noise, prior = PhiloxNoise(seed, offset), _given(prior)
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    z = torch.empty_like(mu) if dz is None else dz
    backend, plan = _planned(mu, logvar, z, _bounds(low, high), prior, with_kl=dkl is not None)
    saved = backend.recompute_saved(plan, mu, logvar, noise, prior)
    # no gradient of the KL: the prior has none either
    dprior = [torch.zeros_like(t) if dkl is None else torch.empty_like(t) for t in prior]
    backend.reparam_kl_bwd(plan, mu, logvar, saved, dz, dkl, dmu, dlogvar, noise, prior, dprior)
    return [dmu, dlogvar, *dprior]


def _planned(
    mu: Tensor, logvar: Tensor, z: Tensor, bounds: Clamp | None, prior: Sequence[Tensor], *, with_kl: bool
) -> tuple[Any, Any]:
    backend = _backend.backend_module(mu, "reparam_kl")
    metas = mu, logvar, z, torch.empty_like(mu), torch.empty_like(logvar)
    of_prior = [meta_of(t) for t in (*prior, *(torch.empty_like(t) for t in prior))]
    return backend, backend.plan_reparam_kl(*map(meta_of, metas), bounds, with_kl, of_prior)


_N_BWD_ARGUMENTS = 6  # between logvar and the prior


@torch.library.register_fake("fastvae::reparam_kl_bwd", lib=_LIBRARY)
def _reparam_kl_bwd_fake(mu: Tensor, logvar: Tensor, *args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in (mu, logvar, *_given(args[_N_BWD_ARGUMENTS:]))]


@torch.library.impl(_LIBRARY, "philox_normal", "CompositeExplicitAutograd")
def _philox_normal(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    backend = _backend.backend_module(seed, "philox")
    normals: Tensor = backend.philox_normal(torch.Size(size), seed, offset, dtype, seed.device)
    return normals.clone()  # an op's output has memory of its own


@torch.library.register_fake("fastvae::philox_normal", lib=_LIBRARY)
def _philox_normal_fake(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mu, logvar, seed, offset, low, high, with_kl, *prior = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mu, logvar, seed, *prior)
    ctx.constants = offset, low, high
    ctx.with_kl = with_kl


def _backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed, *prior = ctx.saved_tensors
    dkl = dkl if ctx.with_kl else None
    gradients = torch.ops.fastvae.reparam_kl_bwd(mu, logvar, dz, dkl, seed, *ctx.constants, *prior)
    dmu, dlogvar, *dprior = (g if want else None for g, want in zip(gradients, _wanted(ctx), strict=False))
    return dmu, dlogvar, None, None, None, None, None, *(dprior or [None] * len(prior))


def _wanted(ctx: Any) -> tuple[bool, ...]:
    """Of mu, logvar and the prior."""
    return (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[7:])


torch.library.register_autograd("fastvae::reparam_kl", _backward, setup_context=_setup_context, lib=_LIBRARY)
