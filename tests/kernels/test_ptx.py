"""The interpreter of PTX: arithmetic against definitions, control flow, and every error."""

import numpy as np
import pytest

from tests.helpers.ptx import Fault, Unsupported, execute, parse

THREADS = 64
KINDS = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}


def module(body: str) -> str:
    """A kernel with two pointers; %rd1 and %rd2 hold them, %r1 the thread and %r2 the program."""
    lines = [
        *(f".reg .{kind} %{prefix}<99>;" for prefix, kind in KINDS.items()),
        *("ld.param.b64 %rd1, [k_param_0];", "ld.param.b64 %rd2, [k_param_1];"),
        *("mov.u32 %r1, %tid.x;", "mov.u32 %r2, %ctaid.x;"),
        *body.strip().splitlines(),
        "ret;",
    ]
    parameters = "".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}{',' * (i < 1)}\n" for i in range(2))
    return f".visible .entry k(\n{parameters})\n.reqntid {THREADS}\n{{\n" + "\n".join(lines) + "\n}\n"


def run(body, source=None, size=4 * THREADS, *, grid=1, shared=0, skew=0.0):
    """Execute; `source` is at the first pointer, and what the second points to, of `size` bytes, is returned."""
    first = np.zeros(8, np.uint8) if source is None else np.ascontiguousarray(source).view(np.uint8)
    found = np.zeros(size, np.uint8)
    execute(parse(module(body), skew), grid, [1 << 20, 1 << 30], [(1 << 20, first), (1 << 30, found)], shared)
    return found


def at(width: int, base: str = "%rd2") -> str:
    """%rd9 = base + width * thread"""
    return f"mul.wide.u32 %rd9, %r1, {width};\nadd.s64 %rd9, %rd9, {base};"


