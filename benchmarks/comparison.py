"""One group of providers on one case: each first shown to be right, then all timed in turns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fastvae

from .measure import Call, Ratio, Timings, clock_of, interleave

OURS = "fastvae"


@dataclass(frozen=True)
class Contest:
    """What is compared: a call for each provider, and how the result of its first call is judged."""

    name: str
    calls: dict[str, Call]
    verify: Callable[[Any], None]  # raises truth.WrongResult
    moved_bytes: int | None = None


@dataclass
class Comparison:
    name: str
    moved_bytes: int | None = None
    failed: dict[str, Exception] = field(default_factory=dict)  # wrong, or did not run
    timings: Timings = field(default_factory=lambda: Timings({}))

    def fail(self, provider: str) -> None:
        raise self.failed[provider]

    def ratios(self) -> dict[str, Ratio]:
        """Each peer's time over fastvae's."""
        seconds = self.timings.seconds
        return {peer: self.timings.ratio(peer, OURS) for peer in seconds if peer != OURS and OURS in seconds}


def compare(contest: Contest, device: torch.device, seconds: float) -> Comparison:
    """Check every provider, then time those that are right."""
    result = Comparison(contest.name, contest.moved_bytes)
    right = {}
    # interpreted kernels prove and do not race: on a CPU the fallback is what users get
    with fastvae.use_backend("auto"):
        for name, call in contest.calls.items():
            try:
                contest.verify(call(0))
                right[name] = call
            except Exception as error:  # one provider's trouble is its own: the others are timed all the same
                result.failed[name] = error.with_traceback(None)  # whose frames hold tensors
        result.timings = interleave(right, clock_of(device), seconds=seconds)
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


def table(comparisons: list[Comparison]) -> list[str]:
    """Lines of a table: fastvae's time, and how many times as long each peer took, with quartiles."""
    peers = list(dict.fromkeys(peer for c in comparisons for peer in c.ratios()))
    rows = [["case", OURS, *peers]]
    for c in comparisons:
        ratios = c.ratios()
        if ratios:
            cells = (f"{r.median:.2f}x ({r.low:.2f}-{r.high:.2f})" if (r := ratios.get(p)) else "-" for p in peers)
            rows.append([c.name, _duration(c.timings.median(OURS)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for peer in peers:
        medians = [(r.median, c.name) for c in comparisons if (r := c.ratios().get(peer))]
        (best, at_best), (worst, at_worst) = max(medians), min(medians)
        lines.append(f"against {peer}: best {best:.2f}x ({at_best}), worst {worst:.2f}x ({at_worst})")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
