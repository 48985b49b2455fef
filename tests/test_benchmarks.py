"""The benchmarks themselves, what fastvae's peers would move on a GPU, and a guard on the speed of the fallback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from benchmarks import inductor, plots, readme, report, suite
from benchmarks.bench_train_step import StepCase, batch_that_fits, check_step
from benchmarks.cases import AUTOCAST, BF16, BYTES, FP32, MEDIUM, OPS, PHASES, TINY, Case, Trial
from benchmarks.comparison import Comparison, Contest, compare
from benchmarks.footprint import peak_mib
from benchmarks.measure import Timings, clock_of, interleave
from benchmarks.peers import COMPILED, OURS, OURS_IN_PLACE, function_of
from benchmarks.truth import WrongResult, check

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FORWARD, BACKWARD = PHASES


@pytest.fixture
def _as_users_have_it(monkeypatch):
    """The tests' own poison in new tensors costs time, and only where memory is allocated."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)


BOUND, ATTEMPTS = 1.15, 5


def falls_behind(case, function):
    """Whether the fallback takes longer than BOUND times eager PyTorch, attempt after attempt."""
    trial = Trial(case, CPU)
    calls = {"eager": trial.caller(function_of("eager", case.op)), "ours": trial.caller(function)}
    for _ in range(ATTEMPTS):
        with fastvae.use_backend("torch"):
            timings = interleave(calls, clock_of(CPU), seconds=0.3, min_rounds=7)
        if timings.ratio("ours", "eager").median <= BOUND:
            return False
    return True


@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.parametrize(
    "case",
    [
        Case("whole", MEDIUM, FP32, BACKWARD),
        Case("recon", MEDIUM, FP32, BACKWARD),
        Case("recon", MEDIUM, FP32, FORWARD),
        Case("recon", MEDIUM, AUTOCAST, BACKWARD),
    ],
    ids=lambda case: case.name,
)
def test_the_fallback_keeps_up_with_eager(case):
    assert not falls_behind(case, function_of(OURS, case.op))


@pytest.mark.usefixtures("_as_users_have_it")
def test_the_guard_notices_a_slow_fallback():
    def ten_times(*inputs):
        return [function_of(OURS, "recon")(*inputs) for _ in range(10)][-1]

    assert falls_behind(Case("recon", MEDIUM, FP32, BACKWARD), ten_times)