def f32(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def f64(x: float) -> str:
    return f"0d{np.float64(x).view(np.uint64):016X}"


def bf16(x: float) -> int:
    return int(np.float32(x).view(np.uint32) >> 16)


STORE = f"{at(4)}\nst.global.b32 [%rd9], {{ %r8 }};"
TINY = 2.0**-130  # subnormal
STATEMENTS = [  # a statement that sets %r9 from constants, and what %r9 holds
    ("add.s32 %r9, 4294967295, 3;", 2),
    ("sub.s32 %r9, 3, 5;", -2),
    ("mul.lo.s32 %r9, 65537, 65537;", 131073),
    ("mul.hi.u32 %r9, -1, -1;", 0xFFFFFFFE),
    ("mul.hi.s32 %r9, -1, -1;", 0),
    ("mad.lo.s32 %r9, 7, 6, -2;", 40),
    ("mul.wide.s32 %rd3, -2, 3;\nshr.s64 %rd3, %rd3, 1;\ncvt.u32.u64 %r9, %rd3;", -3),
    ("mad.wide.u32 %rd3, -1, 2, 5;\nshr.u64 %rd3, %rd3, 32;\ncvt.u32.u64 %r9, %rd3;", 2),
    ("div.s32 %r9, -7, 2;", -3),
    ("rem.s32 %r9, -7, 2;", -1),
    ("div.u32 %r9, -7, 2;", 0x7FFFFFFC),
    ("min.s32 %r9, -1, 1;", -1),
    ("max.u32 %r9, -1, 1;", 0xFFFFFFFF),
    ("abs.s32 %r9, -5;", 5),
    ("neg.s32 %r9, 5;", -5),
    ("not.b32 %r9, 5;", ~5),
    ("popc.b32 %r9, 0xF0F0;", 8),
    ("shl.b32 %r9, 1, 31;", 1 << 31),
    ("shl.b32 %r9, 1, 32;", 0),
    ("shr.s32 %r9, -8, 40;", -1),
    ("shr.u32 %r9, -8, 28;", 15),
    ("bfe.u32 %r9, 0x12345678, 8, 12;", 0x456),
    ("bfe.s32 %r9, 0xF0, 4, 4;", -1),
    ("bfe.u32 %r9, 0x12345678, 8, 0;", 0),
    ("prmt.b32 %r9, 0x33221100, 0x77665544, 0x7260U;", 0x77226600),
    ("prmt.b32 %r9, 0x80, 0, 0x1118U;", 0x000000FF),
    ("cvt.s64.s32 %rd3, -5;\nshr.u64 %rd3, %rd3, 32;\ncvt.u32.u64 %r9, %rd3;", -1),
    ("cvt.u64.u32 %rd3, -5;\nshr.u64 %rd3, %rd3, 32;\ncvt.u32.u64 %r9, %rd3;", 0),
    ("mov.b32 %r9, {1, 2};", 0x20001),
    ("mov.b64 %rd3, {7, 9};\nmov.b64 {_, %r9}, %rd3;", 9),
    ("mov.b32 %r3, 0x20001;\nmov.b32 {%rs3, %rs4}, %r3;\ncvt.u32.u16 %r9, %rs4;", 2),
    (f"add.f32 %r9, {f32(1)}, {f32(2**-24)};", np.float32(1)),
    (f"fma.rn.f32 %r9, {f32(1 + 2**-12)}, {f32(1 + 2**-12)}, {f32(-1 - 2**-11)};", np.float32(2**-24)),
    (f"mul.f32 %r9, {f32(TINY)}, {f32(1)};", np.float32(TINY)),
    (f"fma.rn.ftz.f32 %r9, {f32(TINY)}, {f32(1)}, {f32(-0.0)};", np.float32(0)),
    (f"abs.ftz.f32 %r9, {f32(-TINY)};", np.float32(0)),
    (f"min.f32 %r9, {f32(np.nan)}, {f32(1)};", np.float32(1)),
    (f"max.f32 %r9, {f32(np.nan)}, {f32(1)};", np.float32(1)),
    (f"max.NaN.f32 %r9, {f32(np.nan)}, {f32(1)};", np.float32(np.nan)),
    (f"neg.f32 %r9, {f32(0)};", np.float32(-0.0)),
    (f"cvt.rzi.s64.f64 %rd3, {f64(-2.7)};\ncvt.u32.u64 %r9, %rd3;", -2),
    (f"cvt.rzi.s32.f32 %r9, {f32(1e20)};", 2**31 - 1),
    (f"cvt.rni.s32.f32 %r9, {f32(np.nan)};", 0),
    (f"cvt.rni.s32.f32 %r9, {f32(2.5)};", 2),
    ("cvt.rn.f32.u32 %r9, -1;", np.float32(2**32)),
    ("cvt.rn.f32.s32 %r9, 16777217;", np.float32(2**24)),
    (f"cvt.rn.f32.f64 %r9, {f64(1 + 2**-30)};", np.float32(1)),
    (f"cvt.f64.f32 %rd3, {f32(0.1)};\ncvt.rn.f32.f64 %r9, %rd3;", np.float32(0.1)),
    (f"cvt.rn.f16x2.f32 %r9, {f32(65520)}, {f32(1)};", 0x7C003C00),
    (f"cvt.rn.bf16x2.f32 %r9, {f32(1 + 2**-8)}, {f32(1 + 3 * 2**-8)};", bf16(1) << 16 | bf16(1 + 2**-6)),
    (f"cvt.rz.bf16x2.f32 %r9, {f32(1 + 3 * 2**-8)}, {f32(-1.999)};", bf16(1 + 2**-7) << 16 | bf16(-1.9921875)),
    (f"cvt.rn.bf16.f32 %rs3, {f32(-np.nan)};\ncvt.u32.u16 %r9, %rs3;", 0x7FFF),
    (f"cvt.f32.bf16 %r9, {bf16(-1.5)};", np.float32(-1.5)),
    (f"add.bf16 %rs3, {bf16(1)}, {bf16(2**-8)};\ncvt.f32.bf16 %r9, %rs3;", np.float32(1)),
    (f"fma.rn.bf16 %rs3, {bf16(3)}, {bf16(5)}, {bf16(1)};\ncvt.f32.bf16 %r9, %rs3;", np.float32(16)),
    (f"abs.bf16x2 %r9, {bf16(-2) << 16 | bf16(3)};", bf16(2) << 16 | bf16(3)),
    (f"fma.rn.f16x2 %r9, {0x3C004000}, {0x40004000}, 0;", 0x40004400),
    (f"mov.b16 %rs3, {0x3C00};\nadd.f16 %rs3, %rs3, %rs3;\ncvt.f32.f16 %r9, %rs3;", np.float32(2)),
    (f"div.rn.f64 %rd3, {f64(1)}, {f64(3)};\ncvt.rn.f32.f64 %r9, %rd3;", np.float32(1 / 3)),
    (
        f"fma.rn.f64 %rd3, {f64(1 + 2**-30)}, {f64(1 - 2**-30)}, {f64(-1)};\ncvt.rn.f32.f64 %r9, %rd3;",
        -np.float32(2**-60),
    ),
    ("setp.eq.b32 %p1, %r2, 0;\nselp.b32 %r9, 7, 8, %p1;", 7),
    (f"setp.lt.f32 %p1, {f32(np.nan)}, {f32(1)};\nselp.b32 %r9, 7, 8, %p1;", 8),
    (f"setp.ltu.f32 %p1, {f32(np.nan)}, {f32(1)};\nselp.b32 %r9, 7, 8, %p1;", 7),
    (f"setp.ne.f32 %p1, {f32(np.nan)}, {f32(1)};\nselp.b32 %r9, 7, 8, %p1;", 8),
    (f"setp.neu.f32 %p1, {f32(np.nan)}, {f32(1)};\nselp.b32 %r9, 7, 8, %p1;", 7),
    (f"setp.nan.f32 %p1, {f32(np.nan)}, {f32(1)};\nselp.b32 %r9, 7, 8, %p1;", 7),
    (f"setp.lt.bf16 %p1, {bf16(-2)}, {bf16(1)};\nselp.b32 %r9, 7, 8, %p1;", 7),
    ("setp.lo.u32 %p1, 1, -1;\nsetp.lt.s32 %p2, 1, -1;\nxor.pred %p3, %p1, %p2;\nselp.b32 %r9, 7, 8, %p3;", 7),
    ("mov.pred %p1, -1;\nnot.pred %p1, %p1;\nselp.b32 %r9, 7, 8, %p1;", 8),
    ("{ .reg .b32 tmp; mov.b64 {%r9, tmp}, 0x700000005; }", 5),
    ("mov.b32 %r9, 5;\nmov.b32 %r3, %r9;\nsetp.eq.b32 %p1, %r2, 1;\n@%p1 mov.b32 %r9, 6;", 5),
]


@pytest.mark.parametrize(("statement", "expected"), STATEMENTS)
def test_a_statement(statement, expected):
    found = run(f"{statement}\nmov.b32 %r8, %r9;\n{STORE}").view(np.uint32)
    bits = np.uint32(expected & 0xFFFFFFFF) if isinstance(expected, int) else expected.view(np.uint32)
    assert (found == bits).all() or (np.isnan(expected) and np.isnan(found.view(np.float32)).all())


APPROXIMATIONS = {  # the function, its domain, and the error that PTX allows: relative, or absolute if below
    "ex2.approx.f32": (np.exp2, (-30, 30), 2.5 * 2**-23, 0),
    "ex2.approx.ftz.f32": (np.exp2, (-30, 30), 2.5 * 2**-23, 0),
    "lg2.approx.f32": (np.log2, (1e-3, 4), 2**-22, 2**-22),
    "sqrt.approx.ftz.f32": (np.sqrt, (1e-3, 9), 2**-23, 0),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), (1e-3, 9), 2**-22.9, 0),
    "rcp.approx.ftz.f32": (np.reciprocal, (-9, 9), 2**-23, 0),
    "div.full.f32": (lambda x: 3 / x, (-9, 9), 2 * 2**-23, 0),
}


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
@pytest.mark.parametrize("skew", [-1.0, 0.0, 1.0])
def test_approximations_err_as_far_as_they_may_and_no_further(opcode, skew):
    function, (low, high), relative, absolute = APPROXIMATIONS[opcode]
    x = np.random.default_rng(0).uniform(low, high, THREADS).astype(np.float32)
    source = f"%r8, {f32(3)}, %r8" if opcode.startswith("div") else "%r8, %r8"
    body = f"{at(4, '%rd1')}\nld.global.b32 {{ %r8 }}, [%rd9];\n{opcode} {source};\n{STORE}"
    found = run(body, x, skew=skew).view(np.float32)
    exact = function(x.astype(np.float64))
    outward = (np.abs(found) - np.abs(exact)) / np.maximum(np.abs(exact) * relative, absolute)
    assert (np.abs(outward) <= 1).all()
    if skew:
        assert (np.sign(outward) == skew).all()
        assert np.abs(outward).mean() > 0.3  # the rest is lost to the grid of float32
    else:
        assert (found == exact.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("opcode", "expected"), [("ex2.approx.f32", 1.0), ("sqrt.approx.f32", 0.0), ("lg2.approx.f32", -np.inf)]
)
def test_the_results_of_zero_are_exact(opcode, expected):
    body = f"{opcode} %r9, {f32(0)};\nmov.b32 %r8, %r9;\n{STORE}"
    assert (run(body, skew=1.0).view(np.float32) == expected).all()


