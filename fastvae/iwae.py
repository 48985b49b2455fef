"""The importance-weighted bound on the likelihood as a training loss."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _checks, _numbers
from ._dtypes import compute_dtype
from .functional import Prior, philox_normal, reconstruction_loss
from .likelihood_counts import CountLikelihood, Multinomial, checked_counts
from .likelihoods import Gaussian, Likelihood, Scaled, resolve
from .reference import per_sample

Decoded = Tensor | tuple[Tensor, Mapping[str, Tensor]]


def iwae_loss(
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    decode: Callable[[Tensor], Decoded],
    *,
    samples: int,
    chunk: int | None = None,
    likelihood: str | Likelihood,
    prior: Prior | None = None,
    seed: int | Tensor | None = None,
    estimator: Literal["iwae", "dreg"] = "iwae",
    likelihood_args: Mapping[str, Tensor | None] | None = None,
) -> Tensor:
    """Negative importance-weighted bound on log p(x), averaged over the batch, in nats.

        log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x),  z_k = mu + exp(logvar / 2) * noise_k
        loss    = mean over the batch of -log(1/K sum_k w_k)

    All constants of the densities count, so the loss is an upper bound on -log p(x), which becomes tighter with K. With
    K = 1 its expectation is the negative ELBO.

    The decoder runs on `chunk` samples at once, and again in the backward pass, so that the memory for its activations
    does not grow with K. Layers that depend on the whole batch (batch normalization in training mode) see each chunk by
    itself, and update their statistics twice.

    Args:
        x: Images or other data, [B, ...]; floating point, or uint8, or counts, as in `vae_loss`.
        mu, logvar: Mean and log variance of the posterior, [B, ...]; any floating point dtype.
        decode: Called with latents [n * B, *mu.shape[1:]]; returns reconstructions [n * B, *x.shape[1:]]. For
            a likelihood of counts it may return (reconstructions, arguments) instead, where arguments are those of the
            likelihood that depend on the latents, such as {"zero_logits": ...}, with n * B rows.
        samples: K, the latents of each element of the batch.
        chunk: n, samples decoded at once; None: one. More are faster on a GPU and take more memory. The noise does not
            depend on it.
        likelihood: Must be a density: "l2" is a Gaussian of variance 1/2, "l1" a Laplace of scale 1; `Gaussian`, with
            or without `full`; `Scaled("l1")`; "bernoulli" and "bernoulli_probs", probabilities of binary x; those of
            counts, where the multinomial's coefficient is counted.
        prior: None for N(0, I), or (mu_p, logvar_p), which broadcast to the shape of `mu` and get gradients.
        seed: Makes the noise a function of (seed, sample, element), as in `reparameterize`; None: the seed is drawn
            from torch's default generator.
        estimator: Of the gradients of `mu` and `logvar`. "iwae": the gradient of the loss. "dreg": doubly
            reparameterized, with the same expectation; its signal-to-noise ratio does not fall with K. The gradients
            of decoder, prior and likelihood are those of the loss in both. "dreg" has no second derivatives.
        likelihood_args: As in `vae_loss`, of the batch.

    Returns:
        0-d; float64 if an input is, else float32.

    Raises:
        ValueError: samples or chunk below 1; a likelihood that is no density; unknown estimator; shapes or devices
            that differ; a reconstruction of another shape.
        TypeError: not a floating point tensor; decode is not callable.

    Source: Burda et al., Importance Weighted Autoencoders, arXiv:1509.00519, eq. 8; Tucker et al., Doubly
    Reparameterized Gradient Estimators for Monte Carlo Objectives, arXiv:1810.04152, eq. 8.
    """
    samples = _numbers.integer("samples", samples, least=1)
    chunk = 1 if chunk is None else _numbers.integer("chunk", chunk, least=1)
    _checks.choice("estimator", estimator, ("iwae", "dreg"))
    if not isinstance(likelihood, CountLikelihood):
        _checks.no_likelihood_args(likelihood_args)
        _checks.float_tensor("x", x, also=(torch.uint8,))
    _checks.gaussian(mu, logvar)
    _checks.same_device("x", x, "mu", mu)
    if len(x) != len(mu):
        _checks.fail(f"x and mu must have one batch size; got {len(x)} and {len(mu)}. Pass the x that mu is of.")
    if not callable(decode):
        raise TypeError(f"decode must be a function of latents; got {type(decode).__name__}. Pass model.decode.")
    constant = _constant(likelihood, x)
    checked_prior = None if prior is None else _checks.prior(prior, mu)
    if seed is None:
        seed = torch.empty(1, dtype=torch.int64, device=mu.device).random_()
    stored = torch.promote_types(mu.dtype, logvar.dtype)
    dreg = estimator == "dreg"
    bound = _Bound(x, decode, likelihood, likelihood_args, constant, checked_prior, seed, stored, dreg)
    shares: list[Tensor] = []  # of each sample in the sum of weights, known when the backward pass begins
    parts = []
    for first in range(0, samples, chunk):
        n = min(chunk, samples - first)
        inputs = [t.to(compute_dtype(mu, logvar)).expand(n, *t.shape) for t in (mu, logvar)]
        if bound.dreg:
            for tensor in inputs:
                _scale_gradient(tensor, shares, slice(first, first + n))
        parts.append(checkpoint(bound.log_weights, *inputs, first, use_reentrant=False))
    weights = torch.cat(parts)
    shares.append(weights.detach().softmax(0))
    return (math.log(samples) - weights.logsumexp(0)).mean()


class _Bound(NamedTuple):
    """What all samples share."""

    x: Tensor
    decode: Callable[[Tensor], Decoded]
    likelihood: str | Likelihood
    likelihood_args: Mapping[str, Tensor | None] | None
    constant: float | Tensor  # that the reconstruction loss of a sample leaves out
    prior: Prior | None
    seed: int | Tensor
    latent_dtype: torch.dtype  # for the decoder
    dreg: bool

    def log_weights(self, mu: Tensor, logvar: Tensor, first: int) -> Tensor:
        """[n, B], of the samples from `first` on; mu and logvar: [n, B, ...]."""
        n, dtype = len(mu), mu.dtype
        offset = first * math.prod(mu.shape[1:])
        noise = philox_normal(mu.shape, seed=self.seed, offset=offset, dtype=dtype, device=mu.device)
        z = mu + torch.exp(0.5 * logvar) * noise
        if self.dreg:  # log q as a function of z alone
            logvar = logvar.detach()
            noise = noise + (z - z.detach()) * torch.exp(-0.5 * logvar)
        distance = z.square()
        if self.prior is not None:
            prior_mu, prior_logvar = (t.to(dtype) for t in self.prior)
            distance = ((z - prior_mu) * torch.exp(-0.5 * prior_logvar)).square() + prior_logvar
        ratio = 0.5 * (logvar + noise.square() - distance)  # log p(z) - log q(z | x)
        decoded = self.decode(z.to(self.latent_dtype).flatten(0, 1))
        recon, arguments = decoded if isinstance(decoded, tuple) else (decoded, {})
        expected = (n * len(self.x), *self.x.shape[1:])
        if recon.shape != expected:
            _checks.fail(
                f"decode must return {expected}, as many samples as it was given, in the shape of x; got "
                f"{tuple(recon.shape)}."
            )
        # one by one: neither x nor the scale of a likelihood is repeated
        parts = {name: tensor.chunk(n) for name, tensor in arguments.items()}
        of_batch = {} if self.likelihood_args is None else self.likelihood_args
        given = bool(parts) or self.likelihood_args is not None
        nats = [
            reconstruction_loss(
                one,
                self.x,
                likelihood=self.likelihood,
                reduction="none",
                likelihood_args={**of_batch, **{name: part[i] for name, part in parts.items()}} if given else None,
            )
            for i, one in enumerate(recon.chunk(n))
        ]
        return per_sample(ratio.flatten(0, 1)).reshape(mu.shape[:2]) - torch.stack(nats) - self.constant


def _scale_gradient(tensor: Tensor, shares: list[Tensor], rows: slice) -> None:
    """Weigh each sample's gradient by its share once more: the loss gives it a factor w, the dreg estimator w^2."""

    def scaled(grad: Tensor) -> Tensor:
        return grad * shares[0][rows].reshape(*grad.shape[:2], *[1] * (grad.ndim - 2))

    if tensor.requires_grad:
        tensor.register_hook(scaled)  # type: ignore[no-untyped-call]


