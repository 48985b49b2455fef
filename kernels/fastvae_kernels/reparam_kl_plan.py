"""Everything about the launches of a sample that its tensors' shapes, strides, dtypes and options decide."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ._tile import ONE_TILE_EACH, layout, pack_f64, tile, triton_dtype
from .philox import elements_per_thread
from .types import Clamp, TensorMeta, compute_dtype


class Prior(NamedTuple):
    """Tensors of a Gaussian prior, or strides, in the shape of the posterior. None: not there, or not wanted."""

    mu: Any = None  # read, as is the next
    logvar: Any = None
    dmu: Any = None  # written, as is the next
    dlogvar: Any = None


class Pass(NamedTuple):
    """One launch but for its tensors and its noise."""

    programs: int
    strides: tuple[Any, ...]  # of each tensor but the prior's
    prior_strides: Any  # Prior; None: the prior is N(0, I)
    shape: tuple[Any, ...]  # sizes, n_rows, n_cols, n_col_programs
    elements_per_thread: int  # where the noise of the first element begins a counter
    block_rows: int
    block_cols: int


class ReparamKLPlan(NamedTuple):
    """Launches of both passes of one kind of call."""

    device: torch.device
    with_kl: bool
    bounds: tuple[Any, Any]  # of logvar, packed
    dtype: torch.dtype  # of arithmetic
    triton_dtype: tl.dtype
    forward: Pass
    backward: Pass
    partials: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of the KL's; [n_rows] where they are the sums


def plan_reparam_kl(
    mu: TensorMeta,
    logvar: TensorMeta,
    z: TensorMeta,
    dmu: TensorMeta,
    dlogvar: TensorMeta,
    logvar_clamp: Clamp | None,
    with_kl: bool,
    prior: Sequence[TensorMeta] = (),
) -> ReparamKLPlan:
    """Plan the launches of a sample; dmu and dlogvar are gradient buffers.

    prior: mu, logvar and the buffers of their gradients; none: N(0, I).
    """
    low, high = logvar_clamp or (None, None)
    dtype = compute_dtype(mu, logvar, *prior)
    forward = _plan_pass((mu, logvar, z), prior[:2], z.dtype.itemsize, with_kl)
    n_rows, n_col_programs = forward.shape[1], forward.shape[3]
    return ReparamKLPlan(
        device=mu.device,
        with_kl=with_kl,
        bounds=(pack_f64(low), pack_f64(high)),
        dtype=dtype,
        triton_dtype=triton_dtype(dtype),
        forward=forward,
        backward=_plan_pass((mu, logvar, z, dmu, dlogvar), prior, mu.dtype.itemsize, with_kl),
        partials=((n_rows, n_col_programs), (n_col_programs, 1)) if n_col_programs > 1 else ((n_rows,), (1,)),
    )


def _plan_pass(
    tensors: tuple[TensorMeta, ...], prior: Sequence[TensorMeta], element_size: int, by_sample: bool
) -> Pass:
    if 0 in tensors[0].shape:
        return Pass(0, ((),) * len(tensors), None, (None, tensors[0].shape[0], 0, 1), 1, 1, 1)
    n_rows, n_cols, sizes, strides = layout((*tensors, *prior), by_sample=by_sample, c_order=True)
    # the tensors of a prior take registers: half as many elements a program keep all in them
    size = max(2 * element_size, 8) if prior else element_size
    t = tile(n_rows, n_cols, size, max_programs=ONE_TILE_EACH, noise=True)
    per_thread = elements_per_thread(element_size, 0 if n_rows == 1 else n_cols)
    shape = sizes, n_rows, n_cols, t.col_programs
    of_prior = Prior(*strides[len(tensors) :]) if prior else None
    return Pass(t.programs(n_rows), tuple(strides[: len(tensors)]), of_prior, shape, per_thread, t.rows, t.cols)
