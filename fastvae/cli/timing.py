"""Paired timing: candidates take turns, so that whatever else the machine does falls on all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Call = Callable[[int], Any]  # call number i
Clock = Callable[[Call, int], float]  # seconds per call of so many calls


class Ratio(NamedTuple):
    """A peer's time over ours, round by round: above 1, we are faster."""

    median: float
    low: float  # quartiles
    high: float


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each candidate, one entry a round; round i of one stands beside round i of another."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, peer: str, ours: str) -> Ratio:
        ratios = sorted(p / o for p, o in zip(self.seconds[peer], self.seconds[ours], strict=True))
        quarter = len(ratios) // 4
        return Ratio(statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])


def thread_clock(call: Call, calls: int) -> float:
    """CPU time of this thread: other processes' share of the core does not count, page faults do."""
    start = time.thread_time()
    for i in range(calls):
        call(i)
    return (time.thread_time() - start) / calls


def cuda_clock(call: Call, calls: int) -> float:
    """Time on the device between two events around the calls; gaps in which the device waits for the host count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for i in range(calls):
        call(i)
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e-3 / calls


def wall_clock(call: Call, calls: int) -> float:
    """Time that passes until all is done, on the host and on what it waits for: the only fair one for many threads."""
    _finish()
    start = time.perf_counter()
    for i in range(calls):
        call(i)
    _finish()
    return (time.perf_counter() - start) / calls


def _finish() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def clock_of(device: torch.device, threads: int = 1) -> Clock:
    if device.type == "cuda":
        return cuda_clock
    return thread_clock if device.type == "cpu" and threads == 1 else wall_clock


def interleave(
    candidates: dict[str, Call],
    clock: Clock,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 60,
    threads: int = 1,
) -> Timings:
    """Time the candidates in turns, in reversed order every other round, for about so many seconds in all.

    Short candidates are called often enough in a round for the clock, each as often as it needs.
    """
    with on_threads(threads), _no_garbage_collection():
        calls = {name: _calls_per_round(call, clock) for name, call in candidates.items()}
        timings: dict[str, list[float]] = {name: [] for name in candidates}
        names = list(candidates)
        stop = time.perf_counter() + seconds
        rounds = 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < stop):
            for name in names:
                timings[name].append(clock(candidates[name], calls[name]))
            names.reverse()
            rounds += 1
    return Timings(timings)


def _calls_per_round(call: Call, clock: Clock, round_seconds: float = 2e-3) -> int:
    clock(call, 1)  # the first call compiles or loads
    per_call = clock(call, 1)
    return max(1, min(1000, round(round_seconds / max(per_call, 1e-7))))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute on so many threads: thread time is the whole story only where one thread works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
