"""Sampling from a diagonal Gaussian and its KL: autograd and dispatch."""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._options import Clamp, Noise
from ._double import gradients_through


class ReparamKLFunction(torch.autograd.Function):
    """(mu, logvar) -> (z, kl); kl is None unless `with_kl`."""

    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor, noise: Noise, logvar_clamp: Clamp | None, with_kl: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.room = _backend.room(_backend.backend_of(mu), "reparam_kl")
        z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        kl, saved = ctx.room.reparam_kl_fwd(mu, logvar, noise, z, logvar_clamp, with_kl=with_kl)
        ctx.save_for_backward(mu, logvar, *saved)
        # drawn noise lives on in what the fallback saved
        ctx.noise, ctx.logvar_clamp = None if isinstance(noise, Tensor) else noise, logvar_clamp
        return z, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, dkl = upstream
        mu, logvar, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            spread = ctx.room.spread(mu, logvar, saved, ctx.noise, ctx.logvar_clamp)
            outputs = reference.resample_kl(mu, logvar, spread, ctx.logvar_clamp)
            return *gradients_through(outputs, upstream, (mu, logvar), ctx.needs_input_grad), None, None, None
        wants_dmu, wants_dlogvar = ctx.needs_input_grad[:2]
        dmu = torch.empty_like(mu) if wants_dmu else None
        dlogvar = torch.empty_like(logvar) if wants_dlogvar else None
        ctx.room.reparam_kl_bwd(mu, logvar, saved, dz, dkl, dmu, dlogvar, ctx.noise, ctx.logvar_clamp)
        return dmu, dlogvar, None, None, None
