"""What the compiler makes of the kernels of counts, and what that computes: see `test_kernels_compiled` and
`test_executed`.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch

from tests.helpers.aot import DryRun, report
from tests.helpers.executed import executed
from tests.ops import test_counts

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language", reason="the kernels need Triton")
device = pytest.importorskip("fastvae_kernels.count_likelihoods", reason="the kernels need Triton")
kernels = pytest.importorskip("fastvae_kernels.counts", reason="the kernels need Triton")
from fastvae_kernels.count_types import CountGrads, CountOptions, CountTensors  # noqa: E402
from fastvae_kernels.types import meta_of  # noqa: E402

pytestmark = pytest.mark.compiled
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ROWS = 2048  # of a batch: two to a program


class Case(NamedTuple):
    family: str
    genes: int
    head: str = "softmax"
    theta: str | None = None
    dtype: torch.dtype = F32
    mask: bool = False
    counts: torch.dtype | None = None

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.counts) if dtype]
        mask = ["mask"] * self.mask
        return "-".join([self.family, str(self.genes), self.head, *filter(None, [self.theta]), *dtypes, *mask])


# the longest rows that are held on chip, and longer ones, with what takes the most registers
CASES = [
    Case("nb", 4096, theta="gene"),
    Case("nb", 4001, theta="batch", dtype=BF16),
    Case("nb", 4096, theta="gene", mask=True),
    Case("nb", 4096, theta="cell", counts=torch.int32),
    Case("zinb", 4096, theta="batch"),
    Case("zinb", 4001, theta="cell", dtype=BF16),
    Case("zinb", 4096, theta="cell", mask=True),
    Case("poisson", 8192, mask=True),
    Case("multinomial", 8192),
    Case("nb", 2000, theta="gene"),
    Case("nb", 20_000, theta="gene"),
    Case("zinb", 20_000, theta="cell", dtype=BF16, mask=True),
    Case("zinb", 20_000, "exp", theta="gene"),
    Case("nb", 20_000, "softplus", theta="batch"),
    Case("nb", 2000, theta="gene", dtype=F64),
    Case("zinb", 2000, theta="cell", dtype=F64),
]
ELSEWHERE = [(case, target) for case in (CASES[0], CASES[4], CASES[8], CASES[10]) for target in ("sm_80", "sm_100")]
ELSEWHERE += [(CASES[8], "gfx942")]  # there, rows of negative binomials spill up to 48 registers
MATRIX = [*((case, "sm_90") for case in CASES), *ELSEWHERE]


@cache
def launches(case, target):
    """Of the forward pass, which writes gradients, of one without, and of the backward pass."""

    def meta(*shape, dtype=case.dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    shape = (ROWS, case.genes)
    thetas = {"gene": shape[1:], "cell": shape, "batch": (3, case.genes)}
    tensors = CountTensors(
        meta(*shape),
        meta(*shape, dtype=case.counts or case.dtype),
        meta(*thetas[case.theta]) if case.theta else None,
        meta(ROWS) if case.family != "multinomial" else None,
        meta(*shape) if case.family == "zinb" else None,
        meta(ROWS, dtype=torch.int64) if case.theta == "batch" else None,
        meta(*shape, dtype=torch.bool) if case.mask else None,
    )
    grads = CountGrads(
        *(t if t is None else torch.empty_like(t) for t in (getattr(tensors, f) for f in CountGrads._fields))
    )
    metas = CountTensors(*(t if t is None else meta_of(t) for t in tensors))
    plan = kernels.plan_counts(metas, CountOptions(case.family, case.head, case.theta), CountGrads())
    factors = meta(ROWS, dtype=plan.dtype)
    with DryRun(target) as dry:
        _, state = kernels.counts_fwd(plan, tensors, factors, grads)
        kernels.counts_fwd(plan, tensors, None, CountGrads())
        kernels.counts_bwd(plan, tensors, state, factors, factors, grads)
    return dry.launches


def over(matrix):
    return pytest.mark.parametrize(("case", "target"), [pytest.param(c, t, id=f"{c}-{t}") for c, t in matrix])


@over(MATRIX)
def test_registers_are_not_spilled(case, target):
    for launch in launches(case, target):
        facts = report(launch.kernel)
        assert (facts.spill_stores, facts.spill_loads, facts.stack) == (0, 0, 0), launch.name


@over(MATRIX)
def test_arithmetic_is_that_of_the_interpreter(case, target):
    for launch in launches(case, target):
        assert launch.kernel.metadata.enable_fp_fusion, launch.name
        if target != "gfx942" and case.dtype == F64 and "rows" in launch.name:
            assert not report(launch.kernel).widens_floats, launch.name


def rows_report(case, target="sm_90"):
    """Of the forward pass's launch over rows, and its elements a program: of a row, or of a piece."""
    launch = next(launch for launch in launches(case, target) if "rows" in launch.name)
    rows = launch.arguments["rows"]
    return report(launch.kernel), max(rows.pieces.value, 1) * rows.block_cols.value


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == F32 and case.genes % 16 == 0], ids=str)
def test_elements_are_moved_by_16_bytes(case):
    """But masks, and a few numbers of a row."""
    facts, elements = rows_report(case)
    per_thread = elements // (32 * facts.kernel.metadata.num_warps)
    few = 2 + per_thread // 2 * case.mask
    path = facts.paths[-1]
    for widths in (path.global_loads, path.global_stores):
        assert widths[128] >= per_thread // 4
        assert sum(count for width, count in widths.items() if width < 128) <= few + 2 * (case.theta == "batch") * few


