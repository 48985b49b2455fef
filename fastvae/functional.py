"""The public functions."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fastvae_kernels.types import Clamp, ElboNumbers, ElboTensors

from . import _checks
from ._batch_terms import elbo_with_batch_terms, needs_batch_terms
from ._count_terms import elbo_of_counts
from .likelihoods import SPECS, CountLikelihood, Likelihood, LikelihoodSpec, extra_errors, resolve_likelihood
from .ops._elbo_plan import LossSpec
from .ops.elbo import elbo
from .regularizers import Capacity, FreeBits
from .sampling import philox_normal, reparameterize, reparameterize_kl

__all__ = [
    "VAELossTerms",
    "gaussian_kl",
    "philox_normal",
    "reconstruction_loss",
    "reparameterize",
    "reparameterize_kl",
    "vae_loss",
]

Prior = tuple[Tensor, Tensor]


class VAELossTerms(NamedTuple):
    """The loss of a VAE and its terms; each is differentiable on its own."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: Prior | None = None,
    reduction: str = "batchmean",
    logvar_clamp: Clamp | None = None,
    free_bits: FreeBits | None = None,
    capacity: Capacity | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || prior), in nats; of N(0, I) the sum of (mu^2 + exp(logvar) - 1 - logvar) / 2.

    For a model whose reconstruction error is computed elsewhere this is the whole second term of its loss.

    Of another Gaussian, with r = logvar - logvar_p, the sum of ((mu - mu_p)^2 / exp(logvar_p) + exp(r) - 1 - r) / 2.
    Evaluated without cancellation: exact to a few ulp where posterior and prior nearly agree.

    Args:
        mu: Posterior mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the posterior variance; shape and device of `mu`.
        prior: None for N(0, I), or (mu_p, logvar_p), which broadcast to the shape of `mu` and get gradients.
        reduction: "batchmean": sum over all, divided by B; "sum"; "mean": divided by the number of elements; "none":
            [B].
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside. Not the prior's.
        free_bits, capacity: As in `vae_loss`; the result is the KL after both.
        weight: [B]: multiplies the KL of each sample; the sum is divided by B all the same.
        mask: bool, broadcasts to mu's shape: as `kl_mask` in `vae_loss`.

    Example:
        Sequences of different lengths, padded, [B, T, L], free bits for each sample:

        >>> mask = torch.arange(T) < lengths[:, None]  # [B, T]
        >>> kl = fastvae.gaussian_kl(mu, logvar, mask=mask[..., None], free_bits=FreeBits(2.0, "sample"))

    Returns:
        0-d, or [B] for "none"; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; unknown reduction; bounds out of order.
        TypeError: not a floating point tensor; a prior that is no pair of tensors.

    Source: Kingma & Welling, arXiv:1312.6114, appendix B.
    """
    if free_bits is not None or capacity is not None:
        _checks.regularizers(free_bits, FreeBits, capacity, Capacity)
    prior_mu, prior_logvar = (None, None) if prior is None else _checks.prior(prior, mu)
    kl_mask = None if mask is None else _checks.mask(mask, mu, "mask", "mu")
    latents = ElboTensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, kl_mask=kl_mask)
    nats = None if capacity is None else _checks.weight("capacity", capacity.nats)
    spec = LossSpec(
        None,
        _checks.reduction(reduction),
        reduction,
        _checks.logvar_clamp(logvar_clamp),
        free_bits,
        None if capacity is None else capacity.mode,
    )
    function = elbo_with_batch_terms if needs_batch_terms(spec) else elbo
    loss, _, kl = function(latents._replace(weight=weight), ElboNumbers(capacity=nats), spec)
    return kl if free_bits is None and capacity is None else loss


def reconstruction_loss(
    recon: Tensor,
    target: Tensor,
    *,
    likelihood: str | Likelihood = "l2",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    extra: Tensor | None = None,
    likelihood_args: Mapping[str, Tensor | None] | None = None,
) -> Tensor:
    """Error of a reconstruction, sum over its elements: "l2" is the sum of (recon - target)^2.

    Args:
        recon: The decoder's output, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        target: Shape and device of `recon`; floating point, or uint8, which stands for value / 255.
        likelihood, weight, mask, extra, likelihood_args: As in `vae_loss`. A weight of each element is `recon_weight`
            there.
        reduction: "batchmean": sum over all, divided by B; "sum"; "mean": divided by the number of elements; "none":
            [B].

    Returns:
        0-d, or [B] for "none"; float64 if an input is, else float32.

    Raises:
        ValueError: shapes or devices differ; unknown likelihood or reduction; mask_normalize without a normaliser.
        TypeError: not a floating point tensor (or uint8, for `target`); a mask that is not bool.
    """
    if mask is not None:
        mask = _checks.mask(mask, recon)
    if isinstance(likelihood, CountLikelihood):
        _checks.count_options(extra, inplace=False)
        spec = LossSpec(None, _checks.reduction(reduction), reduction, one_pass=True)
        tensors = ElboTensors(recon, target, mask=mask, weight=weight)
        return elbo_of_counts(likelihood, likelihood_args, tensors, ElboNumbers(), spec)[1]
    _checks.no_likelihood_args(likelihood_args)
    resolved = resolve_likelihood(likelihood, recon, target, mask)
    recon, target, likelihood_spec, log_scale, sample_log_scale = resolved
    tensors = ElboTensors(recon, target, log_scale, mask=mask, weight=weight, sample_log_scale=sample_log_scale)
    if extra is not None:
        of_samples, of_elements = extra_errors(extra, recon, log_scale)
        tensors = tensors._replace(extra=of_samples, extra_map=of_elements)
    spec = LossSpec(likelihood_spec, _checks.reduction(reduction), reduction, one_pass=True)
    function = elbo_with_batch_terms if needs_batch_terms(spec) else elbo
    return function(tensors, ElboNumbers(), spec)[1]


def vae_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    likelihood: str | Likelihood = "l2",
    reduction: str = "batchmean",
    recon_reduction: str | None = None,
    kl_reduction: str | None = None,
    recon_weight: float | Tensor = 1.0,
    logvar_clamp: Clamp | None = None,
    free_bits: FreeBits | None = None,
    capacity: Capacity | None = None,
    prior: Prior | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    kl_mask: Tensor | None = None,
    extra: Tensor | None = None,
    one_pass: bool = True,
    inplace: bool = False,
    likelihood_args: Mapping[str, Tensor | None] | None = None,
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
        beta: Weight of the KL: a number of at least 0, or a 0-d tensor on the inputs' device, which may change between
            steps without a sync or a recompilation; the backward pass uses the value that the forward pass saw. [B]:
            one weight per sample.
        likelihood: "l2", "l1", "huber", "smooth_l1", "log_cosh", "bernoulli" (logits), "bernoulli_probs", or an object
            of `fastvae.likelihoods`, where their formulas are. Or a function (recon, target) -> error of each element,
            in plain PyTorch, which autograd differentiates: slower, see `fastvae.likelihoods.Custom`.
        reduction: "batchmean": sum over elements, mean over the batch; "sum"; "mean": each term over its own elements;
            "none": [B].
        recon_reduction, kl_reduction: Override `reduction` for one term.
        recon_weight: Weight of the reconstruction alone: a number or a 0-d tensor, as `beta`; [B]; or a tensor that
            broadcasts to recon's shape, whose elements multiply the error of each element, scale and constants of the
            likelihood included. Divisors stay as they are. A tensor of shape [B] always has one weight per sample. A
            map that requires a gradient itself takes the reference formula, which is slower.
        logvar_clamp: None, or (lo, hi): logvar is clamped first; its gradient is zero outside, as torch.clamp's.
        free_bits: `fastvae.regularizers.FreeBits`: KL that costs nothing.
        capacity: `fastvae.regularizers.Capacity`: |KL - capacity| in place of the KL, after free bits.
        prior: None for N(0, I), or (mu, logvar), which broadcast to the posterior's shape and get gradients.
        weight: [B]: multiplies both terms of each sample; the sum is divided by B all the same, never by the weights'.
        mask: bool, broadcasts to recon's shape: elements outside count as 0 and get no gradient, even if they are NaN.
            The divisor stays B (or, for "mean", the number of all elements), unless the likelihood has
            mask_normalize=True: then it is the number of elements that the mask selects, and the term 0 where that
            is 0. The KL is not masked.
        kl_mask: bool, broadcasts to mu's shape: latents outside count as 0 in the KL and get no gradient of it, even
            if they are NaN. Free bits and capacity apply to what remains. The divisor stays as it is.
        extra: [B] or [B, 1, ...]: is added to the error of every element of a sample, within the likelihood's scale,
            so it counts D times, D elements in a sample; see the first example. Or a map that broadcasts to recon's
            shape, added element by element.
        one_pass: Let the forward pass write recon's gradient, where that is right (12 bytes a float32 pixel instead of
            20). It holds a buffer of recon's size from the forward pass on; False computes the gradient in the
            backward pass.
        inplace: Let that gradient overwrite `recon` itself: no memory of its own, and on a CPU no fresh pages, which
            are most of the cost. recon holds garbage afterwards. An upstream gradient that is not a power of two rounds
            a 16-bit gradient a second time. Ignored where no gradient is asked for and under torch.compile.
        likelihood_args: For a likelihood of counts: its arguments for this batch by name, such as
            {"log_library": ..., "index": ...}; they take precedence over those that the likelihood holds. With these
            likelihoods, extra and inplace are errors, and the target are counts of any dtype, dense or CSR.

    Examples:
        A perceptual distance of each image, [B], added once per image: extra / D, D = the elements of an image.

        >>> terms = fastvae.vae_loss(recon, x, kl=kl, extra=0.1 * lpips(recon, x).flatten() / x[0].numel())

        The same added to each pixel's error, as the autoencoder loss of latent diffusion does:

        >>> terms = fastvae.vae_loss(recon, x, kl=kl, likelihood=Scaled("l1", s), extra=lpips(recon, x))

    Returns:
        VAELossTerms(loss, recon, kl): 0-d, or [B] for "none"; float64 if any tensor but the mask is, weights and the
        likelihood's scale included, else float32. Each is differentiable. `recon` is after likelihood, weight, mask,
        extra and reduction; `kl` is before free bits, capacity and beta, which only the loss has.

    Raises:
        ValueError: shapes or devices differ; unknown likelihood or reduction; one term "none" and the other not;
            neither kl nor mu and logvar; kl with logvar, with kl_reduction="mean" and no mu, or with what acts on its
            elements (logvar_clamp, prior, free bits by dimension); inplace with a leaf, with overlapping memory, or
            where one pass is not right; a negative number as beta or recon_weight; a beta of [B] with free bits or a
            capacity of the batch; an option that a "none" reduction leaves without a meaning.
        TypeError: not a floating point tensor (or uint8, for `target`); beta or recon_weight not a number; a mask that
            is not bool.
        RuntimeError: inplace and a second backward pass, or an earlier operation needs the overwritten output (sigmoid,
            tanh and relu do: let the decoder end in a linear layer).

    Source: Kingma & Welling, arXiv:1312.6114, eq. 10; beta: Higgins et al., beta-VAE, ICLR 2017.
    """
    n_latents = capacity_nats = capacity_mode = prior_mu = prior_logvar = log_scale = sample_log_scale = None
    betas = recon_weights = extra_map = None
    if kl is not None:
        _checks.kl_given(recon, mu, logvar, prior, logvar_clamp, free_bits, kl_mask, kl_reduction or reduction)
        n_latents, mu = None if mu is None else mu.numel(), None
    if isinstance(likelihood, CountLikelihood):
        _checks.count_options(extra, inplace)
    else:
        _checks.no_likelihood_args(likelihood_args)
    if inplace:
        _checks.overwritable(recon, target, recon_weight, one_pass)
    if free_bits is not None or capacity is not None:
        _checks.regularizers(free_bits, FreeBits, capacity, Capacity)
    if capacity is not None:
        capacity_nats, capacity_mode = _checks.weight("capacity", capacity.nats), capacity.mode
    if prior is not None and mu is not None:
        prior_mu, prior_logvar = _checks.prior(prior, mu)
    if mask is not None:
        mask = _checks.mask(mask, recon)
    if kl_mask is not None and mu is not None:
        kl_mask = _checks.mask(kl_mask, mu, "kl_mask", "mu")
    spec_of_likelihood: str | LikelihoodSpec | None = None
    if type(likelihood) is str and likelihood in SPECS:
        spec_of_likelihood = likelihood
    elif not isinstance(likelihood, CountLikelihood):
        resolved = resolve_likelihood(likelihood, recon, target, mask, inplace=inplace)
        recon, target, spec_of_likelihood, log_scale, sample_log_scale = resolved
    if type(beta) is not float or not beta >= 0:
        beta, betas = _checks.beta(beta, recon)
    if type(recon_weight) is not float or not recon_weight >= 0:
        recon_weight, recon_weights = _checks.recon_weight(recon_weight, recon)
    if extra is not None:
        extra, extra_map = extra_errors(extra, recon, log_scale)
    if logvar_clamp is not None:
        logvar_clamp = _checks.logvar_clamp(logvar_clamp)
    # in the order of LossSpec, ElboTensors and ElboNumbers
    reductions = recon_reduction or reduction, kl_reduction or reduction
    spec = (spec_of_likelihood, *reductions, logvar_clamp, free_bits, capacity_mode, one_pass, inplace, n_latents)
    images = recon, target, log_scale, extra_map
    of_samples = kl, weight, extra, sample_log_scale, betas, recon_weights
    tensors = (*images, mu, logvar, prior_mu, prior_logvar, mask, kl_mask, *of_samples)
    numbers = beta, recon_weight, capacity_nats
    if isinstance(likelihood, CountLikelihood):
        if kl is None:
            _checks.posterior(recon, mu, logvar)
        return VAELossTerms(*elbo_of_counts(likelihood, likelihood_args, tensors, numbers, spec))
    if needs_batch_terms(spec):
        return VAELossTerms(*elbo_with_batch_terms(tensors, numbers, spec))
    return VAELossTerms(*elbo(tensors, numbers, spec))
