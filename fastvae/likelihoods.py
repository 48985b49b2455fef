"""What a reconstruction's error is: `vae_loss(..., likelihood=...)` takes a name or an object of this module.

e is the error of one element, x' the reconstruction, x the target; a loss adds e up. In nats where a docstring says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import ErrorOptions

from . import _checks, _numbers
from ._modules import KeepsPrecision
from .likelihood_counts import CountLikelihood as CountLikelihood
from .likelihood_counts import Multinomial as Multinomial
from .likelihood_counts import NegativeBinomial as NegativeBinomial
from .likelihood_counts import Poisson as Poisson
from .reference import BYTE_SCALE, compute_dtype, soft_lower_bound


class LikelihoodSpec(NamedTuple):
    """A likelihood without its tensors; hashable. See `ElboOptions` for what is computed of it."""

    error: ErrorOptions
    factor: float = 1.0  # on the error
    mask_normalize: bool = False
    nll_weight: float = 1.0
    constant: float = 0.0
    softclip: float | None = None
    log_scale: float = 0.0  # if it is fixed
    optimal_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """An error that each element has by itself.

    Args:
        target_scale, target_shift: A uint8 target stands for value * target_scale + target_shift.
        mask_normalize: Divide by the number of elements that the mask selects instead of by the batch ("batchmean") or
            by the number of all elements ("mean").
    """

    target_scale: float = BYTE_SCALE
    target_shift: float = 0.0
    mask_normalize: bool = False

    def __post_init__(self) -> None:
        self._hold(_numbers.finite, "target_scale", "target_shift")

    def _hold(self, check: Callable[[str, object], float], *names: str) -> None:
        """Replace fields by what a check makes of them."""
        for name in names:
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def error(self) -> ErrorOptions:
        """The pair of functions that the backends hold, and its constants."""
        return ErrorOptions(self._pair, self._parameter, self.target_scale, self.target_shift)

    @property
    def spec(self) -> LikelihoodSpec:
        return LikelihoodSpec(self.error, float(self.factor), self.mask_normalize)

    # plain class variables and properties: dynamo traces no super() in a property
    _pair: ClassVar[Any]
    _parameter: ClassVar[Any] = 1.0
    factor: ClassVar[Any] = 1.0  # what the pair's error is multiplied by


@dataclass(frozen=True)
class _OfMeans(Elementwise):
    """An error of x', or of sigmoid(x') if `from_logits`."""

    from_logits: bool = False

    _name: ClassVar[str]

    @property
    def _pair(self) -> str:
        return f"{self._name}_of_logits" if self.from_logits else self._name


@dataclass(frozen=True)
class L2(_OfMeans):
    """e = (x' - x)^2: nats of a Gaussian decoder of variance 1/2, without its constant ½ log(pi) an element.

    Args:
        from_logits: x' is sigmoid(recon); the sigmoid is folded into the loss.
    """

    _name = "l2"


@dataclass(frozen=True)
class L1(_OfMeans):
    """e = |x' - x|: nats of a Laplace decoder of scale 1, without its constant log(2) an element. Gradient 0 at 0.

    Args:
        from_logits: x' is sigmoid(recon); the sigmoid is folded into the loss.
    """

    _name = "l1"


@dataclass(frozen=True)
class Huber(Elementwise):
    """e = ½ d^2 where |d| = |x' - x| <= delta, else delta (|d| - ½ delta), as torch.nn.functional.huber_loss.

    Raises:
        ValueError: delta is not positive.
    """

    delta: float = 1.0
    _pair = "huber"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.positive, "delta")

    @property
    def _parameter(self) -> float:
        return self.delta


@dataclass(frozen=True)
class SmoothL1(Elementwise):
    """e = ½ d^2 / beta where |d| = |x' - x| < beta, else |d| - ½ beta, as torch.nn.functional.smooth_l1_loss.

    Raises:
        ValueError: beta is negative; 0 is L1.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.number if self.beta == 0 else _numbers.positive, "beta")

    @property
    def _pair(self) -> str:
        return "huber" if self.beta else "l1"

    @property
    def _parameter(self) -> float:
        return self.beta

    @property
    def factor(self) -> float:
        return 1.0 / self.beta if self.beta else 1.0


@dataclass(frozen=True)
class LogCosh(Elementwise):
    """e = log(cosh(alpha d)) / alpha, d = x' - x, as |d| + log1p(exp(-2 alpha |d|)) / alpha - log(2) / alpha: finite.

    Raises:
        ValueError: alpha is not positive.

    Source: Chen et al., Log Hyperbolic Cosine Loss Improves Variational Auto-Encoder, 2018.
    """

    alpha: float = 1.0
    _pair = "log_cosh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(_numbers.positive, "alpha")

    @property
    def _parameter(self) -> float:
        return self.alpha

    @property
    def factor(self) -> float:
        return 1.0 / self.alpha


