"""What the interpreted kernels of group normalization do to memory: bytes, launches, order of programs."""

import numpy as np
import pytest
import torch

import fastvae
from tests.conftest import INTERPRETED
from tests.helpers.meter import Meter
from tests.ops.test_group_norm import check, make

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)"),
    pytest.mark.usefixtures("interpreted_kernels"),
]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def interpreted_kernels():
    with fastvae.use_backend("triton"):
        yield


@pytest.fixture
def no_group_fits(monkeypatch):
    monkeypatch.setattr("fastvae_kernels.group_norm._GROUP_BYTES", 0)


def metered(inputs, groups, **options):
    """Meters of the forward and the backward pass, and all that they computed."""
    x, weight, bias, residual = inputs
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    dy = torch.empty_like(x).copy_(dy)
    with Meter(**options) as forward:
        y = fastvae.group_norm_silu(x, groups, weight, bias, residual=residual)
    with Meter(**options) as backward:
        gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    return forward, backward, (y, *gradients)


layouts = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["x", "sum"])
def test_bytes_of_a_split_group(dtype, last, residual, no_group_fits):
    """Forward two reads and a write, backward four reads and a write, within 5 %."""
    inputs = make((2, 32, 64, 64), dtype, channels_last=last, residual=residual)
    forward, backward, _ = metered(inputs, 4)
    size = inputs[0].numel() * dtype.itemsize
    for meter, read, written in ((forward, 3 if residual else 2, 2 if residual else 1), (backward, 4, 1)):
        assert read * size <= meter.loaded <= 1.05 * read * size, meter.table()
        assert written * size <= meter.stored <= 1.05 * written * size, meter.table()
    assert len(forward.launches) == 3
    assert len(backward.launches) == 4


@layouts
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_of_a_group_that_fits(dtype, last):
    """Forward a read and a write, backward two reads and a write."""
    inputs = make((2, 64, 16, 16), dtype, channels_last=last)
    forward, backward, _ = metered(inputs, 4)
    size = inputs[0].numel() * dtype.itemsize
    for meter, read in ((forward, 1), (backward, 2)):
        assert read * size <= meter.loaded <= 1.05 * read * size, meter.table()
        assert size <= meter.stored <= 1.05 * size, meter.table()
    assert [len(meter.launches) for meter in (forward, backward)] == [1, 2]


@layouts
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 37, 31), 4), ((3, 8, 7, 5), 2)], ids=str)
def test_bits_do_not_depend_on_the_order_of_programs(shape, groups, last):
    inputs = make(shape, F32, channels_last=last)
    *_, expected = metered(inputs, groups)
    for order in ("reverse", 1):
        *_, actual = metered(inputs, groups, order=order)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), order


@layouts
def test_bits_of_a_sample_do_not_depend_on_its_batch(last, no_group_fits):
    x, weight, bias, _ = make((3, 6, 40, 30), F32, channels_last=last)
    whole = fastvae.group_norm_silu(x, 3, weight, bias)
    for i in range(3):
        assert torch.equal(fastvae.group_norm_silu(x[i : i + 1], 3, weight, bias), whole[i : i + 1])


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8, 16, 16), 4), ((3, 12, 9, 5), 4), ((2, 70, 33, 2), 2), ((1, 8, 3, 40, 37), 4), ((2, 6, 1, 1), 2)],
    ids=str,
)
def test_values_of_split_groups(shape, groups, dtype, last, no_group_fits):
    """Sizes at which the other tests hold a group in registers."""
    with Meter():  # no access out of bounds, no masked lane that is used, no two programs in one place
        y = check(make(shape, dtype, channels_last=last, residual=shape[1] == 12), groups)
    assert y.is_contiguous() or last


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@layouts
def test_a_mean_of_a_thousand_deviations(dtype, last, no_group_fits):
    """Where aten on a CPU is off by a tenth."""
    x, weight, bias, _ = make((1, 8, 64, 40), dtype, channels_last=last, offset=1000.0 if dtype == F32 else 8.0)
    with np.errstate(over="ignore"):  # the interpreter's, of lanes outside
        check((x, weight, bias, None), 4, factor=15)
