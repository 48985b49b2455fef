"""The training loss in passes over cache-sized pieces: what the kernel of this name does, for any device.

On a CPU the cost of a loss is the memory it walks over, fresh pages above all. So the difference is taken piece by
piece, squared and summed while it is in the cache, and scaled into the gradient on the way.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._options import ElboOptions
from .._strides import is_dense
from ..reference import BYTE_SCALE, compute_dtype
from .gaussian import clamped, kl_per_sample, rows, sum_by_sample

_PIECE = 1 << 18  # elements: a float32 piece and its squares fit the second-level cache, 1 us a call is noise beside it

_ROW = 1024

Coefficient = float | Tensor


def elbo_fwd(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    drecon: Tensor | None,
    options: ElboOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (loss, recon term, KL term, weights); write recon_weight * d(recon term)/d(recon) to `drecon` if it is
    given.

    weights: a snapshot of (recon_weight, beta) if one of them is a tensor, which may change before the backward pass.
    """
    dtype = compute_dtype(recon, target, mu, logvar, kl)
    recon_term = kl_term = None
    if recon is not None and target is not None:
        scale = None if drecon is None else 2.0 * options.recon_scale * _value(options.recon_weight)
        recon_term = _squared_error(recon, target, drecon, scale, per_sample=options.per_sample)
        recon_term = _scaled(recon_term.to(dtype), options.recon_scale)
    if kl is None and mu is not None and logvar is not None:
        logvar = clamped(logvar.to(dtype), options.logvar_clamp)
        kl = kl_per_sample(mu.to(dtype), logvar, torch.expm1(logvar))
    if kl is not None:
        kl_term = _scaled(kl.to(dtype) if options.per_sample else kl.to(dtype).sum(), options.kl_scale)
    if recon_term is None or kl_term is None:
        only = recon_term if recon_term is not None else kl_term
        assert only is not None
        nothing = torch.zeros_like(only)
        recon_term, kl_term = (nothing, kl_term) if recon_term is None else (recon_term, nothing)
    assert kl_term is not None
    weights = None
    if isinstance(options.recon_weight, Tensor) or isinstance(options.beta, Tensor):
        weights = torch.stack(
            [torch.as_tensor(w, dtype=dtype, device=recon_term.device) for w in (options.recon_weight, options.beta)]
        )
    loss = _scaled(recon_term, options.recon_weight) + _scaled(kl_term, options.beta)
    return loss, recon_term, kl_term, weights


def elbo_bwd(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    options: ElboOptions,
    *,
    holds_forward_gradient: bool,
) -> None:
    """Write the gradients that are asked for, given those of (loss, recon term, KL term).

    gradients: buffers for (recon, target, mu, logvar, kl). If `holds_forward_gradient`, recon's already holds what
    `elbo_fwd` wrote there and is only scaled, where that is exact or where recon is gone (None, as is target).
    """
    dloss, drecon_term, dkl_term = upstream
    drecon, dtarget, dmu, dlogvar, dkl = gradients
    if drecon is not None or dtarget is not None:
        coefficient = _combine(dloss, options.recon_weight, drecon_term)
        factor = coefficient / options.recon_weight if holds_forward_gradient else coefficient
        if drecon is not None and holds_forward_gradient and (recon is None or _scales_exactly(drecon, factor)):
            _rescale(drecon, factor)
        elif recon is not None and target is not None:
            _difference(recon, target, drecon, dtarget, coefficient * (2.0 * options.recon_scale))
    if dmu is None and dlogvar is None and dkl is None:
        return
    coefficient = _combine(dloss, options.beta, dkl_term) * options.kl_scale
    if dkl is not None:
        dkl.copy_(coefficient) if isinstance(coefficient, Tensor) else dkl.fill_(coefficient)
    dtype = compute_dtype(mu, logvar)
    if dmu is not None and mu is not None:
        torch.mul(mu.to(dtype), _per_row(coefficient, mu), out=dmu)
    if dlogvar is not None and logvar is not None:
        expm1 = clamped(logvar.to(dtype), options.logvar_clamp).expm1()
        torch.mul(expm1, _per_row(coefficient * 0.5, logvar), out=dlogvar)
        if options.logvar_clamp is not None:
            low, high = options.logvar_clamp
            dlogvar.masked_fill_((logvar < low) | (logvar > high), 0)


def _value(number: Coefficient) -> Coefficient:
    """A float, where reading one waits for nothing: only a CPU tensor's value may steer the host."""
    if isinstance(number, Tensor) and number.device.type == "cpu" and number.ndim == 0:
        return number.item()
    return number


def _scaled(term: Tensor, weight: Coefficient) -> Tensor:
    return term if isinstance(weight, float | int) and weight == 1 else term * weight


def _combine(dloss: Tensor | None, weight: Coefficient, dterm: Tensor | None) -> Coefficient:
    """d(outputs)/d(term) = weight * dloss + dterm."""
    total: Coefficient = 0.0 if dterm is None else _value(dterm)
    return total if dloss is None else _value(dloss) * _value(weight) + total