def test_threads_that_part_meet_again():
    """Odd threads take another way, and every thread goes round the loop as often as its number says."""
    body = f"""
mov.b32 %r3, 0;
and.b32 %r4, %r1, 1;
setp.eq.b32 %p1, %r4, 1;
@%p1 bra $L_odd;
mov.b32 %r5, 10;
bra.uni $L_loop;
$L_odd:
mov.b32 %r5, 100;
$L_loop:
add.s32 %r6, %r3, %r5;
mov.b32 %r3, %r6;
sub.s32 %r1, %r1, 1;
setp.ge.s32 %p2, %r1, 0;
@%p2 bra $L_loop;
shfl.sync.bfly.b32 %r7, %r3, 1, 31, -1;
mov.u32 %r1, %tid.x;
{at(4)}
st.global.b32 [%rd9], {{ %r7 }};"""
    thread = np.arange(THREADS)
    assert (run(body).view(np.uint32) == ((thread + 1) * np.where(thread % 2, 100, 10))[thread ^ 1]).all()


def test_programs_run_side_by_side_and_one_batch_after_another():
    body = f"mad.lo.s32 %r1, %r2, {THREADS}, %r1;\nmov.b32 %r8, %r1;\n{STORE}"
    found = run(body, size=4 * THREADS * 130, grid=130).view(np.uint32)
    assert (found == np.arange(THREADS * 130)).all()


