"""The op for counts on a CPU: one pass over pieces of rows that fit the cache; what nonzero counts add comes from a
list of them.

Values decide what is computed: a zero needs one logarithm and no lgamma, and where float32 would lose digits to
cancellation, the few elements concerned are computed in float64. `fastvae_kernels.count_types` has the contract.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.count_types import CountGrads, CountOptions, CountTensors
from fastvae_kernels.types import compute_dtype

from .count_negative_binomial import NegativeBinomial, ZeroInflated
from .count_poisson import Multinomial, Poisson
from .count_rows import Batch

PIECE = 1 << 16  # elements of a piece of rows


_FAMILIES: dict[str, Callable[[Batch], NegativeBinomial | Poisson | Multinomial]] = {
    "nb": NegativeBinomial,
    "zinb": ZeroInflated,
    "poisson": Poisson,
    "multinomial": Multinomial,
}


class CountPlan(NamedTuple):
    """What is known of a call without the values of its tensors."""

    options: CountOptions
    dtype: torch.dtype  # of arithmetic
    rows: int  # of a piece


def plan_counts(metas: CountTensors, options: CountOptions, wanted: CountGrads) -> CountPlan:
    dtype = compute_dtype(*(meta for meta in metas if meta is not None and meta.dtype.is_floating_point))
    n_rows, n_columns = metas.logits.shape
    return CountPlan(options, dtype, max(1, min(n_rows, PIECE // max(1, n_columns))))


def counts_fwd(
    plan: CountPlan, tensors: CountTensors, row_factors: Tensor | None, grads: CountGrads
) -> tuple[Tensor, None]:
    if row_factors is None:
        grads = CountGrads()
    batch = Batch(tensors, plan.options, plan.dtype, plan.rows, row_factors, grads)
    _FAMILIES[plan.options.family](batch).run()
    return batch.nll, None


def counts_bwd(
    plan: CountPlan,
    tensors: CountTensors,
    state: Any,
    row_factors: Tensor | None,
    row_coefficients: Tensor,
    grads: CountGrads,
) -> None:
    if row_factors is not None:
        eps = torch.finfo(row_factors.dtype).eps
        if bool(((row_coefficients - row_factors).abs() <= 4 * eps * row_factors.abs()).all()):
            return
        quotients = row_coefficients / row_factors
        low, high = quotients.aminmax()
        buffers = [g for g in grads if g is not None]
        # a 16-bit gradient would be rounded a second time
        if bool(high - low <= 4 * eps * high.abs()) and all(g.dtype in (torch.float32, torch.float64) for g in buffers):
            for gradient in buffers:
                gradient.mul_(high)
            return
    counts_fwd(plan, tensors, row_coefficients, grads)
