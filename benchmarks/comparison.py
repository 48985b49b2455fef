"""One group of providers on one case: each first shown to be right, then all timed in turns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastvae

from .cases import Case
from .footprint import peak_mib
from .measure import Call, Ratio, Timings, clock_of, interleave
from .peers import OURS as OURS
from .peers import OURS_IN_PLACE


@dataclass(frozen=True)
class Contest:
    """What is compared: a call for each provider, and how the result of its first call is judged."""

    name: str
    calls: dict[str, Call]
    verify: Callable[[str, Any], None]  # provider, its result; raises truth.WrongResult
    case: Case | None = None
    yardsticks: dict[str, Call] = field(default_factory=dict)  # timed with the others, not judged


@dataclass
class Comparison:
    name: str
    moved_bytes: int | None = None
    failed: dict[str, Exception] = field(default_factory=dict)  # wrong, or did not run
    timings: Timings = field(default_factory=lambda: Timings({}))
    peak_mib: dict[str, float] = field(default_factory=dict)
    case: Case | None = None

    def fail(self, provider: str) -> None:
        raise self.failed[provider]

    def ratios(self, ours: str = OURS) -> dict[str, Ratio]:
        """Each peer's time over that of `ours`."""
        seconds = self.timings.seconds
        peers = [name for name in seconds if name not in (OURS, OURS_IN_PLACE)]
        return {peer: self.timings.ratio(peer, ours) for peer in peers if ours in seconds}


def compare(contest: Contest, device: torch.device, seconds: float, threads: int = 1) -> Comparison:
    """Check every provider, then time those that are right, then see what memory they need."""
    case = contest.case
    result = Comparison(contest.name, case.moved_bytes if case else None, case=case)
    right = {}
    # interpreted kernels prove and do not race: on a CPU the fallback is what users get
    with fastvae.use_backend("auto"):
        for name, call in contest.calls.items():
            try:
                contest.verify(name, call(0))
                right[name] = call
            except Exception as error:  # one provider's trouble is its own: the others are timed all the same
                result.failed[name] = error.with_traceback(None)  # whose frames hold tensors
        timed = right | contest.yardsticks
        result.timings = interleave(timed, clock_of(device, threads), seconds=seconds, threads=threads)
        result.peak_mib = {name: peak_mib(call, device) for name, call in right.items()}
    return result


class RecordedClock:
    """pytest-benchmark's timer for figures that were taken in turns: it shows the time that `play` adds up."""

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        return self._now

    def player(self, durations: list[float]) -> Callable[[], None]:
        """A function that takes the next duration each time it is called."""
        rest = iter(durations)

        def play() -> None:
            self._now += next(rest, 0.0)

        return play


RECORDED = RecordedClock()
