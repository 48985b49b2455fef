"""The likelihood of a row of counts and its gradients, the head of the decoder included, as device functions.

A row that is short enough stays on chip, so that everything is read and written once. Of a longer one, the first loop
finds the sum of the softmax, the second the likelihood, and the third the gradient of the logits, which needs the sum
of another gradient over the row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tile import load
from .count_likelihoods import count_of, dispersion, exact_exp, mean_of, nb, poisson, scaled_mean, zero_inflated
from .gaussian import exp
from .likelihoods import log1p

# logit of what has no part in a softmax, the least float16; with infinity, products with zero counts would be NaN
_NOWHERE = tl.constexpr(-65504.0)


class Rows(NamedTuple):
    """Rows of counts, and what is wanted of them."""

    tensors: Any  # CountTensors: pointers, read
    grads: Any  # CountGrads: pointers, written
    nll: Any  # pointer to [n_rows], written; None: not wanted
    table: Any  # pointer to [3, n_thetas], read: of `dispersion`; None: rows share no theta
    n_thetas: Any
    n_cols: Any
    # constants
    family: Any
    head: Any
    theta: Any
    pieces: Any  # of a row that are held at once; 0: the row is not held
    block_cols: Any  # of a piece
    dtype: Any  # of arithmetic


@triton.jit
def _head(y, scaling, HEAD: tl.constexpr):
    """Of logits the mean, by how much its logarithm is too large, and its derivative by the logit over the mean.

    scaling: (top, scale, log(scale) - top): the mean is exp(logits - top) * scale, or another head(logits) * scale.
    """
    top, scale, shift = scaling
    slope = y
    if HEAD == "softmax":
        mu, excess = scaled_mean(exp(y - top, y.dtype) * scale, y + shift)
    elif HEAD == "softplus":
        raised = tl.maximum(y, -60.0, propagate_nan=tl.PropagateNan.ALL)
        small = exp(-tl.abs(raised), y.dtype)
        softplus = tl.where(raised > 0, raised, 0.0) + log1p(small)
        slope = tl.where(raised < 0, small, 1.0) / ((small + 1.0) * softplus)
        mu, excess = softplus * scale, raised - y
    else:
        mu, excess = mean_of(y + shift)
    return mu, excess, slope


@triton.jit
def _select(values, selected, rows):
    """0 where the mask does not select. Without a mask, values of lanes outside are next to nothing."""
    return values if rows.tensors.mask is None else tl.where(selected, values, 0.0)


@triton.jit
def _logits(rows, row, cols):
    """Of a piece of a row, and which of them the mask selects; the others have no part in a softmax."""
    inside = cols < rows.n_cols
    y = load(rows.tensors.logits + row * rows.n_cols + cols, inside, rows.dtype, _NOWHERE)
    selected = inside
    if rows.tensors.mask is not None:
        selected = load(rows.tensors.mask + row * rows.n_cols + cols, inside, tl.int1)
        y = tl.where(selected, y, _NOWHERE)
    return y, selected


@triton.jit
def _dispersions(rows, row, cols):
    """Of a piece of a row, what `dispersion` returns."""
    inside = cols < rows.n_cols
    if rows.theta == "cell":
        log_theta = load(rows.tensors.log_theta + row * rows.n_cols + cols, inside, rows.dtype)
        theta, constant, p_theta = dispersion(log_theta)
    else:
        genes = rows.table + cols
        if rows.tensors.index is not None:
            genes += tl.load(rows.tensors.index + row) * rows.n_cols
        theta = load(genes, inside, rows.dtype, 1.0)
        constant = load(genes + rows.n_thetas, inside, rows.dtype)
        p_theta = load(genes + 2 * rows.n_thetas, inside, rows.dtype)
    return theta, constant, p_theta


@triton.jit
def _elements(rows, row, cols, y, scaling, selected):
    """Of a piece of a row: values, derivatives by log mu, by log_theta and by zero_logits (or log mu again, where the
    family has none), mu, and the slope of `_head`.
    """
    inside = cols < rows.n_cols
    at = row * rows.n_cols + cols
    mu, excess, slope = _head(y, scaling, rows.head)
    counts = tl.load(rows.tensors.counts + at, mask=inside, other=0)
    x = _select(count_of(counts, rows.dtype), selected, rows)
    if rows.family == "multinomial":
        mu = exp(y - scaling[0], rows.dtype) * scaling[1]
        # finite, because nothing is what zero counts add
        log_mu = tl.maximum(y + scaling[2], -1e38, propagate_nan=tl.PropagateNan.ALL)
        value, dlog_mu = -x * log_mu, -x
        dlog_theta, dzero_logit = dlog_mu, dlog_mu
    elif rows.family == "poisson":
        value, dlog_mu = poisson(mu, excess, x)
        dlog_theta, dzero_logit = dlog_mu, dlog_mu
    else:
        theta, constant, p_theta = _dispersions(rows, row, cols)
        value, dlog_mu, dlog_theta = nb(mu, excess, x, theta, constant, p_theta)
        dzero_logit = dlog_mu
        if rows.family == "zinb":
            zero_logit = load(rows.tensors.zero_logits + at, inside, rows.dtype)
            value, dlog_mu, dlog_theta, dzero_logit = zero_inflated(value, dlog_mu, dlog_theta, x, zero_logit)
    value, dlog_mu = _select(value, selected, rows), _select(dlog_mu, selected, rows)
    dlog_theta, dzero_logit = _select(dlog_theta, selected, rows), _select(dzero_logit, selected, rows)
    return value, dlog_mu, dlog_theta, dzero_logit, mu, slope


@triton.jit
def _store(ptr, rows, row, cols, values):
    tl.store(ptr + row * rows.n_cols + cols, values.to(ptr.dtype.element_ty), mask=cols < rows.n_cols)


@triton.jit
def _store_sums(rows, row, nll, dlog_library):
    if rows.nll is not None:
        tl.store(rows.nll + row, nll)
    if rows.grads.log_library is not None:
        tl.store(rows.grads.log_library + row, dlog_library.to(rows.grads.log_library.dtype.element_ty))


@triton.jit
def _store_others(rows, row, cols, coefficient, dlog_theta, dzero_logit, theta_sums_ptr, n_held):
    """The gradients of a piece of a row but for the logits. That of a log_theta which rows share goes to
    `theta_sums_ptr`, and is added to the first `n_held` numbers there.
    """
    if rows.grads.zero_logits is not None:
        _store(rows.grads.zero_logits, rows, row, cols, coefficient * dzero_logit)
    if rows.grads.log_theta is not None:
        if rows.theta == "cell":
            _store(rows.grads.log_theta, rows, row, cols, coefficient * dlog_theta)
        else:
            before = load(theta_sums_ptr + cols, cols < n_held, rows.dtype)
            tl.store(theta_sums_ptr + cols, before + coefficient * dlog_theta, mask=cols < rows.n_cols)


@triton.jit
def _softmax_scaling(top, total, log_library):
    """Of `_head`, for the sum of exp(logits - top)."""
    return top, exact_exp(log_library) / total, log_library - top - tl.log(total)


@triton.jit
def _scaling_on_chip(rows, ys, log_library):
    """Of the softmax of a row in pieces."""
    tops, sums = ys[0], tl.zeros([rows.block_cols], rows.dtype)
    for i in tl.static_range(1, rows.pieces):
        tops = tl.maximum(tops, ys[i])
    top = tl.max(tops)
    for i in tl.static_range(rows.pieces):
        sums += exp(ys[i] - top, rows.dtype)
    return _softmax_scaling(top, tl.sum(sums), log_library)


@triton.jit
def row_on_chip(rows, row, log_library, coefficient, theta_sums_ptr, n_held):
    """A row of a softmax, in pieces that are held all at once. theta_sums_ptr, n_held: Of `_store_others`."""
    ys, selections = (), ()
    for i in tl.static_range(rows.pieces):
        y, selected = _logits(rows, row, i * rows.block_cols + tl.arange(0, rows.block_cols))
        ys += (y,)  # type: ignore[assignment]
        selections += (selected,)  # type: ignore[assignment]
    scaling = _scaling_on_chip(rows, ys, log_library)
    values = tl.zeros([rows.block_cols], rows.dtype)
    totals = tl.zeros([rows.block_cols], rows.dtype)
    mus, dlog_mus = (), ()
    for i in tl.static_range(rows.pieces):
        cols = i * rows.block_cols + tl.arange(0, rows.block_cols)
        value, dlog_mu, dlog_theta, dzero_logit, mu, _ = _elements(rows, row, cols, ys[i], scaling, selections[i])
        values += value
        totals += dlog_mu
        mus += (mu,)  # type: ignore[assignment]
        dlog_mus += (dlog_mu,)  # type: ignore[assignment]
        _store_others(rows, row, cols, coefficient, dlog_theta, dzero_logit, theta_sums_ptr, n_held)
    total = tl.sum(totals)
    _store_sums(rows, row, tl.sum(values), coefficient * total)
    if rows.grads.logits is not None:
        share = total * exact_exp(-log_library)
        for i in tl.static_range(rows.pieces):
            cols = i * rows.block_cols + tl.arange(0, rows.block_cols)
            dlogits = coefficient * (dlog_mus[i] - mus[i] * share)
            _store(rows.grads.logits, rows, row, cols, _select(dlogits, selections[i], rows))


@triton.jit
def _scaling_of_pieces(rows, row, log_library):
    """Of a row's softmax. Every lane has a maximum and a sum of its own: they meet after the loop."""
    tops = tl.full([rows.block_cols], -1e38, rows.dtype)
    sums = tl.zeros([rows.block_cols], rows.dtype)
    for first in range(0, rows.n_cols, rows.block_cols):
        y, _ = _logits(rows, row, first + tl.arange(0, rows.block_cols))
        higher = tl.maximum(tops, y)
        sums = sums * exp(tops - higher, rows.dtype) + exp(y - higher, rows.dtype)
        tops = higher
    top = tl.max(tops)
    return _softmax_scaling(top, tl.sum(sums * exp(tops - top, rows.dtype)), log_library)


