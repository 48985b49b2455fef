"""No speed without the right result: outputs and gradients against float64, piece by piece so that any size fits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cases import Result, Trial

_PIECE = 1 << 22  # elements held in float64 at a time

# bound on errors relative to the largest magnitude around; peers round at every step, so 16-bit ones are off by several
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class WrongResult(AssertionError):
    """A provider whose numbers are off has no speed."""


def check(trial: Trial, result: Result) -> None:
    """Compare what the first call of `Trial.caller` returned with the truth.

    Sampling is judged around the z that came: any standard normal noise is right.

    Raises:
        WrongResult: what is off, and by how much.
    """
    case, inputs = trial.case, trial.inputs[0]
    outputs, gradients = result
    batch = case.shape.image[0]
    has_images = case.op in ("recon", "whole")
    dloss = case.upstream if has_images else 1.0
    loss = torch.zeros((), dtype=torch.float64, device=trial.device)
    with torch.no_grad():
        if has_images:
            recon, target = inputs[:2]
            loss += _squared_error(recon, target) / batch
            if gradients is not None:
                _check_image_gradient(gradients[0], recon, target, 2 * dloss / batch)
        if case.op != "recon":
            mu, logvar = _halves(*inputs[-2:])
            z = outputs[1] if has_images else outputs[0]
            kl = _check_latents(mu, logvar, z, _halves(*(gradients or ())[-2:]), trial.dz, dloss / mu.shape[0])
            loss += kl.mean()
        if has_images:
            _near("loss", outputs[0], loss, loss, _tolerance(*inputs))
        else:
            _near("kl", outputs[1], kl, kl.max(), _tolerance(*inputs))


def _halves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Two tensors, or one taken apart."""
    return tensors[0].chunk(2, dim=1) if len(tensors) == 1 else tensors


def _tolerance(*tensors: Tensor) -> float:
    return max(_TOLERANCE.get(t.dtype, 0.0) for t in tensors)


def _near(name: str, actual: Tensor, truth: Tensor, scale: Tensor | float, tolerance: float) -> None:
    # in float64 throughout, and written so that a NaN fails
    error = (actual.double() - truth).abs()
    if not bool((error <= tolerance * (truth.abs() + scale)).all()):
        worst = float((error / (truth.abs() + scale)).max())
        raise WrongResult(f"{name} is off by {worst:.2g} of its size; {tolerance:.2g} is allowed")


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _PIECE * tensors[0].shape[0] // tensors[0].numel())
    for start in range(0, tensors[0].shape[0], rows):
        yield tuple(t[start : start + rows].double() / (255 if t.dtype == torch.uint8 else 1) for t in tensors)


def _squared_error(recon: Tensor, target: Tensor) -> Tensor:
    return torch.stack([(r - t).square().sum() for r, t in _pieces(recon, target)]).sum()


def _check_image_gradient(drecon: Tensor, recon: Tensor, target: Tensor, factor: float) -> None:
    for d, r, t in _pieces(drecon, recon, target):
        # subnormals of a 16-bit gradient are flushed by some and rounded by others
        tiny = torch.finfo(drecon.dtype).smallest_normal
        _near("gradient of recon", d, factor * (r - t), abs(factor) + tiny / _tolerance(drecon), _tolerance(recon))


def _check_latents(
    mu: Tensor, logvar: Tensor, z: Tensor, gradients: tuple[Tensor, ...], dz: Tensor, dkl: float
) -> Tensor:
    """Check the noise in z and the gradients; return the true KL of each sample."""
    kl = []
    moments = torch.zeros(2, dtype=torch.float64, device=mu.device)
    tolerance = _tolerance(mu, logvar)
    n = mu.numel()
    pieces = _pieces(mu, logvar, z, dz, *gradients)
    for mu, logvar, z, dz, *piece in pieces:
        spread = z - mu
        noise = spread * torch.exp(-0.5 * logvar)
        moments += torch.stack([noise.sum(), noise.square().sum()])
        kl.append(0.5 * (mu.square() + torch.expm1(logvar) - logvar).flatten(1).sum(1))
        if piece:
            scale = dz.abs() * (1 + mu.abs() + spread.abs()) + dkl
            _near("gradient of mu", piece[0], dz + dkl * mu, scale, tolerance)
            _near("gradient of logvar", piece[1], 0.5 * (dz * spread + dkl * torch.expm1(logvar)), scale, tolerance)
    mean, square = (moments / n).tolist()
    if not (abs(mean) < 6 / n**0.5 + tolerance and abs(square - 1) < 9 / n**0.5 + tolerance):
        raise WrongResult(f"the noise has mean {mean:.3g} and mean square {square:.3g}, not 0 and 1")
    return torch.cat(kl)