def test_vectors_and_the_offset_of_an_address():
    body = f"""{at(16, "%rd1")}
ld.global.v4.b32 {{ %r3, %r4, %r5, %r6 }}, [ %rd9 + 0 ];
{at(8)}
st.global.v2.b32 [ %rd9 + 8 ], {{ %r6, %r3 }};"""
    source = np.arange(4 * THREADS, dtype=np.uint32)
    found = run(body, source, 8 * THREADS + 8).view(np.uint32)
    assert (found[2:] == source.reshape(-1, 4)[:, [3, 0]].ravel()).all()


def test_bytes_are_extended_by_their_sign():
    body = f"""{at(1, "%rd1")}
ld.global.s8 {{ %rs3 }}, [%rd9];
ld.global.b8 {{ %rs4 }}, [%rd9];
mov.b32 %r9, {{ %rs3, %rs4 }};
{at(4)}
st.global.b32 [%rd9], {{ %r9 }};"""
    assert (run(body, np.full(THREADS, 0x81, np.uint8)).view(np.uint32) == 0x0081FF81).all()


def test_shuffles_and_sums_of_a_warp():
    body = f"""
mov.b32 %r3, -1;
redux.sync.add.s32 %r4, %r1, %r3;
add.s32 %r5, %r1, 1;
and.b32 %r5, %r5, 31;
shfl.sync.idx.b32 %r6, %r1, %r5, 31, -1;
mov.b64 %rd3, {{%r4, %r6}};
{at(8)}
st.global.b64 [%rd9], {{ %rd3 }};"""
    found = run(body, size=8 * THREADS).view(np.uint32).reshape(2, 32, 2)
    thread = np.arange(THREADS).reshape(2, 32)
    assert (found[..., 0] == thread.sum(1, keepdims=True)).all()
    assert (found[..., 1] == np.roll(thread, -1, 1)).all()


