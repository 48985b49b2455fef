"""The harness for machines with a GPU, exercised without one: the same code on tiny sizes, interpreted."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastvae
from benchmarks import gpu, gpu_sweep, gpu_tests
from benchmarks.cases import AUTOCAST, BF16, BYTES, FP16, FP32, OPS, PHASES, Case, Result, Trial, square
from benchmarks.measure import Timings
from benchmarks.peers import function_of
from benchmarks.results import Results
from benchmarks.truth import WrongResult, check

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def harness(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_dry_run_records_every_part_and_resumes(tmp_path):
    first = harness(tmp_path, "--dry")
    assert first.returncode == 0, first.stdout + first.stderr
    (file,) = tmp_path.glob("*.json")
    parts = json.loads(file.read_text())["parts"]
    assert set(parts) == {"tests", "bench", "sweep"}
    assert sum(shard.get("passed", 0) for shard in parts["tests"].values()) >= 8
    assert all(figures["gb_per_s"] > 0 for part in ("bench", "sweep") for figures in parts[part].values())
    table = file.with_suffix(".md").read_text()
    assert all(case in table for cases in parts.values() for case in cases)

    measured = file.read_bytes()
    second = harness(tmp_path, "--dry")
    assert second.returncode == 0, second.stdout + second.stderr
    assert file.read_bytes() == measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    run = harness(tmp_path, "--part", "bench")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_results_of_another_commit_stay_and_failures_are_tried_again(tmp_path):
    def results(commit, **options):
        return Results(tmp_path, {"gpu": "NVIDIA X 1", "date": "2026-01-02", "commit": commit}, **options)

    first = results("a")
    first.record("bench", "right", {"us": 1.0})
    first.record("bench", "wrong", {"failed": "no"})
    assert first.path.name == "nvidia-x-1-2026-01-02.json"
    resumed = results("a")
    assert resumed.has("bench", "right")
    assert not resumed.has("bench", "wrong")
    assert not results("a", fresh=True).has("bench", "right")
    assert not results("b").has("bench", "right")
    assert "right" in (tmp_path / "nvidia-x-1-2026-01-02-a.json").read_text()


def test_no_time_no_measurement(tmp_path):
    results = Results(tmp_path, {"date": "2026-01-02", "commit": "a"})
    for part in ("bench", "sweep"):
        assert not gpu.PARTS[part](results, CPU, deadline=0.0, dry=True)
    assert not results.path.exists()


def test_summary_of_pytest_output():
    output = "FAILED tests/test_x.py::test_y - AssertionError\n1 failed, 12 passed, 3 skipped in 1.2s\n"
    assert gpu_tests.summary(output, 1)["failed"] == [
        "FAILED tests/test_x.py::test_y - AssertionError",
        "exit status 1",
    ]
    assert gpu_tests.summary("12 passed in 1s", 0) == {"passed": 12}
    assert gpu_tests.summary("", None)["failed"] == ["out of time"]


def test_sweep_reaches_the_kernels():
    from fastvae_kernels import _tile, elbo_fwd

    usual = _tile.tile(8, 1 << 20, 4)
    image = torch.empty(8, 1 << 12)
    loss = partial(fastvae.vae_loss, image, image, kl=torch.zeros(8))
    with fastvae.use_backend("triton"):
        loss()
    with gpu_sweep.tiles(8192, 8, 4):
        with fastvae.use_backend("triton"), mock.patch.object(_tile, "tile", wraps=_tile.tile) as asked:
            loss()
        assert asked.called  # though such a call was made before
        assert elbo_fwd.NUM_WARPS == 8
        assert _tile.tile(8, 1 << 20, 4).cols == 2 * usual.cols
    assert _tile.tile(8, 1 << 20, 4) == usual


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("precision", [FP32, BF16, AUTOCAST, BYTES, FP16], ids=lambda p: p.name)
def test_a_wrong_result_has_no_speed(op, precision):
    """Of each output and gradient in turn, one element is moved by a tenth: each time the check notices."""
    trial = Trial(Case(op, square(2000), precision, PHASES[1]), CPU)
    outputs, gradients = trial.caller(function_of("fastvae", op))(0)
    check(trial, Result(outputs, gradients))
    results = [t.detach().clone() for t in (*outputs, *gradients)]
    for i, tensor in enumerate(results):
        moved = [t.clone() for t in results]
        moved[i].view(-1)[-1] += 0.2 * tensor.abs().max() + 0.1
        with pytest.raises(WrongResult):
            check(trial, Result(moved[: len(outputs)], moved[len(outputs) :]))


def test_ratios_are_paired():
    timings = Timings({"ours": [1.0, 2.0, 4.0], "peer": [3.0, 6.0, 12.0]})
    assert timings.ratio("peer", "ours") == (3.0, 3.0, 3.0)
