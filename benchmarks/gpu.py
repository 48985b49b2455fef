"""One command for a machine with a GPU and no network: tests on it, then timings, within a time budget.

`python -m benchmarks.gpu` from the root of a checkout, installed or not, writes
`benchmarks/results/<gpu>-<date>-<commit>.json` and a table beside it; run again, it goes on where it stopped.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .__main__ import RESULTS, measure
from .cases import BACKWARD, suite
from .environment import ROOT, environment
from .results import Figures, Results, failures

TESTS_SHARE = 0.4  # of the budget
DRY = (f"sample 8x64 fp32 {BACKWARD}", f"whole 8x1x8x8 autocast {BACKWARD}")
PARITY = ("test_elbo.py", "test_reparam_kl.py", "test_philox.py", "test_loss.py", "test_distributions.py")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all right, 1 something failed or the time was up, 2 no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=["tests", "bench", "all"], default="all")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for the whole run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures")
    parser.add_argument("--dry", action="store_true", help="the same code with tiny sizes on the CPU, for its own test")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("no GPU that PyTorch can use was found; `--dry` runs the same code on the CPU", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "1" if options.dry else "0"  # before Triton is imported
    device, begin = torch.device("cpu" if options.dry else "cuda"), time.monotonic()
    stamp = environment(device)
    gpu = re.sub(r"[^a-z0-9]+", "-", str(stamp.get("gpu", "cpu")).lower()).strip("-")
    path = options.results / f"{gpu}-{stamp['date']}-{stamp['commit']}.json"
    results = Results(path, stamp)
    if options.part != "bench":
        share = 1.0 if options.part == "tests" else TESTS_SHARE
        run_tests(results, device, begin + share * options.budget, options.dry)
    cases = [] if options.part == "tests" else suite("tiny" if options.dry else "default", device)
    cases = [case for case in cases if case.name in DRY or not options.dry]
    complete = measure(results, cases, device, begin + options.budget, seconds=0.01 if options.dry else 0.35)
    print(f"{results.write_markdown()}\nwritten: {path}")
    return 0 if complete and not failures(results.cases) else 1


def commands(device: torch.device, dry: bool) -> dict[str, list[str]]:
    """The tests marked `gpu`, and the parity tests with their tensors on the GPU, in parallel processes."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line"]
    files = {path.name: str(path) for path in (ROOT / "tests").rglob("test_*.py")}
    shards = 2 if dry else max(1, min(6, (os.cpu_count() or 1) // 2))
    plugin = ["-p", "benchmarks.on_device", "--tensor-device", device.type]
    only = ["-k", "upstream_gradients_of_the_loss and float32" if dry else "not textbook"]  # whose noise is a CPU's
    parity = [*pytest, *plugin, *only, *(files[name] for name in PARITY)]
    found = {f"parity {i}/{shards}": [*parity, "--shard", f"{i}/{shards}"] for i in range(1, shards + 1)}
    return {"gpu": [*pytest, "-m", "gpu", files["test_gpu.py"], files["test_gpu_memory.py"]], **found}


def run_tests(results: Results, device: torch.device, deadline: float, dry: bool) -> None:
    """Run what is not recorded as passed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic algorithms ask for
    }
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for name, command in commands(device, dry).items():
            if not results.has(f"tests {name}"):
                log = Path(folder) / name.replace("/", "-")
                with log.open("w") as file:
                    running[name] = subprocess.Popen(command, stdout=file, **options), log
        for name, (process, log) in running.items():
            try:
                status: int | None = process.wait(timeout=max(deadline - time.monotonic(), 1.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
                process.wait()
                status = None
            figures = summary(log.read_text(errors="replace"), status)
            results.record(f"tests {name}", figures)
            print(f"tests {name}: {figures}", flush=True)


def summary(output: str, status: int | None) -> Figures:
    """Counts from pytest's last line, and the failures; `status` is None if the time was up."""
    lines = output.splitlines()
    figures: Figures = {w: int(n) for n, w in re.findall(r"(\d+) (passed|skipped)", lines[-1] if lines else "")}
    if status != 0:
        found = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) |.*Error: ", line)][:40]
        end = "out of time" if status is None else f"exit status {status}"
        figures["failed"] = {str(i): line for i, line in enumerate([*found, end], start=1)}
    return figures


if __name__ == "__main__":
    sys.exit(main())
