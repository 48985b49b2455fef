import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

import fastvae
from fastvae.likelihoods import Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits


@pytest.fixture
def batch():
    recon, target = torch.rand(4, 1, 5, 5, requires_grad=True), torch.rand(4, 1, 5, 5)
    mu, logvar = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    return recon, target, mu, logvar


def textbook(recon, target, mu, logvar, beta=1.0):
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (F.mse_loss(recon, target, reduction="sum") + beta * kl) / recon.shape[0]


def test_no_argument_is_the_textbook_vae(batch):
    loss = fastvae.VAELoss()(*batch)
    expected = textbook(*batch)
    torch.testing.assert_close(loss, expected)
    inputs = [x for x in batch if x.requires_grad]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def test_options_reach_the_loss(batch):
    criterion = fastvae.VAELoss(
        0.5, return_terms=True, recon_weight=2.0, recon_reduction="mean", logvar_clamp=(-0.1, 0.1)
    )
    options = {"recon_weight": 2.0, "recon_reduction": "mean", "logvar_clamp": (-0.1, 0.1)}
    assert criterion(*batch) == fastvae.vae_loss(*batch, beta=0.5, **options)
    assert criterion(*batch, beta=3.0) == fastvae.vae_loss(*batch, beta=3.0, **options)
    recon, target, mu, _ = batch
    kl = torch.rand(4)
    assert fastvae.VAELoss()(recon, target, kl=kl) == fastvae.vae_loss(recon, target, mu, kl=kl).loss


def test_one_pass_is_an_option(batch):
    for one_pass in (True, False):
        loss = fastvae.VAELoss(one_pass=one_pass)(*batch)
        saved = loss.grad_fn.saved_tensors
        assert sum(t is not None and t.shape == batch[0].shape for t in saved) == (3 if one_pass else 2)


def test_a_tensor_beta_moves_and_is_saved_with_the_module(batch):
    criterion = fastvae.VAELoss(beta=torch.tensor(0.5))
    assert criterion.state_dict() == {"beta": torch.tensor(0.5)}
    assert criterion.double().beta.dtype == torch.float64
    criterion.float().beta.fill_(2.0)  # a schedule steps it in place
    assert criterion(*batch) == fastvae.vae_loss(*batch, beta=2.0).loss
    assert fastvae.VAELoss().state_dict() == {}


def test_copies_and_pickles(batch):
    criterion = fastvae.VAELoss(0.3, kl_reduction="mean", recon_reduction="mean")
    for clone in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert clone(*batch) == criterion(*batch)
    assert repr(fastvae.VAELoss(0.3)) == "VAELoss(beta=0.3, likelihood='l2', reduction='batchmean')"


def test_every_option_that_is_not_the_default_is_shown():
    options = {
        "beta": 0.3,
        "return_terms": True,
        "recon_reduction": "mean",
        "kl_reduction": "mean",
        "recon_weight": 2.0,
        "logvar_clamp": (-30.0, 20.0),
        "free_bits": FreeBits(0.5, "dim_mask"),
        "capacity": Capacity(3.0, "batch"),
        "accumulate": 4,
        "one_pass": False,
        "inplace": True,
    }
    shown = repr(fastvae.VAELoss(**options))
    for name, value in options.items():
        assert f"{name}={value!r}" in shown
    schedule = fastvae.schedules.Linear(0.0, 1.0, 4)
    assert "Linear(0.0, 1.0, steps=4" in repr(fastvae.VAELoss(schedule))
    assert repr(fastvae.VAELoss(torch.tensor(0.5))).startswith("VAELoss(beta=tensor(0.5000)")


def test_a_learned_scale_is_a_parameter_of_the_loss(batch):
    criterion = fastvae.VAELoss(likelihood=Gaussian(torch.nn.Parameter(torch.tensor(0.5))))
    assert [name for name, _ in criterion.named_parameters()] == ["likelihood.log_scale"]
    criterion(*batch).backward()
    error = (batch[0] - batch[1]).square().detach()
    expected = 0.5 * (1 - error * math.exp(-0.5)).sum() / error.shape[0]
    torch.testing.assert_close(criterion.likelihood.log_scale.grad, expected)
    clone = fastvae.VAELoss(likelihood=Gaussian(torch.nn.Parameter(torch.zeros(()))))
    clone.load_state_dict(criterion.state_dict())
    assert clone(*batch) == criterion(*batch)


def test_a_constant_scale_moves_with_the_loss(batch):
    criterion = fastvae.VAELoss(likelihood=Scaled("l1", torch.tensor(0.5)))
    assert not list(criterion.parameters())
    assert criterion.to(torch.float64).likelihood.log_scale.dtype == torch.float64


@pytest.mark.parametrize("where", ["beta", "capacity"])
def test_schedules_are_stepped_and_saved_with_the_loss(batch, where):
    def make():
        schedule = fastvae.schedules.Linear(1.0, 3.0, 4)
        options = {"beta": schedule} if where == "beta" else {"capacity": Capacity(schedule, "batch")}
        return fastvae.VAELoss(**options), schedule

    criterion, schedule = make()
    for value in (1.0, 1.5, 2.0):
        options = {"beta": value} if where == "beta" else {"capacity": Capacity(value, "batch")}
        assert criterion(*batch) == fastvae.vae_loss(*batch, **options).loss
        schedule.step()
    resumed, _ = make()
    resumed.load_state_dict(criterion.state_dict())
    assert resumed(*batch) == criterion(*batch)
    assert copy.deepcopy(criterion)(*batch) == criterion(*batch)


def test_arguments_of_the_call_reach_the_loss(batch):
    recon, _, mu, _ = batch
    prior = torch.randn_like(mu), torch.randn_like(mu)
    given = {"prior": prior, "weight": torch.rand(4), "mask": recon > 0.5, "extra": torch.rand(4)}
    free_bits = FreeBits(0.2)
    criterion = fastvae.VAELoss(likelihood="huber", free_bits=free_bits)
    assert criterion(*batch, **given) == fastvae.vae_loss(*batch, likelihood="huber", free_bits=free_bits, **given).loss


def test_weights_make_a_ragged_last_micro_batch_count_by_its_samples():
    """5 samples in micro-batches of 3 and 2 under accumulate=2 are one batch of 5."""
    recon, target, mu, logvar = (torch.rand(5, 6, dtype=torch.float64) for _ in range(4))
    whole = fastvae.vae_loss(recon, target, mu, logvar).loss
    criterion = fastvae.VAELoss(accumulate=2)
    parts = [
        criterion(*(t[part] for t in (recon, target, mu, logvar)), weight=torch.full([size], size / 2.5))
        for part, size in ((slice(0, 3), 3), (slice(3, 5), 2))
    ]
    torch.testing.assert_close(sum(parts), whole)
