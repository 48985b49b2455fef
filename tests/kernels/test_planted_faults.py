"""Planted faults: execution of what was compiled catches each, and passes the sound kernel.

Some are planted in what the compiler wrote, which Triton's interpreter never sees; others in a kernel's source, where
it does not show in the interpreter.
"""

import os
import re

import pytest
import torch

from tests.helpers.executed import executed
from tests.helpers.kernel_cases import SHORT_ROWS, Case
from tests.helpers.ptx import Fault
from tests.kernels.test_executed import check

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
N, BLOCK = 1001, 256

# ------------------------------------------------------------------------------------------- in what the compiler wrote

SAMPLE, NARROW_SAMPLE = Case("sample_kl", F32), Case("sample_kl", BF16)
OFF = (AssertionError, "elements off")  # from the float64 oracle
IN_PTX = {  # a case; what is replaced, by what, where it comes first only if so; how it shows
    "shuffle by 4 instead of 8": (
        SAMPLE,
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )8,",
        r"\g<1>4,",
        False,
        (Fault, "different values"),
    ),
    "a barrier less": (SAMPLE, r"bar\.sync\s+0;", "", True, (Fault, r"\w+\.py:\d+:\d+: .*race")),
    "bf16 rounded toward zero": (NARROW_SAMPLE, r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2", False, OFF),
    "halves of a bf16 pair swapped": (
        NARROW_SAMPLE,
        r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%r\d+), (%r\d+);",
        r"\1, \3, \2;",
        True,
        OFF,
    ),
    "Philox multiplied with signs": (
        Case("noise", F32),
        r"mul\.wide\.u32(\s+%rd\d+, %r\d+, -?\d{9,};)",  # its factors are the only ones as large
        r"mul.wide.s32\1",
        True,
        OFF,
    ),
    "a shared address off by 16": (
        SAMPLE,
        r"(st\.shared\.[\w.]+\s+\[%r\d+)\]",
        r"\1+16]",
        True,
        (Fault, r"\w+\.py:\d+:\d+: "),
    ),
    "a reciprocal of a square root": (Case("noise", F32), r"\bsqrt\.approx", "rsqrt.approx", False, OFF),
    "a sum without its last addend": (
        Case("kl", F32, shape=SHORT_ROWS),
        r"add\.f32(\s+%r\d+, %r\d+), %r\d+;",
        r"mov.b32\1;",
        True,
        OFF,
    ),
    "accesses moved by 4 bytes": (
        Case("loss", F32),
        r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ \+ )0 \]",
        r"\g<1>4 ]",
        True,
        (Fault, "misaligned"),
    ),
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", IN_PTX)
def test_a_fault_in_what_the_compiler_wrote(name):
    case, pattern, replacement, once, (error, message) = IN_PTX[name]
    replaced = 0

    def edit(ptx):
        nonlocal replaced
        ptx, count = re.subn(pattern, replacement, ptx, count=int(once))
        replaced += count
        return ptx

    check(case, "sm_90")
    with pytest.raises(error, match=message):
        check(case, "sm_90", edit=edit)
    assert replaced


# ------------------------------------------------------------------------------------------------- in a kernel's source


@triton.jit
def _tail_kernel(x_ptr, y_ptr, n, FAULTY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets <= n if FAULTY else offsets < n
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["start"])
def _hint_kernel(x_ptr, y_ptr, start, FAULTY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    read = tl.multiple_of(start + offsets, 4) if FAULTY else start + offsets
    tl.store(y_ptr + offsets, tl.load(x_ptr + read))


@triton.jit
def _clamp_kernel(x_ptr, y_ptr, FAULTY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    propagate_nan: tl.constexpr = tl.PropagateNan.NONE if FAULTY else tl.PropagateNan.ALL
    tl.store(y_ptr + offsets, tl.clamp(tl.load(x_ptr + offsets), -1.0, 0.5, propagate_nan))


@triton.jit
def _scale_kernel(x_ptr, y_ptr, scale, FAULTY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    factor = scale if FAULTY else tl.load(scale)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) * factor)


def with_a_tail(faulty):
    beyond = int(INTERPRETED)  # the interpreter really reads and writes there
    x, y = torch.rand(N + beyond)[:N], torch.zeros(N + beyond)[:N]
    _tail_kernel[(-(-N // BLOCK),)](x, y, N, faulty, BLOCK, enable_fp_fusion=True)
    return y, 2 * x


def with_a_hint(faulty):
    x, y = torch.rand(BLOCK + 1), torch.zeros(BLOCK)
    _hint_kernel[(1,)](x, y, 1, faulty, BLOCK, enable_fp_fusion=True)
    return y, x[1:]


def with_a_nan(faulty):
    x, y = torch.linspace(-2, 2, BLOCK), torch.zeros(BLOCK)
    x[7] = float("nan")
    _clamp_kernel[(1,)](x, y, faulty, BLOCK, enable_fp_fusion=True)
    return y, x.clamp(-1, 0.5)


def with_a_float64_scalar(faulty):
    x, y = torch.rand(BLOCK, dtype=torch.float64), torch.zeros(BLOCK, dtype=torch.float64)
    _scale_kernel[(1,)](
        x, y, 0.1 if faulty else torch.tensor(0.1, dtype=torch.float64), faulty, BLOCK, enable_fp_fusion=True
    )
    return y, 0.1 * x


IN_SOURCE = {  # how it shows
    with_a_tail: (Fault, r"test_planted_faults\.py:\d+:\d+: .*out of bounds"),
    with_a_hint: (Fault, r"test_planted_faults\.py:\d+:\d+: .*misaligned"),
    with_a_nan: (AssertionError, "not close"),
    with_a_float64_scalar: (AssertionError, "not close"),
}


def close(results):
    torch.testing.assert_close(*results, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.compiled
@pytest.mark.parametrize("kernel", IN_SOURCE)
def test_a_fault_in_a_kernels_source(kernel):
    error, message = IN_SOURCE[kernel]
    with executed("sm_90"):
        close(kernel(faulty=False))
    with executed("sm_90"), pytest.raises(error, match=message):
        close(kernel(faulty=True))


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("kernel", [with_a_tail, with_a_hint])
def test_the_interpreter_misses_a_fault_in_a_kernels_source(kernel, faulty):
    close(kernel(faulty))
