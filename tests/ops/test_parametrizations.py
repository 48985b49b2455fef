import math

import pytest
import torch

from fastvae.parametrizations import (
    logvar_from_log_std,
    logvar_from_softplus,
    logvar_from_std,
    logvar_from_var,
    soft_clamp,
)
from tests.helpers.oracle import DTYPES

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def softplus_logvar(x, eps):
    """log softplus(x) = x + log(log1p(u) / u), u = exp(x); the quotient is 1 - u / 2 where u vanishes."""
    if eps == 0 and x < -20:
        return 2 * (x - math.exp(x) / 2)
    return 2 * math.log(softplus(x) + eps)


def softplus_slope(x, eps):
    if eps == 0 and x < -20:
        return 2 - math.exp(x)
    return 2 / ((1 + math.exp(-x)) * (softplus(x) + eps)) if x > -700 else 0.0


POSITIVE = [1e-7, 1e-4, 0.01, 0.5, 1.0, 1.001, 3.0, 1000.0, 60000.0]
ANY = [-80.0, -45.0, -21.0, -19.0, -10.0, -1.0, -0.01, 0.0, 0.5, 2.0, 9.0, 19.0, 21.0, 30.0, 45.0, 200.0]
# function, its value and derivative in Python's float64, inputs
CASES = {
    "log_std": (logvar_from_log_std, lambda x: 2 * x, lambda x: 2.0, ANY),
    "std": (logvar_from_std, lambda x: 2 * math.log(x), lambda x: 2 / x, POSITIVE),
    "var": (logvar_from_var, math.log, lambda x: 1 / x, POSITIVE),
    "softplus": (logvar_from_softplus, lambda x: softplus_logvar(x, 0), lambda x: softplus_slope(x, 0), ANY),
    "softplus_eps": (
        lambda x: logvar_from_softplus(x, eps=1e-4),
        lambda x: softplus_logvar(x, 1e-4),
        lambda x: softplus_slope(x, 1e-4),
        ANY,
    ),
    "soft_clamp": (
        lambda x: soft_clamp(x, 5.0),
        lambda x: 5 * math.tanh(x / 5),
        lambda x: 1 / math.cosh(x / 5) ** 2,
        ANY,
    ),
}
every_function = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_function
def test_value_and_gradient(name, dtype):
    function, value, slope, inputs = CASES[name]
    x = torch.tensor([inputs], dtype=dtype, requires_grad=True)
    y = function(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    y.sum().backward()
    exact = x.detach().double()[0].tolist()
    # 4 ulp of the arithmetic's dtype, then one rounding to the tensor's
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rtol = 4 * arithmetic + (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
    atol = 4 * arithmetic
    if dtype == torch.float16:
        atol += 2**-25  # half of its smallest number
    truth = torch.tensor([[value(v) for v in exact]], dtype=torch.float64)
    torch.testing.assert_close(y.detach().double(), truth, rtol=rtol, atol=atol)
    slopes = torch.tensor([[slope(v) for v in exact]], dtype=torch.float64)
    slopes = slopes.to(dtype).double()  # 2 / 1e-7 is beyond float16
    torch.testing.assert_close(x.grad.double(), slopes, rtol=2 * rtol, atol=atol)


@every_function
def test_first_and_second_derivatives(name):
    function, _, _, inputs = CASES[name]
    points = [v for v in inputs if 1e-3 < abs(v) < 1e3] + [-0.3, 0.1] * (inputs is ANY)
    x = torch.tensor([points], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x, atol=1e-4)


@pytest.mark.parametrize("function", [logvar_from_std, logvar_from_var])
def test_second_derivative_where_the_upstream_gradient_is_zero(function):
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(function(x), x, upstream, create_graph=True)
    (slope,) = torch.autograd.grad(dx.sum(), upstream)
    torch.testing.assert_close(slope, (2 if function is logvar_from_std else 1) / x.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [logvar_from_std, logvar_from_var])
def test_zero_is_minus_infinity_and_a_clamp_stops_its_gradient(function, dtype):
    x = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    y = function(x)
    assert y.tolist() == [-math.inf, 0.0]
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    slope = 2.0 if function is logvar_from_std else 1.0
    assert dx.tolist() == [math.inf, slope]
    (dx,) = torch.autograd.grad(y.clamp(-30.0, 20.0).sum(), x)
    assert dx.tolist() == [0.0, slope]  # torch.log: NaN


@pytest.mark.parametrize("function", [logvar_from_std, logvar_from_softplus])
def test_gradient_in_float16_overflows_nowhere_on_its_way(function):
    x = torch.tensor([8.0], dtype=torch.float16, requires_grad=True)
    function(x).backward(torch.tensor([60000.0], dtype=torch.float16))  # twice that is beyond float16
    torch.testing.assert_close(x.grad, torch.tensor([15000.0], dtype=torch.float16), rtol=1e-3, atol=0)


def test_negative_and_nan_give_nan():
    x = torch.tensor([-1.0, math.nan])
    for function in (logvar_from_std, logvar_from_var):
        assert function(x).isnan().all()
    for function in (logvar_from_log_std, logvar_from_softplus, lambda x: soft_clamp(x, 1.0)):
        assert function(x).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-4])
