"""What torch.compile's kernels for an NVIDIA GPU move in memory, beside ours.

`TRITON_INTERPRET=1 python -m tests.helpers.peers_report` prints the table; it takes a minute or two.
"""

import math
from typing import NamedTuple

import torch

import fastvae
from benchmarks.cases import BACKWARD, OpCase, Shape, Trial
from benchmarks.precision import AUTOCAST, BF16, FP32
from benchmarks.providers import COMPILED, EAGER, KERNELS, function_of
from tests.helpers import inductor
from tests.helpers.meter import Meter

SHAPE = Shape("64x2048, 128 latents", (64, 2048), (64, 128))
CASES = [
    OpCase(op, SHAPE, precision, BACKWARD)
    for op, precisions in (
        ("sample", [FP32, BF16]),
        ("moments", [FP32, BF16]),
        ("recon", [FP32, AUTOCAST, BF16]),
        ("whole", [FP32, AUTOCAST, BF16]),
    )
    for precision in precisions
]


class Cost(NamedTuple):
    """Of a forward and a backward pass; a seed that PyTorch draws, one launch for either side, is not in it."""

    bytes_per_element: float  # of the images, or of the latents where there are none
    launches: int


def cost(case: OpCase, provider: str) -> Cost:
    """Run the case in the interpreter, check what came, and count.

    Bytes are counted once a launch: what a kernel reads again, it finds in a cache.
    """
    torch.manual_seed(0)
    trial = Trial(case, torch.device("cpu"))
    compiled = provider == COMPILED
    function = function_of(EAGER if compiled else provider, case.op)
    if compiled:
        function = inductor.compiled_for_h100(function)
    with Meter(bounds=False, poison=False, races=False) as meter, fastvae.use_backend("triton"):
        result = trial.caller(function)(0)
    trial.check(result)
    elements = math.prod(SHAPE.image if case.op in ("recon", "whole") else SHAPE.latent)
    moved = sum(t.distinct_loaded + t.distinct_stored for launch in meter.launches for t in launch.traffic.values())
    return Cost(moved / elements, len(meter.launches))


def table() -> str:
    head = ("op", "storage", "bytes, torch.compile", "bytes, fastvae", "launches, torch.compile", "launches, fastvae")
    rows: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for case in CASES:
        theirs, ours = cost(case, COMPILED), cost(case, KERNELS)
        moved = (f"{c.bytes_per_element:.1f}" for c in (theirs, ours))
        rows.append((case.op, case.precision.name, *moved, str(theirs.launches), str(ours.launches)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    from tests.helpers.interpreter import fix_bf16_rounding

    if reason := inductor.skip_reason():
        raise SystemExit(f"nothing to report: {reason}")
    fix_bf16_rounding()
    print(table())
