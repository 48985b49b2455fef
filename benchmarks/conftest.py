"""Benchmarks: parameters, the comparison behind each of them, and the table of ratios after the run.

All providers of a case are timed in turns when the first of them is asked for; each benchmark then hands its own
figures to pytest-benchmark. `--benchmark-disable` checks every provider once on a tiny shape and times nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastvae

from .cases import AUTOCAST, AUTOENCODER, BYTES, CONV, FP32, MLP, PHASES, TINY, Case, Trial
from .comparison import OURS, RECORDED, Comparison, Contest, compare, table
from .environment import environment
from .measure import one_thread, rotation
from .peers import COMPILED, NAMES, function_of, obstacle
from .truth import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS_PER_CASE = 4.0
_COMPARISONS: dict[str, Comparison] = {}


def cases(op: str, disabled: bool) -> list[Case]:
    if disabled:
        return [Case(op, TINY, FP32, phase) for phase in PHASES] + [Case(op, TINY, AUTOCAST, PHASES[1])]
    on_gpu = DEVICE.type == "cuda"
    shapes = [MLP, CONV, AUTOENCODER] if on_gpu else [MLP, CONV]
    narrow = [AUTOCAST, BYTES] if on_gpu and op != "sample" else [AUTOCAST]
    return [
        Case(op, shape, precision, phase)
        for shape in shapes
        for precision in ([FP32] if shape == MLP else [FP32, *narrow])
        for phase in PHASES
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    disabled = metafunc.config.getoption("benchmark_disable")
    if "case" in metafunc.fixturenames:
        found = [case for op in metafunc.module.OPS for case in cases(op, disabled)]
        metafunc.parametrize("case", found, ids=lambda case: case.name.replace(" ", "-"))
    if "provider" in metafunc.fixturenames:
        metafunc.parametrize("provider", NAMES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.name.startswith("bench_"):
            continue
        item.add_marker(pytest.mark.benchmark(timer=RECORDED.read))
        # what the compiler provokes itself: deprecated imports, a look at the gradients of inputs that are no leaves
        item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"))
        item.add_marker(pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"))
        parameters = parameters_of(item)
        provider = parameters["provider"]
        if reason := obstacle(provider, DEVICE):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif provider == COMPILED and config.getoption("benchmark_disable") and not _worth_compiling(parameters):
            item.add_marker(pytest.mark.skip(reason="without timing, one case of each op is compiled"))


def parameters_of(item: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = item.callspec.params
    return parameters


def _worth_compiling(parameters: dict[str, Any]) -> bool:
    case: Case | None = parameters.get("case")
    if case is None:
        return parameters.get("network") == "mlp"
    return (case.precision, case.phase) == (FP32, "forward+backward")


Contender = Callable[[str, Callable[[list[str]], Contest]], None]


@pytest.fixture
def contend(benchmark: Any, provider: str) -> Contender:
    """Call it with a name and a function that sets up the contest between the providers it is given."""

    def run(name: str, contest_of: Callable[[list[str]], Contest]) -> None:
        benchmark.group = name
        if not benchmark.enabled:
            contest = contest_of([provider])
            with one_thread(), fastvae.use_backend("auto"):
                benchmark.pedantic(lambda: contest.verify(contest.calls[provider](0)))
            return
        if name not in _COMPARISONS:
            usable = [name for name in NAMES if obstacle(name, DEVICE) is None]
            _COMPARISONS[name] = compare(contest_of(usable), DEVICE, SECONDS_PER_CASE)
        comparison = _COMPARISONS[name]
        if provider in comparison.failed:
            benchmark.pedantic(comparison.fail, args=(provider,))
        seconds = comparison.timings.seconds[provider]
        benchmark.pedantic(RECORDED.player(seconds), rounds=len(seconds))
        benchmark.extra_info |= facts(comparison, provider)

    return run


@pytest.fixture
def contend_op(contend: Contender, case: Case) -> None:
    def contest_of(providers: list[str]) -> Contest:
        trial = Trial(case, DEVICE, rotation(case.moved_bytes, DEVICE))
        calls = {name: trial.caller(function_of(name, case.op)) for name in providers}
        return Contest(case.name, calls, lambda result: check(trial, result), case.moved_bytes)

    contend(case.name, contest_of)


def facts(comparison: Comparison, provider: str) -> dict[str, object]:
    """What a figure needs beside itself; units in the keys."""
    median = comparison.timings.median(provider)
    found: dict[str, object] = {**environment(DEVICE), "median_us": median * 1e6}
    if comparison.moved_bytes is not None:
        found["needed_bytes"] = comparison.moved_bytes  # what a fused op moves, whatever this provider does
        if DEVICE.type == "cuda":
            found["needed_gb_per_s"] = comparison.moved_bytes / median / 1e9
    if provider == OURS:
        for peer, ratio in comparison.ratios().items():
            found[f"times_faster_than_{peer}"] = ratio._asdict()
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _COMPARISONS:
        return
    terminalreporter.section("time of each peer over fastvae's: median of paired rounds (quartiles)")
    for line in table(list(_COMPARISONS.values())):
        terminalreporter.write_line(line)
    stamp = environment(DEVICE)
    terminalreporter.write_line(", ".join(f"{key}: {value}" for key, value in stamp.items()))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
