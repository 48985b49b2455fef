"""The loss of a VAE in few passes: what the kernel of this name does, for any device."""

import math
from typing import Any

import torch
from torch import Tensor

from .._dtypes import compute_dtype, in_dtype
from .._options import ElboOptions, ElboTensors
from .gaussian import kl_gradients, kl_terms, rows
from .images import Coefficient, Images, sum_errors, write_gradients


def elbo_fwd(
    tensors: ElboTensors, written: ElboTensors, options: ElboOptions, notes: dict[Any, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return (loss, recon term, KL term, KL term under the floor, weights).

    weights: a snapshot of (recon_weight, beta) if one of them is a tensor, which may change before the backward pass.
    written: buffers for recon_weight times the gradients of the recon term by recon and log_scale, or None.
    notes: the kernels', which plan their launches; here is nothing to plan.
    """
    dtype = compute_dtype(*tensors[:-1])
    like = next(t for t in tensors if t is not None)
    # plain numbers wherever the host may read them: arithmetic on those costs nothing
    recon_term: Coefficient = 0.0
    kl_term: Coefficient = 0.0
    floored: Coefficient | None = None
    if tensors.recon is not None:
        weight: Coefficient = 0.0
        if written.recon is not None:
            weight = options.recon_scale * _number(options.recon_weight)
            weight = weight if options.row_weight is None else options.row_weight
        images = _images(tensors, written)
        errors = sum_errors(images, weight, options.error, per_sample=options.per_sample)
        recon_term = _scaled(_value(errors), options.recon_scale)
        if options.recon_constant:
            recon_term = recon_term + options.recon_constant
    kl = tensors.kl
    if kl is None and tensors.mu is not None:
        kl, raised = kl_terms(tensors, options, dtype)
        floored = None if raised is None else _reduced(raised, options)
    if kl is not None:
        kl_term = _reduced(kl.to(dtype), options)
    weighed = kl_term if floored is None else floored
    loss = _scaled(recon_term, _value(options.recon_weight)) + _scaled(weighed, _value(options.beta))
    loss, recon_term, kl_term = (_result(t, like, dtype, options) for t in (loss, recon_term, kl_term))
    kl_term = kl_term.clone() if kl_term is tensors.kl else kl_term
    floored = None if floored is None else _result(floored, like, dtype, options)
    weights = None
    if isinstance(options.recon_weight, Tensor) or isinstance(options.beta, Tensor):
        weights = torch.stack(
            [torch.as_tensor(w, dtype=dtype, device=like.device) for w in (options.recon_weight, options.beta)]
        )
    return loss, recon_term, kl_term, floored, weights


def elbo_bwd(
    tensors: ElboTensors,
    upstream: tuple[Tensor | None, ...],
    gradients: ElboTensors,
    options: ElboOptions,
    notes: dict[Any, Any],
    *,
    holds_forward_gradient: bool,
) -> None:
    """Write the gradients that are asked for, given those of (loss, recon term, KL term, KL term under the floor).

    gradients: buffers in the places of what they are gradients of. If `holds_forward_gradient`, those of recon and
        log_scale already hold what `elbo_fwd` wrote there and are only scaled, where that is exact or where recon is
        gone (None, as is target).
    """
    dloss, drecon_term, dkl_term, dfloored = upstream
    if gradients.recon is not None or gradients.target is not None or gradients.log_scale is not None:
        coefficient = _combine(dloss, options.recon_weight, drecon_term)
        factor = _factor(coefficient, options) if holds_forward_gradient else coefficient
        held = [g for g in (gradients.recon, gradients.log_scale) if g is not None]
        if holds_forward_gradient and (tensors.recon is None or _scales_exactly(held, factor)):
            for gradient in held:
                _rescale(gradient, factor)
        else:
            write_gradients(_images(tensors, gradients), coefficient * options.recon_scale, options.error)
    of_kl = _combine(dloss if options.floor is None else None, options.beta, dkl_term) * options.kl_scale
    of_floored = None if options.floor is None else _combine(dloss, options.beta, dfloored) * options.kl_scale
    if gradients.kl is not None:
        of_kl = in_dtype(of_kl, gradients.kl.dtype)
        gradients.kl.copy_(of_kl) if isinstance(of_kl, Tensor) else gradients.kl.fill_(of_kl)
    if any(g is not None for g in gradients[3:7]):
        like = tensors.logvar if tensors.logvar is not None else tensors.mu
        assert like is not None
        kl_gradients(
            tensors,
            gradients,
            _per_row(of_kl, like),
            None if of_floored is None else _per_row(of_floored, like),
            options,
        )


def _images(tensors: ElboTensors, gradients: ElboTensors) -> Images:
    assert tensors.recon is not None
    assert tensors.target is not None
    return Images(
        *(tensors.recon, tensors.target, tensors.log_scale, tensors.mask),
        *(gradients.recon, gradients.target, gradients.log_scale),
    )


def _reduced(kl: Tensor, options: ElboOptions) -> Coefficient:
    return _scaled(kl if options.per_sample else _value(kl.sum()), options.kl_scale)


def _result(term: Coefficient, like: Tensor, dtype: torch.dtype, options: ElboOptions) -> Tensor:
    term = in_dtype(term, dtype)
    if isinstance(term, Tensor):
        return term
    if options.per_sample:
        return like.new_full(like.shape[:1], term, dtype=dtype)
    return torch.scalar_tensor(term, dtype=dtype, device=like.device)


def _number(weight: Coefficient) -> float:
    assert not isinstance(weight, Tensor)  # one pass is not right under a tensor
    return weight


def _factor(coefficient: Coefficient, options: ElboOptions) -> Coefficient:
    """What the forward pass's gradient has to be multiplied by."""
    if options.row_weight is None:
        return coefficient / options.recon_weight
    coefficient = torch.as_tensor(coefficient, device=options.row_weight.device)
    # equal where both are 0, too
    factor = torch.where(coefficient == options.row_weight, 1.0, coefficient / options.row_weight)
    return 1.0 if options.row_weight.device.type == "cpu" and bool((factor == 1).all()) else factor


def _value(number: Coefficient) -> Coefficient:
    """A float, where reading one waits for nothing: only a CPU tensor's value may steer the host."""
    if isinstance(number, Tensor) and number.device.type == "cpu" and number.ndim == 0:
        return number.item()
    return number


def _scaled(term: Coefficient, weight: Coefficient) -> Coefficient:
    return term if isinstance(weight, float | int) and weight == 1 else term * weight


def _combine(dloss: Tensor | None, weight: Coefficient, dterm: Tensor | None) -> Coefficient:
    """d(outputs)/d(term) = weight * dloss + dterm."""
    total: Coefficient = 0.0 if dterm is None else _value(dterm)
    return total if dloss is None else _value(dloss) * _value(weight) + total


def _per_row(coefficient: Coefficient, like: Tensor) -> Coefficient:
    return rows(coefficient, like) if isinstance(coefficient, Tensor) and coefficient.ndim else coefficient


def _scales_exactly(held: list[Tensor], factor: Coefficient) -> bool:
    """Whether scaling the forward pass's gradients rounds no second time: a power of two moves the exponent alone."""
    if isinstance(factor, Tensor):
        return False
    return all(t.element_size() > 2 for t in held) or math.frexp(factor)[0] in (0.0, 0.5, -0.5)


def _rescale(drecon: Tensor, factor: Coefficient) -> None:
    if isinstance(factor, Tensor) or factor != 1:
        drecon.mul_(_per_row(factor, drecon))
