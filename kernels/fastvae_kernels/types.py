"""The tuples that the ops of `fastvae` and the backends exchange.

They live here because this package imports nothing of `fastvae`. The PyTorch fallback takes the same ones.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Clamp = tuple[float, float]


class TensorMeta(NamedTuple):
    """What a plan has to know of a tensor: everything but its address and its values."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False
    negated: bool = False  # the negation of a lazily negated view is still to be done
    kind: type = Tensor
    layout: torch.layout = torch.strided

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def like(self) -> "TensorMeta":
        """Of torch.empty_like."""
        tensor = torch.empty_strided(self.shape, self.strides, device="meta")
        return self._replace(strides=torch.empty_like(tensor).stride())


def meta_of(tensor: Tensor) -> TensorMeta:
    layout = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return TensorMeta(*layout, tensor.requires_grad, tensor.is_neg(), type(tensor), tensor.layout)


class ErrorOptions(NamedTuple):
    """Which error an element has: the pair of functions of this name and its constants."""

    name: str = "l2"
    parameter: float = 1.0
    target_scale: float = 1 / 255  # of a uint8 target, as is the shift
    target_shift: float = 0.0
    extra_scale: float = 1.0  # on the extra error of each element


class FreeBitsOptions(NamedTuple):
    """Free bits of each element ("dim", "dim_mask"), of each sample, or of the batch ("dim_batch": not in ops)."""

    nats: float
    mode: Literal["dim", "dim_batch", "dim_mask", "sample"]


class ElboTensors(NamedTuple):
    """Inputs of a loss; a gradient buffer has the place of its input. None: not given, or not wanted.

    Up to the masks they have one entry per element, from `kl` on one per sample, [B], but for `recon_weights`.
    """

    recon: Any = None
    target: Any = None
    log_scale: Any = None  # an element's error e becomes e exp(-log_scale) + log_scale
    extra_map: Any = None  # added to the error of each element
    mu: Any = None
    logvar: Any = None
    prior_mu: Any = None
    prior_logvar: Any = None
    mask: Any = None  # bool; elements outside count as 0, whatever they hold
    kl_mask: Any = None  # bool; latents outside count as 0, whatever they hold
    kl: Any = None  # replaces mu and logvar
    weight: Any = None  # of both terms
    extra: Any = None  # added to the error of each element of a sample
    sample_log_scale: Any = None  # [B], or 0-d for all samples
    betas: Any = None  # of each sample, beside the number
    recon_weights: Any = None  # the same for the reconstruction: [B], or a map in the shape of recon

    @property
    def weight_map(self) -> Any:
        """`recon_weights` where these are one per element."""
        weights = self.recon_weights
        return None if weights is None or weights.ndim == 1 else weights


_FIRST_OF_SAMPLES = ElboTensors._fields.index("weight")


class ElboNumbers(NamedTuple):
    """Numbers that may change from call to call: floats, or 0-d tensors on the inputs' device."""

    beta: Any = 1.0
    recon_weight: Any = 1.0
    capacity: Any = None  # nats


class ElboOptions(NamedTuple):
    """What is constant in a loss. For a sample with n selected elements and sum E of their errors,

        recon = weight (error_weight E / exp(s) + n (extra_weight extra / exp(s) + nll_weight s + constant))

    where s = `sample_log_scale` under its soft lower bound; the term is `recon_normalizer` times the sum over samples.
    The KL term is `kl_normalizer` times the sum of weight * KL. The loss is recon_weight * recon + beta * the KL term
    after free bits and capacity. `recon_weights` and `betas` multiply the terms of each sample in the loss alone; a map
    of weights multiplies the error of each element, and n becomes the sum of the selected weights.
    """

    error: ErrorOptions = ErrorOptions()
    error_weight: float = 1.0
    extra_weight: float = 1.0
    nll_weight: float = 1.0
    constant: float = 0.0
    softclip: float | None = None  # lower bound of s / 2
    recon_normalizer: float = 1.0
    mask_normalize: bool = False  # divide by the number of selected elements in place of `recon_normalizer`
    kl_normalizer: float = 1.0
    per_sample: bool = False  # return [B] instead of sums over the batch
    logvar_clamp: Clamp | None = None
    free_bits: FreeBitsOptions | None = None
    capacity_mode: Literal["sample", "batch"] | None = None

    @property
    def element_free_bits(self) -> FreeBitsOptions | None:
        return None if self.free_bits is None or self.free_bits.mode == "sample" else self.free_bits


def recon_constant(metas: ElboTensors, options: ElboOptions) -> float:
    """What the constants of all elements add to the reconstruction term, where no option acts on samples."""
    if metas.recon is None or not options.constant:
        return 0.0
    n_elements: int = math.prod(metas.recon.shape[1:]) if options.per_sample else metas.recon.numel()
    return options.recon_normalizer * n_elements * options.constant


class PhiloxNoise(NamedTuple):
    """Standard normals as a function of (seed, element): normal number `offset + i` belongs to element i in C order."""

    seed: int | Tensor  # an int in [-2^63, 2^63) or an int64 tensor of one element
    offset: int


def compute_dtype(*tensors: object) -> torch.dtype:
    """Dtype of arithmetic, losses and KL: float64 if any tensor (or meta) is, else float32. Others decide nothing."""
    for tensor in tensors:
        if isinstance(tensor, _WITH_DTYPE) and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


_WITH_DTYPE = (Tensor, TensorMeta)


def needs_sample_terms(tensors: ElboTensors, numbers: ElboNumbers, options: ElboOptions) -> bool:
    """Whether an option acts on samples as a whole, or a number gets a gradient: then sums are kept per sample."""
    if options.capacity_mode is not None or any(t is not None for t in tensors[_FIRST_OF_SAMPLES:]):
        return True
    if options.free_bits is not None and options.free_bits.mode == "sample":
        return True
    if any(isinstance(n, Tensor | TensorMeta) and n.requires_grad for n in numbers):
        return True
    return tensors.mask is not None and (options.mask_normalize or options.constant != 0)