@triton.jit
def _finish_softmax(rows, row, scaling, share, coefficient):
    """The gradient of the logits, from that by log mu, which is in its place if that has enough digits."""
    for first in range(0, rows.n_cols, rows.block_cols):
        cols = first + tl.arange(0, rows.block_cols)
        y, selected = _logits(rows, row, cols)
        if rows.grads.logits.dtype.element_ty == rows.dtype:
            dlog_mu = load(rows.grads.logits + row * rows.n_cols + cols, cols < rows.n_cols, rows.dtype)
            mu, _, _ = _head(y, scaling, rows.head)
        else:
            _, dlog_mu, _, _, mu, _ = _elements(rows, row, cols, y, scaling, selected)
        _store(rows.grads.logits, rows, row, cols, _select(coefficient * (dlog_mu - mu * share), selected, rows))


@triton.jit
def _store_dlogits(rows, row, cols, selected, coefficient, dlog_mu, slope):
    """The gradient of a piece of the logits, unless it needs a sum over the row."""
    if rows.head == "softplus":
        _store(rows.grads.logits, rows, row, cols, _select(coefficient * dlog_mu * slope, selected, rows))
    elif rows.head == "exp":
        _store(rows.grads.logits, rows, row, cols, coefficient * dlog_mu)
    elif rows.grads.logits.dtype.element_ty == rows.dtype:
        _store(rows.grads.logits, rows, row, cols, dlog_mu)


