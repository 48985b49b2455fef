"""Sampling from a diagonal Gaussian and its KL: autograd and dispatch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._options import Clamp, Noise, PhiloxNoise
from ._double import apart, gradients_through, with_memory


class Site(NamedTuple):
    """What calls whose tensors are alike have in common."""

    room: Any  # the backend's module
    dim: int | None  # along which mu and logvar are the halves of one tensor
    logvar_clamp: Clamp | None
    with_kl: bool
    notes: dict[Any, Any]  # what the backend worked out for such tensors


class ReparamKLFunction(torch.autograd.Function):
    """(site, noise, mu, logvar) -> (z, kl); kl is None unless the site has `with_kl`.

    Where it has `dim`, mu holds both, and there is no logvar: they are read where they are, and their gradients are
    written side by side into one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, site: Site, noise: Noise, first: Tensor, second: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        mu, logvar = _halves(first, second, site.dim)
        same = mu.dtype == logvar.dtype  # to name the dtype takes as long as the memory
        z = torch.empty_like(mu) if same else torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        kl, saved = site.room.reparam_kl_fwd(mu, logvar, noise, z, site.logvar_clamp, site.notes, with_kl=site.with_kl)
        ctx.site = site
        # drawn noise lives on in what the fallback saves; a seed is saved, so that autograd finds one that has changed
        # before the noise is drawn again
        seed, ctx.offset = (None, None) if isinstance(noise, Tensor) else noise
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.save_for_backward(first, second, None if seed is ctx.seed else seed, *saved)
        return z, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, dkl = upstream = with_memory(upstream)
        first, second, seed, *saved = ctx.saved_tensors
        site, dim = ctx.site, ctx.site.dim
        noise = None if ctx.offset is None else PhiloxNoise(ctx.seed if seed is None else seed, ctx.offset)
        inputs, wanted = (first, second), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True: the kernels are not differentiable, the reference is
            separate = apart(inputs)
            mu, logvar = _halves(separate[0], separate[1], dim)
            spread = site.room.spread(mu, logvar, saved, noise, site.logvar_clamp)
            outputs = reference.resample_kl(mu, logvar, spread, site.logvar_clamp)
            return None, None, *gradients_through(outputs, upstream, separate, wanted)
        mu, logvar = _halves(first, second, dim)
        dfirst = torch.empty_like(first) if wanted[0] else None
        dsecond = torch.empty_like(second) if wanted[1] else None
        dmu, dlogvar = _halves(dfirst, dsecond, dim)
        site.room.reparam_kl_bwd(mu, logvar, saved, dz, dkl, dmu, dlogvar, noise, site.logvar_clamp, site.notes)
        return None, None, dfirst, dsecond


def _halves(first: Any, second: Any, dim: int | None) -> Any:
    return (first, second) if dim is None else first.chunk(2, dim)
