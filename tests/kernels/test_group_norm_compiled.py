"""What the compiler makes of the kernels of group normalization: registers, widths of accesses, 64-bit offsets."""

import re
from functools import cache

import pytest
import torch

import fastvae
from tests.helpers.aot import TARGETS, DryRun, report
from tests.helpers.executed import executed
from tests.ops.test_group_norm import check, make

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("kernels_for_tensors_anywhere")]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

LARGE = (2, 128, 256, 256)  # as in the autoencoder of Stable Diffusion
SPLIT, GROUP, ODD, VIDEO = (2, 512, 64, 64), (2, 512, 16, 16), (2, 96, 45, 61), (1, 128, 4, 64, 64)
CASES = [
    *((shape, dtype, last) for shape in (LARGE, SPLIT) for dtype in (F32, BF16) for last in (False, True)),
    *((shape, dtype, last) for shape in (GROUP, ODD) for dtype in (F32, BF16) for last in (False, True)),
    *((shape, dtype, True) for shape in (SPLIT, GROUP) for dtype in (F16, F64)),
    ((2, 512, 8, 8), F32, False),
    *(((2, 512, 16, 32), dtype, last) for dtype in (F32, BF16) for last in (False, True)),
    (VIDEO, BF16, True),
]
WHOLE = [case for case in CASES if case[0] in (LARGE, SPLIT) and case[1] != F64]
over = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@pytest.fixture
def kernels_for_tensors_anywhere(monkeypatch):
    """Launches are compiled and not executed, so any tensor will do: those on meta have no memory."""
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    with fastvae.use_backend("triton"):
        yield


@cache
def launches(case, target="sm_90", residual=False):
    shape, dtype, last = case
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory).requires_grad_()
    affine = [
        torch.empty(shape[1], dtype=torch.promote_types(dtype, F32), device="meta").requires_grad_() for _ in "wb"
    ]
    with DryRun(target) as dry:
        added = torch.empty_like(x) if residual else None
        y = fastvae.group_norm_silu(x, 32, *affine, residual=added)
        torch.autograd.grad(y, (x, *affine), torch.empty_like(y))
    return tuple(dry.launches)


def name_of(launch):
    return launch.name.removesuffix("_kernel")


@over
def test_registers_are_not_spilled(case):
    for launch in launches(case):
        facts = report(launch.kernel)
        assert (facts.spill_stores, facts.spill_loads, facts.stack) == (0, 0, 0), launch.name


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [ODD, GROUP, (2, 512, 16, 32)], ids=str)
def test_other_targets(shape, last, target):
    for launch in launches((shape, BF16, last), target, residual=True):
        facts = report(launch.kernel)
        assert (facts.spill_stores, facts.spill_loads, facts.stack) == (0, 0, 0), launch.name


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: "-".join(map(str, case)))
def test_large_tensors_are_moved_by_16_bytes(case):
    tensors = {"moments": (1, 0), "apply": (1, 1), "sums": (2, 0), "dx": (2, 1)}
    seen = set()
    for launch in launches(case):
        if (name := name_of(launch)) in tensors:
            seen.add(name)
            facts, constants = report(launch.kernel), launch.arguments
            elements = constants["ROWS"] * constants["COLS"] // (32 * facts.kernel.metadata.num_warps)
            loads, stores = (count * elements * case[1].itemsize // 16 for count in tensors[name])
            # the first tile of moments is outside of the loop, and loops may be unrolled
            assert facts.global_loads[128] >= loads, name
            assert facts.global_stores[128] >= stores, name
            assert not {width for width in facts.global_stores if stores and width < 128}, name
    assert seen == tensors.keys()


@over
def test_offsets_have_64_bits(case):
    for launch in launches(case):
        additions = re.findall(r"tt\.addptr .*: tensor<.*>, tensor<(?:\d+x)*(i\d+)>", launch.kernel.asm["ttir"])
        if "fold" not in launch.name:
            assert set(additions) <= {"i64"}, launch.name


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_grid_covers_more_than_2_31_elements(last):
    case = (3, 64, 4096, 4096), BF16, last
    for launch in launches(case):
        constants = launch.arguments
        if "ROWS" in constants:
            tile = constants["ROWS"] * constants["COLS"] * constants["STEPS"]
            assert launch.grid[0] * tile >= 3 * 64 * 4096 * 4096
            assert launch.grid[0] < 2**31


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (GROUP, ["group_fwd", "group_bwd", "_fold_rows"]),
        (SPLIT, ["moments", "merge_moments", "apply", "sums", "merge_sums", "dx", "_fold_rows"]),
    ],
    ids=str,
)
def test_launches(shape, names):
    assert [name_of(launch) for launch in launches((shape, BF16, True))] == names


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("group_bytes", [0, 1 << 15], ids=["split", "whole"])
def test_compiled_code_executed_against_float64(group_bytes, dtype, last, monkeypatch):
    monkeypatch.setattr("fastvae_kernels.group_norm._GROUP_BYTES", group_bytes)
    for shape, groups in (((2, 8, 16, 16), 4), ((2, 12, 9, 5), 4)):
        inputs = make(shape, dtype, channels_last=last, residual=shape[1] == 12)
        with executed("sm_90") as done:
            check(inputs, groups)
        assert len(done) == (7 if group_bytes == 0 else 3)
