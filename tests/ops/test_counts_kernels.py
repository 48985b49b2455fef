"""The kernels of counts, interpreted: what the fallback passes, rows in pieces, and what they do to memory."""

import pytest
import torch

import fastvae
from fastvae.ops import counts as ops_counts
from tests.conftest import INTERPRETED
from tests.helpers.meter import Meter
from tests.kernels.test_executed_oracle import parametrizations
from tests.ops import test_counts
from tests.ops.test_counts import USED, leaves, likelihood_of, truth_of

kernels = pytest.importorskip("fastvae_kernels.counts", reason="the kernels need Triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)")

SUBSET = {  # of each test's parametrizations, one in so many
    test_counts.test_value_and_gradients_by_row: 1,
    test_counts.test_dispersions: 1,
    test_counts.test_forms_of_counts: 5,
    test_counts.test_mask: 1,
    test_counts.test_storage: 5,
    test_counts.test_gradient_of_some_inputs_and_none: 1,
    test_counts.test_what_is_no_count_makes_its_row_nan: 5,
    test_counts.test_empty: 1,
}
CALLS = [
    pytest.param(function, arguments, id=f"{function.__name__}-{'-'.join(map(str, arguments.values()))}")
    for function, every in SUBSET.items()
    for arguments in list(parametrizations(function))[::every]
]


@pytest.fixture(autouse=True)
def interpreted():
    with fastvae.use_backend("triton"):
        yield


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_of_the_fallback(function, arguments):
    if "pieces" in function.__code__.co_varnames:
        arguments = {**arguments, "pieces": None}
    function(**arguments)


@pytest.fixture
def in_pieces(monkeypatch):
    """No row is held on chip."""
    monkeypatch.setattr(kernels, "_most_pieces", lambda *of: 0)
    ops_counts._plan.cache_clear()
    yield
    ops_counts._plan.cache_clear()


def batch(dtype=torch.float32, rows=3, genes=1201, batches=None):
    """Rows of two pieces, the last one cut off."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    x = torch.poisson(normal(rows, genes).float().exp(), generator=draw)
    inputs = {"logits": normal(rows, genes), "counts": x, "zero_logits": normal(rows, genes)}
    inputs["log_theta"] = normal(genes) if batches is None else normal(batches, genes)
    if batches is not None:
        inputs["index"] = torch.arange(rows) * 2 % batches
    return {**inputs, "log_library": (x.sum(1).log() + 0.5).to(dtype)}


def check(family, inputs, upstream, bound=3e-6):
    """Gradients of the rows' sum under upstream gradients that the forward pass did not foresee."""
    tensors = leaves(inputs)
    elements, wide = truth_of(family, inputs)
    nll = fastvae.reconstruction_loss(
        tensors["logits"], tensors["counts"], likelihood=likelihood_of(family, tensors), reduction="none"
    )
    (nll * upstream).sum().backward()
    (elements.sum(1) * upstream).sum().backward()
    torch.testing.assert_close(nll.double(), elements.sum(1), rtol=1e-6, atol=0)
    for name in USED[family]:
        truth = wide[name].grad
        size = float(truth.abs().max())
        torch.testing.assert_close(tensors[name].grad.double(), truth, rtol=bound, atol=bound * size, msg=name)


@pytest.mark.parametrize("family", USED)
def test_rows_of_several_pieces(family):
    check(family, batch(), torch.tensor([1.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", USED)
def test_rows_too_long_for_the_chip(in_pieces, family, dtype):
    """In bfloat16, the gradient by log mu is computed again and not read back with a few digits."""
    check(family, batch(dtype), torch.tensor([1.0, -2.0, 0.5]), 3e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("batches", [None, 3])
@pytest.mark.parametrize("held", [True, False])
def test_programs_that_take_several_rows(request, monkeypatch, batches, held):
    """Their shares of the gradient of log_theta are added up, unless rows have batches of their own."""
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 2)
    ops_counts._plan.cache_clear()
    if not held:
        request.getfixturevalue("in_pieces")
    check("nb", batch(rows=5, genes=70, batches=batches), torch.tensor([1.0, 1.0, 3.0, 1.0, -1.0]))
    ops_counts._plan.cache_clear()


def metered(family, inputs, upstream=1.0, **options):
    tensors = leaves(inputs)
    with Meter(**options) as forward:
        loss = fastvae.reconstruction_loss(
            tensors["logits"], tensors["counts"], likelihood=likelihood_of(family, tensors)
        )
    with Meter(**options) as backward:
        (loss * upstream).backward()
    return forward, backward, [loss, *(tensors[name].grad for name in USED[family])]


# bytes an element beside 8 of a shared log_theta's partial sums, which a batch of more than 1024 rows divides
BYTES = {"nb": 12, "zinb": 20, "poisson": 12, "multinomial": 12}


@pytest.mark.parametrize("family", BYTES)
def test_every_byte_is_moved_once(family):
    inputs = batch(rows=6, genes=1600)
    forward, backward, _ = metered(family, inputs)
    n = inputs["logits"].numel()
    *_, rows = [launch for launch in forward.launches if "rows" in launch.name]
    for name, traffic in rows.traffic.items():
        if traffic.distinct_loaded + traffic.distinct_stored >= 4 * n:
            assert traffic.loaded == traffic.distinct_loaded, name
            assert traffic.stored == traffic.distinct_stored, name
    moved = sum(t.distinct_loaded + t.distinct_stored for launch in forward.launches for t in launch.traffic.values())
    partial_sums = 8 if "log_theta" in USED[family] else 0
    assert abs(moved / n - BYTES[family] - partial_sums) < 0.05 * BYTES[family] + 32 / 6, forward.table()
    read = {name for launch in backward.launches for name, traffic in launch.traffic.items() if traffic.loaded}
    assert read == {"coefficients_ptr", "kept_ptr"}, backward.table()
    assert not any(launch.stored for launch in backward.launches), backward.table()
    assert len(forward.launches) == (3 if partial_sums else 1)
    assert len(backward.launches) == (2 if partial_sums else 1)


@pytest.mark.parametrize("family", ["nb", "zinb"])
@pytest.mark.parametrize("batches", [None, 2])
def test_bits_do_not_depend_on_the_order_of_programs(family, batches):
    inputs = batch(rows=5, genes=300, batches=batches)
    *_, expected = metered(family, inputs, 0.3)
    for order in ("reverse", 1):
        *_, actual = metered(family, inputs, 0.3, order=order)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), order
