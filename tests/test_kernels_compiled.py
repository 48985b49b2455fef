"""What the compiler makes of the kernels, for GPUs that are not here: registers, widths, instructions, arithmetic."""

import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

import fastvae
from tests.support.aot import TARGETS, DryRun, report
from tests.support.kernel_cases import (
    CASES,
    HUGE,
    ODD,
    ODD_BATCH,
    ODD_RANGES,
    OPTIONS,
    RANGES,
    SEVERAL_TILES,
    SHORT_ROWS,
    SQUARE,
    STATS,
    SURFACE,
    TOGETHER,
    Case,
    elements_per_program,
    geometry,
)
from tests.support.sass import GLOBAL_LOADS

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("kernels_for_tensors_anywhere")]
F32, BF16, F64, U8 = torch.float32, torch.bfloat16, torch.float64, torch.uint8

SPECIAL = [
    *(Case(op, dtype, shape=shape) for op in ("sample_kl", "kl") for dtype in (F32, BF16) for shape in (SHORT_ROWS,)),
    *(Case("sample_kl", dtype, shape=ODD_BATCH) for dtype in (F32, BF16)),
    *(Case(op, dtype, clamp=True) for op in ("sample_kl", "kl") for dtype in (F32, F64)),
    *(Case("loss", *dtypes, shape=SEVERAL_TILES) for dtypes in ((F32,), (BF16, U8))),
    Case("sample_kl", F32, shape=HUGE),
    Case("loss", BF16, U8, shape=HUGE),
    Case("whole_loss", BF16, U8, shape=ODD, latent_cols=32),
    *STATS,
    Case("stats", F32, shape=RANGES, clamp=True),
    Case("stats", F32, shape=HUGE),
    # rows of samples that start anywhere
    Case("whole_loss", F32, shape=ODD, latent_cols=37, clamp=True, options=TOGETHER),
    Case("loss", BF16, shape=ODD, options=("gaussian", "mask", "weight")),
    Case("whole_loss", BF16, shape=ODD, latent_cols=37, options=("weight",)),
    Case("whole_loss", BF16, U8, shape=HUGE, options=("mask", "prior")),
]
# everything where the instruction counts are taken; elsewhere what training runs, in the form with more code
USUAL = [
    *(Case(op, dtype, shape=ODD) for op in ("sample", "sample_kl", "loss") for dtype in (F32, BF16)),
    *(Case("loss", BF16, dtype, shape=ODD) for dtype in (U8, F32)),
    *(Case("sample_kl", dtype) for dtype in (F32, BF16)),
    Case("loss", BF16, U8),
    Case("whole_loss", BF16, U8, shape=ODD, latent_cols=32),
    *(Case("stats", dtype, shape=ODD_RANGES, clamp=True) for dtype in (F32, BF16)),
    Case("loss", BF16, options=("bernoulli_probs",)),
    Case("whole_loss", BF16, U8, clamp=True, options=TOGETHER),
    Case("whole_loss", BF16, shape=SQUARE, options=("dim_batch",)),
]
HERE = [*CASES, *SURFACE, *SPECIAL]
MATRIX = [
    *((case, "sm_90") for case in HERE),
    *((case, target) for target in TARGETS if target != "sm_90" for case in USUAL),
]
ON_NVIDIA = [(case, target) for case, target in MATRIX if target.startswith("sm_")]


def over(matrix):
    """Parametrize by case and target."""
    return pytest.mark.parametrize(
        ("case", "target"), [pytest.param(case, target, id=f"{case}-{target}") for case, target in matrix]
    )


@pytest.fixture
def kernels_for_tensors_anywhere(monkeypatch):
    """Launches are compiled and not executed, so any tensor will do: those on meta have no memory."""
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    with fastvae.use_backend("triton"):
        yield


@cache
def launches(case, target):
    """Of the forward and of the backward pass."""
    with DryRun(target) as forward:
        step = case.forward("meta")
    with DryRun(target) as backward:
        case.backward(step)
    return tuple(forward.launches), tuple(backward.launches)


def reports(case, target):
    return [report(launch.kernel) for half in launches(case, target) for launch in half]


def main_launches(case, target):
    """Of the forward and of the backward pass, those that see every element."""
    for half in launches(case, target):
        yield [launch for launch in half if not re.search("fold|merge", launch.name)]


def main_reports(case, target):
    """With the elements per program."""
    for half in main_launches(case, target):
        for launch in half:
            yield report(launch.kernel), elements_per_program(launch.arguments)


@over(MATRIX)
def test_registers_are_not_spilled(case, target):
    for facts in reports(case, target):
        assert (facts.spill_stores, facts.spill_loads, facts.stack) == (0, 0, 0), facts.kernel.metadata.name


