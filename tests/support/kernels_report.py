"""A table of what every kernel costs: `python -m tests.support.kernels_report` prints it in Markdown. Needs no GPU.

Bytes and launches are counted in the interpreter, the rest is read from compiled code; Triton decides between the two
when it is imported, so the first half runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import torch

import fastvae
from tests.support.kernel_cases import MIXED, WHAT_IT_DOES, Case, Floor, elements_per_program

TARGETS = ("sm_80", "sm_90", "sm_100")
COLUMNS = ("kernel", "of", "storage", "bytes", "floor", "launches", "registers", "spills", "access", "instructions")
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(Case(op, dtype) for op in ("noise", "sample", "sample_kl", "kl") for dtype in DTYPES),
    *(Case("loss", *dtypes) for dtypes in [(dtype,) for dtype in DTYPES] + list(MIXED)),
]


def halves(case: Case) -> list[tuple[str, Case, Floor]]:
    """Forward and backward pass of a case: name, case, floor. A loss goes back in two ways."""
    found = [("forward", case, case.forward_floor)]
    if case.op == "loss":
        scaled = replace(case, upstream=3.0)
        found.append(("backward, upstream 1", case, case.backward_floor))
        found.append(("backward, upstream 3", scaled, scaled.backward_floor))
    elif case.op != "noise":
        found.append(("backward", case, case.backward_floor))
    return found


def metered() -> dict[str, tuple[float, int]]:
    """Half of a case -> (bytes per element, launches). For a process that interprets."""
    from tests.support.meter import Meter

    found = {}
    with fastvae.use_backend("triton"):
        for case in CASES:
            for half, variant, _ in halves(case):
                with Meter() as forward:
                    step = variant.forward()
                with Meter() as backward:
                    variant.backward(step)
                meter = forward if half == "forward" else backward
                found[f"{case} {half}"] = meter.total / case.n_elements, len(meter.launches)
    return found


def compiled(case: Case, half: str) -> tuple[str, str, str, str, str]:
    """Kernel, registers, bytes spilled, bits of an access, instructions per element. For a process that compiles."""
    from tests.support.aot import DryRun, report

    facts = {}
    for target in TARGETS:
        with DryRun(target) as forward:
            step = case.forward("meta")
        with DryRun(target) as backward:
            case.backward(step)
        launch = (forward if half == "forward" else backward).launches[0]
        facts[target] = report(launch.kernel)
    hopper = facts["sm_90"]
    path = hopper.paths[-1 if half == "backward, upstream 3" else 0]
    width = max([*path.global_loads, *path.global_stores])
    per_thread = elements_per_program(launch.arguments) / (32 * hopper.kernel.metadata.num_warps)
    return (
        f"`{launch.name}`",
        str(max(fact.registers for fact in facts.values())),
        str(max(fact.spill_stores + fact.stack for fact in facts.values())),
        "-" if half == "backward, upstream 1" else str(width),
        "-" if half == "backward, upstream 1" else f"{len(path) / per_thread:.1f}",
    )


def table() -> str:
    command = [sys.executable, "-m", __spec__.name, "--metered"]
    interpreted = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    traffic = json.loads(interpreted.stdout)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    with mock.patch("fastvae._backend._triton_obstacle", return_value=None), fastvae.use_backend("triton"):
        for case in CASES:
            for half, variant, floor in halves(case):
                bytes_per_element, launches = traffic[f"{case} {half}"]
                kernel, *facts = compiled(variant, half)
                storage = " + ".join(str(d).removeprefix("torch.") for d in (case.dtype, case.target_dtype) if d)
                cost = f"{bytes_per_element:.2f}", str(floor.total), str(launches)
                rows.append((kernel, f"{WHAT_IT_DOES[case.op]} {half}", storage, *cost, *facts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(json.dumps(metered()) if "--metered" in sys.argv else table())
