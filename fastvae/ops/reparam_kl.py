"""Sampling from a diagonal Gaussian and its KL: autograd and dispatch."""

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, PhiloxNoise, TensorMeta

from .. import _backend, _checks, reference
from .._strides import needs_copy, with_strides
from ._autograd import alias_inputs, gradients_through, materialize_grads

# a tensor is noise that was drawn beforehand
Noise = PhiloxNoise | Tensor


class Plan(NamedTuple):
    backend: ModuleType
    launches: Any  # the backend's plan
    draws_noise: bool  # without a seed, the noise is drawn by torch
    copies_inputs: bool  # some inputs cannot be read in place
    logvar_clamp: Clamp | None
    dim: int | None  # along which mu and logvar are the halves of one tensor
    same_dtype: bool
    input_strides: tuple[Any, ...]
    z_strides: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan(
    choice: str, metas: tuple[Any, ...], dim: int | None, logvar_clamp: Any, with_kl: bool, given_noise: bool = False
) -> Plan:
    """The plan of a call.

    Args:
        choice: Which backend was asked for.
        metas: Fields of `TensorMeta` of mu and logvar, or of the tensor that holds both and None; behind them those of
            a prior's mu and logvar, if there is one.
        dim: Of the halves of that tensor.
        logvar_clamp, with_kl: Options.
        given_noise: The noise is a tensor, which kernels do not take.

    Raises:
        ValueError, TypeError: inputs or options that do not fit; nothing is cached then.
    """
    inputs = [None if meta is None else TensorMeta(*meta) for meta in metas]
    prior = [meta for meta in inputs[2:] if meta is not None]
    mu, logvar = _half_metas(inputs[:2], dim, gradients=False)
    _checks.gaussian(mu, logvar)
    bounds = _checks.logvar_clamp(logvar_clamp)
    name = "torch" if given_noise else _backend.backend_of(mu)
    backend = _backend.load_backend(name, "reparam_kl")
    copies = any(meta is not None and needs_copy(meta) for meta in inputs)
    z = mu.like()._replace(dtype=torch.promote_types(mu.dtype, logvar.dtype))
    buffers = _half_metas(inputs[:2], dim, gradients=True)
    of_prior = (*prior, *(meta.like() for meta in prior))
    return Plan(
        backend=backend,
        launches=None if copies else backend.plan_reparam_kl(mu, logvar, z, *buffers, bounds, with_kl, of_prior),
        draws_noise=name == "torch",
        copies_inputs=copies,
        logvar_clamp=bounds,
        dim=dim,
        same_dtype=mu.dtype == logvar.dtype,
        input_strides=tuple(meta and meta.strides for meta in inputs),
        z_strides=z.strides,
    )


def _half_metas(inputs: list[Any], dim: int | None, *, gradients: bool) -> tuple[TensorMeta, TensorMeta]:
    """Of mu and logvar, or of the buffers for their gradients."""
    first, second = (meta.like() if gradients and meta is not None else meta for meta in inputs)
    if dim is None:
        return first, second
    mu, logvar = torch.empty_strided(first.shape, first.strides, device="meta").chunk(2, dim)
    return (
        first._replace(shape=torch.Size(mu.shape), strides=mu.stride()),
        first._replace(shape=torch.Size(logvar.shape), strides=logvar.stride()),
    )


class ReparamKLFunction(torch.autograd.Function):
    """(plan, noise, mu, logvar, *prior) -> (z, kl); kl is None unless the plan has it.

    Where the plan has `dim`, mu holds both, and there is no logvar: they are read where they are, and their gradients
    are written side by side into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, at: Plan, noise: Noise, first: Tensor, second: Tensor | None, *prior: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        mu, logvar = (first, second) if at.dim is None else first.chunk(2, at.dim)
        assert logvar is not None
        # to name the dtype takes as long as the memory
        z = (
            torch.empty_like(mu)
            if at.same_dtype
            else torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        )
        kl, saved = at.backend.reparam_kl_fwd(at.launches, mu, logvar, noise, z, prior)
        ctx.plan = at
        # noise that was drawn is part of what the fallback saves; a seed tensor is saved, so that autograd notices when
        # it has changed before the noise is drawn again
        seed, ctx.offset = (None, None) if isinstance(noise, Tensor) else noise
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.save_for_backward(first, second, *prior, None if seed is ctx.seed else seed, *saved)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, dkl = upstream = materialize_grads(upstream, contiguous=False)
        at: Plan = ctx.plan
        n_inputs = len(at.input_strides)
        tensors = ctx.saved_tensors
        (first, second, *prior), (seed, *saved) = tensors[:n_inputs], tensors[n_inputs:]
        noise = None if ctx.offset is None else PhiloxNoise(ctx.seed if seed is None else seed, ctx.offset)
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            separate = alias_inputs((first, second, *prior))
            mu, logvar = separate[:2] if at.dim is None else separate[0].chunk(2, at.dim)  # type: ignore[union-attr]
            scaled_noise = at.backend.scaled_noise(mu, logvar, saved, noise, at.logvar_clamp)
            outputs = reference.resample_kl(mu, logvar, scaled_noise, at.logvar_clamp, *separate[2:])  # type: ignore[arg-type]
            return None, None, *gradients_through(outputs, upstream, separate, wanted)
        first = with_strides(first, at.input_strides[0])
        second = None if second is None else with_strides(second, at.input_strides[1])
        dz = None if dz is None else with_strides(dz, at.z_strides)
        dfirst = torch.empty_like(first) if wanted[0] else None
        dsecond = torch.empty_like(second) if wanted[1] else None  # type: ignore[arg-type]
        mu, logvar, dmu, dlogvar = first, second, dfirst, dsecond
        if at.dim is not None:
            mu, logvar = first.chunk(2, at.dim)
            dmu, dlogvar = dfirst.chunk(2, at.dim) if dfirst is not None else (None, None)
        prior = [with_strides(t, strides) for t, strides in zip(prior, at.input_strides[2:], strict=True)]
        reached = (want and dkl is not None for want in wanted[2:])
        dprior = [torch.empty_like(t) if reach else None for t, reach in zip(prior, reached, strict=True)]
        at.backend.reparam_kl_bwd(at.launches, mu, logvar, saved, dz, dkl, dmu, dlogvar, noise, prior, dprior)
        return None, None, dfirst, dsecond, *dprior
