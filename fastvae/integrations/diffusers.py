"""diffusers' posterior, computed by fastvae."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from math import prod
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import compute_dtype
from ..distributions import DiagonalGaussian
from ..functional import philox_normal
from ..sampling import sample
from ._patch import Patch, Replacement, imported

CLAMP = (-30.0, 20.0)  # what diffusers clamps every logvar to
ATTRIBUTES = ("mean", "logvar", "std", "var")

Posterior = Any  # diffusers' class, which is not imported here
Generators = torch.Generator | list[torch.Generator] | None
Sample = tuple[Tensor, Tensor | None]  # z, and the KL if it was asked for


class CachedKL(NamedTuple):
    """The KL that `sample` computed, and of which moments."""

    kl: Tensor
    parameters: Tensor
    version: int


# not in the posteriors themselves, which are copied and pickled; not in closures, which torch.compile looks into
_made: WeakSet[Posterior] = WeakSet()
_cached_kl: WeakKeyDictionary[Posterior, CachedKL] = WeakKeyDictionary()


def patch_diffusers(
    noise: Literal["torch", "philox"] = "torch", *, kl_shape: Literal["diffusers", "batch"] = "diffusers"
) -> Patch:
    """Let fastvae compute `DiagonalGaussianDistribution`, the posterior of diffusers' autoencoders.

    The class itself is changed: every autoencoder that uses it is served, and so are posteriors that exist already. In
    float32 and float64 the numbers and gradients of `sample`, `kl` and `nll` stay what they were. What it brings:

    - `sample` reads the packed moments where they are; where a gradient is wanted, the same pass measures the KL that
      `kl()` returns afterwards, and the backward pass writes one packed gradient for both. `mean`, `logvar`, `std` and
      `var` are computed when they are read.
    - Arithmetic is float32 for 16-bit moments. `kl` and `nll` are then float32: they neither overflow nor cancel.
    - `kl` and `nll` are in nats, on the moments' device. For a deterministic posterior they are zeros of the same
      shape, where diffusers' own are a one-element CPU tensor. `nll(sample, dims)` adds up `dims`, as there.

    All of them follow `parameters`: an assignment to `mean`, `logvar`, `std` or `var` changes that attribute alone.
    Samples have the dtype of `parameters`, under autocast too. A subclass with its own `__init__` keeps diffusers'
    methods. `kl(other)` broadcasts nothing.

    Args:
        noise: "torch": the noise that diffusers draws, from one generator or a list, bit for bit. "philox": the
            generator (of a list, each its sample's) draws a seed, and the noise is a function of (seed, element): with
            generators on the CPU it is the same on every device, and Triton's backward pass makes it anew instead of
            keeping it.
        kl_shape: Shape of `kl()`, and of `nll(sample)` without `dims`, for latents of videos, [B, C, T, H, W].
            "diffusers": [B, W]. diffusers adds up dimensions 1, 2 and 3 whatever the rank, which leaves the width; with
            this shape `kl().mean()` and `kl().sum() / B` of an existing script keep their values. "batch": [B], the KL
            of each sample, whose mean is W times larger; the pass that draws the sample then measures it too. Latents
            of lower rank have [B] in both.

    Returns:
        Patch: `undo()`, or the end of its `with` block, puts diffusers' methods back; posteriors made meanwhile go
            on with them.

    Raises:
        ImportError: diffusers is not installed.
        RuntimeError: it is patched already.
        ValueError: unknown noise or kl_shape.

    Source: diffusers.models.autoencoders.vae.DiagonalGaussianDistribution of diffusers 0.42.
    """
    _checks.choice("noise", noise, ("torch", "philox"))
    _checks.choice("kl_shape", kl_shape, ("diffusers", "batch"))
    theirs = imported("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution
    draw = _philox if noise == "philox" else _drawn_by(imported("diffusers.utils.torch_utils").randn_tensor)
    lazy, read_all = _lazy_attributes(theirs.__init__)
    methods = lazy | _served(theirs, draw, keeps_width=kl_shape == "diffusers")
    replacements = [Replacement(theirs, name, method) for name, method in methods.items()]
    return Patch("patch_diffusers", replacements, undoing=read_all)


def _gaussian(posterior: Posterior) -> DiagonalGaussian:
    return DiagonalGaussian.from_moments(posterior.parameters, 1, CLAMP, posterior.deterministic)


def _lazy_attributes(init: Callable[..., None]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Methods that compute `ATTRIBUTES` when they are read, and one that computes them all before an undo."""

    def __init__(self: Posterior, parameters: Tensor, deterministic: bool = False) -> None:
        if torch.compiler.is_compiling():  # the compiler drops what is not read
            return init(self, parameters, deterministic)
        self.parameters, self.deterministic = parameters, deterministic
        _made.add(self)
        return None

    def __getattr__(self: Posterior, name: str) -> Tensor:
        if name not in ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with torch.enable_grad():  # the first reader may be under no_grad, later ones not
            value: Tensor = getattr(_gaussian(self), name)
        setattr(self, name, value)
        return value

    def __getstate__(self: Posterior) -> dict[str, Any]:
        if self in _made:
            read(self)  # where a pickle is loaded, nothing may be patched
        return dict(vars(self))

    def read(posterior: Posterior) -> None:
        for name in ATTRIBUTES:
            getattr(posterior, name)

    def read_all() -> None:
        for posterior in list(_made):
            with suppress(Exception):  # its tensor is none of moments, which diffusers would have said when it was made
                read(posterior)

    return {"__init__": __init__, "__getattr__": __getattr__, "__getstate__": __getstate__}, read_all


def _served(
    theirs: type, draw: Callable[[Posterior, Generators, bool], Sample], *, keeps_width: bool
) -> dict[str, Any]:
    """The methods that compute; with `keeps_width`, sums of videos leave out the last dimension, as diffusers' do."""

    def summed(packed: Tensor) -> tuple[int, ...] | None:
        return (1, 2, 3) if keeps_width and packed.ndim > 4 else None

    def sample(self: Posterior, generator: Generators = None) -> Tensor:
        packed = self.parameters
        wanted = packed.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with_kl = wanted and summed(packed) is None
        z, kl = draw(self, generator, with_kl)
        if kl is not None:
            _cached_kl[self] = CachedKL(kl, packed, packed._version)
        return z

    def kl(self: Posterior, other: Posterior | None = None) -> Tensor:
        gaussian, prior = _gaussian(self), None if other is None else _gaussian(other)
        if (dims := summed(self.parameters)) is not None:
            return _over(dims, DiagonalGaussian.kl, gaussian, prior)
        if prior is not None:
            return gaussian.kl(prior)
        known = None if torch.compiler.is_compiling() else _cached_kl.get(self)
        if known and known.parameters is self.parameters and known.version == self.parameters._version:
            return known.kl if torch.is_grad_enabled() else known.kl.detach()
        return gaussian.kl()

    def nll(self: Posterior, sample: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
        gaussian = _gaussian(self)
        dims = summed(self.parameters) if dims is None else tuple(dims)
        return gaussian.nll(sample) if dims is None else _over(dims, DiagonalGaussian.nll, gaussian, sample)

    return {method.__name__: _unless_customised(theirs, method) for method in (sample, kl, nll)}


def _unless_customised(theirs: type, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """diffusers' own method for a subclass with its own __init__, which may mean something else by its attributes."""
    own = vars(theirs)[method.__name__]

    @wraps(own)
    def serve(self: Posterior, *args: Any, **kwargs: Any) -> Tensor:
        customised = type(self).__init__ is not theirs.__init__  # type: ignore[misc]
        result: Tensor = (own if customised else method)(self, *args, **kwargs)
        return result

    return serve


def _over(
    dims: tuple[int, ...], method: Callable[..., Tensor], gaussian: DiagonalGaussian, other: DiagonalGaussian | Any
) -> Tensor:
    """method(gaussian, other) summed over `dims`: the dimensions that remain make the batch."""
    last = tuple(range(-len(dims), 0))
    kept = gaussian.mean.movedim(dims, last).shape[: gaussian.mean.ndim - len(dims)]

    def rows(tensor: Tensor) -> Tensor:
        return tensor.movedim(dims, last).reshape(prod(kept), -1)

    def of_rows(value: DiagonalGaussian | Tensor | None) -> DiagonalGaussian | Tensor | None:
        if not isinstance(value, DiagonalGaussian):
            return None if value is None else rows(value)
        result = DiagonalGaussian(rows(value.mean), rows(value.logvar))
        result.deterministic = value.deterministic
        return result

    return method(of_rows(gaussian), of_rows(other)).reshape(kept)


def _drawn_by(randn_tensor: Callable[..., Tensor]) -> Callable[[Posterior, Generators, bool], Sample]:
    """Sampling with the noise that diffusers draws."""

    def draw(posterior: Posterior, generator: Generators, with_kl: bool) -> Sample:
        packed, gaussian = posterior.parameters, _gaussian(posterior)
        noise = randn_tensor(gaussian.mean.shape, generator=generator, device=packed.device, dtype=packed.dtype)
        if gaussian.deterministic:  # after the draw, which moves the generator on, as diffusers' own does
            return gaussian.mean.clone(), None
        return _with_noise(packed, noise, with_kl)

    return draw


def _philox(posterior: Posterior, generator: Generators, with_kl: bool) -> Sample:
    """Sampling with seeds that the generators draw."""
    packed, gaussian = posterior.parameters, _gaussian(posterior)
    if gaussian.deterministic:
        return gaussian.mean.clone(), None
    if isinstance(generator, list) and len(generator) > 1:
        if len(generator) != packed.shape[0]:
            _checks.fail(f"a list of generators must have one a sample, {packed.shape[0]}; got {len(generator)}.")
        shape, dtype = (1, *gaussian.mean.shape[1:]), compute_dtype(packed)
        rows = [philox_normal(shape, seed=_seed(packed, one), dtype=dtype) for one in generator]
        return _with_noise(packed, torch.cat(rows), with_kl)
    seed = _seed(packed, generator[0] if isinstance(generator, list) else generator)
    return gaussian.rsample_kl(seed=seed) if with_kl else (gaussian.sample(seed=seed), None)


def _seed(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device=device)
    return seed.to(like.device, non_blocking=True)


def _with_noise(packed: Tensor, noise: Tensor, with_kl: bool) -> Sample:
    mu, logvar = packed.chunk(2, 1)
    return sample(mu, logvar, None, None, 0, CLAMP, with_kl=with_kl, packed=(packed, 1), noise=noise)