SHARED = "mov.b32 %r8, global_smem;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r8, %r3;\nst.shared.b32 [%r4], %r1;"
LOAD_OTHER = f"xor.b32 %r5, %r3, 128;\nadd.s32 %r5, %r8, %r5;\nld.shared.b32 %r8, [%r5];\n{STORE}"


def test_shared_memory_passes_values_across_a_barrier_in_every_program():
    found = run(f"{SHARED}\nbar.sync 0;\n{LOAD_OTHER}", shared=4 * THREADS, grid=1).view(np.uint32)
    assert (found == np.arange(THREADS) ^ 32).all()
    body = f"{SHARED}\nbar.sync 0;\n{LOAD_OTHER}".replace("%rd9], {", "%rd2], {").replace("st.global", "@%p1 st.global")
    each = f"mul.wide.u32 %rd7, %r2, 4;\nadd.s64 %rd2, %rd2, %rd7;\nsetp.eq.b32 %p1, %r1, 5;\n{body}"
    assert (run(each, shared=4 * THREADS, grid=9, size=36).view(np.uint32) == 37).all()


@pytest.mark.parametrize("transposes", ["", ".trans"])
def test_matrices_of_16_bits(transposes):
    """Each warp stores two matrices and loads those of the other; those of thread t are 2 t and 2 t + 1."""
    body = f"""
mul.lo.s32 %r3, %r1, 131074;
add.s32 %r4, %r3, 65536;
add.s32 %r5, %r4, 33554944;
and.b32 %r6, %r1, 15;
shl.b32 %r6, %r6, 4;
and.b32 %r7, %r1, 32;
shl.b32 %r7, %r7, 3;
or.b32 %r6, %r6, %r7;
stmatrix.sync.aligned.m8n8.x2{transposes}.shared.b16 [%r6], {{%r4, %r5}};
bar.sync 0;
xor.b32 %r6, %r6, 256;
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r8, %r9}}, [%r6];
{at(8)}
st.global.v2.b32 [%rd9], {{ %r8, %r9 }};"""
    halves = 2 * np.arange(THREADS)[:, None] + np.array([0, 1])  # of a thread
    stored = np.stack([halves.reshape(2, 8, 8), halves.reshape(2, 8, 8) + 512], 1)  # warp, matrix, row, column
    found = run(body, size=8 * THREADS, shared=512).view(np.uint16).reshape(2, 32, 2, 2)  # warp, thread, matrix, half
    found = found.swapaxes(1, 2).reshape(2, 2, 8, 8)[::-1]
    assert (found == (stored.swapaxes(2, 3) if transposes else stored)).all()
    with pytest.raises(Fault, match="race"):
        run(body.replace("bar.sync 0;", ""), size=8 * THREADS, shared=512)


