"""The meter counts what the closed form says, passes clean kernels, and catches every planted fault."""

import numpy as np
import pytest
import torch

from tests.helpers.interpreter import bf16_bits, fix_bf16_rounding
from tests.helpers.meter import Meter, OutOfBounds, Race

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")

BLOCK_SIZE = 256


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=0), mask=mask)


@triton.jit
def _load_at(x_ptr, offsets):
    return tl.load(x_ptr + offsets)


@triton.jit
def _unmasked_copy_kernel(x_ptr, y_ptr, shift, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(y_ptr + offsets, _load_at(x_ptr, offsets + shift))


@triton.jit
def _sum_kernel(x_ptr, sum_ptr, n_elements, HAS_OTHER: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    if HAS_OTHER:
        x = tl.load(x_ptr + offsets, mask=offsets < n_elements, other=0)
    else:
        x = tl.load(x_ptr + offsets, mask=offsets < n_elements)
    tl.store(sum_ptr, tl.sum(x.to(tl.float32)))


@triton.jit
def _add_rows_kernel(x_ptr, y_ptr, bias_ptr, out_ptr, row_stride, n_cols, BLOCK_SIZE: tl.constexpr):
    pid, cols = tl.program_id(0), tl.arange(0, BLOCK_SIZE)
    mask = cols < n_cols
    x = tl.load(x_ptr + pid * row_stride + cols, mask=mask, other=0)
    y = tl.load(y_ptr + pid * row_stride + cols, mask=mask, other=0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(out_ptr + pid * n_cols + cols, x + y, mask=mask)


@triton.jit
def _add_pair_kernel(pair, out_ptr):
    tl.store(out_ptr, tl.load(pair[0]) + tl.load(pair[1]))


@triton.jit
def _store_pid_kernel(out_ptr, last_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.program_id(0))
    tl.store(last_ptr, tl.program_id(0))


@triton.jit
def _neighbour_kernel(x_ptr, n_programs):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, tl.load(x_ptr + (pid + 1) % n_programs))


@triton.jit
def _read_all_then_write_kernel(x_ptr, n_programs, BLOCK_SIZE: tl.constexpr):
    total = tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK_SIZE)))
    if tl.program_id(0) == n_programs - 1:
        tl.store(x_ptr, total)


