"""Sampling from a diagonal Gaussian and its KL: autograd and dispatch."""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._options import Clamp, Noise
from ._double import gradients_through, with_memory


class ReparamKLFunction(torch.autograd.Function):
    """(mu, logvar) -> (z, kl); kl is None unless `with_kl`.

    With `dim`, mu and logvar are the halves of the first input along it: they are read where they are, and their
    gradients are written side by side into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor | None,
        dim: int | None,
        noise: Noise,
        logvar_clamp: Clamp | None,
        with_kl: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.room = _backend.room(_backend.backend_of(mu), "reparam_kl")
        ctx.dim, ctx.logvar_clamp = dim, logvar_clamp
        # drawn noise lives on in what the fallback saves
        ctx.noise = None if isinstance(noise, Tensor) else noise
        inputs = (mu, logvar)
        mu, logvar = _halves(mu, logvar, dim)
        z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        kl, saved = ctx.room.reparam_kl_fwd(mu, logvar, noise, z, logvar_clamp, with_kl=with_kl)
        ctx.save_for_backward(*inputs, *saved)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, dkl = upstream = with_memory(upstream)
        first, second, *saved = ctx.saved_tensors
        inputs, wanted = (first, second), ctx.needs_input_grad[:2]
        mu, logvar = _halves(*inputs, ctx.dim)
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            spread = ctx.room.spread(mu, logvar, saved, ctx.noise, ctx.logvar_clamp)
            outputs = reference.resample_kl(mu, logvar, spread, ctx.logvar_clamp)
            return *gradients_through(outputs, upstream, inputs, wanted), None, None, None, None
        gradients = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        dmu, dlogvar = _halves(gradients[0], gradients[1], ctx.dim)
        ctx.room.reparam_kl_bwd(mu, logvar, saved, dz, dkl, dmu, dlogvar, ctx.noise, ctx.logvar_clamp)
        return *gradients, None, None, None, None


def _halves(first: Any, second: Any, dim: int | None) -> Any:
    return (first, second) if dim is None else first.chunk(2, dim)
