"""Sampling, reconstruction, the whole loss, every likelihood and option, training steps: each provider by itself.

The machine's speed may drift between two tests: ratios come from `python -m benchmarks`, where providers take turns.
`--benchmark-disable` computes every tiny case once and compares it with the truth.
"""

from typing import Any

import torch

from fastvae.cli.timing import on_threads

from .comparison import Call
from .conftest import DEVICE
from .environment import environment


def bench_case(benchmark: Any, case: Any, provider: str) -> None:
    # traced everywhere, but generating and building code for every case takes too long where nothing is timed
    compiler = "inductor" if benchmark.enabled or case.name.startswith("whole") else "aot_eager"
    torch.manual_seed(0)
    benchmark.group = case.name
    benchmark.extra_info |= environment(DEVICE)
    run = case.setup(DEVICE, compiler)(provider)
    with on_threads(1):
        run.check(run.call(0))
        benchmark(finished(run.call), 0)


def finished(call: Call) -> Call:
    """On a GPU the call returns before its work is done: wait for it."""
    return (lambda i: (call(i), torch.cuda.synchronize())) if DEVICE.type == "cuda" else call
