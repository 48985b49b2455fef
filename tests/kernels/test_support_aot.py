"""The dry run sees real launches; the report catches every planted fault and passes clean kernels."""

import pytest
import torch

from tests.helpers.aot import TARGETS, DryRun, report
from tests.helpers.sass import GLOBAL_LOADS, Code, Instruction

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")

pytestmark = pytest.mark.compiled
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
BLOCK_SIZE = 1024


@triton.jit
def _masked_scale_kernel(x_ptr, y_ptr, scale, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    tl.store(y_ptr + offsets, x * scale + x, mask=mask)


@triton.jit
def _branched_scale_kernel(x_ptr, y_ptr, scale_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale == 1:
        return
    pid = tl.program_id(0).to(tl.int64)
    offsets = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    if (pid + 1) * BLOCK_SIZE <= n_elements:
        x = tl.load(x_ptr + offsets).to(tl.float32)
        tl.store(y_ptr + offsets, x * scale + tl.exp(x))
    else:
        mask = offsets < n_elements
        x = tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32)
        tl.store(y_ptr + offsets, x * scale + tl.exp(x), mask=mask)


@triton.jit
def _strided_scale_kernel(x_ptr, y_ptr, scale, n_elements, BLOCK_SIZE: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK_SIZE, n_elements, tl.num_programs(0) * BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        if start + BLOCK_SIZE <= n_elements:
            tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) * scale)
        else:
            mask = offsets < n_elements
            tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0) * scale, mask=mask)


@triton.jit
def _row_sums_kernel(x_ptr, sum_ptr, BLOCK_SIZE: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(sum_ptr + pid, tl.sum(tl.load(x_ptr + pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE))))


@triton.jit
def _noise_kernel(x_ptr, seed, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    a, b, c, d = tl.randn4x(seed, offsets)
    tl.store(x_ptr + offsets, a * b + c * d)


@triton.jit
def _clamp_kernel(x_ptr, y_ptr, KEEPS_NAN: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + offsets)
    propagate_nan: tl.constexpr = tl.PropagateNan.ALL if KEEPS_NAN else tl.PropagateNan.NONE
    tl.store(y_ptr + offsets, tl.maximum(x, 0.0, propagate_nan=propagate_nan))


@triton.jit
def _shift_kernel(x_ptr, y_ptr, by, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) + by)


