"""The terms of samples: gradients of the outputs by the sums of each sample, and by what acts on samples."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import ElboNumbers, ElboOptions, ElboTensors, TensorMeta

from .. import reference
from .._dtypes import in_dtype
from .coefficients import scaled, term_gradient
from .gaussian import passes
from .images import Coefficient

FIRST_OF_SAMPLES = ElboTensors._fields.index("weight")  # behind it are gradients of one value per sample

Gradients = tuple[Sequence[Coefficient | None], Sequence[Tensor | None]]


def has_closed_form(tensors: ElboTensors, numbers: ElboNumbers, options: ElboOptions) -> bool:
    """Whether `SampleSums` serves: of all that acts on samples, only `extra` may require a gradient."""
    others = tensors.weight, tensors.betas, tensors.recon_weights, *numbers
    return not (
        any(isinstance(t, TensorMeta) and t.requires_grad for t in others)
        or tensors.sample_log_scale is not None
        or (tensors.weight_map is not None and tensors.extra is not None)
        or (tensors.mask is not None and any(t is not None for t in tensors[FIRST_OF_SAMPLES:]))
    )


class SampleSums(NamedTuple):
    """What the closed form of the gradients needs."""

    n_selected: float | Tensor
    kl: Tensor | None
    regularized: Tensor | None  # under free bits of each element
    numbers: Sequence[Any]  # `ElboNumbers`

    def backward(self, tensors: ElboTensors, options: ElboOptions, upstream: Sequence[Tensor | None]) -> Gradients:
        """Gradients of the sums (errors, weighed errors, KL, KL under free bits) and of the other inputs; None where
        there is none.
        """
        dloss, drecon_term, dkl_term = upstream
        dtype = next(u.dtype for u in upstream if u is not None)
        beta, recon_weight, _ = self.numbers
        weight = 1.0 if tensors.weight is None else tensors.weight.to(dtype)

        def gradient(dloss: Tensor | None, number: Any, by_sample: Tensor | None, dterm: Tensor | None) -> Coefficient:
            if dloss is None and dterm is None:  # no product with weights, which may be infinite
                return 0.0
            of_loss = term_gradient(dloss, number, None)
            if dloss is not None and by_sample is not None:
                of_loss = of_loss * by_sample.to(dtype)
            return scaled(of_loss + term_gradient(None, 1.0, dterm), weight)

        of_weighed = of_kl = of_free_bits = dextra = None
        by_map = tensors.weight_map is not None
        by_sample = None if by_map else tensors.recon_weights
        of_error = gradient(None if by_map else dloss, recon_weight, by_sample, drecon_term)
        if not options.per_sample:
            of_error = of_error * reference.recon_normalizer(self.n_selected, options)
        if by_map:
            factor = options.recon_normalizer * options.error_weight
            of_weighed = gradient(dloss, recon_weight, None, None) * factor
        reached = dloss is not None or drecon_term is not None
        if reached and tensors.extra is not None and tensors.extra.requires_grad:
            dextra = _filled(tensors.extra, of_error * (options.extra_weight * self.n_selected))
        of_error = of_error * options.error_weight
        if self.kl is not None:
            has_free_bits = self.regularized is not None  # of each element
            betas = None if dloss is None else self._betas(tensors, options, dtype)
            of_kl = gradient(None if has_free_bits else dloss, beta, betas, dkl_term) * options.kl_normalizer
            if has_free_bits:
                of_free_bits = gradient(dloss, beta, betas, None) * options.kl_normalizer
        return (of_error, of_weighed, of_kl, of_free_bits), (None, dextra, *_NO_OTHERS)

    def _betas(self, tensors: ElboTensors, options: ElboOptions, dtype: torch.dtype) -> Tensor | None:
        """Those of the samples, times the slopes of free bits and of the capacity: [B], or 0-d for all."""
        betas = None if tensors.betas is None else tensors.betas.to(dtype)
        sample_free_bits = options.free_bits if options.element_free_bits is None else None
        if sample_free_bits is None and options.capacity_mode is None:
            return betas
        kl = self.kl if self.regularized is None else self.regularized
        assert kl is not None
        kl = kl.to(dtype)
        slopes = [] if betas is None else [betas]
        if sample_free_bits is not None:
            slopes.append(passes(kl, sample_free_bits).to(dtype))
            kl = reference.apply_free_bits(kl, sample_free_bits)
        if options.capacity_mode == "sample":
            slopes.append((kl - in_dtype(self.numbers[2], dtype)).sgn_())
        elif options.capacity_mode == "batch":
            weights = [t.to(dtype) for t in (betas, tensors.weight) if t is not None]
            above = reduce(torch.mul, weights, kl).sum() * options.kl_normalizer
            slopes.append((above - in_dtype(self.numbers[2], dtype) * (options.kl_normalizer * len(kl))).sgn_())
        product: Tensor = reduce(torch.mul, slopes)
        return product


def _filled(like: Tensor, value: Coefficient) -> Tensor:
    """A gradient of `like`, [B], of one value or one for each sample."""
    if isinstance(value, Tensor):
        return value.to(like.dtype).expand(like.shape).clone() if value.ndim == 0 else value.to(like.dtype)
    return torch.full_like(like, in_dtype(value, like.dtype))


_NO_OTHERS = (None,) * (len(ElboTensors._fields) - FIRST_OF_SAMPLES - 2 + len(ElboNumbers._fields))


class SampleGraph(NamedTuple):
    """The terms of samples as a small graph of autograd, from the sums of samples to the outputs."""

    sums: Sequence[Tensor | None]
    others: Sequence[Any]  # `ElboTensors` of samples, `ElboNumbers`
    outputs: tuple[Tensor, Tensor, Tensor]

    @property
    def numbers(self) -> Sequence[Any]:
        return self.others[-len(ElboNumbers._fields) :]

    def backward(self, tensors: ElboTensors, options: ElboOptions, upstream: Sequence[Tensor | None]) -> Gradients:
        """As `SampleSums.backward`."""
        used = [(o, u) for o, u in zip(self.outputs, upstream, strict=True) if u is not None and o.requires_grad]
        inputs = *self.sums, *self.others
        asked = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        found: dict[int, Tensor | None] = {}
        if used and asked:
            outputs, gradients = zip(*used, strict=True)
            result = torch.autograd.grad(outputs, asked, gradients, retain_graph=True, allow_unused=True)
            found = {id(t): g for t, g in zip(asked, result, strict=True)}
        return [found.get(id(t)) for t in self.sums], [found.get(id(t)) for t in self.others]


def sample_graph(
    sums: Sequence[Tensor | None],
    n_selected: float | Tensor,
    n_weighed: Tensor | None,
    tensors: ElboTensors,
    numbers: ElboNumbers,
    options: ElboOptions,
) -> tuple[reference.Terms, SampleGraph]:
    """The terms, and their graph.

    Args:
        sums: Of errors, weighed errors, KL, KL under free bits of each element.
        n_selected, n_weighed: Elements that the mask selects, and the sum of their weights.
    """
    with torch.enable_grad():
        errors, weighed, kl, regularized = leaves = [None if t is None else t.detach().requires_grad_() for t in sums]
        others = [_leaf(t) if isinstance(t, Tensor) else t for t in (*tensors[FIRST_OF_SAMPLES:], *numbers)]
        outputs = reference.combine(
            *(errors, n_selected, kl, regularized),
            ElboTensors(*tensors[:FIRST_OF_SAMPLES], *others[: -len(numbers)]),
            ElboNumbers(*others[-len(numbers) :]),
            options,
            None if weighed is None or n_weighed is None else (weighed, n_weighed),
        )
    loss, recon_term, kl_term = (t.detach() for t in outputs)
    return (loss, recon_term, kl_term), SampleGraph(leaves, others, outputs)


def _leaf(tensor: Tensor) -> Tensor:
    """The same values in a graph of their own; those of a number are copied, because a schedule may step it."""
    leaf = tensor.detach()
    return (leaf if leaf.ndim else leaf.clone()).requires_grad_(tensor.requires_grad)