# instructions an element on sm_90: of the whole row, or of a piece of all three loops
MEASURED = {
    Case("nb", 4096, theta="gene"): 158.0,
    Case("zinb", 4096, theta="batch"): 213.0,
    Case("poisson", 8192, mask=True): 97.0,
    Case("multinomial", 8192): 29.0,
    Case("nb", 20_000, theta="gene"): 182.0,
}
BUDGETS = {"nb": 165, "multinomial": 32}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_instructions_do_not_grow(case):
    facts, elements = rows_report(case)
    found = len(facts.paths[-1]) * 32 * facts.kernel.metadata.num_warps / elements
    assert found <= 1.05 * MEASURED[case]
    if case.genes < 10_000 and case.family in BUDGETS:
        assert found <= BUDGETS[case.family]


@triton.jit
def _pair_kernel(tensors, results, n, ZINB: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Whole tiles: logits in, gradients out, one sum."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    logits_ptr, counts_ptr, table_ptr, zero_logits_ptr, shift_ptr = tensors
    sums_ptr, dlogits_ptr, dtheta_ptr, dzero_ptr = results
    mu, excess = device.scaled_mean(
        tl.exp2((tl.load(logits_ptr + offsets) - tl.load(shift_ptr)) * 1.4426950408889634),
        tl.load(logits_ptr + offsets) - tl.load(shift_ptr),
    )
    x = tl.load(counts_ptr + offsets)
    theta, constant, p_theta = (
        tl.load(table_ptr + offsets),
        tl.load(table_ptr + n + offsets),
        tl.load(table_ptr + 2 * n + offsets),
    )
    value, dlog_mu, dlog_theta = device.nb(mu, excess, x, theta, constant, p_theta)
    if ZINB:
        zero_logit = tl.load(zero_logits_ptr + offsets)
        value, dlog_mu, dlog_theta, dzero_logit = device.zero_inflated(value, dlog_mu, dlog_theta, x, zero_logit)
        tl.store(dzero_ptr + offsets, dzero_logit)
    tl.store(dlogits_ptr + offsets, dlog_mu)
    tl.store(dtheta_ptr + offsets, dlog_theta)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(value))


@pytest.mark.parametrize(("inflated", "budget"), [(False, 134), (True, 197)], ids=["nb", "zinb"])
def test_a_pair_stays_within_its_budget_of_instructions(inflated, budget):
    tensors = tuple(torch.empty(size, device="meta") for size in (2**14, 2**14, 3 * 2**14, 2**14, 1))
    results = tuple(torch.empty(size, device="meta") for size in (16, 2**14, 2**14, 2**14))
    with DryRun("sm_90") as dry:
        _pair_kernel[(16,)](tensors, results, 2**14, inflated, 1024, num_warps=4, enable_fp_fusion=True)
    facts = report(dry.launches[0].kernel)
    assert (facts.spill_stores, facts.spill_loads, facts.stack) == (0, 0, 0)
    assert facts.instructions_per_element(1024) <= budget


EXECUTED = [
    (test_counts.test_value_and_gradients_by_row, {"family": "nb", "head": "softmax"}),
    (test_counts.test_value_and_gradients_by_row, {"family": "zinb", "head": "softplus"}),
    (test_counts.test_value_and_gradients_by_row, {"family": "poisson", "head": "exp"}),
    (test_counts.test_value_and_gradients_by_row, {"family": "multinomial", "head": "softmax"}),
    (test_counts.test_dispersions, {"kind": "batch", "family": "zinb"}),
    (test_counts.test_dispersions, {"kind": "cell", "family": "nb"}),
    (test_counts.test_storage, {"dtype": BF16, "family": "zinb", "kind": "cell"}),
    (test_counts.test_mask, {"family": "nb", "head": "softmax"}),
    (test_counts.test_what_is_no_count_makes_its_row_nan, {"bad": -1.0, "family": "nb", "sparse": False}),
]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [pytest.param(f, a, id="-".join([f.__name__, *map(str, a.values())])) for f, a in EXECUTED],
)
def test_executed(function, arguments):
    with executed("sm_90") as launched:
        function(**arguments, pieces=None)
    assert launched
