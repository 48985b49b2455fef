"""All providers of one case: each first checked, then all timed in turns in one process."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastvae.cli.timing import Call as Call
from fastvae.cli.timing import Timings, clock_of, interleave

from .memory import peak_mib
from .providers import OURS, skip_reason

COPY = "copy"  # of as many bytes as the case must move: what a GPU needs at least; on a CPU caches make no such bound


class Run(NamedTuple):
    """One provider on one case."""

    call: Call  # number i
    check: Callable[[Any], None]  # of what a call returned; raises truth.WrongResult


def compare(case: Any, device: torch.device, seconds: float, threads: int = 1) -> dict[str, Any]:
    """Check every provider that can run here, then time those that are right, then see what memory they need.

    Args:
        case: `cases.OpCase` or `train_step.StepCase`.
        seconds: For the timing of all together.

    Returns what JSON holds of it: medians with quartiles, units in the keys.
    """
    run_of, calls, failed = case.setup(device), {}, {}
    for name in case.providers:
        if skip_reason(name, device):
            continue
        try:
            run = run_of(name)
            run.check(run.call(0))
            calls[name] = run.call
        except Exception as error:  # one provider's trouble is its own: the others are timed all the same
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    baselines = {}
    if device.type == "cuda" and case.moved_bytes is not None:
        source = torch.zeros(max(case.moved_bytes // 2, 1), dtype=torch.uint8, device=device)
        baselines[COPY] = lambda i: source.clone()
    timings = interleave(calls | baselines, clock_of(device, threads), seconds=seconds, threads=threads)
    rounds = max(map(len, timings.seconds.values()), default=0)
    us = Timings({"": [1e-6] * rounds} | timings.seconds)
    others = [name for name in timings.seconds if name not in OURS]
    return {
        "moved_mb": case.moved_bytes and case.moved_bytes / 1e6,  # at least, whatever a provider does
        "rounds": rounds,
        "us": {name: us.ratio(name, "")._asdict() for name in timings.seconds},
        "ratio": {name: {o: timings.ratio(o, name)._asdict() for o in others} for name in calls if name in OURS},
        "peak_mib": {name: peak_mib(call, device) for name, call in calls.items()},
        "failed": failed,
    }