FAULTS = {
    "out of bounds": (f"{at(8)}\nst.global.b32 [%rd9], {{ %r1 }};", "byte 256 of 256"),
    "below every buffer": ("mov.b64 %rd9, 64;\nld.global.b32 {%r3}, [%rd9];", "out of bounds"),
    "misaligned": ("ld.global.v2.b32 {%r3, %r4}, [%rd1+4];", "misaligned.*multiple of 8"),
    "shared memory out of bounds": ("mov.b32 %r3, 4096;\nst.shared.b32 [%r3], %r3;", "out of bounds"),
    "a register that nothing wrote": ("add.s32 %r3, %r1, %r50;", "reads %r50"),
    "a register that some threads wrote": (
        "setp.lt.u32 %p1, %r1, 9;\n@%p1 mov.b32 %r3, 1;\nadd.s32 %r4, %r3, 1;",
        "reads %r3",
    ),
    "a warp that is incomplete": (
        "setp.lt.u32 %p1, %r1, 9;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;",
        "incomplete warp",
    ),
    "lanes left out of a sum": ("mov.b32 %r3, 65535;\nredux.sync.add.s32 %r4, %r1, %r3;", "leaves out lanes"),
    "a program that is incomplete": ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", "incomplete program"),
    "shared memory without a barrier": (f"{SHARED}\n{LOAD_OTHER}", "race: it loads what another thread stored"),
    "shared memory written again without a barrier": (
        f"{SHARED}\nbar.sync 0;\n{LOAD_OTHER}\nst.shared.b32 [%r4], %r8;",
        "race: it overwrites what another thread loaded",
    ),
    "shared memory that two threads read, written by the second": (
        f"{SHARED}\nbar.sync 0;\nld.shared.b32 %r5, [%r8];\nsetp.eq.b32 %p1, %r1, 63;\n@%p1 st.shared.b32 [%r8], %r5;",
        "race: it overwrites what another thread loaded",
    ),
    "shared memory that nothing was stored to": ("mov.b32 %r3, 0;\nld.shared.b32 %r4, [%r3];", "nothing was stored"),
    "conflicting stores": ("st.global.b32 [%rd2], { %r1 };", "different values"),
    "stores of two threads": (f"{at(4)}\nst.global.b32 [%rd9], {{ 1 }};\nst.global.b32 [%rd2], {{ 1 }};", "race"),
    "division by 0": ("div.s32 %r3, %r1, 0;", "divides an integer by 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_gpu_leaves_undefined_is_an_error_that_names_the_line(name):
    body, message = FAULTS[name]
    with pytest.raises(Fault, match=f"kernel.py:12:3: .*{message}"):
        run(f".loc\t1 12 3 // kernel.py:12:3\n{body}", shared=4 * THREADS)


def test_programs_are_not_ordered_by_barriers():
    body = "bar.sync 0;\nsetp.eq.b32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd2], { 5 };"
    run(body)
    with pytest.raises(Fault, match="race"):
        run(f"{body}\nbar.sync 0;\n@%p1 ld.global.b32 {{%r3}}, [%rd2];\n@%p1 st.global.b32 [%rd2], {{ %r3 }};", grid=2)


@pytest.mark.parametrize(
    "statement",
    [
        "vadd.s32 %r3, %r1, %r1;",
        "add.sat.s32 %r3, %r1, %r1;",
        "cvt.rz.f16.f32 %rs3, %r1;",
        "setp.lt.and.s32 %p1, %r1, %r1, %p2;",
        "ex2.approx.f64 %rd3, %rd1;",
        "atom.global.add.u32 %r3, [%rd1], %r1;",
        "shfl.sync.bfly.b32 %r3, %r1, 1, 15, -1;",
        "bar.arrive 0, 64;",
        "mov.u32 %r3, %clock;",
        "add.s32 %r3, %r1;",
        "add.s64 %rd3, %r1, %rd1;",
        "ld.local.b32 %r3, [%rd1];",
        "cp.async.ca.shared.global [%r3], [%rd1], 16;",
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(statement):
    with pytest.raises(Unsupported, match=statement.split(".")[0]):
        parse(module(statement))
