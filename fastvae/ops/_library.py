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
_LIBRARY.define(f"reparam_kl({_SAMPLE}, {_NOISE}, bool with_kl) -> (Tensor z, Tensor kl)")
_LIBRARY.define(f"reparam_kl_bwd({_SAMPLE}, Tensor? dz, Tensor? dkl, {_NOISE}) -> (Tensor dmu, Tensor dlogvar)")
_LIBRARY.define("philox_normal(Tensor seed, SymInt[] size, SymInt offset, ScalarType dtype) -> Tensor")


def reparam_kl(
    mu: Tensor, logvar: Tensor, noise: PhiloxNoise, logvar_clamp: Clamp | None, *, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None), differentiable."""
    seed = _seed_tensor(noise.seed, mu.device)
    z, kl = torch.ops.fastvae.reparam_kl(mu, logvar, seed, noise.offset, *(logvar_clamp or (None, None)), with_kl)
    return z, kl if with_kl else None


def philox_normal(
    shape: Sequence[int], seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """As the functions of this name in the backends."""
    normals: Tensor = torch.ops.fastvae.philox_normal(_seed_tensor(seed, device), list(shape), offset, dtype)
    return normals


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


def _bounds(low: float | None, high: float | None) -> Clamp | None:
    return None if low is None or high is None else (low, high)


@torch.library.impl(_LIBRARY, "reparam_kl", "CompositeExplicitAutograd")
def _reparam_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: int, low: float | None, high: float | None, with_kl: bool
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    backend, plan = _planned(mu, logvar, z, _bounds(low, high), with_kl=with_kl)
    kl, _ = backend.reparam_kl_fwd(plan, mu, logvar, PhiloxNoise(seed, offset), z)
    return z, mu.new_empty(0) if kl is None else kl


@torch.library.register_fake("fastvae::reparam_kl", lib=_LIBRARY)
def _reparam_kl_fake(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: int, low: float | None, high: float | None, with_kl: bool
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    return z, mu.new_empty(mu.shape[0], dtype=compute_dtype(mu, logvar)) if with_kl else mu.new_empty(0)


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
) -> tuple[Tensor, Tensor]:
    noise = PhiloxNoise(seed, offset)
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    z = torch.empty_like(mu) if dz is None else dz
    backend, plan = _planned(mu, logvar, z, _bounds(low, high), with_kl=dkl is not None)
    saved = backend.recompute_saved(plan, mu, logvar, noise)
    backend.reparam_kl_bwd(plan, mu, logvar, saved, dz, dkl, dmu, dlogvar, noise)
    return dmu, dlogvar


def _planned(mu: Tensor, logvar: Tensor, z: Tensor, bounds: Clamp | None, *, with_kl: bool) -> tuple[Any, Any]:
    backend = _backend.backend_module(mu, "reparam_kl")
    metas = mu, logvar, z, torch.empty_like(mu), torch.empty_like(logvar)
    return backend, backend.plan_reparam_kl(*map(meta_of, metas), bounds, with_kl)


@torch.library.register_fake("fastvae::reparam_kl_bwd", lib=_LIBRARY)
def _reparam_kl_bwd_fake(mu: Tensor, logvar: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu), torch.empty_like(logvar)


@torch.library.impl(_LIBRARY, "philox_normal", "CompositeExplicitAutograd")
def _philox_normal(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    backend = _backend.backend_module(seed, "philox")
    normals: Tensor = backend.philox_normal(torch.Size(size), seed, offset, dtype, seed.device)
    return normals.clone()  # an op's output has memory of its own


@torch.library.register_fake("fastvae::philox_normal", lib=_LIBRARY)
def _philox_normal_fake(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mu, logvar, seed, offset, low, high, with_kl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mu, logvar, seed)
    ctx.constants = offset, low, high
    ctx.with_kl = with_kl


def _backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed = ctx.saved_tensors
    dkl = dkl if ctx.with_kl else None
    gradients = torch.ops.fastvae.reparam_kl_bwd(mu, logvar, dz, dkl, seed, *ctx.constants)
    wanted = (g if want else None for g, want in zip(gradients, ctx.needs_input_grad, strict=False))
    return *wanted, None, None, None, None, None


torch.library.register_autograd("fastvae::reparam_kl", _backward, setup_context=_setup_context, lib=_LIBRARY)
