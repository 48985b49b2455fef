"""The part `sweep`: other tiles than those of the kernels' table, to see what the table is worth on this GPU."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

import fastvae
from fastvae.ops._elbo_plan import plan as elbo_plan
from fastvae.ops.reparam_kl import plan as reparam_kl_plan

from .cases import AUTOCAST, FP32, PHASES, Case, Trial, square
from .comparison import OURS
from .gpu_bench import COPY, copier, short
from .measure import clock_of, interleave, rotation
from .peers import function_of
from .results import Results
from .truth import check

TILES = [(2048, 4), (4096, 4), (8192, 4), (16384, 4), (4096, 8), (8192, 8), (16384, 8)]  # bytes, warps
PROGRAMS = [1 << 12, 1 << 14, 1 << 17]


@contextmanager
def tiles(tile_bytes: int, num_warps: int, max_programs: int) -> Iterator[None]:
    """Let the kernels use other tiles and other numbers of programs inside the block."""
    from fastvae_kernels import _reduce, _tile, elbo_bwd, elbo_fwd, elbo_samples, philox, plan, reparam_kl

    with ExitStack() as stack:
        stack.enter_context(patch.object(_tile, "_TILE_BYTES", tile_bytes))
        for forget in (elbo_plan.cache_clear, reparam_kl_plan.cache_clear):
            forget()
            stack.callback(forget)
        for module in (_reduce, _tile, elbo_fwd, elbo_samples, elbo_bwd, philox, reparam_kl):
            stack.enter_context(patch.object(module, "NUM_WARPS", num_warps))
        stack.enter_context(patch.object(plan, "MAX_PROGRAMS_FWD", max_programs))
        yield


def settings(dry: bool) -> list[tuple[Case, tuple[int, int], int]]:
    if dry:
        return [(Case("recon", square(5000), FP32, PHASES[1]), (2048, 4), 4)]
    images = [Case("recon", square(10**8), precision, PHASES[1]) for precision in (FP32, AUTOCAST)]
    samples = [Case("sample", square(10**8), precision, PHASES[1]) for precision in (FP32, AUTOCAST)]
    found = [(case, tile, programs) for case in images for programs in PROGRAMS[1:2] for tile in TILES]
    found += [(case, tile, PROGRAMS[1]) for case in samples for tile in TILES]
    return found + [(case, tile, programs) for case in images for programs in PROGRAMS[::2] for tile in TILES]


def run(results: Results, device: torch.device, deadline: float, dry: bool) -> bool:
    """Measure what is not recorded; True if every result was right and the time sufficed."""
    trials: dict[str, Trial] = {}
    complete = True
    with fastvae.use_backend("triton" if dry else "auto"):
        for case, (tile_bytes, num_warps), max_programs in settings(dry):
            name = f"{case.name}, {tile_bytes} bytes, {num_warps} warps, {max_programs} programs"
            if results.has("sweep", name):
                continue
            if time.monotonic() > deadline:
                print("sweep: the time is up; run again to go on from here", flush=True)
                return False
            if case.name not in trials:
                trials.clear()  # one at a time: they are large
                trials[case.name] = Trial(case, device, rotation(case.moved_bytes, device))
            trial = trials[case.name]
            with tiles(tile_bytes, num_warps, max_programs):
                call = trial.caller(function_of(OURS, case.op))
                try:
                    check(trial, call(0))
                except Exception as error:  # a tile that does not work is a finding
                    results.record("sweep", name, {"failed": f"{type(error).__name__}: {error}"[:300]})
                    complete = False
                    continue
                calls = {OURS: call, COPY: copier(case.moved_bytes, 1, device)}
                timings = interleave(calls, clock_of(device), seconds=0.01 if dry else 0.2)
            seconds = timings.median(OURS)
            figures = {
                f"{OURS}_us": seconds * 1e6,
                "gb_per_s": case.moved_bytes / seconds / 1e9,
                f"{COPY}/{OURS}": timings.ratio(COPY, OURS).median,
            }
            results.record("sweep", name, figures)
            print(f"sweep: {name}: {short(figures)}", flush=True)
    return complete
