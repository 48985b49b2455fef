"""What a reconstruction's error is: `vae_loss(..., likelihood=...)` takes a name or an object of this module."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks, _numbers
from ._custom import Custom as Custom
from ._elementwise import L1 as L1
from ._elementwise import L2 as L2
from ._elementwise import NAMED as NAMED
from ._elementwise import Bernoulli as Bernoulli
from ._elementwise import BernoulliProbs as BernoulliProbs
from ._elementwise import Huber as Huber
from ._elementwise import LogCosh as LogCosh
from ._elementwise import SmoothL1 as SmoothL1
from ._likelihood_base import BYTE_SCALE
from ._likelihood_base import Elementwise as Elementwise
from ._likelihood_base import LikelihoodSpec as LikelihoodSpec
from ._modules import KeepsPrecision
from .likelihood_counts import CountLikelihood as CountLikelihood
from .likelihood_counts import Multinomial as Multinomial
from .likelihood_counts import NegativeBinomial as NegativeBinomial
from .likelihood_counts import Poisson as Poisson
from .reference import compute_dtype, soft_lower_bound


class _WithScale(KeepsPrecision):
    """nll_weight * (e exp(-s) + s) + constant for each element, s the log of the scale."""

    log_scale: float | Tensor | Literal["optimal"]

    def __init__(self, base: Elementwise, log_scale: float | Tensor | Literal["optimal"], nll_weight: float) -> None:
        super().__init__()
        self.base = base
        # a Parameter is trained and saved with the loss, a constant tensor moves with it
        frozen = isinstance(log_scale, nn.Parameter)  # may be trained later
        if isinstance(log_scale, Tensor) and not log_scale.requires_grad and not frozen:
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
            self.base.spec.error,
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

    @property
    def log_normalizer(self) -> float:
        return 0.5 * math.log(2 * math.pi) - self.constant

    def extra_repr(self) -> str:
        return f"logvar={_shown(self.log_scale)}, full={self.constant != 0}, softclip={self.softclip}"


class Scaled(_WithScale):
    """e / exp(s) + s for each element, e that of `base`, as the autoencoder loss of latent diffusion.

    Args:
        base: A name, an elementwise likelihood or a function, as the likelihood of `vae_loss`.
        log_scale: s: as the logvar of `Gaussian`, without "optimal".

    Raises:
        TypeError: base is not elementwise; log_scale is neither number nor tensor.

    Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv:2112.10752, the code.
    """

    def __init__(
        self, base: str | Elementwise | Callable[[Tensor, Tensor], Tensor], log_scale: float | Tensor = 0.0
    ) -> None:
        resolved = resolve(base)
        if not isinstance(resolved, Elementwise):
            raise TypeError(
                f"base must be a name or an elementwise likelihood; got {type(base).__name__}. Scaled adds a scale to "
                "it itself."
            )
        super().__init__(resolved, _checks.log_scale("log_scale", log_scale), nll_weight=1.0)

    @property
    def log_normalizer(self) -> float | None:
        return self.base.log_normalizer if isinstance(self.base, L1) else None

    def extra_repr(self) -> str:
        return f"base={self.base}, log_scale={_shown(self.log_scale)}"


Likelihood = Elementwise | Gaussian | Scaled | CountLikelihood | Callable[[Tensor, Tensor], Tensor]

# names of other libraries
SYNONYMS = {
    "mse": "'l2'",
    "mae": "'l1'",
    "bce": "'bernoulli' for logits, or 'bernoulli_probs' for probabilities",
    "bce_with_logits": "'bernoulli'",
    "gaussian": "fastvae.likelihoods.Gaussian(logvar), or 'l2' for a variance of 1/2 without its constant",
    "laplace": "fastvae.likelihoods.Scaled('l1', log_scale), or 'l1' for a scale of 1 without its constant",
    "scaled": "fastvae.likelihoods.Scaled('l2', log_scale)",
}
SYNONYMS["normal"] = SYNONYMS["gaussian"]
SPECS = {name: likelihood.spec for name, likelihood in NAMED.items()}
_NAMES = {spec: name for name, spec in reversed(SPECS.items())}


class Resolved(NamedTuple):
    """A likelihood for images of one shape."""

    recon: Tensor  # both as given, or errors in place of the reconstruction
    target: Tensor
    spec: str | LikelihoodSpec  # a name, if it is one of `SPECS`: equal spellings share a plan
    log_scale: Tensor | None = None  # in the shape of recon
    sample_log_scale: Tensor | None = None  # 0-d or [B]


def resolve_likelihood(
    likelihood: str | Likelihood, recon: Tensor, target: Tensor, mask: Tensor | None = None, *, inplace: bool = False
) -> Resolved:
    """What a loss is given of a likelihood.

    Raises:
        ValueError, TypeError: unknown name; no likelihood; a scale that does not fit; a function that does not.
    """
    likelihood = resolve(likelihood)
    assert not isinstance(likelihood, CountLikelihood)  # which have an op of their own
    spec = likelihood.spec
    if isinstance(likelihood.base, Custom):
        if inplace:
            _checks.fail(
                "inplace=True needs a likelihood whose gradient fastvae computes; got a function. Leave it out."
            )
        _checks.images(recon, target)
        recon = likelihood.base.errors(recon, target, mask)
        target = recon.detach()  # not looked at
    elif isinstance(likelihood, Elementwise) and spec in _NAMES:
        return Resolved(recon, target, _NAMES[spec])
    log_scale = likelihood.log_scale if isinstance(likelihood, _WithScale) else None
    if not isinstance(log_scale, Tensor):
        return Resolved(recon, target, spec)
    _checks.same_device("the likelihood's scale", log_scale, "recon", recon)
    if log_scale.numel() == 1 or log_scale.shape in (recon.shape[:1], (*recon.shape[:1], *[1] * (recon.ndim - 1))):
        return Resolved(recon, target, spec, None, log_scale.reshape(() if log_scale.numel() == 1 else -1))
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
    return Resolved(recon, target, spec, log_scale)


def extra_errors(extra: Tensor, recon: Tensor, log_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """([B], None), or (None, a map in the shape of recon): always a map where each element has a scale of its own."""
    of_samples, of_elements = _checks.per_sample_or_element("extra", extra, recon)
    if of_samples is None or log_scale is None:
        return of_samples, of_elements
    wide = of_samples.to(compute_dtype(of_samples))  # its gradient is a sum, which is rounded once
    return None, wide.reshape(-1, *[1] * (recon.ndim - 1)).expand(recon.shape)


def resolve(likelihood: str | Likelihood) -> Elementwise | Gaussian | Scaled | CountLikelihood:
    """The likelihood of this name, the object itself, or `Custom` of a function.

    Raises:
        ValueError: unknown name. TypeError: something else.
    """
    if isinstance(likelihood, str):
        _checks.choice("likelihood", likelihood, NAMED, SYNONYMS)
        return NAMED[likelihood]
    if isinstance(likelihood, Elementwise | Gaussian | Scaled | CountLikelihood):
        return likelihood
    if isinstance(likelihood, type):
        raise TypeError(
            f"likelihood must be a name, an object or a function; got {_checks.kind(likelihood)}. Pass "
            f"{likelihood.__name__}(...)."
        )
    if not callable(likelihood):
        raise TypeError(
            f"likelihood must be a name, an object of fastvae.likelihoods or a function (recon, target) -> errors; got "
            f"{type(likelihood).__name__}. Names are {', '.join(map(repr, NAMED))}."
        )
    return Custom(likelihood)


def _shown(log_scale: object) -> str:
    if isinstance(log_scale, torch.Tensor):
        return "tensor" if log_scale.ndim else f"tensor({log_scale.device})"
    return repr(log_scale)
