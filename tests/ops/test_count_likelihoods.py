"""The device functions of counts in the interpreter, against 60 digits of mpmath, over the whole range of data."""

import mpmath
import numpy as np
import pytest
import torch

from tests.conftest import INTERPRETED

triton = pytest.importorskip("triton", reason="the kernels need Triton")
tl = pytest.importorskip("triton.language", reason="the kernels need Triton")
device = pytest.importorskip("fastvae_kernels.count_likelihoods", reason="the kernels need Triton")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1 (see the Makefile)")
BOUNDS = {torch.float32: 4e-6, torch.float64: 1e-12}  # of |error| / (1 + |truth|)


@triton.jit
def _elements_kernel(mu_ptr, x_ptr, log_theta_ptr, zero_logit_ptr, results_ptr, n, FAMILY: tl.constexpr):
    offsets = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    mask = offsets < n
    mu = tl.load(mu_ptr + offsets, mask=mask, other=1.0)
    x = device.count_of(tl.load(x_ptr + offsets, mask=mask, other=0.0), mu.dtype)
    if FAMILY == "poisson":
        value, dlog_mu = device.poisson(mu, mu * 0.0, x)
    else:
        theta, constant, p_theta = device.dispersion(tl.load(log_theta_ptr + offsets, mask=mask, other=0.0))
        value, dlog_mu, dlog_theta = device.nb(mu, mu * 0.0, x, theta, constant, p_theta)
        if FAMILY == "zinb":
            zero_logit = tl.load(zero_logit_ptr + offsets, mask=mask, other=0.0)
            value, dlog_mu, dlog_theta, dzero_logit = device.zero_inflated(value, dlog_mu, dlog_theta, x, zero_logit)
            tl.store(results_ptr + 3 * n + offsets, dzero_logit, mask=mask)
        tl.store(results_ptr + 2 * n + offsets, dlog_theta, mask=mask)
    tl.store(results_ptr + offsets, value, mask=mask)
    tl.store(results_ptr + n + offsets, dlog_mu, mask=mask)


def truth(family, mu, x, log_theta, zero_logit):
    """Value, derivatives by log mu, log theta and zero_logit, from their definitions."""
    mu, x, log_theta, d = map(mpmath.mpf, (mu, x, log_theta, zero_logit))
    if family == "poisson":
        return mu - x * mpmath.log(mu) + mpmath.loggamma(x + 1), mu - x, 0, 0
    t = mpmath.exp(log_theta)
    value = t * mpmath.log(1 + mu / t) + x * mpmath.log(1 + t / mu)
    value += mpmath.loggamma(t) + mpmath.loggamma(x + 1) - mpmath.loggamma(t + x)
    dlog_mu = t * (mu - x) / (t + mu)
    dlog_theta = t * (mpmath.log(1 + mu / t) - (mu - x) / (t + mu) + mpmath.psi(0, t) - mpmath.psi(0, t + x))
    if family == "nb":
        return value, dlog_mu, dlog_theta, 0
    probability = 1 / (1 + mpmath.exp(-d))
    posterior = 1 / (1 + mpmath.exp(-d - value)) if x == 0 else 0
    if x == 0:
        value -= mpmath.log(1 + mpmath.exp(d + value))
    value += mpmath.log(1 + mpmath.exp(d))
    return value, dlog_mu * (1 - posterior), dlog_theta * (1 - posterior), probability - posterior


def points(n, dtype):
    """mu, x, log theta and zero logits over their ranges: of x, a quarter zeros, a quarter near the mean, an eighth
    fractions.
    """
    draw = np.random.default_rng(0)

    def over(low, high, size=n):
        return np.exp(draw.uniform(np.log(low), np.log(high), size))

    mu, log_theta, x = over(1e-8, 1e5), np.log(over(1e-4, 1e6)), np.floor(over(0.3, 1e5))
    x[: n // 4] = 0
    near = slice(n // 4, n // 2)
    mu[near] = np.maximum(x[near], 1) * (1 + draw.normal(size=n // 4) * over(1e-5, 0.5, n // 4)).clip(0.01)
    x[n // 2 : n // 2 + n // 8] = over(1e-6, 3, n // 8)
    zero_logit = draw.normal(size=n) * over(0.05, 20)
    corners = np.array([[m, x, np.log(t), 0] for m in (1e-8, 1e5) for x in (0, 1, 1e5) for t in (1e-4, 1, 1e6)])
    columns = np.concatenate([np.stack([mu, x, log_theta, zero_logit], axis=1), corners]).T
    return [torch.tensor(column, dtype=dtype) for column in columns]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("family", ["nb", "zinb", "poisson"])
def test_values_and_derivatives(family, dtype):
    given = points(1600, dtype)
    n = len(given[0])
    results = torch.zeros(4, n, dtype=dtype)
    _elements_kernel[(triton.cdiv(n, 1024),)](*given, results, n, family)
    with mpmath.workdps(60):
        true = np.array([truth(family, *map(float, point)) for point in zip(*given, strict=True)])
    error = np.abs(results.T.double().numpy() - true) / (1 + np.abs(true))
    assert error.shape == (n, 4)
    worst = {column: max(map(float, error[:, i])) for i, column in enumerate(("value", "mu", "theta", "zero logit"))}
    assert max(worst.values()) < BOUNDS[dtype], worst


@pytest.mark.parametrize("x", [-1.0, -0.25, float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["nb", "zinb", "poisson"])
def test_counts_that_are_none_are_nan(family, x):
    one = torch.ones(1)
    results = torch.zeros(4, 1)
    with np.errstate(all="ignore"):  # the interpreter's numpy
        _elements_kernel[(1,)](one, one * x, one, one, results, 1, family)
    assert results[:2].isnan().all()
