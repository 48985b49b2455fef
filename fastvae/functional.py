"""The public functions: check what came, choose the noise, hand over to an op."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, _checks, reference
from ._options import Clamp, ElboOptions, Noise, PhiloxNoise
from ._strides import few_dims
from .ops.elbo import ElboFunction
from .ops.reparam_kl import ReparamKLFunction


class VAELossTerms(NamedTuple):
    """What a VAE's loss is made of; each term is differentiable on its own."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
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
    return sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=False)[0]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int = 0,
    logvar_clamp: Clamp | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a latent and measure its posterior's KL from N(0, I), in one pass over memory.

        z  = mu + exp(logvar / 2) * noise,  noise ~ N(0, I)
        kl = sum over each sample of (mu^2 + exp(logvar) - 1 - logvar) / 2

    Args:
        mu: Posterior mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the posterior variance; shape and device of `mu`.
        generator: Source of the noise; torch's default one of the device if neither it nor `seed` is given.
        seed: int or one-element int64 tensor on the device of `mu`. Makes the noise a function of (seed, element): the
            same on every device, backend, dtype and memory layout. Its stream is Philox4x32-10.
        offset: Position in the seed's stream of the first element, counted in elements: a rank or micro-batch that
            holds part of a larger batch draws what the whole batch would draw there.
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside, as torch.clamp's.

    Returns:
        z: shape of `mu`, promoted dtype of `mu` and `logvar`.
        kl: [B], nats; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; generator and seed together; offset without seed; bounds out of order.
        TypeError: not a floating point tensor; a seed that is neither int nor tensor.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, arXiv:1312.6114, section 2.4 and appendix B.
    """
    z, kl = sample(mu, logvar, generator, seed, offset, logvar_clamp, with_kl=True)
    assert kl is not None
    return z, kl


def gaussian_kl(
    mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", logvar_clamp: Clamp | None = None
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = sum of (mu^2 + exp(logvar) - 1 - logvar) / 2, in nats.

    Evaluated without cancellation: exact to a few ulp where posterior and prior nearly agree.

    Args:
        mu: Posterior mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the posterior variance; shape and device of `mu`.
        reduction: "batchmean": sum over all, divided by B; "sum"; "mean": divided by the number of elements; "none":
            [B].
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside.

    Returns:
        0-d, or [B] for "none"; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; unknown reduction; bounds out of order.
        TypeError: not a floating point tensor.

    Source: Kingma & Welling, arXiv:1312.6114, appendix B.
    """
    _checks.gaussian(mu, logvar)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    options = ElboOptions(
        kl_scale=_scale(reduction, mu.shape[0], mu.numel()),
        per_sample=reduction == "none",
        logvar_clamp=_checks.logvar_clamp(logvar_clamp),
    )
    return _elbo(None, None, mu, logvar, None, options, one_pass=False).kl


def reconstruction_loss(
    recon: Tensor, target: Tensor, *, likelihood: str = "l2", reduction: str = "batchmean"
) -> Tensor:
    """Error of a reconstruction: "l2" is the sum of (recon - target)^2, without 1/2 and without constants.

    It is the negative log-likelihood, in nats and up to a constant, of a Gaussian decoder of variance 1/2.

    Args:
        recon: The decoder's output, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        target: Shape and device of `recon`; floating point, or uint8, which stands for value / 255.
        likelihood: "l2".
        reduction: "batchmean": sum over all, divided by B; "sum"; "mean": divided by the number of elements; "none":
            [B].

    Returns:
        0-d, or [B] for "none"; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; unknown likelihood or reduction.
        TypeError: not a floating point tensor (or uint8, for `target`).
    """
    _checks.images(recon, target)
    _checks.choice("likelihood", likelihood, _checks.LIKELIHOODS)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    options = ElboOptions(recon_scale=_scale(reduction, recon.shape[0], recon.numel()), per_sample=reduction == "none")
    return _elbo(recon, target, None, None, None, options, one_pass=True).recon


