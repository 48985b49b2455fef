"""The truth: float64, from torch.distributions and plain arithmetic, sharing no code with fastvae. And how near
is near.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Truth:
    """A float64 value (or gradient) and the size of the largest term that it is the sum of, element by element."""

    value: Tensor
    terms: Tensor


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.is_floating_point())


def per_sample(elements: Tensor) -> Tensor:
    return elements.reshape(elements.shape[0], elements[:1].numel() if len(elements) else 1).sum(1)


def reduce(elements: Tensor, reduction: str) -> Tensor:
    """One term of the loss from its elements, [B, ...]."""
    if reduction == "none":
        return per_sample(elements)
    return {
        "sum": elements.sum(),
        "mean": elements.sum() / elements.numel() if elements.numel() else elements.mean(),
    }.get(reduction, elements.sum() / elements.shape[0] if elements.shape[0] else elements.mean())


def clamp(logvar: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    return logvar if bounds is None else logvar.clamp(*bounds)


def sample(mu: Tensor, logvar: Tensor, noise: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    return mu + (0.5 * clamp(logvar, bounds)).exp() * noise.double()


def kl(mu: Tensor, logvar: Tensor, bounds: tuple[float, float] | None = None) -> Tensor:
    """Elements of KL(N(mu, sigma^2) || N(0, 1)).

    torch.distributions' own cancellation near 0 is of float64's size, so it is the truth for everything narrower.
    """
    sigma = (0.5 * clamp(logvar, bounds)).exp()
    return kl_divergence(Normal(mu, sigma), Normal(torch.zeros_like(mu), torch.ones_like(mu)))


def squared_error(recon: Tensor, target: Tensor) -> Tensor:
    return (recon - (target.double() / 255 if target.dtype == torch.uint8 else target)) ** 2


def assert_near(actual: Tensor, value: Tensor, terms: Tensor | float, *, ulps: float = 4) -> None:
    """`actual` is `value` rounded once to its dtype, after at most `ulps` ulp of `terms` lost in the dtype of
    arithmetic.
    """
    arithmetic = torch.float64 if actual.dtype == torch.float64 else torch.float32
    bound = ulps * torch.finfo(arithmetic).eps * torch.as_tensor(terms, dtype=torch.float64).abs()
    if actual.dtype != arithmetic:
        storage = torch.finfo(actual.dtype)
        bound = bound + storage.eps / 2 * value.abs() + storage.smallest_normal * storage.eps
    error = (actual.detach().double() - value).abs()
    same = (actual.detach().double() == value) | (actual.isnan() & value.isnan())
    bad = ~same & ~(error <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} elements off; worst: error {float(error[bad].max()):.3g}, "
        f"{float((error / bound)[bad].max()):.3g} times the bound"
    )