@pytest.mark.skipif(inductor.obstacle() is not None, reason=str(inductor.obstacle()))
@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("op", "precision", "theirs", "ours"),
    [
        ("recon", FP32, 20, 12),
        ("recon", AUTOCAST, 14, 8),
        ("sample", FP32, 40, 32),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_of_torch_compile_on_a_gpu(op, precision, theirs, ours):
    """What the documentation says of both, per element of the image or latent, forward and backward."""
    from tests.support.peers_report import SHAPE, cost

    case = Case(op, SHAPE, precision, BACKWARD)
    assert cost(case, COMPILED).bytes_per_element == pytest.approx(theirs, rel=0.01)
    assert cost(case, OURS).bytes_per_element == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("op", ["recon", "whole"])
def test_in_place_is_judged_by_inputs_that_it_leaves_alone(op):
    trial = Trial(Case(op, TINY, BYTES, BACKWARD), CPU)
    recon = trial.inputs[0][0].clone()
    call = trial.caller(function_of(OURS_IN_PLACE, op), overwrites=True)
    check(trial, call(0))
    assert torch.equal(trial.inputs[0][0], recon)
    for _ in range(200):  # what is overwritten again and again stays normal: subnormals would be slow
        _, (drecon, *_) = call(0)
    assert drecon.abs().min() > torch.finfo(torch.float32).tiny


def test_peak_memory_counts_what_lives_at_once():
    n = 1 << 18  # elements of a MiB

    def call(_):
        torch.empty(2 * n)  # gone before the next
        return [torch.empty(n) for _ in range(3)]

    assert peak_mib(call, CPU) == pytest.approx(3, abs=0.01)


def comparison(name="recon", size=100, **seconds):
    shape = suite.replace(TINY, name=f"{size}", image=(size,))
    case = Case("recon", shape, FP32, BACKWARD)
    peaks = {provider: 1.0 + i for i, provider in enumerate(seconds)}
    return Comparison(name, case.moved_bytes, timings=Timings(seconds), peak_mib=peaks, case=case)


def two_comparisons():
    ours, in_place = {OURS: [1.0, 1.0, 1.0]}, {OURS_IN_PLACE: [0.5, 0.5, 0.5]}
    slow, fast = {"eager": [2.0, 2.0, 3.0]}, {"eager": [0.5, 0.4, 0.5]}
    first, second = comparison("A", 100, **slow, **ours, **in_place), comparison("B", 200, **fast, **ours)
    second.failed["pythae"] = WrongResult("off")
    return [first, second]


def test_the_report_has_the_best_and_the_worst_and_what_failed():
    found = two_comparisons()
    assert report.extremes(found) == [
        "fastvae against eager: best 2.00x (A), worst 0.50x (B)",
        "fastvae in place against eager: best 4.00x (A), worst 4.00x (A)",
    ]
    head, *rows = report.ratio_rows(found)
    assert head == ["case", "who", "time", "eager"]
    assert rows[0] == ["A", "fastvae", "1000.00 ms", "2.00x (2.00-3.00)"]
    assert [row[1] for row in rows] == ["fastvae", "fastvae in place", "fastvae"]
    assert report.failures(found) == ["pythae is not in B: off"]


def test_recorded_figures_and_their_table_agree(tmp_path):
    found = two_comparisons()
    written = report.record(tmp_path / "new" / "cpu-2.13", {"date": "2026-01-02", "torch": "2.13"}, found)
    assert [path.name for path in written] == ["cpu-2.13.json", "cpu-2.13.md"]
    content = json.loads(written[0].read_text())
    assert content["environment"]["date"] == "2026-01-02"
    assert content["cases"]["A"]["eager/fastvae"] == {"median": 2.0, "low": 2.0, "high": 3.0}
    assert content["cases"]["A"]["fastvae_us"] == 1e6
    assert content["cases"]["A"]["fastvae in place_peak_mib"] == 3.0
    table = written[1].read_text()
    assert "- date: 2026-01-02" in table
    assert "| A | fastvae | 1000.00 ms | 2.00x (2.00-3.00) |" in table
    assert "pythae is not in B: off" in table


def test_the_table_for_the_docs_has_the_loss_and_the_step(tmp_path):
    loss, step = (
        comparison(f"whole 100 fp32 {BACKWARD}", **{"eager": [4e-3], OURS: [2e-3]}),
        comparison("step mlp B=8 fp32", **{"eager": [3.0], COMPILED: [2.0], OURS: [1.0], OURS_IN_PLACE: [0.5]}),
    )
    evaluation = comparison(f"whole 100 fp32 {FORWARD}", **{"eager": [1.0], OURS: [1.0]})
    environment = {"date": "2026-01-02", "torch": "2.13", "command": "pytest benchmarks", "allocator": "default malloc"}
    path, _ = report.record(tmp_path / "cpu", environment, [loss, evaluation, step])
    where, _, head, _, *rows = readme.table(path)
    assert where == "`pytest benchmarks`, 2026-01-02, torch 2.13, default malloc:"
    assert head.startswith("|  | eager | torch.compile | fastvae (over eager, over torch.compile) |")
    assert rows == [
        "| loss 100 fp32 | 4.00 ms | - | 2.00 ms (2.00x, -) | - |",
        "| step mlp B=8 fp32 | 3000.00 ms | 2000.00 ms | 1000.00 ms (3.00x, 2.00x) | 500.00 ms (6.00x, 4.00x) |",
    ]


def test_the_docs_have_the_recorded_figures():
    recorded = sorted((ROOT / "benchmarks" / "results").glob("cpu*.json"))
    if not recorded:
        pytest.skip("no figures of a CPU are recorded in benchmarks/results")
    text = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    for path in recorded:
        missing = [line for line in readme.table(path) if line not in text]
        assert not missing, f"python -m benchmarks.readme {path.relative_to(ROOT)} prints other lines"


def test_plots_hold_every_size(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need it")
    found = two_comparisons()
    assert plots.ratio_series(found) == {"eager": [(100, 2.0), (200, 0.5)], OURS_IN_PLACE: [(100, 0.5)]}
    assert plots.memory_series(found)[OURS] == [(100, 2.0), (200, 2.0)]
    assert [path.name for path in plots.save_plots(tmp_path, found)] == ["ratio_by_size.png", "memory_by_size.png"]
    found.append(comparison("C", 1000, **{OURS: [2e-6], plots.COPY: [1e-6]}))
    bandwidth = plots.bandwidth_series(found)
    assert (bandwidth[plots.COPY], bandwidth[OURS][-1]) == ([(12000, 12.0)], (12000, 6.0))
    assert plots.save_plots(tmp_path / "new", found)[-1].name == "roofline.png"
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "new").iterdir())


