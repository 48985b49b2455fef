"""Benchmarks: options, parameters, the comparison behind each of them, and the tables after the run.

All providers of a case are timed in turns when the first of them is asked for; each benchmark then hands its own
figures to pytest-benchmark. `--benchmark-disable` checks every provider once on a tiny shape and times nothing.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastvae

from .cases import FP32, TINY, Case, Trial
from .comparison import OURS, RECORDED, Comparison, Contest, compare
from .environment import environment
from .gpu_bench import copier
from .measure import on_threads, rotation
from .peers import OURS_IN_PLACE, function_of, obstacle
from .plots import COPY, save_plots
from .report import aligned, extremes, failures, memory_rows, ratio_rows, record
from .suite import BACKWARD, SCALES, cases, competitors
from .truth import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED_WITHOUT_TIMING = Case("whole", TINY, FP32, BACKWARD).name
_PARTICIPANTS: dict[str, list[str]] = {}  # by case
_COMPARISONS: dict[str, Comparison] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastvae's benchmarks")
    group.addoption("--scale", choices=SCALES, default="default", help="large adds 256x3x256x256 images on a CPU")
    group.addoption("--seconds", type=float, default=4.0, help="for timing a case (default: %(default)s)")
    group.addoption("--threads", type=int, default=1, help="of PyTorch on the CPU; above 1 the clock is wall time")
    group.addoption("--record", type=Path, metavar="STEM", help="write all figures to STEM.json and STEM.md")
    group.addoption("--plots", type=Path, metavar="DIR", help="write plots by size into DIR (needs matplotlib)")


def scale_of(config: pytest.Config) -> str:
    return "tiny" if config.getoption("benchmark_disable") else str(config.getoption("scale"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = [case for op in metafunc.module.OPS for case in cases(op, scale_of(metafunc.config), DEVICE)]
        pairs = [(case, provider) for case in found for provider in competitors(case)]
        ids = [f"{case.name}-{provider}".replace(" ", "-") for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.name.startswith("bench_"):
            continue
        # what the compiler provokes itself: deprecated imports, a look at the gradients of inputs that are no leaves
        item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"))
        item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"))
        parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        if reason := obstacle(parameters["provider"], DEVICE):
            item.add_marker(pytest.mark.skip(reason=reason))
        if _contends(item):
            item.add_marker(pytest.mark.benchmark(timer=RECORDED.read))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Who takes part: those whose benchmarks were selected, by -k say, and can run."""
    for item in filter(_contends, session.items):
        parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
        case = parameters.get("case") or parameters["step_case"]
        if obstacle(parameters["provider"], DEVICE) is None:
            _PARTICIPANTS.setdefault(case.name, []).append(parameters["provider"])


def _contends(item: pytest.Item) -> bool:
    return "contend" in getattr(item, "fixturenames", ())


ContestOf = Callable[[list[str], str], Contest]  # providers, backend of torch.compile
Contender = Callable[[str, ContestOf], None]


@pytest.fixture
def contend(benchmark: Any, provider: str, pytestconfig: pytest.Config) -> Contender:
    """Call it with the name of a case and a function that sets up the contest between the providers it is given."""

    def run(name: str, contest_of: ContestOf) -> None:
        benchmark.group = name
        if not benchmark.enabled:
            # traced everywhere, but generating and building code for every case takes CI too long
            contest = contest_of([provider], "inductor" if name == COMPILED_WITHOUT_TIMING else "aot_eager")
            with on_threads(1), fastvae.use_backend("auto"):
                benchmark.pedantic(lambda: contest.verify(provider, contest.calls[provider](0)))
            return
        if name not in _COMPARISONS:
            seconds, threads = pytestconfig.getoption("seconds"), pytestconfig.getoption("threads")
            _COMPARISONS[name] = compare(contest_of(_PARTICIPANTS[name], "inductor"), DEVICE, seconds, threads)
        comparison = _COMPARISONS[name]
        if provider in comparison.failed:
            benchmark.pedantic(comparison.fail, args=(provider,))
        seconds = comparison.timings.seconds[provider]
        benchmark.pedantic(RECORDED.player(seconds), rounds=len(seconds))
        benchmark.extra_info |= stamp(pytestconfig) | facts(comparison, provider)

    return run


@pytest.fixture
def contend_op(contend: Contender, case: Case) -> None:
    def contest_of(providers: list[str], backend: str) -> Contest:
        sets = rotation(case.moved_bytes, DEVICE)
        trial = Trial(case, DEVICE, sets)
        calls = {
            name: trial.caller(function_of(name, case.op, backend), overwrites=name == OURS_IN_PLACE)
            for name in providers
        }
        # the roof of all that only moves bytes; on a CPU caches and fresh pages make none
        copy = {COPY: copier(case.moved_bytes, sets, DEVICE)} if DEVICE.type == "cuda" else {}
        return Contest(case.name, calls, lambda _, result: check(trial, result), case, copy)

    contend(case.name, contest_of)


def stamp(config: pytest.Config) -> dict[str, Any]:
    """Where and how the figures were taken."""
    threads = config.getoption("threads")
    wall = {"clock": "wall time"} if DEVICE.type == "cpu" and threads > 1 else {}
    command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
    return {**environment(DEVICE), **wall, "threads": threads, "command": command}


def facts(comparison: Comparison, provider: str) -> dict[str, object]:
    """What a figure needs beside itself; units in the keys."""
    median = comparison.timings.median(provider)
    found: dict[str, object] = {"median_us": median * 1e6, "peak_mib": comparison.peak_mib[provider]}
    if comparison.moved_bytes is not None:
        found["needed_bytes"] = comparison.moved_bytes  # what a fused op moves, whatever this provider does
        if DEVICE.type == "cuda":
            found["needed_gb_per_s"] = comparison.moved_bytes / median / 1e9
    if provider in (OURS, OURS_IN_PLACE):
        for peer, ratio in comparison.ratios(provider).items():
            found[f"times_faster_than_{peer}"] = ratio._asdict()
    return found


@pytest.hookimpl(trylast=True)  # after the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _COMPARISONS:
        return
    found = list(_COMPARISONS.values())
    terminalreporter.section("time of each peer over ours: median of paired rounds (quartiles)")
    for line in [*aligned(ratio_rows(found)), "", *extremes(found), *failures(found)]:
        terminalreporter.write_line(line)
    terminalreporter.section("peak memory of one call, MiB")
    for line in aligned(memory_rows(found)):
        terminalreporter.write_line(line)
    environment_of_run = stamp(config)
    terminalreporter.write_line("\n" + ", ".join(f"{key}: {value}" for key, value in environment_of_run.items()))
    written = (
        [] if config.getoption("record") is None else record(config.getoption("record"), environment_of_run, found)
    )
    if config.getoption("plots") is not None:
        written += save_plots(config.getoption("plots"), found)
    for path in written:
        terminalreporter.write_line(f"written: {path}")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
