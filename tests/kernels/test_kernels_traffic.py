"""What the interpreted kernels do to memory: bytes against the closed form, launches, order of programs, layouts."""

from dataclasses import replace

import pytest
import torch

import fastvae
from fastvae.statistics import latent_stats
from tests.conftest import INTERPRETED
from tests.helpers.huge_tensors import last_programs, sparse_zeros
from tests.helpers.kernel_cases import CASES, STATS, Case
from tests.helpers.meter import Meter

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)"),
    pytest.mark.usefixtures("interpreted_kernels"),
]
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8


@pytest.fixture
def interpreted_kernels():
    with fastvae.use_backend("triton"):
        yield


def metered(case, **options):
    """Meters of the forward and the backward pass, and all that they computed."""
    with Meter(**options) as forward:
        step = case.forward()
    with Meter(**options) as backward:
        gradients = case.backward(step)
    return forward, backward, (*step.outputs, *gradients)


LOSSES = [case for case in CASES if case.op == "loss"]
SCALED = [replace(case, upstream=upstream) for case in LOSSES for upstream in (3.0, 65536.0)]


@pytest.mark.parametrize("case", [*CASES, *SCALED], ids=str)
def test_every_byte_is_moved_once(case):
    forward, backward, _ = metered(case)
    for meter, floor in ((forward, case.forward_floor), (backward, case.backward_floor)):
        # partial sums, a number per sample and upstream gradients are within the hundredth
        slack = max(0.01 * floor.total * case.n_elements, 512)
        assert abs(meter.loaded - floor.read * case.n_elements) <= slack, meter.table()
        assert abs(meter.stored - floor.written * case.n_elements) <= slack, meter.table()
        for launch in meter.launches:
            for traffic in launch.traffic.values():
                if traffic.distinct_loaded + traffic.distinct_stored > slack:
                    assert traffic.loaded == traffic.distinct_loaded, meter.table()
                    assert traffic.stored == traffic.distinct_stored, meter.table()


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [  # bytes an element: what the documentation promises
        (Case("sample_kl", F32), 12, 20),
        (Case("sample_kl", BF16), 6, 10),
        (Case("sample_kl", F32, options=("prior",)), 20, 36),
        (Case("sample_kl", BF16, options=("prior",)), 10, 18),
        (Case("kl", F32), 8, 16),
        (Case("loss", F32), 12, 0),
        (Case("loss", F32, upstream=3), 12, 8),
        (Case("loss", BF16), 6, 0),
        (Case("loss", BF16, upstream=3), 6, 6),
        (Case("loss", BF16, U8), 5, 0),
        (Case("loss", BF16, F32), 8, 0),
        (Case("loss", torch.float16), 4, 6),
        (Case("whole_loss", F32), 12 + 8, 16),
    ],
    ids=str,
)
def test_the_closed_form_is_the_documented_one(case, forward, backward):
    assert (case.forward_floor.total, case.backward_floor.total) == (forward, backward)


