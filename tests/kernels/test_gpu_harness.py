"""The runner for machines with a GPU, exercised without one: the same code on tiny sizes, interpreted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import measure
from benchmarks.cases import suite
from benchmarks.results import Results

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run_gpu(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_dry_run_records_every_part_and_resumes(tmp_path):
    first = run_gpu(tmp_path, "--dry")
    assert first.returncode == 0, first.stdout + first.stderr
    (file,) = tmp_path.glob("*.json")
    cases = json.loads(file.read_text())["cases"]
    assert set(cases) == {"tests gpu", "tests parity 1/2", "tests parity 2/2", *gpu.DRY}
    assert sum(figures.get("passed", 0) for figures in cases.values()) >= 8
    for name in gpu.DRY:
        assert {"fastvae kernels", "fastvae fallback", "eager"} <= set(cases[name]["us"])
    table = file.with_suffix(".md").read_text()
    assert all(name in table for name in gpu.DRY)

    measured = file.read_bytes()
    second = run_gpu(tmp_path, "--dry")
    assert second.returncode == 0, second.stdout + second.stderr
    assert file.read_bytes() == measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    run = run_gpu(tmp_path, "--part", "bench")
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_time_no_measurement(tmp_path):
    results = Results(tmp_path / "gpu.json", {"date": "2026-01-02", "commit": "a"})
    assert not measure(results, suite("tiny", CPU), CPU, deadline=time.monotonic() - 1, seconds=0.01)
    assert not results.path.exists()


def test_tests_that_outlast_the_budget_are_stopped(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(gpu, "commands", lambda *_: {"slow": command})
    results = Results(tmp_path / "gpu.json", {"date": "2026-01-02", "commit": "a"})
    gpu.run_tests(results, CPU, deadline=0.0, dry=True)
    assert results.cases["tests slow"] == {"failed": {"1": "out of time"}}
    assert not results.has("tests slow")


def test_every_file_of_tests_is_found():
    found = " ".join(word for command in gpu.commands(CPU, dry=False).values() for word in command)
    assert all(name in found for name in (*gpu.PARITY, "test_gpu.py", "test_gpu_memory.py"))


def test_summary_of_pytest_output():
    output = "FAILED tests/test_x.py::test_y - AssertionError\n1 failed, 12 passed, 3 skipped in 1.2s\n"
    assert gpu.summary(output, 1) == {
        "passed": 12,
        "skipped": 3,
        "failed": {"1": "FAILED tests/test_x.py::test_y - AssertionError", "2": "exit status 1"},
    }
    assert gpu.summary("12 passed in 1s", 0) == {"passed": 12}
