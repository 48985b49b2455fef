"""torch.distributions.kl_divergence with and without fastvae, against float64; and what a Patch promises."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, LogNormal, Normal, kl, kl_divergence

from fastvae.integrations import register_torch_kl
from fastvae.integrations.torch_kl import normal_kl
from tests.helpers import oracle

FORMER = kl._KL_REGISTRY[Normal, Normal]


@pytest.fixture
def registered():
    with register_torch_kl() as patch:
        yield patch
    assert kl._KL_REGISTRY[Normal, Normal] is FORMER


def leaves(*shapes, dtype=torch.float64):
    """loc and scale of p, then of q."""
    loc_and_scale = [(torch.randn(shape), 0.5 + torch.rand(shape)) for shape in shapes]
    return [t.to(dtype).requires_grad_() for pair in loc_and_scale for t in pair]


def normals(inputs):
    return Normal(*inputs[:2]), Normal(*inputs[2:])


def nearby(dtype, distance, n=20_000):
    """Normals whose means and scales differ by about `distance`, as far as the dtype tells them apart."""
    p = distance * torch.randn(n), (1 + distance * torch.randn(n)).clamp(min=0.1)
    return normals([t.to(dtype) for t in (*p, torch.zeros(n), torch.ones(n))])


def truth(p, q):
    return kl_divergence(*(Normal(n.loc.double(), n.scale.double()) for n in (p, q)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 1), (4,)), ((2, 3), ()), ((), ()), ((0, 3), (3,))], ids=str)
def test_values_and_gradients_are_torchs(shapes, dtype):
    inputs = leaves(*shapes, dtype=dtype)
    expected = kl_divergence(*normals(inputs))
    with register_torch_kl():
        actual = kl_divergence(*normals(inputs))
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, inputs, upstream) for result in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_first_and_second_derivatives(registered):
    inputs = leaves((2, 3), (3,))
    function = lambda *inputs: kl_divergence(*normals(inputs))  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-2])
def test_16_bit_results_are_rounded_once(dtype, distance):
    p, q = nearby(dtype, distance)
    theirs, true = kl_divergence(p, q), truth(p, q)
    with register_torch_kl():
        ours = kl_divergence(p, q)
    terms = true + (p.scale / q.scale).double().log().abs()
    oracle.assert_near(ours, true, terms)
    error = [float((x.double() - true).abs().sum() / true.sum()) for x in (ours, theirs)]
    assert error[0] < torch.finfo(dtype).eps < error[1]


def test_float32_does_not_cancel():
    p, q = nearby(torch.float32, 1e-3)
    theirs, true = kl_divergence(p, q), truth(p, q)
    with register_torch_kl():
        ours = kl_divergence(p, q)
    error = [float((x.double() - true).abs().sum() / true.sum()) for x in (ours, theirs)]
    assert error[0] < 3e-5
    assert error[1] > 1e-3


def test_16_bit_gradients_are_rounded_once(registered):
    inputs = leaves((200,), (), dtype=torch.bfloat16)  # q: 0-dimensional, its gradient a sum
    exact = [oracle.leaf(t) for t in inputs]
    kl_divergence(*normals(inputs)).sum().backward()
    truth(*normals(exact)).sum().backward()
    for ours, true in zip(inputs, exact, strict=True):
        oracle.assert_near(ours.grad, true.grad, 200.0)


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32],
        [torch.bfloat16, torch.float32, torch.float32, torch.float32],
        [torch.float32, torch.float32, torch.float64, torch.float64],
        [torch.float64, torch.float64, torch.float32, torch.float32],
        [torch.int64, torch.float32, torch.int64, torch.float32],
        [torch.int64, torch.int64, torch.int64, torch.int64],
    ],
    ids=str,
)
@pytest.mark.parametrize("shape_q", [(), (3,)], ids=["0-d", "1-d"])
def test_dtype_is_torchs(dtypes, shape_q):
    p_and_q = normals(
        [(1 + t.detach()).abs().ceil().to(dtype) for t, dtype in zip(leaves((3,), shape_q), dtypes, strict=True)]
    )
    expected = kl_divergence(*p_and_q)
    with register_torch_kl():
        actual = kl_divergence(*p_and_q)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)  # compares the dtype too


def test_small_ratios_of_scales_stay_finite(registered):
    p, q = Normal(0.0, torch.tensor([1e-25, 1e-35])), Normal(0.0, 1.0)
    torch.testing.assert_close(kl_divergence(p, q).double(), truth(p, q))


def test_what_is_made_of_normals_is_served(registered):
    p, q = nearby(torch.bfloat16, 1e-2, n=12)
    elements = normal_kl(p, q)
    whole = kl_divergence(*(Independent(n.expand((3, 12)), 1) for n in (p, q)))
    torch.testing.assert_close(whole, elements.sum().expand(3))
    apart = [LogNormal(n.loc, n.scale) for n in (p, q)]
    assert torch.equal(kl_divergence(*apart), elements)


def test_traces_when_torch_has_never_looked_it_up(registered):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(loc, scale):
        p = Normal(loc, scale, validate_args=False)
        return kl_divergence(p, Normal(torch.zeros_like(loc), 1.0, validate_args=False)).sum()

    loc, scale = leaves((4,), (4,))[:2]
    gradients = torch.autograd.grad(loss(loc, scale), (loc, scale))
    torch.testing.assert_close(gradients, (loc.detach(), scale.detach() - 1 / scale.detach()))


def test_undo_restores_and_can_be_repeated():
    class Subclass(Normal):
        pass

    p, q = (Subclass(n.loc, n.scale) for n in nearby(torch.bfloat16, 1e-2, n=50))
    before = kl_divergence(p, q)  # memoised by torch for the pair of subclasses
    patch = register_torch_kl()
    during = kl_divergence(p, q)
    patch.undo()
    assert torch.equal(during, normal_kl(p, q))
    assert not torch.equal(during, before)
    assert torch.equal(kl_divergence(p, q), before)
    patch.undo()
    assert kl._KL_REGISTRY[Normal, Normal] is FORMER


def test_an_error_inside_the_block_undoes_too():
    with pytest.raises(KeyError), register_torch_kl():
        raise KeyError
    assert kl._KL_REGISTRY[Normal, Normal] is FORMER


def test_twice_at_a_time_is_refused(registered):
    with pytest.raises(RuntimeError, match=r"register_torch_kl\(\) may be in effect once.*undo"):
        register_torch_kl()
    registered.undo()
    with register_torch_kl():
        assert kl._KL_REGISTRY[Normal, Normal] is normal_kl


def test_undo_does_not_drop_a_later_registration(registered):
    kl.register_kl(Normal, Normal)(lambda p, q: p.loc)
    try:
        with pytest.raises(RuntimeError, match="replaced again by other code"):
            registered.undo()
    finally:
        kl.register_kl(Normal, Normal)(normal_kl)


def test_importing_the_integrations_imports_none_of_the_packages():
    script = "import sys, fastvae.integrations; sys.exit(bool({'diffusers', 'pythae'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
