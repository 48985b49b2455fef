"""Values of a loss's inputs that are usually mistakes: for looking at a batch, not for every step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks
from ._dtypes import compute_dtype
from .likelihood_counts import CountLikelihood, checked_counts
from .likelihoods import Elementwise, Likelihood, resolve

MOST_OF_SCALED = 16.0  # images of floats that reach further were not divided by 255


@dataclass(frozen=True)
class InputReport:
    """What `check_inputs` found. `str(report)` has one line for each problem.

    Attributes:
        nonfinite: How many values of each tensor, by its name, are NaN or infinite.
        out_of_range: How many finite values of recon and target lie outside of the range of the likelihood.
        suspicious: How many values of recon and target have another meaning, as it seems, than the likelihood gives
            them.
        warnings: One sentence for each problem: what was found and what to do.
    """

    nonfinite: dict[str, int]
    out_of_range: dict[str, int]
    suspicious: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.warnings

    def __str__(self) -> str:
        return "\n".join(self.warnings) or "No problem was found."


def check_inputs(
    recon: Tensor,
    target: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    likelihood: str | Likelihood = "l2",
) -> InputReport:
    """Look for values that make `vae_loss` of the same arguments meaningless, on any device.

    The loss itself looks at no values, because on a GPU it would have to wait for them. This function reads every value
    once and waits: call it on the first batch, or on one whose loss is not what it should be.

    - Values that are NaN or infinite, of each tensor.
    - Values out of range: targets outside of [0, 1] under a Bernoulli likelihood or a likelihood of sigmoid(recon),
      reconstructions outside of [0, 1] where they are probabilities. A uint8 target is scaled first.
    - Under a likelihood of counts: negative targets are out of range, and targets that are no whole numbers suspicious.
    - Suspicious values: reconstructions that all lie in [0, 1] where they are logits, as if a sigmoid had been applied
      already; targets from 0 to at most 255 that were not divided by 255.

    Args:
        recon, target: As in `vae_loss`.
        mu, logvar: As in `vae_loss`; each may be left out.
        likelihood: A name or an object of `fastvae.likelihoods`.

    Returns:
        InputReport: the counts, and a warning for each problem.

    Raises:
        ValueError, TypeError: shapes, devices and dtypes as in `vae_loss`; unknown likelihood.

    Example:
        >>> report = fastvae.check_inputs(recon, target, mu, logvar, likelihood="bernoulli")
        >>> assert report.ok, str(report)
    """
    resolved = resolve(likelihood)
    base = resolved if isinstance(resolved, CountLikelihood) else resolved.base
    if isinstance(base, CountLikelihood):
        counts = checked_counts(target, recon)
        target = (counts if counts.layout == torch.strided else counts.values()).to(torch.float64)
    else:
        _checks.images(recon, target)
        if target.dtype == torch.uint8:
            target = target.to(compute_dtype(recon)) * base.target_scale + base.target_shift
    given = {"recon": recon, "target": target}
    for name, tensor in (("mu", mu), ("logvar", logvar)):
        if tensor is not None:
            _checks.float_tensor(name, tensor)
            given[name] = tensor
    values = {name: _Values.of(tensor) for name, tensor in given.items()}
    nonfinite = {name: found.nonfinite for name, found in values.items()}
    warnings = [
        f"{name} has {found.nonfinite} of {found.size} values that are NaN or infinite. Find the first step or layer "
        "that makes one; mask what is missing in the data."
        for name, found in values.items()
        if found.nonfinite
    ]
    if isinstance(base, CountLikelihood):
        out_of_range, suspicious, more = _judge_counts(values["target"], target)
    else:
        out_of_range, suspicious, more = _judge(values["recon"], values["target"], base)
    return InputReport(nonfinite, out_of_range, suspicious, (*warnings, *more))


@dataclass(frozen=True)
class _Values:
    """What a tensor holds: how many values in all and not finite, and of the finite ones the range."""

    size: int
    nonfinite: int
    below: int  # 0
    above: int  # 1
    least: float
    largest: float

    @classmethod
    def of(cls, tensor: Tensor) -> "_Values":
        values = tensor.detach()
        if values.numel() == 0:
            return cls(0, 0, 0, 0, 0.0, 0.0)
        finite = values.isfinite()
        outside = (finite & (values < 0), finite & (values > 1))
        counts = torch.stack([torch.count_nonzero(which) for which in (~finite, *outside)]).tolist()
        least = values.masked_fill(~finite, torch.inf).amin()
        largest = values.masked_fill(~finite, -torch.inf).amax()
        return cls(values.numel(), *counts, *torch.stack([least, largest]).tolist())


def _judge_counts(target: _Values, counts: Tensor) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """As `_judge`."""
    fractions = int(torch.count_nonzero(counts.isfinite() & (counts != counts.floor())))
    warnings = []
    if target.below:
        warnings.append(
            f"target has {target.below} of {target.size} negative values, from {target.least:g}, which are no counts. "
            "Their rows make the loss NaN: set them to 0 or mask them."
        )
    if fractions:
        warnings.append(
            f"target has {fractions} of {target.size} values that are no whole numbers. Likelihoods of counts take raw "
            "counts, neither normalized nor log-transformed."
        )
    return {"recon": 0, "target": target.below}, {"recon": 0, "target": fractions}, warnings


def _judge(recon: _Values, target: _Values, base: Elementwise) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """(values out of range, suspicious ones, warnings of both)."""
    of_logits, of_probabilities = base.expects == "logits", base.expects == "probabilities"
    out_of_range, suspicious = {"recon": 0, "target": 0}, {"recon": 0, "target": 0}
    warnings = []
    if of_probabilities and (outside := recon.below + recon.above):
        out_of_range["recon"] = outside
        warnings.append(
            f"recon has {outside} of {recon.size} values outside of [0, 1], from {recon.least:g} to {recon.largest:g}, "
            'but the likelihood takes probabilities. If they are logits, use likelihood="bernoulli".'
        )
    if of_logits and recon.below + recon.above == 0 and recon.least < recon.largest:
        suspicious["recon"] = recon.size - recon.nonfinite
        warnings.append(
            f"recon has values from {recon.least:g} to {recon.largest:g} only, which look like probabilities, but the "
            "likelihood takes logits. Remove the sigmoid at the end of the decoder"
            + (', or use likelihood="bernoulli_probs".' if base.name == "bernoulli" else ", or leave out from_logits.")
        )
    is_byte = target.below == 0 and MOST_OF_SCALED < target.largest <= 255
    if is_byte and (of_logits or of_probabilities or recon.largest <= MOST_OF_SCALED):
        suspicious["target"] = target.above
        warnings.append(
            f"target has values up to {target.largest:g}, which look like bytes from 0 to 255. Divide it by 255, or "
            "pass it as torch.uint8."
        )
    if (of_logits or of_probabilities) and (outside := target.below + target.above):
        out_of_range["target"] = outside
        warnings.append(
            f"target has {outside} of {target.size} values outside of [0, 1], from {target.least:g} to "
            f"{target.largest:g}, which no probability reaches. Scale it to [0, 1]."
        )
    return out_of_range, suspicious, warnings
