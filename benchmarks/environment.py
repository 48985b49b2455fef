"""Where and how a figure was taken."""

import datetime
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "diffusers", "pythae")


def allocator() -> str:
    """Which malloc serves PyTorch's CPU tensors: page faults of fresh memory can outweigh all arithmetic."""
    preload = os.environ.get("LD_PRELOAD", "")
    base = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preload), "default malloc")
    settings = [f"{k}={os.environ[k]}" for k in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE") if os.environ.get(k)]
    return ", ".join([base, *settings])


def commit() -> str:
    """Commit of the checkout and, if files differ from it, a digest of the differences; "unknown" outside of one."""
    git = "git rev-parse --short=12 HEAD && git diff HEAD"
    shown = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True).stdout
    head, _, changes = shown.partition(b"\n")
    return (head.decode() or "unknown") + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


@cache
def environment(device: torch.device, threads: int = 1) -> dict[str, str | int | float | None]:
    """Date, command, versions and machine; on a CPU also the malloc that serves it, and the clock."""
    found: dict[str, str | int | float | None] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES if find_spec(package)},
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "cuda": torch.version.cuda or torch.version.hip}
        return found | {"gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "gpu_l2_mib": gpu.L2_cache_size >> 20}
    found |= {"allocator": allocator(), "threads": threads}
    return found | {"clock": "CPU time of one thread" if threads == 1 else "wall time"}