def vae_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    likelihood: str = "l2",
    reduction: str = "batchmean",
    recon_reduction: str | None = None,
    kl_reduction: str | None = None,
    recon_weight: float | Tensor = 1.0,
    logvar_clamp: Clamp | None = None,
    one_pass: bool = True,
    inplace: bool = False,
) -> VAELossTerms:
    """The loss of a variational autoencoder: the negative evidence lower bound, in nats per sample by default.

        loss = recon_weight * recon + beta * kl
        recon = sum of (recon - target)^2,  kl = sum of (mu^2 + exp(logvar) - 1 - logvar) / 2, each reduced

    Args:
        recon: The decoder's output, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        target: Shape and device of `recon`; floating point, or uint8, which stands for value / 255.
        mu, logvar: Parameters of the posterior, [B, ...]; of one shape, which need not be recon's.
        kl: [B], from `reparameterize_kl`, which already measured it: the KL is then taken from it alone, and `mu`, if
            given too, only supplies the element count of kl_reduction="mean".
        beta: Weight of the KL: a float, or a 0-d tensor on the inputs' device, which may change between steps without
            a sync or a recompilation; the backward pass uses the value that the forward pass saw.
        likelihood: "l2".
        reduction: "batchmean": sum over elements, mean over the batch; "sum"; "mean": each term over its own elements;
            "none": [B].
        recon_reduction, kl_reduction: Override `reduction` for one term.
        recon_weight: Weight of the reconstruction term; as `beta`.
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside, as torch.clamp's.
        one_pass: Let the forward pass write recon's gradient, where that is right (12 bytes a float32 pixel instead of
            20). It holds a buffer of recon's size from the forward pass on; False computes the gradient in the
            backward pass.
        inplace: Let that gradient overwrite `recon` itself: no memory of its own, and on a CPU no fresh pages, which
            are most of the cost. recon holds garbage afterwards. An upstream gradient that is not a power of two rounds
            a 16-bit gradient a second time. Ignored where no gradient is asked for and under torch.compile.

    Returns:
        VAELossTerms(loss, recon, kl): 0-d, or [B] for "none"; float64 if an input is, else float32. Each is
        differentiable.

    Raises:
        ValueError: shapes or devices differ; unknown likelihood or reduction; one term "none" and the other not;
            neither kl nor mu and logvar; kl with logvar_clamp, with logvar, or with kl_reduction="mean" and no mu;
            inplace with a leaf, with overlapping memory, or where one pass is not right.
        TypeError: not a floating point tensor (or uint8, for `target`); beta or recon_weight not a number.
        RuntimeError: inplace and a second backward pass, or an earlier operation needs the overwritten output (sigmoid,
            tanh and relu do: let the decoder end in a linear layer).

    Source: Kingma & Welling, arXiv:1312.6114, eq. 10; beta: Higgins et al., beta-VAE, ICLR 2017.
    """
    _checks.images(recon, target)
    _checks.choice("likelihood", likelihood, _checks.LIKELIHOODS)
    recon_reduction, kl_reduction = _checks.reductions(reduction, recon_reduction, kl_reduction)
    _checks.weight("beta", beta, recon)
    _checks.weight("recon_weight", recon_weight, recon)
    latents = _checks.latents(recon, mu, logvar, kl, kl_reduction, logvar_clamp)
    options = ElboOptions(
        beta=beta,
        recon_weight=recon_weight,
        recon_scale=_scale(recon_reduction, recon.shape[0], recon.numel()),
        kl_scale=_scale(kl_reduction, recon.shape[0], latents),
        per_sample=recon_reduction == "none",
        logvar_clamp=_checks.logvar_clamp(logvar_clamp),
    )
    if kl is not None:
        mu = None
    if inplace:
        _checks.overwritable(recon, target, recon_weight, one_pass)
    return _elbo(recon, target, mu, logvar, kl, options, one_pass=one_pass, inplace=inplace)


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
    _checks.noise_source(like, None, seed, offset)
    size = torch.Size([shape] if isinstance(shape, int) else shape)
    room = _backend.room("torch" if torch.compiler.is_compiling() else _backend.backend_of(like), "philox")
    normals: Tensor = room.philox_normal(size, _int64(seed), offset, dtype, like.device)
    return normals


