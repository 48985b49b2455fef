"""A table of what every kernel costs: `python -m tests.helpers.kernels_report` prints it in Markdown. Needs no GPU.

Bytes and launches are counted in the interpreter, the rest is read from compiled code; Triton decides between the two
when it is imported, so the first half runs in a process of its own. A second table predicts speed: see `speed_model`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import torch

import fastvae
from tests.helpers.aot import DryRun, report
from tests.helpers.kernel_cases import MIXED, WHAT_IT_DOES, Case, Floor, elements_per_program
from tests.helpers.speed_model import H100, H200, predict

TARGETS = ("sm_80", "sm_90", "sm_100")
COLUMNS = ("kernel", "of", "storage", "bytes", "floor", "launches", "registers", "spills", "access", "instructions")
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    *(Case(op, dtype) for op in ("noise", "sample", "sample_kl", "kl") for dtype in DTYPES),
    *(Case("loss", *dtypes) for dtypes in [(dtype,) for dtype in DTYPES] + list(MIXED)),
]
SPEED_COLUMNS = ("of", "storage", "bytes", "instructions", "warps", "KiB in flight", "bound", H100.name, H200.name)
LARGE, MANY_ROWS = (2**15, 2**12), (2**17, 2**10)  # of images or latents; for statistics of columns
SPEED_CASES = [
    *(replace(case, shape=LARGE) for case in CASES),
    *(Case("stats", dtype, shape=MANY_ROWS) for dtype in DTYPES),
    *(
        Case("loss", *dtypes, shape=LARGE, options=(name,))
        for name in ("bernoulli", "bernoulli_probs", "log_cosh")
        for dtypes in (DTYPES[:1], MIXED[0])
    ),
]


def halves(case: Case) -> list[tuple[str, Case, Floor]]:
    """Forward and backward pass of a case: name, case, floor. A loss goes back in two ways."""
    found = [("forward", case, case.forward_floor)]
    if case.op == "loss":
        scaled = replace(case, upstream=3.0)
        found.append(("backward, upstream 1", case, case.backward_floor))
        found.append(("backward, upstream 3", scaled, scaled.backward_floor))
    elif case.op not in ("noise", "stats"):
        found.append(("backward", case, case.backward_floor))
    return found


def metered() -> dict[str, tuple[float, int]]:
    """Half of a case -> (bytes per element, launches). For a process that interprets."""
    from tests.helpers.meter import Meter

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
    facts = {}
    for target in TARGETS:
        with DryRun(target) as forward:
            step = case.forward("meta")
        with DryRun(target) as backward:
            case.backward(step)
        launch = (forward if half == "forward" else backward).launches[0]
        facts[target] = report(launch.kernel)
    hopper = facts["sm_90"]
    path = hopper.path
    width = max([*path.global_loads, *path.global_stores])
    per_thread = elements_per_program(launch.arguments) / (32 * hopper.kernel.metadata.num_warps)
    return (
        f"`{launch.name}`",
        str(max(fact.registers for fact in facts.values())),
        str(max(fact.spill_stores + fact.stack for fact in facts.values())),
        "-" if half == "backward, upstream 1" else str(width),
        "-" if half == "backward, upstream 1" else f"{len(path) / per_thread:.1f}",
    )


def speeds() -> str:
    """Predicted parts of the peak bandwidth on GPUs of sm_90, large tensors."""
    rows = [SPEED_COLUMNS, ("---",) * len(SPEED_COLUMNS)]
    for case in SPEED_CASES:
        for half, variant, floor in halves(case):
            if floor.total:
                rows.append((f"{WHAT_IT_DOES[case.op]} {half}", *speed(variant, half, floor)))
    return markdown(rows)


def speed(case: Case, half: str, floor: Floor) -> tuple[str, ...]:
    with DryRun("sm_90") as forward:
        step = case.forward("meta")
    with DryRun("sm_90") as backward:
        case.backward(step)
    launch = (forward if half == "forward" else backward).launches[0]
    path = report(launch.kernel).path
    on_h100, on_h200 = (predict(launch, path, floor.total, case.n_elements, gpu) for gpu in (H100, H200))
    return (
        " ".join([storage(case), *case.options]),
        str(floor.total),
        f"{on_h100.instructions:.0f}",
        f"{on_h100.occupancy:.0%}",
        f"{on_h100.in_flight / 1024:.0f}",
        on_h100.bound,
        f"{on_h100.share:.0%}",
        f"{on_h200.share:.0%}",
    )


def storage(case: Case) -> str:
    return " + ".join(str(d).removeprefix("torch.") for d in (case.dtype, case.target_dtype) if d)


def markdown(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table() -> str:
    command = [sys.executable, "-m", __spec__.name, "--metered"]
    interpreted = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    traffic = json.loads(interpreted.stdout)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for case in CASES:
        for half, variant, floor in halves(case):
            bytes_per_element, launches = traffic[f"{case} {half}"]
            kernel, *facts = compiled(variant, half)
            cost = f"{bytes_per_element:.2f}", str(floor.total), str(launches)
            rows.append((kernel, f"{WHAT_IT_DOES[case.op]} {half}", storage(case), *cost, *facts))
    return markdown(rows)


def main() -> None:
    if "--metered" in sys.argv:
        print(json.dumps(metered()))
        return
    with mock.patch("fastvae._backend._triton_obstacle", return_value=None), fastvae.use_backend("triton"):
        print(table())
        print(
            "\nPredicted by a model, not measured: part of the peak bandwidth, and what bounds it on the first GPU.\n"
        )
        print(speeds())


if __name__ == "__main__":
    main()