def rows_are_aligned(case):
    """Sampling numbers the noise by rows where it measures the KL, statistics are of columns, losses may be of samples:
    rows of any length take the general path.
    """
    by_rows = case.op in ("sample_kl", "stats") or any("sample" in OPTIONS[name].planes for name in case.options)
    return not by_rows or case.shape[1] % 16 == 0


def moves(launch, floor, *, few):
    """Whether some path moves what `floor` says by the widest accesses there are, and beside it `few` bytes at most.

    Paths through the tail leave out accesses; that through whole tiles has them all.
    """
    facts = report(launch.kernel)
    per_thread = elements_per_program(launch.arguments) // (32 * facts.kernel.metadata.num_warps)
    n_of_bytes = sum(t is not None and t.itemsize == 1 for t in launch.arguments.get("images", ()))

    def are(widths, needed):
        moved = [(width, width // 8 * count) for width, count in widths.items()]
        wide = sum(size for width, size in moved if width >= 128)
        # a thread's share of a mask or a uint8 target may be fewer than 16 bytes
        widest = sum(size for width, size in moved if width >= min(8 * per_thread, 128))
        total = sum(size for _, size in moved)
        return wide >= needed - n_of_bytes * per_thread and needed <= widest and total <= needed + few

    return any(
        are(path.global_loads, floor.read * per_thread) and are(path.global_stores, floor.written * per_thread)
        for path in [*facts.paths, *facts.code.paths(GLOBAL_LOADS)]
    )


def has_arm(launch, op):
    """Whether a launch of a loss has programs for its images ("loss"), or its latents ("kl")."""
    tensors = launch.arguments.get({"loss": "images", "kl": "latents"}.get(op))
    return tensors is None or tensors[0] is not None


@over([(case, "sm_90") for case in HERE if rows_are_aligned(case) and case.dtype != F64])
def test_a_thread_moves_all_of_its_elements_by_16_bytes(case, target):
    # numbers of a row, or of a column: upstream gradients and partial sums
    few = 48 if case.op == "stats" or "dim_batch" in case.options else 16
    forward, backward = main_launches(case, target)
    for op in ("loss", "kl") if case.op == "whole_loss" else (case.op,):
        arm = replace(case, op=op)
        floors = [(forward, arm.forward_floor)]
        floors += [(backward, replace(arm, upstream=upstream).backward_floor) for upstream in (2.0, 3.0) if backward]
        for half, floor in floors:
            assert any(moves(launch, floor, few=few) for launch in half if has_arm(launch, op)), (op, floor)


@over([(case, target) for target in TARGETS if target != "sm_90" for case in USUAL if rows_are_aligned(case)])
def test_accesses_of_16_bytes_elsewhere(case, target):
    for half in main_launches(case, target):
        facts = [report(launch.kernel) for launch in half]
        assert all(max(fact.global_loads) >= 128 for fact in facts)
        assert not facts or any(max(fact.global_stores) >= 128 for fact in facts)


@over([(case, "sm_90") for case in SURFACE if case.op == "whole_loss"])
def test_a_warp_moves_runs_of_64_bytes(case, target):
    """Along the dimension that is adjacent in memory: tiles of columns, too, if it is the samples' dimension."""
    for half in main_launches(case, target):
        for launch in half:
            ttgir = launch.kernel.asm["ttgir"]
            layouts = {
                name: [[int(n) for n in numbers.split(",")] for numbers in re.findall(r"= \[([\d, ]+)\]", layout)]
                for name, layout in re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", ttgir, re.MULTILINE)
            }
            accesses = re.findall(r"tt\.(?:load|store) .*: tensor<(\d+)x(\d+)x!tt\.ptr<\D*(\d+)>, (#\w+)>", ttgir)
            for *shape, bits, name in accesses:
                if math.prod(map(int, shape)) == elements_per_program(launch.arguments):  # else numbers of a row
                    per_thread, per_warp, _, (first, _) = layouts[name]
                    run = min(per_thread[first] * per_warp[first], int(shape[first]))
                    assert run * max(int(bits), 8) >= 64 * 8, (launch.name, shape)


@over([(c, t) for c, t in MATRIX if c.has_noise and c.dtype != F64])
def test_noise_stays_in_registers(case, target):
    for facts, _ in main_reports(case, target):
        if case.op == "sample_kl":
            # the KL of rows, or its gradient, alone: a float32 for each row, or for each warp of a row
            rows = launches(case, target)[0][0].arguments["BLOCK_ROWS"]
            assert facts.shared <= 4 * max(rows, facts.kernel.metadata.num_warps)
        else:
            assert (facts.shared, facts.shared_accesses, facts.barriers) == (0, 0, 0)


@over(ON_NVIDIA)
def test_arithmetic_is_that_of_the_interpreter(case, target):
    for facts in reports(case, target):
        name = facts.kernel.metadata.name
        assert not facts.drops_nan, name
        assert facts.kernel.metadata.enable_fp_fusion, name
        if case.has_noise and "fold" not in name:
            assert facts.fused_multiply_add, name


def widened_inputs(ptx):
    """Registers that become a float64 straight after they were loaded, or passed, as a float32."""
    registers = set()
    for loaded in re.findall(r"\bld\.(?:global|param)[\w.:]*\.[bf]32\s+(\{[^}]*\}|%\w+)", ptx):
        registers.update(re.findall(r"%\w+", loaded))
    copies = re.findall(r"\bmov\.[bf]32\s+(%\w+), (%\w+);", ptx)
    for _ in copies:
        registers.update(to for to, source in copies if source in registers)
    return registers.intersection(re.findall(r"\bcvt\.f64\.f32\s+%\w+, (%\w+);", ptx))


def rounded_constants(ttir):
    """float64 constants that have the digits of a float32, and more of them than a person writes."""
    written = re.findall(r"arith\.constant (?:dense<)?(-?\d[\d.]*(?:[eE][-+]\d+)?)>? : (?:tensor<[\dx]*)?f64", ttir)
    return {x for x in map(float, written) if float(torch.tensor(x, dtype=F32)) == x and len(repr(x)) > 12}


@over([(case, target) for case, target in ON_NVIDIA if case.dtype == F64])
def test_float64_keeps_its_digits(case, target):
    for facts, _ in main_reports(case, target):
        name = facts.kernel.metadata.name
        if case.has_noise:  # noise is float32 by definition
            assert not widened_inputs(facts.kernel.asm["ptx"]), name
        else:
            assert not facts.widens_floats, name
            assert not rounded_constants(facts.kernel.asm["ttir"]), name


@over([(case, "sm_90") for case in HERE])
def test_offsets_have_64_bits(case, target):
    for half in main_launches(case, target):
        for launch in half:
            additions = re.findall(r"tt\.addptr .*: tensor<.*>, tensor<(?:\d+x)*(i\d+)>", launch.kernel.asm["ttir"])
            assert additions, launch.name
            assert set(additions) == {"i64"}, launch.name


def test_a_grid_covers_more_than_2_31_elements():
    for case in (Case("sample_kl", F32, shape=HUGE), Case("loss", BF16, U8, shape=HUGE)):
        forward, backward = launches(case, "sm_90")
        for launch in (forward[0], backward[0]):
            steps = 1 if (at := geometry(launch.arguments)) is None else at.steps.value
            assert launch.grid[0] * steps * elements_per_program(launch.arguments) >= case.n_elements, launch.name
            assert launch.grid[0] < 2**31
    case = Case("stats", F32, shape=HUGE)
    (statistics, *_), _ = launches(case, "sm_90")
    elements_of_a_range = statistics.arguments["range_rows"] * statistics.arguments["BLOCK_COLS"]
    assert statistics.grid[0] * elements_of_a_range >= case.n_elements


# instructions per element on sm_90, of the cheapest path through whole tiles
BUDGETS = {"sample": 56, "sample_kl": 64}
MEASURED = {  # forward, backward
    Case("noise", F32): (39.3,),
    Case("noise", BF16): (39.8,),
    Case("sample", F32): (46.4, 50.2),
    Case("sample", BF16): (49.5, 52.6),
    Case("sample_kl", F32): (62.9, 64.4),
    Case("sample_kl", BF16): (63.9, 69.1),
    Case("kl", F32): (28.4, 27.1),
    Case("kl", BF16): (24.6, 24.1),
    Case("kl", F32, options=("prior",)): (37.6, 43.5),
    Case("kl", BF16, options=("prior",)): (35.2, 40.4),
    # a round and what comes once for all of a range's rounds, which alone cost 30 and 33
    Case("stats", F32, shape=RANGES): (79.9,),
    Case("stats", BF16, shape=RANGES): (89.8,),
    Case("loss", F32): (19.0, 10.1),
    Case("loss", BF16): (15.6, 7.9),
    Case("loss", BF16, U8): (16.9, 9.5),
    Case("loss", BF16, F32): (14.6, 7.9),
    Case("loss", F32, options=("bernoulli",)): (41.2, 10.1),
    Case("loss", BF16, options=("bernoulli",)): (36.2, 7.9),
    Case("loss", BF16, options=("log_cosh",)): (51.1, 7.9),
    Case("loss", F32, options=("gaussian",)): (28.2, 13.2),
    Case("loss", BF16, options=("gaussian",)): (25.7, 12.2),
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_instructions_do_not_grow(case):
    found = [facts.instructions_per_element(elements) for facts, elements in main_reports(case, "sm_90")]
    assert all(count <= 1.1 * measured for count, measured in zip(found, MEASURED[case], strict=True)), found
    assert found[0] <= BUDGETS.get(case.op, math.inf)
