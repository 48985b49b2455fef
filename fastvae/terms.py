"""The two terms of a loss as they were asked for."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._dtypes import compute_dtype, in_dtype
from ._options import Clamp, ErrorOptions, FloorOptions
from .likelihoods import Gaussian, Likelihood, Scaled
from .regularizers import Capacity, FreeBits

Weight = float | Tensor
Maybe = Tensor | None
Posterior = tuple[Maybe, Maybe, Maybe, Maybe, Maybe]  # mu, logvar, the prior's, kl
# what an op takes of latents: tensors, factor on the sum of the KL, bounds, free bits by element
ForOp = tuple[Posterior, float, Clamp | None, FloorOptions | None]


def normalizer(reduction: str, tensor: Tensor) -> float:
    """Factor on the sum of a term; NaN where torch's mean over nothing is."""
    if reduction == "sum" or reduction == "none":
        return 1.0
    divisor: Any = tensor.shape[0] if reduction == "batchmean" else tensor.numel()
    if isinstance(divisor, Tensor):  # torch.jit.trace keeps sizes variable
        divisor = divisor.double()
    return 1.0 / divisor if divisor else float("nan")


class Images(NamedTuple):
    """The reconstruction term."""

    recon: Tensor
    target: Tensor
    likelihood: Likelihood
    reduction: str
    weight: Tensor | None = None  # [B], as is extra
    mask: Tensor | None = None
    extra: Tensor | None = None

    def in_dtype(self, dtype: torch.dtype) -> "Images":
        """With what weighs samples in the dtype of arithmetic; without that of samples that the mask leaves out."""
        weight, extra = (t if t is None else self.selected(t.to(dtype)) for t in (self.weight, self.extra))
        return self._replace(weight=weight, extra=extra)

    @property
    def error(self) -> ErrorOptions:
        """The likelihood's error with constants that its arithmetic can represent."""
        name, *constants = self.likelihood.error
        dtype = compute_dtype(self.recon, self.target)
        return ErrorOptions(name, *(in_dtype(constant, dtype) for constant in constants))

    def selected(self, values: Tensor) -> Tensor:
        """Values of samples, [B], or one for all: 0 where the mask selects no element, whose gradient is 0 then."""
        if self.mask is None:
            return values
        reached = self.mask.flatten(1).any(1) if self.mask.ndim > 1 else self.mask
        return torch.where(reached if values.ndim else reached.any(), values, torch.zeros_like(values))

    @property
    def normalizer(self) -> float | Tensor:
        """Factor on the sum of the term."""
        if self.mask is not None and self.likelihood.mask_normalize:
            return 1.0 / self.mask.sum().to(compute_dtype(self.recon, self.target, self.weight))
        return normalizer(self.reduction, self.recon)


class Latents(NamedTuple):
    """The KL term: of mu and logvar, or `kl`, measured already."""

    reduction: str
    mu: Tensor | None
    logvar: Tensor | None = None
    kl: Tensor | None = None
    prior: tuple[Tensor, Tensor] | None = None
    logvar_clamp: Clamp | None = None
    free_bits: FreeBits | None = None
    capacity: Capacity | None = None
    weight: Tensor | None = None

    @property
    def normalizer(self) -> float:
        """Factor on the sum of the term."""
        like = self.kl if self.mu is None else self.mu
        assert like is not None
        return normalizer(self.reduction, like)

    @property
    def batch(self) -> int:
        like = self.kl if self.mu is None else self.mu
        assert like is not None
        return like.shape[0]

    @property
    def for_op(self) -> ForOp:
        tensors: Posterior = (None, None, None, None, self.kl)
        if self.kl is None:
            tensors = (self.mu, self.logvar, *(self.prior or (None, None)), None)
        return tensors, self.normalizer, self.logvar_clamp, self.floor

    @property
    def floor(self) -> FloorOptions | None:
        """Free bits that each element has by itself."""
        if self.free_bits is None or self.free_bits.mode in ("sample", "dim_batch"):
            return None
        nats = in_dtype(self.free_bits.nats, compute_dtype(self.mu, self.logvar, *(self.prior or ())))
        return FloorOptions(nats, self.free_bits.mode)  # type: ignore[arg-type]

    @property
    def weighs_samples(self) -> bool:
        return (
            self.weight is not None or self.capacity is not None or (self.free_bits is not None and self.floor is None)
        )


class Scale(NamedTuple):
    """How an element's error e, as the pair of functions computes it, becomes its term: shrink factor e + constant."""

    factor: float = 1.0
    share: float = 1.0
    shrink: Weight = 1.0  # share * exp(-log scale)
    constant: Weight = 0.0
    by_element: Tensor | None = None  # log scale of each element; the op sees to it
    optimal: bool = False
    folded: float = 1.0  # factor that `by_element` holds

    @classmethod
    def of(cls, images: Images, dtype: torch.dtype) -> "Scale":
        likelihood, recon = images.likelihood, images.recon
        if not isinstance(likelihood, Gaussian | Scaled):
            return cls(likelihood.factor)
        factor, share, constant, log_scale = (
            likelihood.factor,
            likelihood.share,
            likelihood.constant,
            likelihood.log_scale,
        )
        if isinstance(log_scale, str):
            return cls(factor, share, constant=constant, optimal=True)
        if not isinstance(log_scale, Tensor):
            log_scale = likelihood.clipped(log_scale)
            return cls(factor, share, share * _exp(-log_scale), share * log_scale + constant)
        _checks.same_device("the likelihood's scale", log_scale, "recon", recon)
        one_a_sample = (recon.shape[0], *[1] * (recon.ndim - 1))
        if log_scale.numel() == 1 or log_scale.shape in (one_a_sample[:1], one_a_sample):
            log_scale = log_scale.to(dtype).reshape(() if log_scale.numel() == 1 else -1)
            log_scale = likelihood.clipped(images.selected(log_scale))
            return cls(factor, share, share * torch.exp(-log_scale), share * log_scale + constant)
        if factor != 1 or likelihood.softclip is not None or images.extra is not None:
            log_scale = log_scale.to(compute_dtype(log_scale))  # more than the op acts on it: round once
        by_element = _checks.expanded("the likelihood's scale", log_scale, "recon", recon)
        if likelihood.softclip is not None and images.mask is not None:
            by_element = torch.where(images.mask, by_element, torch.zeros_like(by_element))
        by_element = likelihood.clipped(by_element)
        if factor != 1:  # factor e exp(-s) + s = e exp(-t) + t + log(factor), t = s - log(factor)
            by_element = by_element - math.log(factor)
            constant += share * math.log(factor)
        return cls(1.0, share, share, constant, by_element, folded=factor)

    def at_best(self, images: Images, errors: Tensor, count: Weight) -> "Scale":
        """With the scale that makes the term smallest, log of the mean error; the mean of nothing is 1."""
        assert isinstance(images.likelihood, Gaussian)
        total = count.sum() if isinstance(count, Tensor) and count.ndim else count * errors.shape[0]
        if isinstance(total, Tensor):
            mean = errors.sum() / total.clamp(min=1)
            mean = torch.where(total > 0, mean, torch.ones_like(mean))
        else:
            mean = errors.sum() / total if total else errors.new_ones(())
        log_scale = images.likelihood.clipped(torch.log(self.factor * mean))
        return self._replace(shrink=self.share * torch.exp(-log_scale), constant=self.share * log_scale + self.constant)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
