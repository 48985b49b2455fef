"""The noise of a sample, and the call of its op."""

from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, PhiloxNoise

from . import _backend, _checks, reference
from ._seeds import given_noise, noise_source
from ._strides import readable
from .ops import _library
from .ops._autograd import direct_apply
from .ops.reparam_kl import Noise, ReparamKLFunction, plan

_PLAIN = Tensor, torch.nn.Parameter  # a subclass must see the ops
_apply = direct_apply(ReparamKLFunction)

# devices on which a traced sample without a seed is one op that draws its own noise; elsewhere the compiler fuses the
# plain formula with torch's noise
OPAQUE = {"cuda"}


def sample(
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int,
    logvar_clamp: Clamp | None,
    *,
    with_kl: bool,
    packed: tuple[Tensor, int] | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None).

    `packed`: mu and logvar are the halves of a dimension of one tensor. `noise`: used instead of drawing any.
    """
    first, second, dim = (mu, logvar, None) if packed is None else (packed[0], None, packed[1])
    if _backend.needs_reference() or type(first) not in _PLAIN:
        _checks.gaussian(mu, logvar)
        bounds = _checks.logvar_clamp(logvar_clamp)
        return _traced(mu, logvar, generator, seed, offset, bounds, noise, with_kl=with_kl)
    try:
        metas = tuple(
            [
                t if t is None else (t.shape, t.stride(), t.dtype, t.device, False, t.is_neg(), Tensor, t.layout)
                for t in (first, second)
            ]
        )
        at = plan(_backend.choice(), metas, dim, logvar_clamp, with_kl, noise is not None)
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor, or bounds that cannot be hashed
        _checks.gaussian(mu, logvar)
        bounds = _checks.logvar_clamp(logvar_clamp)
        if bounds == logvar_clamp:
            raise
        return sample(mu, logvar, generator, seed, offset, bounds, with_kl=with_kl, packed=packed, noise=noise)
    if at.copies_inputs:
        mu, logvar = readable(mu), readable(logvar)
        return sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=with_kl, noise=noise)
    if noise is not None:
        used: Noise = given_noise(noise, mu, generator, seed, offset)
    else:
        if not (generator is None and seed is None and offset == 0):
            seed, offset = noise_source(mu, generator, seed, offset)
        drawn = seed is None and at.draws_noise
        used = _drawn(mu, generator) if drawn else _philox_noise(mu, generator, seed, offset)
    apply: Any = ReparamKLFunction.apply if torch._C._are_functorch_transforms_active() else _apply
    z, kl = apply(at, used, first, second)
    return z, kl


def _traced(
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int,
    bounds: Clamp | None,
    noise: Tensor | None,
    *,
    with_kl: bool,
) -> tuple[Tensor, Tensor | None]:
    if noise is not None:
        noise = given_noise(noise, mu, generator, seed, offset)
        z, kl = reference.reparameterize_kl(mu, logvar, noise, bounds)
        return z, kl if with_kl else None
    seed, offset = noise_source(mu, generator, seed, offset)
    if generator is not None:
        _checks.fail(
            "generator cannot be given while torch traces (torch.compile, torch.export, fake tensors); got one. Pass "
            "seed=, an int or a tensor, or let the noise come from torch's default generator."
        )
    if seed is None and mu.device.type not in OPAQUE:
        return reference.reparameterize_kl(mu, logvar, _drawn(mu, None), bounds)
    drawn_seed = torch.randint(2**63 - 1, (1,), device=mu.device) if seed is None else seed
    return _library.reparam_kl(mu, logvar, PhiloxNoise(drawn_seed, offset), bounds, with_kl=with_kl)


def philox(shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The noise of seeded sampling itself, on the device of `like`."""
    if _backend.needs_reference() or type(like) not in _PLAIN:
        return _library.philox_normal(shape, seed, offset, dtype, like.device)
    backend = _backend.backend_module(like, "philox")
    normals: Tensor = backend.philox_normal(shape, seed, offset, dtype, like.device)
    return normals


def _philox_noise(mu: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int) -> PhiloxNoise:
    if seed is not None:
        return PhiloxNoise(seed, offset)
    if generator is None:
        return PhiloxNoise(torch.empty(1, dtype=torch.int64, device=mu.device).random_(), 0)
    drawn = torch.empty(1, dtype=torch.int64, device=generator.device)
    drawn.random_(-(2**63), 2**63 - 1, generator=generator)
    return PhiloxNoise(drawn.to(mu.device, non_blocking=True), 0)


def _drawn(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """What torch.randn_like(mu) draws, so that a seeded textbook VAE and this one see the same noise."""
    if generator is None:
        return torch.randn_like(mu)
    if generator.device == mu.device:
        return torch.empty_like(mu).normal_(generator=generator)
    return torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=generator.device).to(mu.device)