def test_plots_without_matplotlib_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install"):
        plots.save_plots(tmp_path, two_comparisons())


def test_who_is_wrong_is_not_timed():
    def verify(name, result):
        if result != 4:
            raise WrongResult(f"{result} is not 4")

    calls = {OURS: lambda i: 4, "eager": lambda i: 5, "broken": lambda i: 1 / 0}
    found = compare(Contest("sum", calls, verify), CPU, seconds=0.01)
    assert set(found.timings.seconds) == set(found.peak_mib) == {OURS}
    assert [type(error) for error in found.failed.values()] == [WrongResult, ZeroDivisionError]


@pytest.mark.parametrize("scale", suite.SCALES)
def test_the_suite_names_every_case_once(scale):
    for op in OPS:
        names = [case.name for case in suite.cases(op, scale, CPU)]
        assert names
        assert len(set(names)) == len(names)
    larger = {case.name for case in suite.cases("whole", "large", CPU)}
    assert larger >= {case.name for case in suite.cases("whole", "default", CPU)}
    assert any("256x3x256x256" in name for name in larger)


def test_a_wrong_training_step_is_noticed():
    images, recon = torch.rand(4, 6), torch.rand(4, 6)
    mu = logvar = torch.zeros(4, 2)
    loss = (recon - images).square().sum() / 4
    check_step((loss, recon, mu, logvar), images, FP32, overwritten=False)
    check_step((loss, (recon - images) / 2, mu, logvar), images, FP32, overwritten=True)
    with pytest.raises(WrongResult):
        check_step((1.001 * loss, recon, mu, logvar), images, FP32, overwritten=False)


def test_the_batch_that_fits_is_a_power_of_two_that_grows_with_memory():
    small, large = (batch_that_fits(mib, trial_batch=4) for mib in (100.0, 1000.0))
    assert small & (small - 1) == 0
    assert 4 * small <= large <= 16 * small


def test_names_of_steps_differ():
    steps = [StepCase("mlp", 8), StepCase("mlp", 8, BF16), StepCase("mlp", 8, compiled=True), StepCase("conv", 8)]
    assert len({step.name for step in steps}) == 4


def test_a_run_is_recorded_and_plotted(tmp_path):
    """The command of the docs, on tiny shapes, one file of benchmarks."""
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need it")
    pytest.importorskip("matplotlib", reason="plots need it")
    options = ["--benchmark-only", "--scale", "tiny", "--seconds", "0.01", "--record", str(tmp_path / "cpu")]
    options += ["--plots", str(tmp_path), "--benchmark-json", str(tmp_path / "all.json"), "-k", "not compile"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks/bench_reconstruction.py", *options],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "cpu.json").read_text())
    names = [case.name for case in suite.cases("recon", "tiny", CPU)]
    assert list(content["cases"]) == names
    assert "bench_reconstruction.py" in content["environment"]["command"]
    assert "fastvae against eager: best" in run.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"ratio_by_size.png", "memory_by_size.png"}
    for figures in json.loads((tmp_path / "all.json").read_text())["benchmarks"]:
        extra = figures["extra_info"]
        assert {"median_us", "peak_mib", "needed_bytes", "torch", "allocator", "clock"} <= set(extra)
        assert ("times_faster_than_eager" in extra) == ("fastvae" in figures["name"])