def _scale(reduction: str, batch: int, elements: int) -> float:
    """Factor on the sum of a term; NaN where torch's mean over nothing is."""
    divisor = {"batchmean": batch, "mean": elements, "sum": 1, "none": 1}[reduction]
    return 1.0 / divisor if divisor else float("nan")


def _int64(seed: int | Tensor) -> int | Tensor:
    """The int64 with the bits of seed mod 2^64."""
    return seed if isinstance(seed, Tensor) else (seed + 2**63) % 2**64 - 2**63


def _noise(mu: Tensor, generator: torch.Generator | None, seed: int | Tensor | None, offset: int) -> Noise:
    if seed is not None:
        return PhiloxNoise(_int64(seed), offset)
    if torch.compiler.is_compiling() or _backend.backend_of(mu) == "torch":
        return _drawn(mu, generator)
    on_device = generator is None or generator.device == mu.device
    seed = torch.empty(1, dtype=torch.int64, device=mu.device if on_device else "cpu")
    seed.random_(-(2**63), 2**63 - 1, generator=generator) if generator is not None else seed.random_()
    return PhiloxNoise(seed.to(mu.device, non_blocking=True), 0)


def _drawn(mu: Tensor, generator: torch.Generator | None) -> Tensor:
    """What torch.randn_like(mu) draws, so that a seeded textbook VAE and this one see the same noise."""
    if generator is None:
        return torch.randn_like(mu)
    if generator.device == mu.device:
        return torch.empty_like(mu).normal_(generator=generator)
    return torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=generator.device).to(mu.device)


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
    """What the public functions and DiagonalGaussian share; `packed`: mu and logvar are the halves of a dimension."""
    _checks.gaussian(mu, logvar)
    _checks.noise_source(mu, generator, seed, offset)
    bounds = _checks.logvar_clamp(logvar_clamp)
    noise = _noise(mu, generator, seed, offset)
    if torch.compiler.is_compiling():
        if isinstance(noise, PhiloxNoise):
            noise = philox_normal(mu.shape, seed=noise.seed, offset=noise.offset, device=mu.device)
        return reference.reparameterize_kl(mu, logvar, noise, bounds)
    first, second, dim = (mu, logvar, None) if packed is None else (packed[0], None, packed[1])
    inputs = (few_dims(first), None if second is None else few_dims(second), dim)
    z, kl = ReparamKLFunction.apply(*inputs, noise, bounds, with_kl)  # type: ignore[no-untyped-call]
    return z, kl


def _elbo(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    options: ElboOptions,
    *,
    one_pass: bool,
    inplace: bool = False,
) -> VAELossTerms:
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula with its neighbours
        return VAELossTerms(*reference.elbo(recon, target, mu, logvar, kl, options))
    recon, target, mu, logvar = (None if t is None else few_dims(t) for t in (recon, target, mu, logvar))
    weights = (w if isinstance(w, Tensor) else None for w in (options.beta, options.recon_weight))
    if not torch.is_grad_enabled():  # no node of a graph is needed
        like = next(t for t in (recon, mu, kl) if t is not None)
        room = _backend.room(_backend.backend_of(like), "elbo")
        loss, recon_term, kl_term, _ = room.elbo_fwd(recon, target, mu, logvar, kl, None, options)
        return VAELossTerms(loss, recon_term, kl_term)
    inputs = (recon, target, mu, logvar, kl, *weights)
    return VAELossTerms(*ElboFunction.apply(*inputs, options, one_pass, inplace))  # type: ignore[no-untyped-call]
