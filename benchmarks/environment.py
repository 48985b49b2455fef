"""Where a figure was taken: without this it means nothing."""

import datetime
import hashlib
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def allocator() -> str:
    """Which malloc serves PyTorch's CPU tensors: page faults of fresh memory can outweigh all arithmetic."""
    preload = os.environ.get("LD_PRELOAD", "")
    base = next((name for name in ("jemalloc", "tcmalloc", "mimalloc") if name in preload), "default malloc")
    settings = [f"{k}={os.environ[k]}" for k in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE") if os.environ.get(k)]
    return ", ".join([base, *settings])


def commit() -> str:
    """Commit of the checkout and, if files differ from it, a digest of the differences; "unknown" outside of one."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    digest = f"+{hashlib.sha256(changes.stdout).hexdigest()[:8]}" if changes.stdout else ""
    return head.stdout.decode().strip() + digest


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


@cache
def environment(device: torch.device) -> dict[str, str | int | float | None]:
    stamp: dict[str, str | int | float | None] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        stamp |= {
            "gpu": properties.name,
            "cuda": torch.version.cuda or torch.version.hip,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
    else:
        stamp |= {"allocator": allocator(), "clock": "CPU time of one thread"}
    return stamp