def _per_row(coefficient: Coefficient, like: Tensor) -> Coefficient:
    return rows(coefficient, like) if isinstance(coefficient, Tensor) and coefficient.ndim else coefficient


def _scales_exactly(drecon: Tensor, factor: Coefficient) -> bool:
    """Whether scaling the forward pass's gradient rounds no second time: a power of two moves the exponent alone."""
    if isinstance(factor, Tensor):
        return False
    return drecon.element_size() > 2 or math.frexp(factor)[0] in (0.0, 0.5, -0.5)


def _rescale(drecon: Tensor, factor: Coefficient) -> None:
    if isinstance(factor, Tensor) or factor != 1:
        drecon.mul_(_per_row(factor, drecon))


def _same_dense_layout(tensors: list[Tensor]) -> bool:
    return is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def _pieces(tensors: list[Tensor], *, per_sample: bool) -> Iterator[list[Tensor]]:
    """Equal parts of tensors of one shape, about _PIECE elements each; whole samples if `per_sample`."""
    first = tensors[0]
    n = first.numel()
    if n == 0:
        return
    if n <= _PIECE:
        yield tensors
    elif not per_sample and _same_dense_layout(tensors):
        flat = [t.as_strided((n,), (1,)) for t in tensors]
        for start in range(0, n, _PIECE):
            yield [t[start : start + _PIECE] for t in flat]
    else:
        step = max(1, _PIECE * first.shape[0] // n)
        for start in range(0, first.shape[0], step):
            yield [t[start : start + step] for t in tensors]


def _subtract(recon: Tensor, target: Tensor, out: Tensor) -> Tensor:
    """out = recon - target, in the dtype of `out`, whatever theirs are."""
    if recon.dtype == target.dtype == out.dtype:
        return torch.sub(recon, target, out=out)
    scale = BYTE_SCALE if target.dtype == torch.uint8 else 1
    return out.copy_(recon).sub_(target.to(out.dtype), alpha=scale)


def _sum_of_squares(values: Tensor) -> Tensor:
    """By the norms of short rows where there are whole ones: one pass and no squares to store.

    A norm adds up in sequence; over 1024 elements that costs 7e-7 at worst, over all of them 1e-3. The sum of the rows
    is torch's cascaded one.
    """
    if values.is_contiguous() and values.numel() % _ROW == 0:
        norms: Tensor = torch.linalg.vector_norm(values.view(-1, _ROW), dim=1)
        return norms.square_().sum()
    return values.square().sum()


def _squared_error(
    recon: Tensor, target: Tensor, drecon: Tensor | None, scale: Coefficient | None, *, per_sample: bool
) -> Tensor:
    """Sum of squared differences, 0-d or [B]; scale * difference is written to `drecon` in the same pass."""
    dtype = compute_dtype(recon, target)
    tensors = [recon, target] if drecon is None else [recon, target, drecon]
    in_place = drecon is not None and drecon.dtype == dtype
    sums = []
    buffer: Tensor | None = None
    for recon_piece, target_piece, *drecon_piece in _pieces(tensors, per_sample=per_sample):
        if not in_place and (buffer is None or buffer.shape != recon_piece.shape):
            buffer = torch.empty_like(recon_piece, dtype=dtype)
        difference = _subtract(recon_piece, target_piece, drecon_piece[0] if buffer is None else buffer)
        sums.append(sum_by_sample(difference.square()) if per_sample else _sum_of_squares(difference))
        if scale is not None:
            difference.mul_(scale)
            if not in_place:
                drecon_piece[0].copy_(difference)
    if len(sums) == 1:
        return sums[0]
    if per_sample:
        return torch.cat(sums) if sums else recon.new_zeros(recon.shape[0], dtype=dtype)
    return torch.stack(sums).sum() if sums else recon.new_zeros((), dtype=dtype)


def _difference(
    recon: Tensor, target: Tensor, drecon: Tensor | None, dtarget: Tensor | None, coefficient: Coefficient
) -> None:
    """drecon = coefficient * (recon - target); dtarget = -drecon. coefficient: one number, or [B]."""
    per_row = _per_row(coefficient, recon)
    by_row = [per_row.expand(recon.shape)] if isinstance(per_row, Tensor) and per_row.ndim else []
    outputs = [t for t in (drecon, dtarget) if t is not None]
    buffer: Tensor | None = None
    for recon_piece, target_piece, *rest in _pieces([recon, target, *by_row, *outputs], per_sample=False):
        if buffer is None or buffer.shape != recon_piece.shape:
            buffer = torch.empty_like(recon_piece, dtype=compute_dtype(recon, target))
        _subtract(recon_piece, target_piece, buffer).mul_(rest.pop(0) if by_row else coefficient)
        if drecon is not None:
            rest[0].copy_(buffer)
        if dtarget is not None:
            rest[-1].copy_(buffer.neg_())
