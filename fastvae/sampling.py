"""Where the noise of a sample comes from, and the way from there to the op."""

import torch
from torch import Tensor

from . import _backend, _calls, _checks, reference
from ._options import Clamp, PhiloxNoise
from ._seeds import noise_source
from ._strides import readable
from .ops import _registered
from .ops.reparam_kl import ReparamKLFunction, Site

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
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None); `packed`: mu and logvar are the halves of a dimension of one tensor."""
    first, second, dim = (mu, logvar, None) if packed is None else (packed[0], None, packed[1])
    call = _calls.signature((mu, logvar), "sample", dim, logvar_clamp, with_kl)
    site: Site | None = _calls.recall(call)
    if site is None:
        _checks.gaussian(mu, logvar)
        bounds = _checks.logvar_clamp(logvar_clamp)
        if _backend.is_traced() or _registered.is_watched(mu):
            return _traced(mu, logvar, generator, seed, offset, bounds, with_kl=with_kl)
        site = Site(_backend.room_of(mu, "reparam_kl"), dim, bounds, with_kl, {})
        first, second = readable(first), None if second is None else readable(second)
        _calls.remember(call, site, (mu, logvar))
    seed, offset = noise_source(mu, generator, seed, offset)
    drawn = seed is None and site.room is _backend.room("torch", "reparam_kl")
    noise = _drawn(mu, generator) if drawn else _philox_noise(mu, generator, seed, offset)
    z, kl = ReparamKLFunction.apply(site, noise, first, second)  # type: ignore[no-untyped-call]
    return z, kl


def _traced(
    mu: Tensor,
    logvar: Tensor,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
    offset: int,
    bounds: Clamp | None,
    *,
    with_kl: bool,
) -> tuple[Tensor, Tensor | None]:
    seed, offset = noise_source(mu, generator, seed, offset)
    if generator is not None:
        _checks.fail(
            "generator cannot be given while torch traces (torch.compile, torch.export, fake tensors); got one. Pass "
            "seed=, an int or a tensor, or let the noise come from torch's default generator."
        )
    if seed is None and mu.device.type not in OPAQUE:
        return reference.reparameterize_kl(mu, logvar, _drawn(mu, None), bounds)
    drawn_seed = torch.randint(2**63 - 1, (1,), device=mu.device) if seed is None else seed
    return _registered.reparam_kl(mu, logvar, PhiloxNoise(drawn_seed, offset), bounds, with_kl=with_kl)


def philox(shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The noise of seeded sampling itself, on the device of `like`."""
    if _backend.is_traced() or _registered.is_watched(like):
        return _registered.philox_normal(shape, seed, offset, dtype, like.device)
    room = _backend.room_of(like, "philox")
    normals: Tensor = room.philox_normal(shape, seed, offset, dtype, like.device)
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
