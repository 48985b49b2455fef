"""python -m tests.fuzz --cases 10000: check that many random calls; exit status 1 if a result is wrong."""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core instead

BATCH = 25


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next one has the next seed")
    parser.add_argument("--backend", choices=["torch", "triton"], default="torch", help="triton: interpreted kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    arguments = parser.parse_args()
    if arguments.backend == "triton":
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from .check import failures  # now: the kernels decide on import whether they are interpreted

    start, wrong, skipped = time.monotonic(), 0, 0
    seeds = range(arguments.seed, arguments.seed + arguments.cases)
    batches = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]
    # spawned: a fork of a process that holds threads may hang
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for number, (reports, skips) in enumerate(pool.map(failures, batches, repeat(arguments.backend)), 1):
            wrong, skipped = wrong + len(reports), skipped + skips
            for report in reports:
                print(f"\n{report}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{number * BATCH} of {arguments.cases}", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    print(f"\n{arguments.cases} cases, {skipped} of them skipped, {wrong} wrong: {arguments.backend}, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
