"""Schedules of a loss weight or a capacity: a number on the device that is stepped in place.

    beta = fastvae.schedules.Linear(0.0, 1.0, steps=10_000).to(device)
    loss = fastvae.vae_loss(recon, target, mu, logvar, beta=beta.value).loss
    loss.backward()
    optimizer.step()
    beta.step()

`value` is one tensor for the whole run, so a CUDA graph or a compiled region sees the new number without a
recompilation, and neither reading nor stepping it waits for the device.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from . import _checks, _numbers

Shape = Literal["linear", "cosine", "sigmoid"]


class Schedule(nn.Module):
    """What all schedules share: from `start` to `end` in `steps`, after `delay` steps at `start`.

        value = start * (1 - share) + end * share,  share = shape(progress)

    Every value is computed from the step count in float64 (float32 on MPS) and rounded once, so nothing drifts. Both
    buffers are in `state_dict`; the arguments are not, and what is loaded follows those of this object.

    Args:
        start: Value at first; the one of step 0, which is before any `step()`.
        end: Value that is reached, exactly, after delay + steps steps, and kept from then on.
        steps: Length, without the delay.
        delay: Steps at `start` before it begins.

    Attributes:
        value: 0-d float32 tensor, also where the module is cast to another dtype. `to(device)` replaces it.
        step_count: 0-d int64 tensor: the calls of `step()`.

    Raises:
        ValueError: start or end is not finite in float32; steps is not an int of at least 1, delay not one of at
            least 0. TypeError: start or end is not a number.
    """

    shape: Shape = "linear"
    value: Tensor
    step_count: Tensor

    def __init__(self, start: float, end: float, steps: int, *, delay: int = 0) -> None:
        super().__init__()
        self.start, self.end = _finite("start", start), _finite("end", end)
        self.steps = _numbers.integer("steps", steps, least=1)
        self.delay = _numbers.integer("delay", delay, least=0)
        self.register_buffer("value", torch.tensor(self.start, dtype=torch.float32))
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Advance by one step, on the device. Call it after `backward()`, which reads the value of its forward pass."""
        self.step_count.add_(1)
        _refresh(self)

    def value_at(self, step: int) -> float:
        """The value after `step` steps in float64, computed on the host: for plots and logs."""
        return float(self._at(torch.tensor(step, dtype=torch.int64, device="cpu")))

    def _at(self, step: Tensor) -> Tensor:
        share = SHAPES[self.shape](self._progress((step - self.delay).clamp(0, self.steps)))
        # and not start + (end - start) * share, which need not end at `end`
        return self.start * (1 - share) + self.end * share

    def _progress(self, elapsed: Tensor) -> Tensor:
        """Where in the ramp, in [0, 1], `elapsed` of the `steps` lead."""
        return _fraction(elapsed, self.steps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.value.dtype != torch.float32:  # half() of a whole model would round a beta of 1e-6 by 5 %
            self.value = self.value.float()
            _refresh(self)
        return self

    def extra_repr(self) -> str:
        return f"{self.start}, {self.end}, steps={self.steps}, delay={self.delay}"


class Linear(Schedule):
    """A straight line: share = progress = min(step / steps, 1).

    Arguments, attributes and errors as `Schedule`.

    Source: Bowman et al., Generating Sentences from a Continuous Space, arXiv:1511.06349, section 3.1.
    """


class Cosine(Schedule):
    """Half a period of a cosine, flat at both ends: share = (1 - cos(pi * progress)) / 2, progress as in `Linear`.

    Arguments, attributes and errors as `Schedule`.

    Source: the cosine ramp of Fu et al., arXiv:1903.10145, the code.
    """

    shape = "cosine"


class Sigmoid(Schedule):
    """The logistic function on [-6, 6], stretched by half a percent so that it goes from 0 to 1 exactly.

        share = (sigmoid(12 * progress - 6) - sigmoid(-6)) / (sigmoid(6) - sigmoid(-6)),  progress as in `Linear`

    The source does not stretch, so its values are up to 0.0025 * (end - start) away and begin and end with a jump.
    Arguments, attributes and errors as `Schedule`.

    Source: Bowman et al., arXiv:1511.06349, section 3.1; 12 and 6 as Fu et al., arXiv:1903.10145, the code.
    """

    shape = "sigmoid"


class Cyclical(Schedule):
    """`cycles` equal ramps one after the other; each stays at `end` for the rest of its cycle, the last one forever.

        position = where in its cycle the step is, in [0, 1)
        share = shape(min(max(position - zero_ratio, 0) / ratio, 1))

    With zero_ratio=0.3 it is the schedule of Optimus (Li et al., arXiv:2004.04092).

    Args:
        start, end, delay: As in `Schedule`.
        steps: Length of all cycles together; need not be a multiple of `cycles`.
        cycles: Number of cycles.
        ratio: Share of a cycle that its ramp takes.
        shape: Of the ramp: "linear", "cosine" or "sigmoid", as in the schedules of these names.
        zero_ratio: Share of a cycle at `start` before its ramp.

    Attributes:
        value, step_count: As in `Schedule`.

    Raises:
        ValueError: as `Schedule`; cycles is not an int of at least 1; ratio is not in (0, 1], or together with
            zero_ratio more than 1; unknown shape.

    Source: Fu et al., Cyclical Annealing Schedule, arXiv:1903.10145, eq. 6-7: M = cycles, R = ratio.
    """

    def __init__(
        self,
        start: float,
        end: float,
        steps: int,
        cycles: int = 4,
        ratio: float = 0.5,
        shape: Shape = "linear",
        *,
        zero_ratio: float = 0.0,
        delay: int = 0,
    ) -> None:
        super().__init__(start, end, steps, delay=delay)
        _checks.choice("shape", shape, SHAPES)
        self.ratio = _numbers.positive("ratio", ratio)
        self.zero_ratio = _numbers.not_negative("zero_ratio", zero_ratio)
        if self.ratio + self.zero_ratio > 1:
            _checks.fail(
                f"ratio and zero_ratio must add up to at most 1, a whole cycle; got {ratio} and {zero_ratio}. "
                "What they leave of a cycle is spent at `end`."
            )
        self.cycles = _numbers.integer("cycles", cycles, least=1)
        self.shape = shape

    def _progress(self, elapsed: Tensor) -> Tensor:
        # in integers, because a rounding error where a cycle begins would take `end` for `start`
        position = _fraction(elapsed * self.cycles % self.steps, self.steps)
        ramp = ((position - self.zero_ratio) / self.ratio).clamp(0, 1)
        return torch.where(elapsed < self.steps, ramp, 1.0)

    def extra_repr(self) -> str:
        own = f"cycles={self.cycles}, ratio={self.ratio}, shape={self.shape!r}, zero_ratio={self.zero_ratio}"
        return f"{super().extra_repr()}, {own}"


def _linear(progress: Tensor) -> Tensor:
    return progress


def _cosine(progress: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * progress).square()  # (1 - cos(pi * progress)) / 2 without its cancellation


def _sigmoid(progress: Tensor) -> Tensor:
    # one tanh for both, so that their quotient is exactly 1 and -1 at the ends on every device
    height = torch.tanh(torch.full_like(progress, 3.0))
    return 0.5 + 0.5 * torch.tanh(6 * progress - 3) / height


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}


def _fraction(part: Tensor, whole: int) -> Tensor:
    return part.to(torch.float32 if part.device.type == "mps" else torch.float64) / whole  # MPS has no float64


def _finite(name: str, value: object) -> float:
    number = _numbers.number(name, value)
    if not abs(number) <= torch.finfo(torch.float32).max:
        _checks.fail(f"{name} must be finite in float32; got {value!r}.")
    return number


def _refresh(schedule: nn.Module, _: Any = None) -> None:
    """Bring the value up to the step count; also the hook of `load_state_dict`."""
    assert isinstance(schedule, Schedule)
    schedule.value.copy_(schedule._at(schedule.step_count))
