"""One command for a machine with a GPU and no network: tests on it, timings, a sweep over tile sizes.

`python -m benchmarks.gpu` from the root of a checkout, installed or not. Figures go to
`benchmarks/results/<gpu>-<date>.json` after every measurement, and to a Markdown table beside it; what the file of the
same day and commit holds is not measured again.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from . import gpu_bench, gpu_sweep, gpu_tests
from .environment import ROOT, environment
from .results import Results

PARTS = {"tests": gpu_tests.run, "bench": gpu_bench.run, "sweep": gpu_sweep.run}
# share of the time that is left when the part begins
SHARES = {"tests": 0.4, "bench": 0.75, "sweep": 1.0}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 something failed or the time was up, 2 no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--fresh", action="store_true", help="measure again what is recorded already")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for the whole run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where figures are kept")
    parser.add_argument("--dry", action="store_true", help="the same code with tiny sizes on the CPU, for its own test")
    options = parser.parse_args(arguments)

    if not options.dry and not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; `--dry` runs the same code on the CPU", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "1" if options.dry else "0"  # before Triton is imported
    device = torch.device("cpu" if options.dry else "cuda")
    torch.manual_seed(0)

    results = Results(options.results, environment(device), fresh=options.fresh)
    parts = list(PARTS) if options.part == "all" else [options.part]
    end = time.monotonic() + options.budget
    complete = True
    for part in parts:
        begin = time.monotonic()
        share = SHARES[part] if len(parts) > 1 else 1.0
        complete &= PARTS[part](results, device, begin + share * (end - begin), options.dry)
    print(f"results: {results.path} and {results.write_markdown()}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