@pytest.mark.parametrize("case", STATS, ids=str)
def test_statistics_are_one_read_of_the_latents_and_few_partial_sums(case):
    meter, *_ = metered(case)
    measured, *merged = meter.launches
    assert len(merged) == (case.shape[0] > 512), meter.table()  # few samples are one range, with nothing to merge
    for name in ("mu_ptr", "logvar_ptr"):
        traffic = measured.arguments[name]
        assert traffic.loaded == traffic.distinct_loaded == case.n_elements * case.dtype.itemsize, meter.table()
    inputs = case.forward_floor.read * case.n_elements
    assert measured.loaded == inputs, meter.table()
    if merged:
        assert meter.total - inputs < 0.12 * inputs, meter.table()
        assert merged[0].loaded <= 1.2 * measured.stored, meter.table()  # the first shifts twice


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("kl_is_given", [True, False], ids=["kl", "mu"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_a_loss_is_two_launches_and_one_back(reduction, kl_is_given, weight):
    recon, mu, logvar = (torch.rand(5, 700).requires_grad_() for _ in range(3))
    latents = {"kl": torch.rand(5, requires_grad=True), "mu": mu} if kl_is_given else {"mu": mu, "logvar": logvar}
    with Meter() as forward:
        terms = fastvae.vae_loss(recon, torch.rand(5, 700), **latents, beta=weight, reduction=reduction)
    with Meter() as backward:
        torch.autograd.backward(terms, [torch.rand_like(term) for term in terms])
    assert len(forward.launches) <= 2, forward.table()
    assert len(backward.launches) == 1, backward.table()


@pytest.mark.parametrize("shape", [(5, 700), (3, 5000)], ids=str)
def test_sampling_is_two_launches_at_most_and_one_back(shape):
    forward, backward, _ = metered(Case("sample_kl", F32, shape=shape))
    assert len(forward.launches) == (1 if shape[1] <= 1024 else 2), forward.table()
    assert len(backward.launches) == 1, backward.table()


@pytest.mark.parametrize(
    "case",
    [
        Case("sample_kl", F32, shape=(2, 2051)),
        Case("sample_kl", BF16, shape=(65, 32)),
        Case("kl", F32, shape=(2, 2051), clamp=True),
        Case("loss", BF16, U8, upstream=3.0),
        Case("loss", F32, shape=(65, 32)),
        Case("whole_loss", F32, shape=(2, 2051)),
        Case("stats", F32, shape=(600, 40)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_programs(case):
    *_, expected = metered(case)
    for order in ("reverse", 1, 2):
        *_, actual = metered(case, order=order)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), order


@pytest.mark.parametrize("n_cols", [7, 300, 2500])
def test_bits_of_a_sample_do_not_depend_on_its_batch(n_cols):
    recon, target, mu, logvar = (torch.randn(5, n_cols) for _ in range(4))
    whole = fastvae.vae_loss(recon, target, mu, logvar, reduction="none")
    for row in range(5):
        alone = fastvae.vae_loss(*(t[row : row + 1] for t in (recon, target, mu, logvar)), reduction="none")
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, whole, strict=True))


def _halves(dim, *shape):
    doubled = [2 * size if axis == dim else size for axis, size in enumerate(shape)]
    return lambda: torch.randn(doubled).chunk(2, dim)


def _pair(make):
    return lambda: (make(), make())


LAYOUTS = {
    "halves of rows": _halves(1, 5, 37),
    "halves of channels": _halves(1, 3, 4, 6, 5),
    "halves of the batch": _halves(0, 3, 33),
    "halves of the last dimension": _halves(3, 3, 2, 5, 7),
    "channels_last": _pair(lambda: torch.randn(3, 4, 9, 11).contiguous(memory_format=torch.channels_last)),
    "channels_last halves": lambda: torch.randn(3, 8, 9, 11).contiguous(memory_format=torch.channels_last).chunk(2, 1),
    "one of each": lambda: (
        torch.randn(3, 4, 9, 11).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4, 9, 11),
    ),
    "transposed": _pair(lambda: torch.randn(40, 30).t()),
    "every other column": _pair(lambda: torch.randn(7, 60)[:, ::2]),
    "expanded rows": _pair(lambda: torch.randn(1, 50).expand(6, 50)),
    "expanded columns": lambda: (torch.randn(6, 1).expand(6, 50), torch.randn(6, 50)),
    "one number": lambda: (torch.randn(()).expand(6, 50), torch.randn(6, 50)),
    "off alignment": lambda: (torch.randn(1001)[1:].view(10, 100), torch.randn(1003)[3:].view(10, 100)),
    "one element": _pair(lambda: torch.randn(1)),
    "six dimensions": _pair(lambda: torch.randn(2, 3, 2, 3, 2, 3).permute(5, 3, 1, 0, 2, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["sample_kl", "kl", "stats", "loss", "loss of samples"])
def test_any_layout_is_read_in_place_and_within_bounds(layout, op):
    """Bounds, races and poisoned lanes by the meter; elements that went elsewhere by the other backend."""
    a, b = (t.detach().requires_grad_() for t in LAYOUTS[layout]())
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (a, b)]

    def step(a, b):
        draw = torch.Generator().manual_seed(2)
        if op == "stats":
            return latent_stats(a, b, logvar_clamp=(-2.0, 2.0))
        if op == "sample_kl":
            outputs = fastvae.reparameterize_kl(a, b, seed=3, logvar_clamp=(-2.0, 2.0))
        elif op == "kl":
            outputs = (fastvae.gaussian_kl(a, b),)
        else:
            reduction = "sum" if op == "loss" else "none"
            kl = torch.rand(a.shape[0], generator=draw)
            outputs = fastvae.vae_loss(a, b, kl=kl, recon_weight=torch.tensor(3.0), reduction=reduction)[:2]
        upstream = [torch.rand(output.shape, generator=draw) for output in outputs]
        return *outputs, *torch.autograd.grad(outputs, (a, b), upstream)

    with Meter() as meter:
        actual = step(a, b)
    assert meter.launches
    for launch in meter.launches:
        for traffic in launch.traffic.values():
            if traffic.distinct_loaded >= 2 * a.numel() and "expanded" not in layout:
                assert traffic.loaded == traffic.distinct_loaded, meter.table()
    with fastvae.use_backend("torch"):
        expected = step(*copies)
    for x, y in zip(actual, expected, strict=True):
        # one sample has no variance
        torch.testing.assert_close(x, y, rtol=2e-6, atol=4e-6, equal_nan=op == "stats")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_partial_gradients_move_what_they_need(wanted):
    """Bytes an element of the backward pass of a loss, by which of recon, mu and logvar are asked for."""
    n = 4096
    inputs = [torch.rand(2, n // 2).requires_grad_(i in wanted) for i in range(3)]
    loss = fastvae.vae_loss(inputs[0], torch.rand(2, n // 2), *inputs[1:]).loss
    with Meter() as meter:
        torch.autograd.grad(loss, [x for x in inputs if x.requires_grad], torch.tensor(3.0))
    needed = sum(8 for i in wanted)  # each is a read and a write
    assert abs(meter.total - needed * n) < 0.01 * needed * n, meter.table()


@pytest.mark.parametrize("strides", [(2**31 + 8, 1), (2**31 + 8, 2), (1, 2**30 + 4)], ids=str)
def test_strides_beyond_32_bits(strides):
    """In the middle of memory, so that an address of 32 bits would find zeros."""
    shape = (2, 300) if strides[0] > 1 else (300, 3)
    storage = sparse_zeros((2**32 + 4096,), BF16)
    far = storage.as_strided(shape, strides, 2**31)
    near = torch.rand(shape).to(BF16)
    far.copy_(near)
    for op in (
        lambda x: fastvae.reparameterize_kl(x, x, seed=1),
        lambda x: fastvae.vae_loss(x, x.detach().flip(0), x, x, reduction="none"),
    ):
        x, y = far.detach().requires_grad_(), near.clone().requires_grad_()
        with last_programs(None):
            outputs = op(x)
            gradient = torch.autograd.grad(outputs, x, [torch.full_like(t, 3.0) for t in outputs])
        expected = op(y)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected, y, [torch.full_like(t, 3.0) for t in expected])
        )


N_HUGE = 2**31 + 1001


@pytest.fixture
def _untouched(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.usefixtures("_untouched")
def test_the_last_of_more_than_2_31_latents():
    mu, logvar = (sparse_zeros((N_HUGE,), BF16).requires_grad_() for _ in range(2))
    with torch.no_grad():
        mu[-1000:] = torch.randn(1000)
        logvar[-1000:] = torch.randn(1000)
    with last_programs(2):
        z = fastvae.reparameterize(mu, logvar, seed=3)
        gradients = torch.autograd.grad(z, (mu, logvar), torch.ones((), dtype=BF16).expand(N_HUGE))
    mu, logvar = (t.detach()[-1000:].clone().requires_grad_() for t in (mu, logvar))
    with fastvae.use_backend("torch"):
        expected = fastvae.reparameterize(mu, logvar, seed=3, offset=N_HUGE - 1000)
        expected_gradients = torch.autograd.grad(expected.sum(), (mu, logvar))
    torch.testing.assert_close(z[-1000:], expected)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual[-1000:], expected)


@pytest.mark.usefixtures("_untouched")
def test_the_last_of_more_than_2_31_pixels(monkeypatch):
    monkeypatch.setattr("fastvae_kernels.plan.MAX_IMAGE_PROGRAMS_BWD", 2**16)  # short walks: quicker to interpret
    recon, target = sparse_zeros((1, N_HUGE), BF16).requires_grad_(), sparse_zeros((1, N_HUGE), U8)
    with torch.no_grad():
        recon[0, -1000:] = torch.rand(1000)
        target[0, -1000:] = torch.randint(256, (1000,), dtype=U8)
    with last_programs(1):
        loss = fastvae.reconstruction_loss(recon, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, recon, torch.tensor(2.0))
    expected = 4 * (recon.detach()[0, -1000:].float() - target[0, -1000:] / 255)
    torch.testing.assert_close(gradient[0, -1000:], expected.to(BF16))
