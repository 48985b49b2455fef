"""The likelihoods of counts in their plainest differentiable form: for compiled regions, second derivatives, tests.

Shares no code with the kernels or the fallback. Arithmetic is float64 whatever the inputs are: differences of lgamma
lose all digits of float32 for large dispersions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae_kernels.count_types import CountOptions, CountTensors
from fastvae_kernels.types import compute_dtype


def result_dtype(tensors: CountTensors) -> torch.dtype:
    return compute_dtype(*(t for t in tensors if t is not None and t.is_floating_point()))


def count_nll(tensors: CountTensors, options: CountOptions) -> Tensor:
    """The negative log-likelihood of each row, [B]; formulas in `fastvae_kernels.count_types`."""
    mask = tensors.mask

    def selected(tensor: Tensor | None, value: float = 0.0) -> Tensor | None:
        # what is outside may be NaN, whose gradient would be too
        if tensor is None:
            return None
        tensor = tensor.double()
        return tensor if mask is None else torch.where(mask, tensor, value)

    counts = tensors.counts
    counts = (counts if counts.layout == torch.strided else counts.to_dense()).double()
    if mask is not None:
        counts = torch.where(mask, counts, 0.0)
    counts = torch.where((counts >= 0) & (counts < torch.inf), counts, torch.nan)
    log_theta = tensors.log_theta
    if log_theta is not None:
        if options.theta == "batch":
            log_theta = log_theta.index_select(0, tensors.index)
        log_theta = selected(log_theta.expand(counts.shape))
    log_mu = _log_mean(tensors.logits.double(), tensors.log_library, options, mask)
    elements = _elements(log_mu, counts, log_theta, selected(tensors.zero_logits), options.family)
    if mask is not None:
        elements = torch.where(mask, elements, 0.0)
    return elements.sum(1).to(result_dtype(tensors))


def _log_mean(logits: Tensor, log_library: Tensor | None, options: CountOptions, mask: Tensor | None) -> Tensor:
    """log mu of each element; 0 outside of the mask."""
    if mask is not None:
        # -inf leaves an element out of the softmax, but for rows without any, where that would be NaN
        outside = -torch.inf if options.head == "softmax" else 0.0
        logits = torch.where(mask, logits, torch.where(mask.any(1, keepdim=True), outside, 0.0))
    match options.head:
        case "softmax":
            log_mu = torch.log_softmax(logits, 1)
        case "softplus":
            small = torch.full((), -30.0, dtype=torch.float64, device=logits.device)
            log_mu = torch.where(logits < small, logits, _softplus(torch.maximum(logits, small)).log())
        case "exp":
            log_mu = logits
    if log_library is not None:
        log_mu = log_mu + log_library.double()[:, None]
    return log_mu if mask is None else torch.where(mask, log_mu, 0.0)


def _elements(
    log_mu: Tensor, counts: Tensor, log_theta: Tensor | None, zero_logits: Tensor | None, family: str
) -> Tensor:
    positive = counts > 0
    # 0 log(0) is 0, and its gradient too
    log_mu_of_counts = torch.where(positive, log_mu, 0.0)
    if family == "multinomial":
        return -counts * log_mu_of_counts
    if family == "poisson":
        return log_mu.exp() - counts * log_mu_of_counts + torch.lgamma(counts + 1)
    assert log_theta is not None
    theta = log_theta.exp()
    log_ratio = log_mu - log_theta
    nll = theta * _softplus(log_ratio) + counts * _softplus(torch.where(positive, -log_ratio, 0.0))
    nll = nll + (torch.lgamma(theta) + torch.lgamma(counts + 1) - torch.lgamma(theta + counts))
    if family == "nb":
        return nll
    assert zero_logits is not None
    zero_inflated = nll + _softplus(zero_logits)
    # not softplus(d) - softplus(d + nll) + nll where nll is infinite: a zero may be explained by the inflation alone
    either = torch.logaddexp(zero_logits, -torch.where(counts == 0, nll, 0.0))
    return torch.where(counts == 0, _softplus(zero_logits) - either, zero_inflated)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # from there on it is x in float64
