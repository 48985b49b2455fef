"""The part `bench`: every op against a copy of as many bytes, eager PyTorch and torch.compile, in one process."""

import math
import time

import torch

import fastvae

from .cases import (
    AUTOCAST,
    AUTOENCODER,
    BF16,
    BYTES,
    CONV,
    FP16,
    FP32,
    MLP,
    PHASES,
    Case,
    Precision,
    Shape,
    Trial,
    square,
)
from .comparison import OURS, Comparison
from .measure import Call, clock_of, interleave, rotation
from .peers import COMPILED, function_of
from .results import Figures, Results
from .truth import check

COPY = "copy"
GRAPH_BYTES = 1 << 26  # below, the host may be what takes the time: the device alone is measured too, by graph replay
COMPILED_SIZES = (10**5, 10**7)  # torch.compile takes seconds for every shape
FORWARD, BACKWARD = PHASES


def cases(dry: bool) -> list[Case]:
    """What matters most first, in case the time runs out."""
    if dry:
        return [
            Case("recon", square(1000), FP32, BACKWARD),
            Case("sample", square(1000), BF16, FORWARD),
            Case("whole", square(200), AUTOCAST, BACKWARD, upstream=65536.0),
        ]
    found = []
    for n in (10**7, 10**8, 10**9, 10**6, 10**5, 10**4, 10**3):
        shape = square(n)
        precisions: list[Precision] = [FP32, AUTOCAST, BF16, BYTES, FP16] if n >= 10**6 else [FP32, AUTOCAST]
        for precision in precisions:
            found += [Case("recon", shape, precision, phase) for phase in PHASES]
            if n >= 10**6 and precision != BYTES:
                found.append(Case("recon", shape, precision, BACKWARD, upstream=65536.0))
            if n <= 10**8 and precision not in (AUTOCAST, BYTES):
                found += [Case("sample", shape, precision, phase) for phase in PHASES]
    large = Shape("4096x3x64x64", (4096, 3, 64, 64), (4096, 128))
    wholes = [Case("whole", s, p, BACKWARD) for s in (MLP, CONV, large, AUTOENCODER) for p in (FP32, AUTOCAST)]
    return found[:16] + wholes + found[16:]


def fits(case: Case, device: torch.device) -> bool:
    """Whether the hungriest provider (eager under autocast: 50 bytes an element) finds the memory."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return 56 * math.prod(case.shape.image) < 0.9 * free


def copier(n_bytes: int, sets: int, device: torch.device) -> Call:
    """torch.clone that moves so many bytes in all, half of them read and half written."""
    sources = [torch.zeros(max(n_bytes // 2, 1), dtype=torch.uint8, device=device) for _ in range(sets)]
    return lambda i: sources[i % sets].clone()


def graphed(call: Call, calls: int) -> Call:
    """So many calls in one CUDA graph: what the device needs when the host is out of the way."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return lambda _: graph.replay()


def measure(case: Case, device: torch.device, seconds: float, compiled: bool) -> Figures:
    sets = rotation(case.moved_bytes, device)
    trial = Trial(case, device, sets)
    calls = {OURS: trial.caller(function_of(OURS, case.op)), "eager": trial.caller(function_of("eager", case.op))}
    if compiled:
        calls[COMPILED] = trial.caller(function_of(COMPILED, case.op))
    figures: Figures = {"moved_mb": case.moved_bytes / 1e6}
    right = {}
    for name, call in calls.items():
        try:
            check(trial, call(0))
            right[name] = call
        except Exception as error:  # one provider's trouble is its own
            figures["failed"] = f"{figures.get('failed', '')} {name}: {type(error).__name__}: {error}"[:500].strip()
    right[COPY] = copier(case.moved_bytes, sets, device)
    clock = clock_of(device)
    compared = Comparison(case.name, case.moved_bytes, timings=interleave(right, clock, seconds=seconds))
    figures |= {f"{name}_us": compared.timings.median(name) * 1e6 for name in right}
    if OURS in right:
        figures["gb_per_s"] = case.moved_bytes / compared.timings.median(OURS) / 1e9
        figures |= {f"{peer}/{OURS}": ratio.median for peer, ratio in compared.ratios().items()}
    if device.type == "cuda" and case.moved_bytes < GRAPH_BYTES:
        figures |= _graph_figures(right, max(sets, 10), seconds)
    return figures


def _graph_figures(candidates: dict[str, Call], calls: int, seconds: float) -> Figures:
    figures: Figures = {}
    graphs = {}
    for name, call in candidates.items():
        try:
            graphs[name] = graphed(call, calls)
        except Exception as error:
            figures["failed"] = f"{figures.get('failed', '')} {name}, captured: {error}"[:500].strip()
    timings = interleave(graphs, clock_of(torch.device("cuda")), seconds=seconds)
    figures |= {f"{name}_graph_us": timings.median(name) * 1e6 / calls for name in graphs}
    if OURS in graphs:
        figures |= {f"{p}/{OURS} graph": timings.ratio(p, OURS).median for p in graphs if p != OURS}
    return figures


def wants_compiled(case: Case) -> bool:
    at = case.op == "whole" or case.shape.name in {square(n).name for n in COMPILED_SIZES}
    return at and case.upstream == 1


def run(results: Results, device: torch.device, deadline: float, dry: bool) -> bool:
    """Measure what is not recorded; True if every result was right and the time sufficed."""
    complete = True
    # without a GPU the interpreted kernels stand in, so that this code is exercised
    with fastvae.use_backend("triton" if dry else "auto"):
        for case in cases(dry):
            if results.has("bench", case.name) or not fits(case, device):
                continue
            if time.monotonic() > deadline:
                print("bench: the time is up; run again to go on from here", flush=True)
                return False
            try:
                figures = measure(case, device, 0.01 if dry else 0.35, wants_compiled(case) and not dry)
            except torch.OutOfMemoryError as error:
                figures = {"failed": str(error)[:200]}
            complete &= "failed" not in figures
            results.record("bench", case.name, figures)
            print(f"bench: {case.name}: {short(figures)}", flush=True)
    return complete


def short(figures: Figures) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
