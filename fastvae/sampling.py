"""Sampling: the public functions, the noise, and the call of the op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp, PhiloxNoise

from . import _backend, _checks, reference
from ._numbers import is_integer
from ._seeds import given_noise, noise_source
from ._strides import readable
from .ops import _library
from .ops._autograd import direct_apply
from .ops.reparam_kl import Noise, ReparamKLFunction, plan

_apply = direct_apply(ReparamKLFunction)

# devices on which a traced sample without a seed is one op that draws its own noise; elsewhere the compiler fuses the
# plain formula with torch's noise
OPAQUE = {"cuda"}


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    logvar_clamp: Clamp | None = None,
) -> Tensor:
    """Draw z = mu + exp(logvar / 2) * noise, noise ~ N(0, I), differentiable in mu and logvar.

    Args, errors and source as `reparameterize_kl`.

    Returns:
        z: shape of `mu`, promoted dtype of `mu` and `logvar`.
    """
    return sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=False, noise=noise)[0]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: tuple[Tensor, Tensor] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    logvar_clamp: Clamp | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a latent and measure the KL of its posterior from a prior, in one pass over memory.

        z  = mu + exp(logvar / 2) * noise,  noise ~ N(0, I)
        kl = sum over each sample of (mu^2 + exp(logvar) - 1 - logvar) / 2

    With a prior N(mu_p, exp(logvar_p)), as hierarchical VAEs and recurrent state-space models learn it, and
    r = logvar - logvar_p, the KL is the sum of ((mu - mu_p)^2 / exp(logvar_p) + exp(r) - 1 - r) / 2.

    Args:
        mu: Posterior mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the posterior variance; shape and device of `mu`.
        prior: None for N(0, I), or (mu_p, logvar_p), which broadcast to the shape of `mu` and get gradients of the KL.
        noise: The noise itself: shape and device of `mu`, any floating point dtype. It gets no gradient. On every
            backend the sample is then computed by PyTorch operations.
        generator: Source of the noise; torch's default one of the device if neither noise nor seed is given.
        seed: int or one-element int64 tensor on the device of `mu`. Makes the noise a function of (seed, element): the
            same on every device, backend, dtype and memory layout. Its stream is Philox4x32-10.
        offset: Position in the seed's stream of the first element, counted in elements: a rank or micro-batch that
            holds part of a larger batch draws what the whole batch would draw there.
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside, as torch.clamp's.
            Not the prior's.

    Returns:
        z: shape of `mu`, promoted dtype of `mu` and `logvar`.
        kl: [B], nats; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; two of noise, generator, seed; offset without seed; bounds out of order.
        TypeError: not a floating point tensor; a seed that is neither int nor tensor; a prior that is no pair of
            tensors.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, arXiv:1312.6114, section 2.4 and appendix B.
    """
    z, kl = sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=True, noise=noise, prior=prior)
    assert kl is not None
    return z, kl


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
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None).

    `packed`: mu and logvar are the halves of a dimension of one tensor. `noise`: used instead of drawing any.
    """
    of_prior: tuple[Tensor, ...] = ()
    if prior is not None:
        _checks.gaussian(mu, logvar)
        of_prior = _checks.prior(prior, mu)
    first, second, dim = (mu, logvar, None) if packed is None else (packed[0], None, packed[1])
    if (
        _backend.needs_reference()
        or type(first) not in _backend.PLAIN
        or any(type(t) not in _backend.PLAIN for t in of_prior)
    ):
        _checks.gaussian(mu, logvar)
        bounds = _checks.logvar_clamp(logvar_clamp)
        return _traced(mu, logvar, of_prior, generator, seed, offset, bounds, noise, with_kl=with_kl)
    try:
        metas = tuple(
            [
                t if t is None else (t.shape, t.stride(), t.dtype, t.device, False, t.is_neg(), Tensor, t.layout)
                for t in (first, second, *of_prior)
            ]
        )
        at = plan(_backend.choice(), metas, dim, logvar_clamp, with_kl, noise is not None)
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor, or bounds that cannot be hashed
        _checks.gaussian(mu, logvar)
        bounds = _checks.logvar_clamp(logvar_clamp)
        if bounds == logvar_clamp:
            raise
        options: Any = {"with_kl": with_kl, "packed": packed, "noise": noise, "prior": prior}
        return sample(mu, logvar, generator, seed, offset, bounds, **options)
    if at.copies_inputs:
        mu, logvar = readable(mu), readable(logvar)
        prior = (readable(of_prior[0]), readable(of_prior[1])) if of_prior else None
        return sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=with_kl, noise=noise, prior=prior)
    if noise is not None:
        used: Noise = given_noise(noise, mu, generator, seed, offset)
    else:
        if not (generator is None and seed is None and offset == 0):
            seed, offset = noise_source(mu, generator, seed, offset)
        drawn = seed is None and at.draws_noise
        used = _drawn(mu, generator) if drawn else _philox_noise(mu, generator, seed, offset)
    apply: Any = ReparamKLFunction.apply if torch._C._are_functorch_transforms_active() else _apply
    z, kl = apply(at, used, first, second, *of_prior)
    return z, kl


def _traced(
    mu: Tensor,
    logvar: Tensor,
    prior: tuple[Tensor, ...],
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
        z, kl = reference.reparameterize_kl(mu, logvar, noise, bounds, *prior)
        return z, kl if with_kl else None
    seed, offset = noise_source(mu, generator, seed, offset)
    if generator is not None:
        _checks.fail(
            "generator cannot be given while torch traces (torch.compile, torch.export, fake tensors); got one. Pass "
            "seed=, an int or a tensor, or let the noise come from torch's default generator."
        )
    if seed is None and mu.device.type not in OPAQUE:
        return reference.reparameterize_kl(mu, logvar, _drawn(mu, None), bounds, *prior)
    drawn_seed = torch.randint(2**63 - 1, (1,), device=mu.device) if seed is None else seed
    return _library.reparam_kl(mu, logvar, PhiloxNoise(drawn_seed, offset), bounds, with_kl=with_kl, prior=prior)


def philox(shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The noise of seeded sampling itself, on the device of `like`."""
    if _backend.needs_reference() or type(like) not in _backend.PLAIN:
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


def philox_normal(
    shape: int | Sequence[int],
    *,
    seed: int | Tensor,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The noise of seeded sampling itself: standard normals as a pure function of (seed, element).

    Normal i of the stream is number i mod 4 of counter i // 4 of Philox4x32-10 under the key `seed` mod 2^64, by
    Box-Muller. The random words are equal on every device and backend, the normals equal within 1e-6.

    Args:
        shape: Shape of the result.
        seed: int or one-element int64 tensor on `device`.
        offset: Position in the stream of the first element.
        dtype: Floating point dtype; the normals are float32 values rounded to it.
        device: Default: the seed tensor's device, else torch's default device.

    Raises:
        ValueError: seed tensor of another shape, dtype or device; negative offset.
        TypeError: dtype not floating point; seed neither int nor tensor.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC11; Box & Muller, 1958.
    """
    if device is None and isinstance(seed, Tensor):
        device = seed.device
    like = torch.empty(0, dtype=dtype, device=device)
    _checks.float_tensor("the noise", like)
    checked, offset = noise_source(like, None, seed, offset)
    assert checked is not None
    sizes: Any = [shape] if is_integer(shape) else shape
    size = torch.Size([int(side) for side in sizes])
    return philox(size, checked, offset, dtype, like)
