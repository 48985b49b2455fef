import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

import fastvae


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
    assert repr(criterion) == "VAELoss(beta=0.3, likelihood='l2', reduction='batchmean')"
