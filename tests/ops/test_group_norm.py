"""GroupNorm + SiLU against float64: values, gradients, layouts, memory that is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvae
from tests.helpers.oracle import DTYPES

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# whole and odd sizes; one channel a group, one group; several tiles of pixels; one pixel
SHAPES = [
    ((2, 8, 16, 16), 4),
    ((3, 12, 9, 5), 4),
    ((2, 12, 4, 4), 1),
    ((1, 6, 70, 65), 3),
    ((5, 96, 3, 1), 32),
    ((2, 6, 1, 1), 2),
    ((2, 6, 37), 6),
    ((1, 8, 3, 8, 7), 4),
    ((2, 4, 2, 3, 2, 3), 2),
]
# of the largest number, as in the documentation; storage of 16 bits rounds once
ARITHMETIC = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def make(shape, dtype, *, channels_last=False, offset=0.0, affine_dtype=None, residual=False):
    memory = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype).contiguous(memory_format=memory)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64).to(affine_dtype or dtype) for _ in range(2))
    added = torch.randn(shape).to(dtype) if residual else None
    return [t if t is None else t.requires_grad_() for t in (x, weight, bias, added)]


def truth(x, weight, bias, residual, groups, dy, *, silu=True, eps=1e-5):
    """(y, gradients by x, weight, bias and residual) in float64."""
    if residual is not None:
        x = (x + residual).to(x.dtype)
    leaves = [None if t is None else t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias)]
    # torch's group norm fails with a bias and without a weight
    weight, bias = (
        torch.full(x.shape[1:2], value, dtype=torch.float64) if leaf is None else leaf
        for leaf, value in zip(leaves[1:], (1.0, 0.0), strict=True)
    )
    y = F.group_norm(leaves[0], groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, given, dy.double().contiguous()))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    return y.detach(), [*gradients, None if residual is None else gradients[0]]


def assert_close(actual, expected, tolerance):
    """To `tolerance` of the largest number, and one rounding to the dtype of storage."""
    bound = tolerance * expected.abs().max()
    if actual.dtype in (torch.bfloat16, torch.float16):
        storage = torch.finfo(actual.dtype)
        bound = bound + 0.5001 * storage.eps * expected.abs() + storage.smallest_normal * storage.eps
    error = (actual.detach().double() - expected).abs()
    assert (error <= bound).all(), f"{float((error / bound).max()):.3g} times the bound"


def check(inputs, groups, *, dy=None, factor=1.0, **options):
    x, weight, bias, residual = inputs
    dy = torch.randn_like(x) if dy is None else dy
    y = fastvae.group_norm_silu(x, groups, weight, bias, residual=residual, **options)
    given = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, given, dy))
    expected_y, expected = truth(*inputs, groups, dy, silu=options.get("activation", "silu") == "silu")
    tolerance = factor * ARITHMETIC[x.dtype]
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert_close(y, expected_y, tolerance)
    for given_input, gradient, scale in zip(inputs, expected, (1, 2, 2, 1), strict=True):
        if given_input is not None:
            actual = next(found)
            assert actual.dtype == given_input.dtype
            assert_close(actual, gradient, scale * tolerance)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_values_and_gradients(backend, shape, groups, channels_last, dtype):
    if channels_last and len(shape) not in CHANNELS_LAST:
        pytest.skip("no such layout")
    inputs = make(shape, dtype, channels_last=channels_last)
    y = check(inputs, groups)
    assert y.stride() == inputs[0].stride()


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_added_before_the_norm(backend, dtype, channels_last, activation):
    inputs = make((2, 12, 9, 5), dtype, channels_last=channels_last, residual=True)
    check(inputs, 4, activation=activation)


@pytest.mark.parametrize("affine", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_may_have_another_dtype(backend, affine):
    check(make((2, 12, 9, 5), torch.bfloat16, affine_dtype=affine), 4)
    check(make((2, 12, 9, 5), torch.float32, affine_dtype=affine), 4)


@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)], ids=str)
def test_without_weight_or_bias(backend, missing):
    inputs = make((2, 12, 9, 5), torch.float32)
    check([None if i in missing else t for i, t in enumerate(inputs)], 4)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "negated"])
def test_other_layouts_are_read_too(backend, layout):
    x, weight, bias, _ = make((2, 12, 9, 6), torch.float32)
    x = {
        "sliced": lambda: x[..., ::2],
        "transposed": lambda: x.transpose(2, 3),
        "expanded": lambda: x[:1].expand(3, -1, -1, -1),
        "negated": lambda: torch.complex(x, x).conj().imag,
    }[layout]().detach()
    check([x.requires_grad_(), weight, bias, None], 4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("upstream", ["contiguous", "channels_last", "expanded"])
def test_the_upstream_gradient_may_have_any_layout(backend, channels_last, upstream):
    """aten's own gradient is wrong where the layouts of x and of the gradient differ."""
    inputs = make((2, 8, 16, 16), torch.float32, channels_last=channels_last)
    dy = torch.randn(2, 8, 16, 16)
    dy = {
        "contiguous": dy,
        "channels_last": dy.contiguous(memory_format=torch.channels_last),
        "expanded": dy[:, :, :1].expand(-1, -1, 16, -1),
    }[upstream]
    check(inputs, 4, dy=dy)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (1, 2)], ids=str)
def test_any_subset_of_gradients(backend, wanted):
    inputs = make((2, 8, 6, 5), torch.float32, residual=True)
    dy = torch.randn(2, 8, 6, 5)
    for i, t in enumerate(inputs):
        t.requires_grad_(i in wanted)
    x, weight, bias, residual = inputs
    fastvae.group_norm_silu(x, 4, weight, bias, residual=residual).backward(dy)
    _, expected = truth(*inputs, 4, dy)
    for i, t in enumerate(inputs):
        if i in wanted:
            assert_close(t.grad, expected[i], 2e-6)
        else:
            assert t.grad is None


