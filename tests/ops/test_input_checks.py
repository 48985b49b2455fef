import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import L1, L2, Bernoulli, Gaussian, Scaled

PROBABILITIES = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.0, 1.0]])
LOGITS = torch.tensor([[-3.0, 2.0, 0.5], [0.2, 0.0, 1.0]])
BYTES = torch.tensor([[0.0, 255.0, 17.0], [1.0, 3.0, 128.0]])
NONE = {"recon": 0, "target": 0}


@pytest.mark.parametrize(
    ("recon", "target", "likelihood"),
    [
        (PROBABILITIES, PROBABILITIES, "l2"),
        (LOGITS, LOGITS, "l1"),
        (LOGITS, PROBABILITIES, "bernoulli"),
        (PROBABILITIES, PROBABILITIES, "bernoulli_probs"),
        (LOGITS, PROBABILITIES, L2(from_logits=True)),
        (LOGITS, BYTES.byte(), "bernoulli"),
        (PROBABILITIES, BYTES.byte(), "bernoulli_probs"),
        (BYTES + 0.5, BYTES, "l2"),  # a decoder of bytes
        (torch.zeros(2, 3), PROBABILITIES, "bernoulli"),  # a decoder that starts at 0
        (torch.zeros(0, 3), torch.zeros(0, 3), "bernoulli"),
        (LOGITS, BYTES.byte(), L2(target_scale=2 / 255, target_shift=-1.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_good_inputs(recon, target, likelihood, dtype):
    target = target if target.dtype == torch.uint8 else target.to(dtype)
    report = fastvae.check_inputs(recon.to(dtype), target, LOGITS, LOGITS, likelihood=likelihood)
    assert report.ok
    assert report.warnings == ()
    assert report.nonfinite == {"recon": 0, "target": 0, "mu": 0, "logvar": 0}
    assert report.out_of_range == report.suspicious == NONE
    assert str(report) == "No problem was found."


def test_values_that_are_not_finite_are_counted_in_each_tensor():
    recon, target, mu, logvar = (LOGITS.clone() for _ in range(4))
    recon[0, 0], target[1], mu[0, :2], logvar[0, 2] = math.nan, math.inf, -math.inf, math.nan
    report = fastvae.check_inputs(recon, target, mu, logvar)
    assert report.nonfinite == {"recon": 1, "target": 3, "mu": 2, "logvar": 1}
    assert [line.split()[0] for line in str(report).splitlines()] == ["recon", "target", "mu", "logvar"]
    assert "mu has 2 of 6 values that are NaN or infinite" in str(report)
    assert fastvae.check_inputs(LOGITS, LOGITS, mu=mu).nonfinite == {"recon": 0, "target": 0, "mu": 2}
    nan = torch.full((2, 3), math.nan)
    assert fastvae.check_inputs(nan, nan, likelihood="bernoulli_probs").out_of_range == NONE


@pytest.mark.parametrize(
    ("likelihood", "advice"),
    [
        ("bernoulli", '"bernoulli_probs"'),
        (Bernoulli(), '"bernoulli_probs"'),
        (Scaled("bernoulli"), '"bernoulli_probs"'),
        (L1(from_logits=True), "leave out from_logits"),
        (Gaussian(from_logits=True), "from_logits"),
    ],
)
def test_probabilities_passed_as_logits(likelihood, advice):
    report = fastvae.check_inputs(PROBABILITIES, PROBABILITIES, likelihood=likelihood)
    assert report.suspicious == {"recon": 6, "target": 0}
    (warning,) = report.warnings
    assert "look like probabilities" in warning
    assert advice in warning


def test_the_range_is_that_of_finite_values():
    recon, target = torch.tensor([[0.5, 2.0, math.nan]]), torch.tensor([[20.0, math.inf, 40.0]])
    report = fastvae.check_inputs(recon, target, likelihood="bernoulli_probs")
    assert "recon has 1 of 3 values outside of [0, 1], from 0.5 to 2," in str(report)
    assert "target has 2 of 3 values outside of [0, 1], from 20 to 40," in str(report)


def test_logits_passed_as_probabilities():
    report = fastvae.check_inputs(LOGITS, PROBABILITIES, likelihood="bernoulli_probs")
    assert report.out_of_range == {"recon": 2, "target": 0}
    assert "from -3 to 2, but the likelihood takes probabilities" in str(report)
    assert 'use likelihood="bernoulli"' in str(report)


@pytest.mark.parametrize("likelihood", ["l2", "bernoulli", "bernoulli_probs", "huber", Gaussian("optimal")])
def test_targets_of_bytes(likelihood):
    recon = PROBABILITIES if likelihood == "bernoulli_probs" else LOGITS
    report = fastvae.check_inputs(recon, BYTES, likelihood=likelihood)
    assert report.suspicious == {"recon": 0, "target": 4}
    assert "up to 255, which look like bytes from 0 to 255. Divide it by 255" in str(report)
    of_bernoulli = likelihood in ("bernoulli", "bernoulli_probs")
    assert report.out_of_range == {"recon": 0, "target": 4 if of_bernoulli else 0}


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs", L2(from_logits=True)], ids=str)
def test_targets_out_of_range(likelihood):
    recon = PROBABILITIES if likelihood == "bernoulli_probs" else LOGITS
    report = fastvae.check_inputs(recon, 2 * PROBABILITIES - 1, likelihood=likelihood)
    assert report.out_of_range == {"recon": 0, "target": 3}
    assert "target has 3 of 6 values outside of [0, 1], from -1 to 1" in str(report)
    shifted = Bernoulli(target_scale=2 / 255, target_shift=-1.0)
    assert fastvae.check_inputs(LOGITS, BYTES.byte(), likelihood=shifted).out_of_range["target"] == 4


def test_errors_are_those_of_the_loss():
    with pytest.raises(ValueError, match="one shape"):
        fastvae.check_inputs(LOGITS, LOGITS[:1])
    with pytest.raises(TypeError, match="mu must be one of"):
        fastvae.check_inputs(LOGITS, LOGITS, LOGITS.int())
    with pytest.raises(ValueError, match="likelihood must be one of"):
        fastvae.check_inputs(LOGITS, LOGITS, likelihood="bernouli")


def test_inputs_are_left_alone():
    recon = LOGITS.clone().requires_grad_()
    strided = torch.rand(3, 2).t()
    fastvae.check_inputs(recon, strided, likelihood="bernoulli")
    assert recon._version == 0
    assert torch.equal(recon.detach(), LOGITS)
