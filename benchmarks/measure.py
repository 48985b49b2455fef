"""Paired timing, which `fastvae bench` shares, and what a GPU's cache asks for."""

import torch

from fastvae.cli.timing import Call as Call
from fastvae.cli.timing import Ratio as Ratio
from fastvae.cli.timing import Timings as Timings
from fastvae.cli.timing import clock_of as clock_of
from fastvae.cli.timing import interleave as interleave
from fastvae.cli.timing import on_threads as on_threads


def rotation(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs it takes that none is still in the second-level cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-2 * cache // max(input_bytes, 1))))
