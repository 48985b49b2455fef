"""fastvae against textbook PyTorch, torch.compile and other packages: `python -m benchmarks` compares them in turns,
`pytest benchmarks --benchmark-only` times each by itself, `python -m benchmarks.gpu` is for a machine with a GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # of this checkout, whatever is installed
