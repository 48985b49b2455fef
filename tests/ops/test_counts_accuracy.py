"""Likelihoods of counts against mpmath, over the range of means, dispersions and counts."""

import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import NegativeBinomial, Poisson
from tests.helpers import count_truth

N_ROWS, N_COLUMNS = 24, 32
REFERENCE = pytest.param(True, id="reference")
FALLBACK = pytest.param(False, id="fallback")


def points(dtype, near):
    """(logits, mu as the loss computes it, log_theta, theta, counts, zero logits); `near`: counts close to the mean."""
    generator = torch.Generator().manual_seed(3 + near)

    def uniform(low, high):
        shape = N_ROWS, N_COLUMNS
        return (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)

    logits = uniform(math.log(1e-8), math.log(1e5))
    log_theta = uniform(math.log(1e-4), math.log(1e6))
    counts = uniform(0, math.log(1e5)).exp().floor()
    counts = torch.where(uniform(0, 1) < 0.3, torch.zeros_like(counts), counts)
    if near:
        counts = (logits.exp() * (1 + uniform(-0.1, 0.1))).round()
        log_theta = uniform(0, math.log(1e6))
    return logits, log_theta, counts, uniform(-20, 20)


def evaluate(likelihood, inputs, counts, reference):
    """(value of each element, gradients of the inputs), through rows of one element each."""
    rows = [t.detach().reshape(-1, 1).requires_grad_() for t in inputs]
    logits, *rest = rows
    criterion = likelihood(*rest)
    if not reference:
        value = fastvae.reconstruction_loss(logits, counts.reshape(-1, 1), likelihood=criterion, reduction="none")
        value.sum().backward()
        return value.detach(), [t.grad.reshape(-1) for t in rows]
    value = fastvae.reconstruction_loss(logits, counts.reshape(-1, 1), likelihood=criterion, reduction="none")
    return value.detach(), [g.reshape(-1) for g in torch.autograd.grad(value.sum(), rows, create_graph=True)]


def worst(found, truth):
    """The largest |error| / (1 + |true|)."""
    pairs = zip(found.tolist(), truth, strict=True)
    return max(float(abs(f - t) / (1 + abs(t))) for f, t in pairs)


def means(logits):
    """As the loss has them: the truth is that of a given mean."""
    return logits.reshape(-1, 1).exp().reshape(-1).tolist()


def dispersions(log_theta):
    return log_theta.reshape(-1, 1).double().exp().reshape(-1).tolist()


BOUND = {torch.float32: 4e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("inflated", [False, True])
def test_negative_binomial(dtype, near, inflated):
    logits, log_theta, counts, zero_logits = points(dtype, near)
    inputs = [logits, log_theta, *([zero_logits] if inflated else [])]

    def likelihood(log_theta, zero_logits=None):
        return NegativeBinomial(log_theta, zero_logits=zero_logits, head="exp")

    value, grads = evaluate(likelihood, inputs, counts, False)
    arguments = [counts.reshape(-1).tolist(), means(logits), dispersions(log_theta)]
    function = count_truth.nb
    if inflated:
        arguments.append(zero_logits.reshape(-1).tolist())
        function = count_truth.zinb
    truth = [function(*element) for element in zip(*arguments, strict=True)]
    errors = [worst(found, [t[i] for t in truth]) for i, found in enumerate([value, *grads])]
    assert max(errors) <= BOUND[dtype], errors


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", BOUND)
def test_poisson(dtype, near):
    logits, _, counts, _ = points(dtype, near)
    value, grads = evaluate(lambda: Poisson(head="exp"), [logits], counts, False)
    truth = [count_truth.poisson(*e) for e in zip(counts.reshape(-1).tolist(), means(logits), strict=True)]
    errors = [worst(found, [t[i] for t in truth]) for i, found in enumerate([value, *grads])]
    assert max(errors) <= BOUND[dtype], errors


def test_reference_formula():
    """In float64, where logits of 1e-8 and counts of 1e5 cost digits that float32 does not have."""
    logits, log_theta, counts, zero_logits = points(torch.float64, False)
    inputs = [logits, log_theta, zero_logits]
    value, grads = evaluate(lambda t, d: NegativeBinomial(t, zero_logits=d, head="exp"), inputs, counts, True)
    arguments = counts.reshape(-1).tolist(), means(logits), dispersions(log_theta), zero_logits.reshape(-1).tolist()
    truth = [count_truth.zinb(*element) for element in zip(*arguments, strict=True)]
    errors = [worst(found, [t[i] for t in truth]) for i, found in enumerate([value, *grads])]
    assert max(errors) <= 1e-8, errors


@pytest.mark.parametrize("inflated", [False, True])
def test_counts_below_one(inflated):
    """Corrected counts need not be whole: lgamma's polynomials end at 1."""
    logits, log_theta, _, zero_logits = points(torch.float32, False)
    generator = torch.Generator().manual_seed(5)
    counts = torch.rand(logits.shape, generator=generator)
    inputs = [logits, log_theta, *([zero_logits] if inflated else [])]
    value, grads = evaluate(lambda t, d=None: NegativeBinomial(t, zero_logits=d, head="exp"), inputs, counts, False)
    arguments = [counts.reshape(-1).tolist(), means(logits), dispersions(log_theta)]
    if inflated:
        arguments.append(zero_logits.reshape(-1).tolist())
    function = count_truth.zinb if inflated else count_truth.nb
    truth = [function(*element) for element in zip(*arguments, strict=True)]
    errors = [worst(found, [t[i] for t in truth]) for i, found in enumerate([value, *grads])]
    assert max(errors) <= 4e-6, errors