def launch(kernel, *args, **options):
    """As a launcher of the library does: the grid from a function, options by name, fusion explicit."""
    options = {"BLOCK_SIZE": BLOCK_SIZE, "enable_fp_fusion": True} | options
    kernel[lambda arguments: (3, arguments["BLOCK_SIZE"] // BLOCK_SIZE)](*args, **options)


def compiled(target, kernel, *args, **options):
    with DryRun(target) as dry:
        launch(kernel, *args, **options)
    (dry_launch,) = dry.launches
    return report(dry_launch.kernel)


def pair(n_elements, dtype=torch.float32, **options):
    return torch.zeros(n_elements, dtype=dtype, **options), torch.zeros(n_elements, dtype=dtype, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_dry_run_records_the_launch_and_executes_nothing(target):
    x, y = torch.ones(3000), torch.zeros(3000)
    with DryRun(target) as dry:
        launch(_masked_scale_kernel, x, y, 2.5, 3000, num_warps=8)
        launch(_masked_scale_kernel, x, y, 2.5, 3000)
    assert not y.any()
    first, second = dry.launches
    assert (first.name, first.grid) == ("_masked_scale_kernel", (3, 1))
    assert (first.kernel.metadata.num_warps, second.kernel.metadata.num_warps) == (8, 4)
    assert first.arguments["x_ptr"] is x
    assert (first.arguments["n_elements"], first.arguments["BLOCK_SIZE"]) == (3000, BLOCK_SIZE)
    assert ("cubin" in first.kernel.asm) == target.startswith("sm_")
    assert first.kernel.metadata.target.arch == TARGETS[target][1]


def test_dry_run_specializes_as_a_launch_does():
    x, y = pair(4097)
    with DryRun("sm_90") as dry:
        launch(_masked_scale_kernel, x[:4096], y[:4096], 2.5, 4096)
        launch(_masked_scale_kernel, x, y, 2.5, 4097)
        launch(_masked_scale_kernel, x[1:], y[1:], 2.5, 4096)
        launch(_masked_scale_kernel, *pair(2**33, device="meta"), 2.5, 2**33)
    assert [dry_launch.divisible_by_16 for dry_launch in dry.launches] == [
        {"x_ptr", "y_ptr", "n_elements"},
        {"x_ptr", "y_ptr"},
        {"n_elements"},
        {"x_ptr", "y_ptr", "n_elements"},
    ]
    signatures = [dry_launch.kernel.src.signature for dry_launch in dry.launches]
    assert [signature["n_elements"] for signature in signatures] == ["i32", "i32", "i32", "i64"]


def test_dry_runs_nest_and_leave_nothing_behind():
    from triton.runtime.driver import driver

    run, active = triton.JITFunction.run, driver._active
    with DryRun("sm_80") as outer:
        with DryRun("gfx942") as inner:
            launch(_masked_scale_kernel, *pair(16), 2.5, 16)
        launch(_masked_scale_kernel, *pair(16), 2.5, 16)
    assert [dry_launch.kernel.metadata.target.arch for dry_launch in (*inner.launches, *outer.launches)] == [
        "gfx942",
        80,
    ]
    with pytest.raises(KeyError), DryRun("sm_90"):
        launch(_masked_scale_kernel, *pair(16), 2.5, 16, no_such_option=1)
    assert triton.JITFunction.run is run
    assert driver._active is active
    assert not _masked_scale_kernel.device_caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_a_clean_kernel_passes(target, dtype):
    # 16 bytes a thread in bfloat16, also with the wider warps of gfx942
    facts = compiled(
        target, _branched_scale_kernel, *pair(9000, dtype), torch.zeros(1), 9000, BLOCK_SIZE=2 * BLOCK_SIZE
    )
    assert (facts.stack, facts.spill_stores, facts.spill_loads, facts.local_accesses) == (0, 0, 0, 0)
    assert (facts.shared, facts.shared_accesses, facts.barriers) == (0, 0, 0)
    assert 8 < facts.registers < 64
    assert facts.global_loads[128] > 0
    assert facts.global_stores[128] > 0


@pytest.mark.parametrize(("dtype", "narrow"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.uint8, 8)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_a_mask_against_an_unknown_size_is_seen_as_scalar_accesses(target, dtype, narrow):
    aligned = compiled(target, _masked_scale_kernel, *pair(4096, dtype), 3, 4096)
    odd = compiled(target, _masked_scale_kernel, *pair(4097, dtype), 3, 4097)
    assert min(aligned.global_loads) > narrow
    assert set(odd.global_loads) == set(odd.global_stores) == {narrow}


@pytest.mark.parametrize("target", NVIDIA)
def test_a_planted_spill_is_caught(target):
    facts = compiled(target, _noise_kernel, torch.zeros(BLOCK_SIZE), 1, maxnreg=24)
    assert facts.registers <= 24
    assert facts.stack > 0
    assert facts.spill_stores > 0
    assert facts.spill_loads > 0
    assert facts.local_accesses > 0


def test_a_planted_spill_is_caught_on_amd():
    facts = compiled("gfx942", _noise_kernel, torch.zeros(8192), 1, BLOCK_SIZE=8192, waves_per_eu=8)
    assert facts.stack > 0
    assert facts.spill_stores == facts.spill_loads > 0
    assert facts.local_accesses > 0


def test_a_local_array_is_not_a_spill():
    facts = compiled("sm_90", _noise_kernel, torch.zeros(2 * BLOCK_SIZE), 1, BLOCK_SIZE=2 * BLOCK_SIZE)
    assert facts.stack > 0
    assert facts.spill_stores == facts.spill_loads == 0


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_and_barriers_of_a_reduction_are_counted(target):
    facts = compiled(target, _row_sums_kernel, torch.zeros(3, BLOCK_SIZE), torch.zeros(3))
    assert min(facts.shared, facts.shared_accesses, facts.barriers) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", NVIDIA)
def test_a_dropped_nan_is_caught(target, dtype):
    assert compiled(target, _clamp_kernel, *pair(BLOCK_SIZE, dtype), KEEPS_NAN=False).drops_nan
    assert not compiled(target, _clamp_kernel, *pair(BLOCK_SIZE, dtype), KEEPS_NAN=True).drops_nan


@pytest.mark.parametrize("target", NVIDIA)
def test_a_scalar_that_lost_its_digits_is_caught(target):
    x, y = pair(BLOCK_SIZE, torch.float64)
    assert compiled(target, _shift_kernel, x, y, 0.1).widens_floats
    assert not compiled(target, _shift_kernel, x, y, 3).widens_floats


@pytest.mark.parametrize("target", NVIDIA)
def test_missing_fusion_is_caught(target):
    x, y = pair(BLOCK_SIZE)
    assert compiled(target, _masked_scale_kernel, x, y, 2.5, BLOCK_SIZE).fused_multiply_add
    assert not compiled(target, _masked_scale_kernel, x, y, 2.5, BLOCK_SIZE, enable_fp_fusion=False).fused_multiply_add
    assert not compiled(target, _shift_kernel, x, y, 0.1).fused_multiply_add  # has nothing to fuse
    # the library functions inside come with fused instructions of their own
    assert not compiled(target, _noise_kernel, x, 1, BLOCK_SIZE=128, enable_fp_fusion=False).fused_multiply_add


@pytest.mark.parametrize("target", NVIDIA)
def test_path_is_not_the_early_return_nor_the_masked_tail(target):
    facts = compiled(target, _branched_scale_kernel, *pair(9000), torch.zeros(1), 9000)
    assert facts.path.global_loads == {32: 1, 128: 2}
    assert facts.path.global_stores == {128: 2}
    assert facts.path[-1].mnemonic == "EXIT"
    assert len(facts.path) < 2 / 3 * len(facts.code)
    assert facts.instructions_per_element(BLOCK_SIZE) == len(facts.path) / 8


@pytest.mark.parametrize("n_elements", [9000, 9216])
@pytest.mark.parametrize("target", NVIDIA)
def test_path_takes_one_round_of_a_loop(target, n_elements):
    facts = compiled(target, _strided_scale_kernel, *pair(n_elements), 2.5, n_elements)
    assert facts.path.global_loads == facts.path.global_stores == {128: 2}


def test_path_of_a_kernel_without_wide_stores_goes_through_its_wide_loads():
    facts = compiled("sm_90", _row_sums_kernel, torch.zeros(3, BLOCK_SIZE), torch.zeros(3))
    assert facts.path.global_loads == {128: 2}


def test_paths_through_arms_that_exclude_each_other():
    code = Code(
        [
            Instruction("EXIT", predicate="@P0"),  # 0x00
            Instruction("BRA", "0x60", "@!P1"),
            Instruction("LDG.E.64"),  # 0x20, the costly arm
            Instruction("FMUL"),
            Instruction("STG.E.128"),
            Instruction("BRA.U", "UP0,0xa0"),
            Instruction("BRA", "0x90", "@P2"),  # 0x60, the cheap arm
            Instruction("STG.E.128"),
            Instruction("EXIT"),
            Instruction("STG.E.64"),  # 0x90, the masked tail
            Instruction("EXIT"),  # 0xa0
            Instruction("BRA", "0xb0"),
        ]
    )
    assert [[instruction.opcode for instruction in path] for path in code.paths()] == [
        ["EXIT", "BRA", "BRA", "STG.E.128", "EXIT"],
        ["EXIT", "BRA", "LDG.E.64", "FMUL", "STG.E.128", "BRA.U", "EXIT"],
    ]
    assert code.paths(GLOBAL_LOADS) == code.paths()[1:]


def test_equal_kernels_share_one_report():
    first = compiled("sm_90", _shift_kernel, *pair(64), 0.1)
    assert compiled("sm_90", _shift_kernel, *pair(128), 0.2) is first
    assert compiled("sm_80", _shift_kernel, *pair(64), 0.1) is not first
