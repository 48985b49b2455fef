"""The part `tests`: tests marked `gpu`, and the parity tests with their tensors on the GPU, in parallel processes."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .environment import ROOT
from .results import Figures, Results

PARITY = ("test_elbo.py", "test_reparam_kl.py", "test_philox.py", "test_loss.py", "test_distributions.py")


def commands(device: torch.device, dry: bool) -> dict[str, list[str]]:
    """What is run, by name."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    shards = 2 if dry else max(1, min(6, (os.cpu_count() or 1) // 2))
    files = [str(path) for name in PARITY if (path := ROOT / "tests" / name).exists()]
    parity = [*pytest, "-p", "benchmarks.on_device", "--tensor-device", device.type, *files]
    parity += ["-k", "upstream_gradients_of_the_loss and float32" if dry else "not textbook"]  # its noise is a CPU's
    found = {f"parity {i}/{shards}": [*parity, "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)}
    gpu = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_gpu_memory.py")]
    return {"gpu": [*pytest, "-m", "gpu", *gpu], **found}


def run(results: Results, device: torch.device, deadline: float, dry: bool) -> bool:
    """Run what is not recorded as passed; True if all passed."""
    left = {name: command for name, command in commands(device, dry).items() if not results.has("tests", name)}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic algorithms ask for
        "TRITON_INTERPRET": "1" if dry else "0",
    }
    started = time.monotonic()
    complete = True
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for name, command in left.items():
            log = Path(folder) / name.replace("/", "-")
            with log.open("w") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            running.append((name, process, log))
        for name, process, log in running:
            try:
                status: int | None = process.wait(timeout=max(deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
                process.wait()
                status = None
            figures = {
                "seconds": round(time.monotonic() - started, 1),
                **summary(log.read_text(errors="replace"), status),
            }
            results.record("tests", name, figures)
            complete &= "failed" not in figures
            print(f"tests: {name}: {figures}", flush=True)
    return complete


def summary(output: str, status: int | None) -> Figures:
    """Counts from pytest's last line, and the failures."""
    lines = output.splitlines()
    figures: Figures = {}
    for count, word in re.findall(r"(\d+) (passed|skipped)", lines[-1] if lines else ""):
        figures[word] = int(count)
    if status != 0:
        failures = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) |.*Error: ", line)]
        figures["failed"] = [*failures[:40], "out of time" if status is None else f"exit status {status}"]
    return figures
