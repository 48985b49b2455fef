"""From the options of a loss to one op, and where they weigh whole samples a little arithmetic on [B] values.

The op sums the errors and the KL of each sample, in one pass and with their gradients. What weighs, scales or
regularises samples as wholes is plain PyTorch on those sums, differentiable in everything it is made of.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend, _calls, reference
from ._dtypes import compute_dtype, in_dtype
from ._options import ElboOptions, ElboTensors
from .likelihoods import Gaussian, Scaled
from .ops.elbo import Site, elbo, elbo_at, site_of
from .terms import ForOp, Images, Latents, Scale, Weight, normalizer

_NO_LATENTS: ForOp = (None, None, None, None, None), 1.0, None, None


class VAELossTerms(NamedTuple):
    """What a VAE's loss is made of; each term is differentiable on its own."""

    loss: Tensor
    recon: Tensor
    kl: Tensor


class KnownLoss(NamedTuple):
    """What a call of the loss comes to where no option acts on samples as wholes: its op, but for the weights."""

    site: Site
    options: tuple[Any, ...]  # the last ones of ElboOptions

    def __call__(self, beta: Weight, recon_weight: Weight, *tensors: Tensor) -> VAELossTerms:
        loss, recon, kl, _ = elbo_at(self.site, ElboOptions(beta, recon_weight, *self.options), *tensors)
        return VAELossTerms(loss, recon, kl)


def objective(
    images: Images | None,
    latents: Latents | None,
    *,
    beta: Weight = 1.0,
    recon_weight: Weight = 1.0,
    one_pass: bool = True,
    inplace: bool = False,
    call: _calls.Call | None = None,
) -> VAELossTerms:
    """recon_weight * recon + beta * (regularised KL), and its two terms; a term that is None is 0.

    call: under which the op's options are remembered if they are all of the work, so that the next one can start there.
    """
    if images is None:
        assert latents is not None
        posterior, kl_scale, logvar_clamp, _ = latents.for_op
        options = ElboOptions(beta, recon_weight, 1.0, 0.0, kl_scale, latents.reduction == "none", logvar_clamp)
        return VAELossTerms(*_op(ElboTensors(None, None, None, *posterior), options)[:3])
    dtype = _dtype(images, latents, beta, recon_weight)
    if images.weight is not None:  # once for both terms, so that its gradient is rounded once
        weight = images.weight.to(dtype)
        images, latents = images._replace(weight=weight), latents and latents._replace(weight=weight)
    images = images.in_dtype(dtype)
    scale = Scale.of(images, dtype)
    posterior, kl_scale, logvar_clamp, floor = _NO_LATENTS if latents is None else latents.for_op
    tensors = ElboTensors(images.recon, images.target, scale.by_element, *posterior, images.mask)
    by_sample = _weighs_samples(images, scale) or (latents is not None and latents.weighs_samples)
    by_sample = by_sample or dtype != compute_dtype(*tensors[:-1])  # the op's dtype is that of its tensors alone
    recon_scale, recon_constant = (1.0, 0.0) if by_sample else _linear(images, scale)
    constants = recon_scale, recon_constant, kl_scale, images.reduction == "none", logvar_clamp
    options = ElboOptions(beta, recon_weight, *constants, images.error, floor, one_pass, inplace)
    if by_sample:
        return _by_sample(images, scale, latents, tensors, options, dtype)
    if call is not None:
        _calls.remember(call, KnownLoss(site_of(tensors), options[2:]), tensors)
    return VAELossTerms(*_op(tensors, options)[:3])


def _dtype(images: Images, latents: Latents | None, *weights: Weight) -> torch.dtype:
    """Of the results and of all arithmetic outside the op: float64 if any differentiable argument is."""
    scale = images.likelihood.log_scale if isinstance(images.likelihood, Gaussian | Scaled) else None
    given = [*weights, scale, images.recon, images.target, images.weight, images.extra]
    if latents is not None:
        capacity = None if latents.capacity is None else latents.capacity.nats
        given += [*latents.for_op[0], capacity]
    return compute_dtype(*given)


def _linear(images: Images, scale: Scale) -> tuple[float, float]:
    """(a, b) of the reconstruction term a * (sum of the errors) + b."""
    assert not isinstance(scale.shrink, Tensor)
    assert not isinstance(scale.constant, Tensor)
    factor = normalizer(images.reduction, images.recon)
    if scale.constant == 0:
        return factor * scale.shrink * scale.factor, 0.0
    n = math.prod(images.recon.shape[1:]) if images.reduction == "none" else images.recon.numel()
    return factor * scale.shrink * scale.factor, factor * n * scale.constant


def _weighs_samples(images: Images, scale: Scale) -> bool:
    """Whether an option acts on samples as wholes, so that their errors are needed one by one."""
    given = images.weight is not None or images.extra is not None
    if given or scale.optimal or isinstance(scale.shrink, Tensor):
        return True
    return images.mask is not None and (images.likelihood.mask_normalize or bool(scale.constant != 0))


