"""Compare fastvae with textbook PyTorch, torch.compile and other packages: all providers of a case take turns in one
process, and a ratio is the median over rounds of a baseline's time over fastvae's. Above 1, fastvae is faster.

Every provider's outputs and gradients are compared with a float64 formula before it is timed.
"""

import argparse
import math
import sys
import time
import warnings
from typing import Any

import torch

from .cases import SCALES, suite
from .comparison import compare
from .environment import ROOT, environment
from .results import Results, failures, ratios

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 a provider was wrong or did not run, 2 no such case."""
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    found.add_argument("--cases", metavar="WORDS", action="append", help='with all these words in the name: "loss 32x"')
    found.add_argument("--scale", choices=SCALES, default="default", help="how many cases (default: %(default)s)")
    found.add_argument("--list", action="store_true", help="print the names of the cases and measure nothing")
    found.add_argument("--seconds", type=float, default=2.0, help="for timing a case (default: %(default)s)")
    found.add_argument("--threads", type=int, default=1, help="on a CPU; above 1 the clock is wall time")
    found.add_argument("--record", metavar="NAME", help="write NAME.json and NAME.md in benchmarks/results, or go on")
    options = found.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = [words.split() for words in options.cases or [""]]
    cases = [c for c in suite(options.scale, device) if any(all(w in c.name for w in words) for words in wanted)]
    if not cases:
        print(f"--cases: no case of the scale {options.scale!r} has these words; --list shows them", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    path = None if options.record is None else RESULTS / f"{options.record}.json"
    results = Results(path, environment(device, options.threads))
    measure(results, cases, device, seconds=options.seconds, threads=options.threads)
    print(f"\n{results.write_markdown()}\nwritten: {path or 'nothing, for want of --record NAME'}")
    return 1 if failures(results.cases) else 0


def measure(results: Results, cases: list[Any], device: torch.device, deadline: float = math.inf, **how: Any) -> bool:
    """Compare and record the cases that are not recorded; False if the deadline came before the last."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # its compiler provokes both itself
    warnings.filterwarnings("ignore", message="The .grad attribute")
    for i, case in enumerate(cases, start=1):
        if results.has(case.name):
            continue
        if time.monotonic() > deadline:
            print(f"the time is up before {case.name}; run again to go on from here", flush=True)
            return False
        torch.manual_seed(0)
        results.record(case.name, compare(case, device, **how))
        found = {case.name: results.cases[case.name]}
        head, *rows = ratios(found)
        lines = [", ".join(map(" ".join, zip(head[1:], row[1:], strict=True))) for row in rows]
        print(f"[{i}/{len(cases)}] {case.name}", *lines, *failures(found), sep="\n  ", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