@dataclass(frozen=True)
class Bernoulli(Elementwise):
    """e = softplus(x') - x' x, x' the logits: nats, as torch.nn.functional.binary_cross_entropy_with_logits."""

    _pair = "bernoulli"


@dataclass(frozen=True)
class BernoulliProbs(Elementwise):
    """e = -x log(x') - (1 - x) log(1 - x'), x' probabilities: nats, as torch.nn.functional.binary_cross_entropy.

    As there, a logarithm is at least -100, and the gradient divides by at least 1e-12. Values of x' outside [0, 1] are
    not looked for, which would cost a sync.
    """

    _pair = "bernoulli_probs"


class _WithScale(KeepsPrecision):
    """nll_weight * (e exp(-s) + s) + constant for each element, s the log of the scale."""

    log_scale: float | Tensor | Literal["optimal"]

    def __init__(self, base: Elementwise, log_scale: float | Tensor | Literal["optimal"], nll_weight: float) -> None:
        super().__init__()
        self.base = base
        # a Parameter is trained and saved with the loss, a constant tensor moves with it
        if isinstance(log_scale, Tensor) and not log_scale.requires_grad:
            self.register_buffer("log_scale", log_scale)
        else:
            self.log_scale = log_scale
        self.nll_weight = nll_weight
        self.constant = 0.0
        self.softclip: float | None = None

    @property
    def mask_normalize(self) -> bool:
        return self.base.mask_normalize

    @property
    def spec(self) -> LikelihoodSpec:
        return LikelihoodSpec(
            self.base.error,
            float(self.base.factor),
            self.base.mask_normalize,
            self.nll_weight,
            self.constant,
            self.softclip,
            self.clipped(self.log_scale) if isinstance(self.log_scale, float | int) else 0.0,
            self.log_scale == "optimal" if isinstance(self.log_scale, str) else False,
        )

    def clipped(self, log_scale: float) -> float:
        """log_scale under its soft lower bound: of log sigma = log_scale / 2."""
        if self.softclip is None:
            return float(log_scale)
        above = log_scale / 2 - self.softclip
        return 2 * (self.softclip + max(above, 0.0) + math.log1p(math.exp(-abs(above))))


class Gaussian(_WithScale):
    """½ ((x' - x)^2 / sigma^2 + log sigma^2 [+ log 2 pi if `full`]) for each element: nats.

    Args:
        logvar: log sigma^2. A float; a tensor, which gets a gradient (0-d: one for all, such as an nn.Parameter, which
            is then a parameter of the loss; [B]: one a sample; otherwise what broadcasts to recon's shape); or
            "optimal": the log of the mean squared error of the batch, the best value there is, through which the
            gradient flows (it takes a second pass over the images).
        full: With the constant ½ log 2 pi of each element.
        softclip: Soft lower bound of log sigma: softclip + softplus(log sigma - softclip). Where the error vanishes, so
            does the optimal sigma.
        from_logits: x' is sigmoid(recon).
        target_scale, target_shift, mask_normalize: As in every likelihood.

    Raises:
        TypeError: logvar is neither number, tensor nor "optimal".

    Source: Rybkin et al., Simple and Effective VAE Training with Calibrated Decoders, arXiv:2006.13202.
    """

    def __init__(
        self,
        logvar: float | Tensor | Literal["optimal"] = 0.0,
        *,
        full: bool = False,
        softclip: float | None = None,
        from_logits: bool = False,
        target_scale: float = BYTE_SCALE,
        target_shift: float = 0.0,
        mask_normalize: bool = False,
    ) -> None:
        base = L2(from_logits, target_scale=target_scale, target_shift=target_shift, mask_normalize=mask_normalize)
        super().__init__(base, _checks.log_scale("logvar", logvar, also="optimal"), nll_weight=0.5)
        self.constant = 0.5 * math.log(2 * math.pi) if full else 0.0
        self.softclip = None if softclip is None else _numbers.finite("softclip", softclip)

    def extra_repr(self) -> str:
        return f"logvar={_shown(self.log_scale)}, full={self.constant != 0}, softclip={self.softclip}"