def test_second_derivatives(backend):
    x, weight, bias, residual = (
        t.requires_grad_() for t in (*make((2, 4, 3, 2), torch.float64)[:3], torch.randn(2, 4, 3, 2).double())
    )

    def function(*inputs):
        return fastvae.group_norm_silu(inputs[0], 2, inputs[1], inputs[2], residual=inputs[3])

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual), nondet_tol=0)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual), nondet_tol=0)


@pytest.mark.parametrize("residual", [False, True], ids=["x", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_and_the_statistics_alone_are_saved(backend, dtype, residual):
    inputs = make((4, 16, 8, 8), dtype, residual=residual)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastvae.group_norm_silu(inputs[0], 4, *inputs[1:3], residual=inputs[3])
    large = [t for t in saved if t.numel() == y.numel()]
    assert len(large) == 1
    assert large[0].dtype == dtype
    if not residual:
        assert large[0].data_ptr() == inputs[0].data_ptr()
    assert sorted(t.numel() for t in saved) == [16, 16, 16, 16, y.numel()]


def test_an_input_changed_after_the_call_is_noticed(backend):
    x, weight, bias, _ = make((2, 4, 3, 2), torch.float32)
    y = fastvae.group_norm_silu(x, 2, weight, bias)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_mean_of_a_thousand_deviations(backend):
    x, weight, bias = (t.detach() for t in make((1, 8, 32, 32), torch.float32, offset=1000.0)[:3])
    expected, _ = truth(x, weight, bias, None, 4, torch.ones_like(x))
    y = fastvae.group_norm_silu(x, 4, weight, bias)
    error = float((y - expected).abs().max() / expected.abs().max())
    eager = float((F.silu(F.group_norm(x, 4, weight, bias)) - expected).abs().max() / expected.abs().max())
    assert error <= max(1e-5, 1.01 * eager)


def test_no_samples_and_no_pixels(backend):
    weight, bias = torch.ones(4), torch.zeros(4)
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        y = fastvae.group_norm_silu(x, 2, weight.requires_grad_(), bias)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert not weight.grad.any()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compiled(channels_last):
    inputs = make((2, 8, 6, 6), torch.float32, channels_last=channels_last, residual=True)

    def function(x, weight, bias, residual):
        return fastvae.group_norm_silu(x, 4, weight, bias, residual=residual)

    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    dy = torch.randn(2, 8, 6, 6)
    expected_y, expected = truth(*inputs, 4, dy)
    assert y.stride() == inputs[0].stride()
    assert_close(y, expected_y, 1e-6)
    for actual, gradient in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        assert_close(actual, gradient, 2e-6)


def test_fake_and_meta_tensors_and_vmap(backend):
    x, weight, bias, _ = (
        t if t is None else t.detach()
        for t in make((3, 2, 8, 6, 6), torch.float32)[:1] + make((2, 8, 6, 6), torch.float32)[1:]
    )
    each = torch.stack([fastvae.group_norm_silu(sample, 4, weight, bias) for sample in x])
    torch.testing.assert_close(torch.vmap(lambda s: fastvae.group_norm_silu(s, 4, weight, bias))(x), each)
    last = x[0].contiguous(memory_format=torch.channels_last)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(last)
        y = fastvae.group_norm_silu(fake, 4, mode.from_tensor(weight), mode.from_tensor(bias))
    assert y.stride() == fake.stride()


def test_the_layer_is_group_norm_and_silu(backend):
    torch.manual_seed(0)
    layer = fastvae.nn.GroupNormSiLU(4, 8, eps=1e-3)
    eager = nn.GroupNorm(4, 8, eps=1e-3)
    assert isinstance(layer, nn.GroupNorm)
    with torch.no_grad():
        eager.weight.normal_()
        eager.bias.normal_()
    layer.load_state_dict(eager.state_dict())
    assert layer.state_dict().keys() == eager.state_dict().keys()
    x, residual = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), F.silu(eager(x)))
    torch.testing.assert_close(layer(x, residual), F.silu(eager(x + residual)))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    plain = fastvae.nn.GroupNormSiLU(4, 8, affine=False, activation=None)
    torch.testing.assert_close(plain(x), F.group_norm(x, 4))
    assert "activation=None" in repr(plain)


def test_autocast_keeps_the_dtype_of_x(backend):
    layer = fastvae.nn.GroupNormSiLU(4, 8)
    conv = nn.Conv2d(3, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(conv(torch.randn(2, 3, 8, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, "at least three dimensions"),
        ({"x": torch.zeros(2, 8, 3, dtype=torch.int64)}, TypeError, "x must be one of"),
        ({"num_groups": 3}, ValueError, "num_groups must divide"),
        ({"num_groups": 0}, ValueError, "num_groups must be an int of at least 1"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have one element per channel.*\(8,\)"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "on one device"),
        ({"eps": -1.0}, ValueError, "eps must be 0 or more"),
        ({"activation": "swish"}, ValueError, "Did you mean 'silu'"),
        ({"residual": torch.zeros(2, 8, 4)}, ValueError, "x and residual must have one shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.zeros(2, 8, 3), "num_groups": 4, "weight": torch.ones(8), "bias": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        fastvae.group_norm_silu(**arguments)
    if "activation" in change:
        with pytest.raises(error, match=message):
            fastvae.nn.GroupNormSiLU(4, 8, activation="swish")
