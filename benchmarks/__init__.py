"""Paired benchmarks of fastvae and its peers: `pytest benchmarks --benchmark-only`, and `python -m benchmarks.gpu`."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("fastvae_kernels") is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