def _constant(likelihood: str | Likelihood, x: Tensor) -> float | Tensor:
    """Nats that the reconstruction loss leaves out of -log p(x | z): of all samples, or [B]."""
    resolved = resolve(likelihood)
    if not isinstance(resolved, CountLikelihood):
        return _constant_of_element(likelihood) * math.prod(x.shape[1:])
    if not isinstance(resolved, Multinomial):
        return 0.0
    counts = checked_counts(x, x)
    counts = (counts if counts.layout == torch.strided else counts.to_dense()).double()
    return (torch.lgamma(counts + 1).sum(1) - torch.lgamma(counts.sum(1) + 1)).to(compute_dtype(x))


def _constant_of_element(likelihood: str | Likelihood) -> float:
    """Nats of each element that the reconstruction loss leaves out of -log p(x | z)."""
    resolved = resolve(likelihood)
    if isinstance(resolved, Gaussian) and isinstance(resolved.log_scale, str):
        _checks.fail(
            'Gaussian("optimal") takes its variance from the samples, so it is no density. Pass logvar as a float '
            "or as a tensor."
        )
    if not isinstance(resolved, CountLikelihood) and resolved.log_normalizer is not None:
        return resolved.log_normalizer
    name = repr(likelihood) if isinstance(likelihood, str) else type(likelihood).__name__
    scaled = f" of {type(resolved.base).__name__}" if isinstance(resolved, Scaled) else ""
    raise ValueError(
        f'likelihood must be a normalized density; got {name}{scaled}. Use "l2", "l1", "bernoulli", "bernoulli_probs", '
        'Gaussian(...), Scaled("l1", ...) or a likelihood of counts.'
    )
