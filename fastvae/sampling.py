"""Where the noise of a sample comes from, and the way from there to the op."""

import torch
from torch import Tensor

from . import _backend, _checks, reference
from ._options import Clamp, Noise, PhiloxNoise
from ._strides import readable
from .ops import _registered
from .ops.reparam_kl import ReparamKLFunction

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
    _checks.gaussian(mu, logvar)
    _checks.noise_source(mu, generator, seed, offset)
    bounds = _checks.logvar_clamp(logvar_clamp)
    traced = torch.compiler.is_compiling() or _registered.is_watched(mu)
    if traced and generator is not None:
        _checks.fail(
            "generator cannot be given while torch traces (torch.compile, torch.export, fake tensors); got one. Pass "
            "seed=, an int or a tensor, or let the noise come from torch's default generator."
        )
    noise = _noise(mu, generator, seed, offset, traced=traced)
    if traced:
        if isinstance(noise, PhiloxNoise):
            return _registered.reparam_kl(mu, logvar, noise, bounds, with_kl=with_kl)
        return reference.reparameterize_kl(mu, logvar, noise, bounds)
    first, second, dim = (mu, logvar, None) if packed is None else (packed[0], None, packed[1])
    inputs = (readable(first), None if second is None else readable(second), dim)
    room = _backend.room_of(mu, "reparam_kl")
    z, kl = ReparamKLFunction.apply(room, *inputs, noise, bounds, with_kl)  # type: ignore[no-untyped-call]
    return z, kl


def philox(shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The noise of seeded sampling itself, on the device of `like`."""
    if torch.compiler.is_compiling() or _registered.is_watched(like):
        return _registered.philox_normal(shape, _int64(seed), offset, dtype, like.device)
    room = _backend.room_of(like, "philox")
    normals: Tensor = room.philox_normal(shape, _int64(seed), offset, dtype, like.device)
    return normals


def _int64(seed: int | Tensor) -> int | Tensor:
    """The int64 with the bits of seed mod 2^64."""
    if isinstance(seed, Tensor) or -(2**63) <= seed < 2**63:  # arithmetic on a traced int would overflow
        return seed
    return (seed + 2**63) % 2**64 - 2**63


def _noise(
    mu: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int, *, traced: bool
) -> Noise:
    if seed is not None:
        return PhiloxNoise(_int64(seed), offset)
    if traced and mu.device.type in OPAQUE:
        return PhiloxNoise(torch.randint(2**63 - 1, (1,), device=mu.device), 0)
    if traced or _backend.backend_of(mu) == "torch":
        return _drawn(mu, generator)
    if generator is None:
        return PhiloxNoise(torch.empty(1, dtype=torch.int64, device=mu.device).random_(), 0)
    seed = torch.empty(1, dtype=torch.int64, device=generator.device)
    seed.random_(-(2**63), 2**63 - 1, generator=generator)
    return PhiloxNoise(seed.to(mu.device, non_blocking=True), 0)


def _drawn(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """What torch.randn_like(mu) draws, so that a seeded textbook VAE and this one see the same noise."""
    if generator is None:
        return torch.randn_like(mu)
    if generator.device == mu.device:
        return torch.empty_like(mu).normal_(generator=generator)
    return torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=generator.device).to(mu.device)