def test_softplus_is_finite_with_two_derivatives_everywhere(eps, dtype):
    largest = min(torch.finfo(dtype).max, 1e30) / 4
    left = [-largest, -1e4, -1000.0, -200.0, -104.0, -88.0, -41.0, -39.9, -20.0]
    x = torch.tensor([[*left, 0.0, 20.0, 41.0, 88.0, 200.0, 1e4, largest]]).to(dtype).requires_grad_()
    y = logvar_from_softplus(x, eps)
    upstream = 2.0**14  # as of a loss scaler
    (dx,) = torch.autograd.grad(y.sum(), x, torch.tensor(upstream).to(dtype), create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    for tensor in (y, dx, ddx):
        assert tensor.isfinite().all()
    if eps == 0:
        assert torch.equal(y[0, :6], 2 * x[0, :6])
        assert dx[0, :6].tolist() == [2 * upstream] * 6
    else:
        assert y[0, 0].item() == pytest.approx(2 * math.log(eps), rel=1e-2)
        assert dx[0, :3].tolist() == [0.0] * 3
    assert (dx[0] >= 0).all()
    assert ddx[0, 0] == 0


def test_softplus_has_no_step_where_its_branches_meet():
    for dtype, edge in ((torch.float32, 20.0), (torch.float64, 40.0)):
        for centre in (-edge, edge):
            middle = torch.tensor([centre], dtype=dtype)
            x = torch.cat([middle.nextafter(middle - 1), middle, middle.nextafter(middle + 1)]).requires_grad_()
            y = logvar_from_softplus(x)
            y.sum().backward()
            truth = [softplus_logvar(v, 0) for v in x.tolist()]
            assert y.tolist() == pytest.approx(truth, rel=torch.finfo(dtype).eps)
            assert x.grad.tolist() == pytest.approx(
                [softplus_slope(v, 0) for v in x.tolist()], rel=2 * torch.finfo(dtype).eps
            )


def test_soft_clamp_is_nvaes():
    x = torch.randn(2, 50) * 10
    torch.testing.assert_close(soft_clamp(x, 5.0), x.div(5.0).tanh().mul(5.0), rtol=0, atol=0)
    assert soft_clamp(torch.tensor([-1e30, 1e30]), 3.0).tolist() == [-3.0, 3.0]


# dynamo makes such an object itself, and hides the warning unless warnings are errors
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_function
def test_compiles_in_one_piece_with_its_gradient(name):
    function, _, _, inputs = CASES[name]
    x = torch.tensor([inputs], requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for result, expected in zip(
        (compiled(x), *torch.autograd.grad(compiled(x).sum(), x)),
        (function(x), *torch.autograd.grad(function(x).sum(), x)),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@every_function
def test_maps_over_a_batch(name):
    function, _, slope, inputs = CASES[name]
    x = torch.tensor([[v] for v in inputs], dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(lambda x: function(x).sum()))(x)
    truth = torch.tensor([[slope(v)] for v in inputs], dtype=torch.float64)
    torch.testing.assert_close(slopes, truth)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@every_function
def test_never_reads_the_device(name, dtype):
    function = CASES[name][0]
    assert function(torch.ones(3, 2, dtype=dtype, device="meta")).shape == (3, 2)


@every_function
def test_wrong_tensors(name):
    function = CASES[name][0]
    with pytest.raises(TypeError, match="must be one of float64, float32, bfloat16, float16; got int64"):
        function(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch dimension"):
        function(torch.ones(()))


@pytest.mark.parametrize("eps", [-1e-4, math.nan, math.inf, 1e-20])
def test_wrong_eps(eps):
    with pytest.raises(ValueError, match="eps must be 0 or"):
        logvar_from_softplus(torch.ones(2), eps)


@pytest.mark.parametrize("limit", [0.0, -5.0, math.nan, math.inf])
def test_wrong_limit(limit):
    with pytest.raises(ValueError, match="limit must be positive"):
        soft_clamp(torch.ones(2), limit)
