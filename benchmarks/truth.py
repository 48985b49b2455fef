"""No speed without the right result: outputs and gradients against the textbook formula in float64."""

import torch
from torch import Tensor

from .losses import LOSSES
from .providers import EAGER, LOSS, Function, function_of

# outputs, and gradients of the inputs that require one; None without a backward pass
Result = tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]
# of errors relative to an element and the mean magnitude; peers round at every step, so 16-bit ones are off by several
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_JUMPED = 0.02  # share of the gradients of `Loss.jumps` that 16 bits may put on the other side of the threshold


class WrongResult(AssertionError):
    """A provider whose numbers are off has no speed."""


def check(op: str, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...], result: Result) -> None:
    """Compare what a provider computed of an op with the truth; `upstream` are the gradients of the outputs.

    Sampling is judged around the z that came: any standard normal noise is right. Raises WrongResult.
    """
    outputs, gradients = result
    tolerance = max(_TOLERANCE.get(x.dtype, 0.0) for x in inputs)
    jumps = op.startswith(LOSS) and LOSSES[op.removeprefix(LOSS)].jumps and tolerance > 1e-3
    doubles = [_double(x) for x in inputs]
    with torch.enable_grad():
        truths = _truth(op, outputs, tolerance)(*doubles)
    for i, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        _near(f"output {i}", output, truth.detach(), tolerance)
    if gradients is not None:
        differentiable = [x for x in doubles if x.requires_grad]
        right = torch.autograd.grad(truths, differentiable, [u.double() for u in upstream])
        for gradient, truth in zip(gradients, right, strict=True):
            _near(f"gradient {tuple(gradient.shape)}", gradient, truth, tolerance, _JUMPED if jumps else 0.0)


def _double(x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return x
    double = x.detach().double()
    return double / 255 if x.dtype == torch.uint8 else double.requires_grad_(x.requires_grad)


def _truth(op: str, outputs: tuple[Tensor, ...], tolerance: float) -> Function:
    """The textbook formula, with the noise that gave the z among the outputs."""
    textbook, at = function_of(EAGER, op), {"sample": 0, "moments": 0, "whole": 1}.get(op)
    if at is None:
        return textbook
    z = outputs[at].detach().double()

    def with_noise(*inputs: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = inputs[0].chunk(2, dim=1) if op == "moments" else inputs[-2:]
        scaled = (z - mu).detach()
        _check_noise(scaled * torch.exp(-0.5 * logvar.detach()), tolerance)
        found = list(textbook(*inputs))  # whose own z is another
        found[at] = mu + scaled * torch.exp(0.5 * (logvar - logvar.detach()))
        return tuple(found)

    return with_noise


def _check_noise(noise: Tensor, tolerance: float) -> None:
    mean, square, n = float(noise.mean()), float(noise.square().mean()), noise.numel()
    if not (abs(mean) < 6 / n**0.5 + tolerance and abs(square - 1) < 9 / n**0.5 + tolerance):
        raise WrongResult(f"the noise has mean {mean:.3g} and mean square {square:.3g}, not 0 and 1")


def _near(name: str, actual: Tensor, truth: Tensor, tolerance: float, exempt: float = 0.0) -> None:
    if actual.shape != truth.shape:
        raise WrongResult(f"{name} has the shape {tuple(actual.shape)}; {tuple(truth.shape)} is right")
    # subnormals of a 16-bit gradient are flushed by some and rounded by others
    tiny = torch.finfo(actual.dtype).smallest_normal
    scale = truth.abs() + truth.abs().mean()
    error = (actual.detach().double() - truth).abs()
    wrong = ~(error <= tolerance * scale + tiny)  # so that a NaN is wrong
    if int(wrong.sum()) > exempt * truth.numel():
        worst = float((error / scale).nan_to_num(nan=float("inf")).max())
        raise WrongResult(f"{name} is off by {worst:.2g} of its size; {tolerance:.2g} is allowed")