@triton.jit
def row_in_pieces(rows, row, log_library, coefficient, theta_sums_ptr, n_held):
    """A row of any length. theta_sums_ptr, n_held: Of `_store_others`."""
    scaling = (log_library, exact_exp(log_library), log_library)
    if rows.head == "softmax":
        scaling = _scaling_of_pieces(rows, row, log_library)
    values = tl.zeros([rows.block_cols], rows.dtype)
    totals = tl.zeros([rows.block_cols], rows.dtype)
    for first in range(0, rows.n_cols, rows.block_cols):
        cols = first + tl.arange(0, rows.block_cols)
        y, selected = _logits(rows, row, cols)
        value, dlog_mu, dlog_theta, dzero_logit, _, slope = _elements(rows, row, cols, y, scaling, selected)
        values += value
        totals += dlog_mu
        _store_others(rows, row, cols, coefficient, dlog_theta, dzero_logit, theta_sums_ptr, n_held)
        if rows.grads.logits is not None:
            _store_dlogits(rows, row, cols, selected, coefficient, dlog_mu, slope)
    total = tl.sum(totals)
    _store_sums(rows, row, tl.sum(values), coefficient * total)
    if rows.head == "softmax" and rows.grads.logits is not None:
        _finish_softmax(rows, row, scaling, total * exact_exp(-log_library), coefficient)