def _by_sample(
    images: Images,
    scale: Scale,
    latents: Latents | None,
    tensors: ElboTensors,
    options: ElboOptions,
    dtype: torch.dtype,
) -> VAELossTerms:
    by_dimension = latents is not None and latents.free_bits is not None and latents.free_bits.mode == "dim_batch"
    if by_dimension:
        tensors = tensors._replace(mu=None, logvar=None, prior_mu=None, prior_logvar=None)
    # a copy, because a schedule may step the tensor before the backward pass
    beta, recon_weight = (w.to(dtype).clone() if isinstance(w, Tensor) else w for w in options[:2])
    share = in_dtype(_share(images), dtype)
    linear = share * scale.shrink * scale.factor
    row_options = options._replace(beta=1.0, recon_weight=recon_weight, kl_scale=1.0, per_sample=True)
    if scale.optimal:
        row_options = row_options._replace(recon_weight=1.0, one_pass=False)
    elif not isinstance(linear, Tensor):
        row_options = row_options._replace(recon_scale=linear)
    elif isinstance(recon_weight, Tensor):
        row_options = row_options._replace(recon_weight=1.0, one_pass=False)
    else:
        # what autograd multiplies an upstream gradient of 1 by on its way to the errors
        weights = (recon_weight * linear).detach().to(compute_dtype(*tensors[:3]))
        weights = weights if weights.ndim else weights.repeat(images.recon.shape[0])
        row_options = row_options._replace(recon_weight=1.0, row_weight=weights)
    _, errors, kl_rows, raised = (t if t is None else t.to(dtype) for t in _op(tensors, row_options))
    assert errors is not None
    assert kl_rows is not None

    count: Weight = math.prod(images.recon.shape[1:]) if images.mask is None else _selected(images.mask, dtype)
    if scale.optimal:
        scale = scale.at_best(images, errors, count)
        linear = share * scale.shrink * scale.factor
    rows = linear * errors if isinstance(linear, Tensor) else errors
    if images.extra is not None:
        rows = rows + _extra(images, scale, share, count)
    if isinstance(scale.constant, Tensor) or scale.constant != 0:
        rows = rows + share * (count * scale.constant)
    recon = rows if images.reduction == "none" else rows.sum()
    if recon.ndim == 0 and not len(rows):
        recon = recon * images.normalizer  # a mean over nothing is NaN

    if latents is None:
        return VAELossTerms(recon_weight * recon, recon, torch.zeros_like(recon))
    both = (
        _kl_by_dimension(latents) if by_dimension else _kl_term(latents, kl_rows, kl_rows if raised is None else raised)
    )
    kl, regularised = (term.to(dtype) for term in both)
    return VAELossTerms(recon_weight * recon + beta * regularised, recon, kl)


def _share(images: Images) -> Weight:
    """What a sample's sum counts in the term: the normaliser times its weight."""
    if images.weight is None:
        return images.normalizer
    return images.weight * images.normalizer


def _extra(images: Images, scale: Scale, share: Weight, count: Weight) -> Tensor:
    """[B]: what `extra`, as a part of every element's error, adds to the term."""
    assert images.extra is not None
    if scale.by_element is None:
        return (share * scale.shrink) * (count * images.extra)
    log_scale = scale.by_element
    if images.mask is not None:  # before the exponential, whose gradient at NaN no later zero takes back
        log_scale = log_scale.masked_fill(~images.mask, math.inf)
    shrinks = torch.exp(-log_scale)
    return (share * (scale.share / scale.folded)) * (reference.per_sample(shrinks) * images.extra)


def _selected(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B]: elements of each sample that the mask selects."""
    return mask.flatten(1).sum(1).to(dtype) if mask.ndim > 1 else mask.to(dtype)


def _kl_term(latents: Latents, kl: Tensor, raised: Tensor) -> tuple[Tensor, Tensor]:
    """The KL term and the regularised one, from the KL of each sample, [B], and the same under free bits by element."""
    if latents.free_bits is not None and latents.free_bits.mode == "sample":
        raised = kl.clamp(min=in_dtype(latents.free_bits.nats, kl.dtype))
    if latents.capacity is not None and latents.capacity.mode == "sample":
        raised = (raised - in_dtype(latents.capacity.nats, kl.dtype)).abs()
    if latents.weight is not None:
        kl, raised = kl * latents.weight, raised * latents.weight
    if latents.reduction == "none":
        return kl, raised
    kl, raised = latents.normalizer * kl.sum(), latents.normalizer * raised.sum()
    return kl, _beyond_capacity(latents, raised)


def _kl_by_dimension(latents: Latents) -> tuple[Tensor, Tensor]:
    """The same for free bits of the batch's mean: dimensions are the rows of the transposed latents."""
    batch, mu, logvar = latents.batch, latents.mu, latents.logvar
    prior_mu, prior_logvar = latents.prior or (None, None)
    assert mu is not None
    assert logvar is not None
    n = math.prod(mu.shape[1:])
    if latents.weight is None:
        turned = [None if t is None else t.reshape(batch, n).t() for t in (mu, logvar, prior_mu, prior_logvar)]
        tensors = ElboTensors(None, None, None, *turned)
        kl = _op(tensors, ElboOptions(per_sample=True, logvar_clamp=latents.logvar_clamp))[2]
    else:
        elements = reference.gaussian_kl(mu, logvar, latents.logvar_clamp, prior_mu, prior_logvar)
        kl = (elements.reshape(batch, n) * latents.weight.to(elements.dtype)[:, None]).sum(0)
    assert latents.free_bits is not None
    nats = in_dtype(latents.free_bits.nats, kl.dtype)
    raised = (kl / batch if batch else kl).clamp(min=nats).sum() * (latents.normalizer * batch)
    return latents.normalizer * kl.sum(), _beyond_capacity(latents, raised)


def _beyond_capacity(latents: Latents, term: Tensor) -> Tensor:
    """|mean over the batch - capacity| in the units of the term."""
    if latents.capacity is None or latents.capacity.mode == "sample":
        return term
    return (term - in_dtype(latents.capacity.nats, term.dtype) * (latents.normalizer * latents.batch)).abs()


def _op(tensors: ElboTensors, options: ElboOptions) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, recon term, KL term, KL term under the floor)."""
    if _backend.is_traced():  # a compiler fuses the plain formula with its neighbours
        return reference.elbo(tensors, options)
    return elbo(tensors, options)
