"""What the compiler makes of the kernels, for GPUs that are not here: registers, widths, instructions, arithmetic."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

import fastvae
from tests.helpers.aot import TARGETS, DryRun, report
from tests.helpers.kernel_cases import (
    CASES,
    HUGE,
    LIKELIHOODS,
    ODD,
    ODD_BATCH,
    ODD_RANGES,
    RANGES,
    SEVERAL_TILES,
    SHORT_ROWS,
    STATS,
    Case,
    elements_per_program,
    geometry,
)

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("kernels_for_tensors_anywhere")]
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
F32, BF16, F16, F64, U8 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8

SPECIAL = [
    *(Case(op, dtype, shape=shape) for op in ("sample_kl", "kl") for dtype in (F32, BF16) for shape in (SHORT_ROWS,)),
    *(Case("sample_kl", dtype, shape=ODD_BATCH) for dtype in (F32, BF16)),
    *(Case(op, dtype, clamp=True) for op in ("sample_kl", "kl") for dtype in (F32, F64)),
    Case("loss", F32, shape=SEVERAL_TILES),
    Case("loss", BF16, U8, shape=SEVERAL_TILES),
    Case("sample_kl", F32, shape=HUGE),
    Case("loss", BF16, U8, shape=HUGE),
    Case("whole_loss", BF16, U8, shape=ODD, latent_cols=32),
    *STATS,
    Case("stats", F32, shape=RANGES, clamp=True),
    Case("stats", F32, shape=HUGE),
]
# everything where the instruction counts are taken; elsewhere what training runs, in the form with more code
USUAL = [
    *(Case(op, dtype, shape=ODD) for op in ("sample", "sample_kl", "loss") for dtype in (F32, BF16)),
    *(Case("loss", BF16, dtype, shape=ODD) for dtype in (U8, F32)),
    *(Case("sample_kl", dtype) for dtype in (F32, BF16)),
    Case("loss", BF16, U8),
    Case("whole_loss", BF16, U8, shape=ODD, latent_cols=32),
    *(Case("stats", dtype, shape=ODD_RANGES, clamp=True) for dtype in (F32, BF16)),
]
# every way through the loss that a user can choose
CHOSEN = [
    *(Case("loss", F32, shape=ODD, options=(name,)) for name in LIKELIHOODS),
    *(Case("loss", BF16, U8, shape=ODD, options=(name,)) for name in (*LIKELIHOODS, "shifted")),
    *(Case("loss", BF16, F32, shape=ODD, options=(name,)) for name in ("gaussian", "scaled_l1", "mask", "target")),
    *(Case("loss", F32, shape=ODD, options=(name,)) for name in ("gaussian", "scaled_sample", "weight")),
    *(Case("loss", F32, shape=ODD, options=(name,)) for name in ("extra_map", "recon_weight", "recon_weight_map")),
    Case("loss", BF16, U8, shape=ODD, options=("recon_weight_map", "scaled_sample", "mask", "beta")),
    *(Case("whole_loss", F32, shape=ODD, options=(name,)) for name in ("prior", "dim", "dim_mask")),
    Case("whole_loss", BF16, U8, shape=ODD, clamp=True, options=("dim", "mask", "bernoulli")),
]
MATRIX = [
    *((case, "sm_90") for case in (*CASES, *SPECIAL, *CHOSEN)),
    *((case, target) for target in TARGETS if target != "sm_90" for case in USUAL),
    *((case, target) for target in TARGETS if target != "sm_90" for case in CHOSEN if case.dtype == BF16),
]
ON_NVIDIA = [(case, target) for case, target in MATRIX if target in NVIDIA]


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


def main_reports(case, target):
    """Of the launches that see every element, with their elements per program; no folds of partial sums."""
    for half in launches(case, target):
        if half:
            yield report(half[0].kernel), elements_per_program(half[0].arguments)


@over(MATRIX)
def test_registers_are_not_spilled(case, target):
    for facts in reports(case, target):
        assert (facts.spill_stores, facts.spill_loads) == (0, 0), facts.kernel.metadata.name
        assert facts.stack <= 8, facts.kernel.metadata.name  # of one case on sm_100, where nothing is spilled to it


def rows_are_aligned(case):
    """Sampling numbers the noise by rows where it measures the KL, statistics are of columns: rows of any length take
    the general path.
    """
    return case.op not in ("sample_kl", "stats") or case.shape[1] % 16 == 0


@over([(Case("stats", dtype, shape=RANGES), "sm_90") for dtype in (F32, BF16)])
def test_statistics_leave_registers_to_other_programs(case, target):
    assert next(main_reports(case, target))[0].registers <= 60


def bytes_of(widths, *, wide):
    return sum(width // 8 * count for width, count in widths.items() if (width >= 128) == wide)


@over([(case, "sm_90") for case in (*CASES, *SPECIAL) if rows_are_aligned(case) and case.dtype != F64])
def test_a_thread_moves_all_of_its_elements_by_16_bytes(case, target):
    image = replace(case, op="loss") if case.op == "whole_loss" else case
    moved = [image.forward_floor], [replace(image, upstream=u).backward_floor for u in (2.0, 3.0)]
    for (facts, elements), floors in zip(main_reports(case, target), moved, strict=False):
        per_thread = elements // (32 * facts.kernel.metadata.num_warps)
        # paths through the tail leave out accesses; that through whole tiles has them all, and beside them at most a
        # few numbers of a row, or of a column: upstream gradients and partial sums
        few = 48 if case.op == "stats" else 16
        whole = [(floor.read * per_thread, floor.written * per_thread) for floor in floors]
        assert any(
            (bytes_of(path.global_loads, wide=True), bytes_of(path.global_stores, wide=True)) in whole
            and bytes_of(path.global_loads, wide=False) <= few
            and bytes_of(path.global_stores, wide=False) <= few
            for path in facts.paths
        ), facts.kernel.metadata.name


@over([(case, target) for target in TARGETS if target != "sm_90" for case in USUAL if rows_are_aligned(case)])
def test_accesses_of_16_bytes_elsewhere(case, target):
    for half, (facts, _) in zip(("forward", "backward"), main_reports(case, target), strict=False):
        assert max(facts.global_loads) >= 128, half
        assert max(facts.global_stores) >= 128, half


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


@over([(case, target) for case, target in ON_NVIDIA if case.dtype == F64])
def test_float64_keeps_its_digits(case, target):
    for facts, _ in main_reports(case, target):
        if case.has_noise:  # noise is float32 by definition
            assert not widened_inputs(facts.kernel.asm["ptx"]), facts.kernel.metadata.name
        else:
            assert not facts.widens_floats, facts.kernel.metadata.name


@over([(case, "sm_90") for case in (*CASES, *SPECIAL)])
def test_offsets_have_64_bits(case, target):
    for half in launches(case, target):
        for launch in half[:1]:  # no folds of partial sums: those are few
            additions = re.findall(r"tt\.addptr .*: tensor<.*>, tensor<(?:\d+x)*(i\d+)>", launch.kernel.asm["ttir"])
            assert additions, launch.name
            assert set(additions) == {"i64"}, launch.name


def test_a_bf16_reconstruction_of_a_float64_target_compiles():
    """Arithmetic in float64, a gradient in 16 bits."""
    assert all(launches(Case("loss", BF16, F64, shape=ODD), "sm_90"))


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


# instructions per element on sm_90, of the path through whole tiles that does all the work
BUDGETS = {"sample": 56, "sample_kl": 64}
MEASURED = {  # forward, backward
    Case("noise", F32): (35.2,),
    Case("noise", BF16): (35.5,),
    Case("sample", F32): (41.3, 45.0),
    Case("sample", BF16): (43.3, 47.4),
    Case("sample_kl", F32): (57.6, 59.1),
    Case("sample_kl", BF16): (57.6, 62.2),
    Case("sample_kl", F32, options=("prior",)): (73.1, 81.1),
    Case("sample_kl", BF16, options=("prior",)): (77.2, 88.6),
    Case("kl", F32): (27.4, 27.1),
    Case("kl", BF16): (22.7, 23.1),
    # a round, which alone costs 21, and what comes once for all of a range's rounds
    Case("stats", F32, shape=RANGES): (155.8,),
    Case("stats", BF16, shape=RANGES): (119.1,),
    Case("loss", F32): (18.5, 10.1),
    Case("loss", BF16): (14.1, 12.8),
    Case("loss", BF16, U8): (15.9, 14.4),
    Case("loss", BF16, F32): (13.6, 11.9),
}


def instructions_per_element(case):
    return [facts.instructions_per_element(elements) for facts, elements in main_reports(case, "sm_90")]


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_instructions_do_not_grow(case):
    for found, measured in zip(instructions_per_element(case), MEASURED[case], strict=True):
        assert found <= 1.1 * measured


@over([(case, "sm_90") for case in MEASURED if case.op in BUDGETS and not case.options])
def test_sampling_stays_within_its_budget_of_instructions(case, target):
    assert instructions_per_element(case)[0] <= BUDGETS[case.op]