class Scaled(_WithScale):
    """e / exp(s) + s for each element, e that of `base`, as the autoencoder loss of latent diffusion.

    Args:
        base: A name or an elementwise likelihood.
        log_scale: s: as the logvar of `Gaussian`, without "optimal".

    Raises:
        TypeError: base is not elementwise; log_scale is neither number nor tensor.

    Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, the code.
    """

    def __init__(self, base: str | Elementwise, log_scale: float | Tensor = 0.0) -> None:
        resolved = resolve(base)
        if not isinstance(resolved, Elementwise):
            raise TypeError(
                f"base must be a name or an elementwise likelihood; got {type(base).__name__}. Scaled adds a scale to "
                "it itself."
            )
        super().__init__(resolved, _checks.log_scale("log_scale", log_scale), nll_weight=1.0)

    def extra_repr(self) -> str:
        return f"base={self.base}, log_scale={_shown(self.log_scale)}"


Likelihood = Elementwise | Gaussian | Scaled | CountLikelihood

NAMED: dict[str, Elementwise] = {
    "l2": L2(),
    "l1": L1(),
    "huber": Huber(),
    "smooth_l1": SmoothL1(),
    "log_cosh": LogCosh(),
    "bernoulli": Bernoulli(),
    "bernoulli_probs": BernoulliProbs(),
}


SPECS = {name: likelihood.spec for name, likelihood in NAMED.items()}
_NAMES = {spec: name for name, spec in reversed(SPECS.items())}


class Resolved(NamedTuple):
    """A likelihood, and an extra error, for images of one shape."""

    spec: str | LikelihoodSpec  # a name, if it is one of `SPECS`: equal spellings share a plan
    log_scale: Tensor | None = None  # in the shape of recon
    sample_log_scale: Tensor | None = None  # 0-d or [B]
    extra: Tensor | None = None  # [B]
    extra_map: Tensor | None = None  # in the shape of recon


def resolve_likelihood(
    likelihood: str | Likelihood, recon: Tensor, extra: Tensor | None = None, mask: Tensor | None = None
) -> Resolved:
    """What a loss is given of a likelihood.

    Raises:
        ValueError, TypeError: unknown name; no likelihood; a scale that does not fit.
    """
    likelihood = resolve(likelihood)
    assert not isinstance(likelihood, CountLikelihood)  # which have an op of their own
    spec = likelihood.spec
    if isinstance(likelihood, Elementwise) and spec in _NAMES:
        return Resolved(_NAMES[spec], None, None, extra)
    log_scale = likelihood.log_scale if isinstance(likelihood, _WithScale) else None
    if not isinstance(log_scale, Tensor):
        return Resolved(spec, None, None, extra)
    _checks.same_device("the likelihood's scale", log_scale, "recon", recon)
    if log_scale.numel() == 1 or log_scale.shape in (recon.shape[:1], (*recon.shape[:1], *[1] * (recon.ndim - 1))):
        return Resolved(spec, None, log_scale.reshape(() if log_scale.numel() == 1 else -1), extra)
    if spec.factor != 1 or spec.softclip is not None:  # more than the op acts on it: round once
        log_scale = log_scale.to(compute_dtype(log_scale))
    log_scale = _checks.expanded("the likelihood's scale", log_scale, "recon", recon)
    if spec.softclip is not None and mask is not None:
        log_scale = torch.where(mask, log_scale, torch.zeros_like(log_scale))
    log_scale = soft_lower_bound(log_scale, spec.softclip)
    factor = spec.factor
    if factor != 1:  # factor e exp(-s) + s = e exp(-t) + t + log(factor), t = s - log(factor)
        log_scale = log_scale - math.log(factor)
        constant = spec.constant + spec.nll_weight * math.log(factor)
        spec = spec._replace(factor=1.0, constant=constant)
    extra_map = None
    if extra is not None:  # divided by a scale that each element has, which holds the factor
        _checks.per_sample("extra", extra, recon)
        extra_map = extra.to(compute_dtype(extra)) / factor
        extra_map = extra_map.reshape(-1, *[1] * (recon.ndim - 1)).expand(recon.shape)
    return Resolved(spec, log_scale, None, None, extra_map)


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of this name, or the object itself.

    Raises:
        ValueError: unknown name. TypeError: something else.
    """
    if isinstance(likelihood, str):
        _checks.choice("likelihood", likelihood, NAMED)
        return NAMED[likelihood]
    if not isinstance(likelihood, Elementwise | _WithScale | CountLikelihood):
        raise TypeError(
            f"likelihood must be a name or an object of fastvae.likelihoods; got {type(likelihood).__name__}. "
            f"Names are {', '.join(map(repr, NAMED))}."
        )
    return likelihood


def _shown(log_scale: object) -> str:
    if isinstance(log_scale, torch.Tensor):
        return "tensor" if log_scale.ndim else f"tensor({log_scale.device})"
    return repr(log_scale)
