"""Sampling from a diagonal Gaussian and its KL: autograd and dispatch."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._options import Clamp, Noise, PhiloxNoise
from ._double import apart, gradients_through, with_memory


class ReparamKLFunction(torch.autograd.Function):
    """(mu, logvar) -> (z, kl); kl is None unless `with_kl`. room: the backend's module.

    With `dim`, mu and logvar are the halves of the first input along it: they are read where they are, and their
    gradients are written side by side into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        room: Any,
        mu: Tensor,
        logvar: Tensor | None,
        dim: int | None,
        noise: Noise,
        logvar_clamp: Clamp | None,
        with_kl: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.room, ctx.dim, ctx.logvar_clamp = room, dim, logvar_clamp
        # drawn noise lives on in what the fallback saves
        ctx.noise = None if isinstance(noise, Tensor) else noise
        inputs = (mu, logvar)
        mu, logvar = _halves(mu, logvar, dim)
        same = mu.dtype == logvar.dtype  # to name the dtype takes as long as the memory
        z = torch.empty_like(mu) if same else torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        kl, saved = room.reparam_kl_fwd(mu, logvar, noise, z, logvar_clamp, with_kl=with_kl)
        # saved, so that autograd finds a seed that has changed before the noise is drawn again
        seed = noise.seed if isinstance(noise, PhiloxNoise) and isinstance(noise.seed, Tensor) else None
        ctx.save_for_backward(*inputs, seed, *saved)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, dkl = upstream = with_memory(upstream)
        first, second, seed, *saved = ctx.saved_tensors
        noise = ctx.noise if seed is None else PhiloxNoise(seed, ctx.noise.offset)
        inputs, wanted = (first, second), ctx.needs_input_grad[1:3]
        if torch.is_grad_enabled():
            first, second = apart(inputs)
            inputs = (first, second)
        mu, logvar = _halves(*inputs, ctx.dim)
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            spread = ctx.room.spread(mu, logvar, saved, noise, ctx.logvar_clamp)
            outputs = reference.resample_kl(mu, logvar, spread, ctx.logvar_clamp)
            return None, *gradients_through(outputs, upstream, inputs, wanted), None, None, None, None
        gradients = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        dmu, dlogvar = _halves(gradients[0], gradients[1], ctx.dim)
        ctx.room.reparam_kl_bwd(mu, logvar, saved, dz, dkl, dmu, dlogvar, noise, ctx.logvar_clamp)
        return None, *gradients, None, None, None, None


def _halves(first: Any, second: Any, dim: int | None) -> Any:
    return (first, second) if dim is None else first.chunk(2, dim)