@triton.jit
def _two_lanes_kernel(x_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    tl.store(x_ptr + offsets // 2, offsets)


@triton.jit
def _atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1)


@triton.jit
def _round_kernel(x_ptr, y_ptr, z_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    y = tl.load(x_ptr + offsets).to(tl.bfloat16)
    tl.store(y_ptr + offsets, y)
    tl.store(z_ptr + offsets, y.to(tl.float32))


def copy(x, y, n_elements):
    _copy_kernel[(triton.cdiv(n_elements, BLOCK_SIZE),)](x, y, n_elements, BLOCK_SIZE=BLOCK_SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
@pytest.mark.parametrize("n_elements", [1, BLOCK_SIZE, 3 * BLOCK_SIZE + 7])
def test_bytes_are_those_of_the_closed_form(n_elements, dtype):
    x, y = torch.arange(n_elements).to(dtype), torch.empty(n_elements, dtype=dtype)
    with Meter() as meter:
        copy(x, y, n_elements)
        copy(y, x, n_elements)
    assert torch.equal(x, y)
    n_bytes = n_elements * dtype.itemsize
    assert [launch.name for launch in meter.launches] == ["_copy_kernel"] * 2
    assert meter.launches[0].grid == (triton.cdiv(n_elements, BLOCK_SIZE), 1, 1)
    moved = meter.launches[0].arguments
    assert set(moved) == {"x_ptr", "y_ptr"}
    assert (moved["x_ptr"].loaded, moved["x_ptr"].stored) == (n_bytes, 0)
    assert (moved["y_ptr"].loaded, moved["y_ptr"].stored) == (0, n_bytes)
    assert (moved["x_ptr"].distinct_loaded, moved["y_ptr"].distinct_stored) == (n_bytes, n_bytes)
    assert (meter.loaded, meter.stored, meter.total) == (2 * n_bytes, 2 * n_bytes, 4 * n_bytes)
    assert f"2 launches                               {4 * n_bytes} bytes" in meter.table()


def test_rereads_show_as_more_bytes_than_distinct_bytes():
    x, out = torch.ones(4, 8), torch.empty(4, 8)
    with Meter() as meter:
        _add_rows_kernel[(4,)](x, x, None, out, 8, 8, BLOCK_SIZE=8)
    (launch,) = meter.launches
    assert launch.arguments["x_ptr"] is launch.arguments["y_ptr"]
    assert (launch.arguments["x_ptr"].loaded, launch.arguments["x_ptr"].distinct_loaded) == (256, 128)
    assert launch.loaded == 256
    assert "x_ptr = y_ptr" in meter.table()


def test_in_place_launch_counts_both_directions():
    x = torch.arange(300.0)
    with Meter() as meter:
        copy(x, x, 300)
    assert (meter.loaded, meter.stored) == (1200, 1200)


def test_interleaved_halves_expanded_and_scalar_arguments_are_told_apart():
    packed, bias, out = torch.randn(5, 12), torch.tensor(2.0), torch.empty(5, 6)
    mu, logvar = packed.chunk(2, dim=1)
    with Meter() as meter:
        _add_rows_kernel[(5,)](mu, logvar, bias, out, 12, 6, BLOCK_SIZE=8)
    torch.testing.assert_close(out, mu + logvar + 2)
    moved = meter.launches[0].arguments
    assert (moved["x_ptr"].loaded, moved["y_ptr"].loaded, moved["out_ptr"].stored) == (120, 120, 120)
    assert (moved["bias_ptr"].loaded, moved["bias_ptr"].distinct_loaded) == (20, 4)
    with Meter() as meter:
        _add_rows_kernel[(5,)](mu[0].expand(5, 6), logvar, None, out, 0, 6, BLOCK_SIZE=8)
    assert (meter.launches[0].arguments["x_ptr"].loaded, meter.launches[0].arguments["x_ptr"].distinct_loaded) == (
        120,
        24,
    )
    assert "bias_ptr" not in meter.launches[0].arguments


def test_shared_bytes_belong_to_the_first_argument_that_covers_them():
    packed, out = torch.randn(5, 12), torch.empty(5, 6)
    with Meter() as meter:
        _add_rows_kernel[(5,)](packed[:, 6:], packed, None, out, 12, 6, BLOCK_SIZE=8)
        _add_rows_kernel[(5,)](packed[:, :6], packed, None, out, 12, 6, BLOCK_SIZE=8)
    apart, same = (launch.arguments for launch in meter.launches)
    assert (apart["x_ptr"].loaded, apart["y_ptr"].loaded) == (120, 120)
    assert (same["x_ptr"].loaded, same["y_ptr"].loaded) == (240, 0)


def test_tensors_in_a_tuple_are_arguments_of_their_own():
    out = torch.empty(1)
    with Meter() as meter:
        _add_pair_kernel[(1,)]((torch.ones(1), torch.ones(1, dtype=torch.float64)), out)
    assert out == 2
    moved = meter.launches[0].arguments
    assert (moved["pair[0]"].loaded, moved["pair[1]"].loaded, moved["out_ptr"].stored) == (4, 8, 4)


@pytest.mark.parametrize(
    ("shift", "where"), [(1, "at byte 1024 of 'x_ptr', which spans 1024"), (-1, "at byte -4 of 'x_ptr'")]
)
def test_out_of_bounds_is_caught_before_the_access(shift, where):
    around = torch.zeros(BLOCK_SIZE + 2)
    with (
        pytest.raises(OutOfBounds, match=rf"_unmasked_copy_kernel, program \(0, 0, 0\): load of 1 lanes.*{where}"),
        Meter(),
    ):
        _unmasked_copy_kernel[(1,)](around[1:-1], torch.empty(BLOCK_SIZE), shift, BLOCK_SIZE=BLOCK_SIZE)


def test_store_out_of_bounds_leaves_the_memory_alone():
    around = torch.zeros(2 * BLOCK_SIZE)
    with pytest.raises(OutOfBounds, match="store of 250 lanes"), Meter():
        _unmasked_copy_kernel[(1,)](torch.ones(BLOCK_SIZE), around[:6], 0, BLOCK_SIZE=BLOCK_SIZE)
    assert not around.any()


def test_hole_of_a_strided_view_is_out_of_bounds():
    packed, out = torch.randn(5, 12), torch.empty(5, 7)
    mu = packed[:, :6]
    with pytest.raises(OutOfBounds, match="load of 1 lanes outside"), Meter():
        _add_rows_kernel[(5,)](mu, mu, None, out, 12, 7, BLOCK_SIZE=8)


def test_misaligned_access_is_caught():
    x = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(OutOfBounds, match="not aligned"), Meter():
        copy(triton.reinterpret(x[1:], tl.float32), torch.empty(8), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8], ids=str)
def test_masked_lane_without_other_is_poisoned(dtype):
    fix_bf16_rounding()
    x, total = torch.ones(8, dtype=dtype), torch.zeros((), dtype=torch.float32)
    with Meter():
        _sum_kernel[(1,)](x, total, 5, HAS_OTHER=True, BLOCK_SIZE=8)
        assert total == 5
        _sum_kernel[(1,)](x, total, 8, HAS_OTHER=False, BLOCK_SIZE=8)
        assert total == 8
        _sum_kernel[(1,)](x, total, 5, HAS_OTHER=False, BLOCK_SIZE=8)
        assert total.isnan() if dtype.is_floating_point else total not in (5, 8)
    with Meter(poison=False):
        _sum_kernel[(1,)](x, total, 5, HAS_OTHER=False, BLOCK_SIZE=8)
        assert total == 5


@pytest.mark.parametrize("order", [None, "reverse", 3])
def test_races_are_caught_in_any_program_order(order):
    with (
        pytest.raises(Race, match=r"_store_pid_kernel.*: stores what program \d of the same launch stored"),
        Meter(order=order),
    ):
        _store_pid_kernel[(4,)](torch.empty(4), torch.empty(1))
    with (
        pytest.raises(Race, match=r"loads what program \d .* stored|stores what program \d .* loaded"),
        Meter(order=order),
    ):
        _neighbour_kernel[(4,)](torch.zeros(4), 4)
    with (
        pytest.raises(Race, match=r"stores what other programs .* loaded|loads what program 2 .* stored"),
        Meter(order=order),
    ):
        _read_all_then_write_kernel[(3,)](torch.zeros(4), 3, BLOCK_SIZE=4)


def test_one_program_may_read_what_it_wrote_and_launches_do_not_race():
    x = torch.zeros(4)
    with Meter() as meter:
        _neighbour_kernel[(1,)](x, 1)
        _read_all_then_write_kernel[(1,)](x, 1, BLOCK_SIZE=4)
        _read_all_then_write_kernel[(1,)](x, 1, BLOCK_SIZE=4)
    assert len(meter.launches) == 3


def test_two_lanes_of_one_store_and_atomics_are_races():
    with pytest.raises(Race, match="two lanes"), Meter():
        _two_lanes_kernel[(1,)](torch.zeros(8), BLOCK_SIZE=8)
    with pytest.raises(Race, match="atomic"), Meter():
        _atomic_kernel[(1,)](torch.zeros(1))


@pytest.mark.parametrize(
    ("order", "last"), [(None, 5), ("reverse", 0), (7, np.random.default_rng(7).permutation(6)[-1])]
)
def test_every_program_runs_once_in_the_given_order(order, last):
    ran, last_pid = torch.full((6,), -1), torch.full((1,), -1)
    with Meter(order=order, races=False):
        _store_pid_kernel[(6,)](ran, last_pid)
    assert ran.tolist() == list(range(6))
    assert last_pid.item() == last


def test_checks_can_be_switched_off_and_end_with_the_context():
    around, out = torch.arange(BLOCK_SIZE + 1.0), torch.empty(BLOCK_SIZE)
    with Meter(bounds=False) as meter:
        _unmasked_copy_kernel[(1,)](around[:-1], out, 1, BLOCK_SIZE=BLOCK_SIZE)
    assert meter.loaded == 4 * (BLOCK_SIZE - 1)  # what belongs to no argument is not counted
    _unmasked_copy_kernel[(1,)](around[:-1], out, 1, BLOCK_SIZE=BLOCK_SIZE)
    assert out[-1] == BLOCK_SIZE
    assert len(meter.launches) == 1


def test_other_errors_pass_through():
    with pytest.raises(TypeError, match="n_elements"), Meter():
        _copy_kernel[(1,)](torch.ones(1), torch.ones(1), BLOCK_SIZE=8)


def float32_values() -> torch.Tensor:
    random_bits = np.random.default_rng(0).integers(0, 2**32, 4096 - 16, np.uint32).view(np.float32)
    tie_down, tie_up, above_tie = (np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32)).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 9.1e-41, 1.1754944e-38]
    smallest_nan = np.array([0x7F800001], np.uint32).view(np.float32)
    return torch.from_numpy(
        np.concatenate([random_bits, np.float32(special), [tie_down, tie_up, above_tie], smallest_nan])
    )


def test_bf16_rounding_is_torchs():
    x = float32_values()
    fix_bf16_rounding()
    fix_bf16_rounding()
    y, z = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(x.shape)
    _round_kernel[(x.numel() // BLOCK_SIZE,)](x, y, z, BLOCK_SIZE=BLOCK_SIZE)
    expected = x.to(torch.bfloat16)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.view(torch.int16)[~y.isnan()], expected.view(torch.int16)[~y.isnan()])
    assert torch.equal(z.view(torch.int32)[~y.isnan()], expected.float().view(torch.int32)[~y.isnan()])
    assert z.isnan().sum() == x.isnan().sum() > 0


def test_bf16_rounding_keeps_the_shape_of_scalars():
    assert bf16_bits(np.array(1.0, np.float32)).shape == ()
