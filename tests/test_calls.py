"""Calls that were checked before: the same results, the same errors, less work."""

import pytest
import torch

import fastvae
from fastvae import _calls, _checks, functional
from fastvae.likelihoods import Gaussian

RECON, TARGET, MU, LOGVAR, KL = torch.rand(2, 3), torch.rand(2, 3), torch.randn(2, 4), torch.randn(2, 4), torch.rand(2)


@pytest.fixture
def checked(monkeypatch):
    """Counts the calls that are checked from the start."""
    count = []
    check = _checks.images
    monkeypatch.setattr(_checks, "images", lambda *args: count.append(1) or check(*args))
    monkeypatch.setattr(_calls, "_KNOWN", {})
    return count


CALLS = {
    "mu and logvar": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, LOGVAR, **weights),
    "kl": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, **weights),
    "kl and mu": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, kl=KL, kl_reduction="mean", **weights),
    "wider mu": lambda **weights: fastvae.vae_loss(
        RECON, TARGET, torch.cat([MU, MU], 1), kl=KL, kl_reduction="mean", **weights
    ),
    "bytes": lambda **weights: fastvae.vae_loss(RECON, (255 * TARGET).to(torch.uint8), kl=KL, **weights),
    "rows": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, reduction="none", **weights),
    "sum": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, reduction="sum", **weights),
    "mean": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, recon_reduction="mean", **weights),
    "l1": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, likelihood="l1", **weights),
    "clamp": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, LOGVAR, logvar_clamp=(-0.1, 0.1), **weights),
    "double": lambda **weights: fastvae.vae_loss(RECON.double(), TARGET, MU, LOGVAR, **weights),
}
WEIGHTS = [{}, {"beta": 0.5}, {"beta": torch.tensor(2.0)}, {"beta": 3, "recon_weight": 0.25}]


def test_what_was_checked_once_is_computed_alike(checked):
    alone = {}
    for name, call in CALLS.items():
        for i, weights in enumerate(WEIGHTS):
            _calls._KNOWN.clear()
            alone[name, i] = call(**weights)
    _calls._KNOWN.clear()
    checked.clear()
    for (name, i), expected in alone.items():
        terms = CALLS[name](**WEIGHTS[i])
        torch.testing.assert_close(tuple(terms), tuple(expected), rtol=0, atol=0)
        assert type(terms) is functional.VAELossTerms
    assert len(checked) == len(CALLS) == len(_calls._KNOWN)


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": Gaussian(0.5)},  # whose logvar may be another one the next time
        {"weight": torch.ones(2)},
        {"mask": torch.ones(2, 3) > 0},
        {"extra": torch.ones(2)},
        {"logvar_clamp": [-1, 1], "kl": None, "mu": MU, "logvar": LOGVAR},  # what cannot be hashed
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_calls_are_checked_each_time(checked, options):
    for _ in range(2):
        fastvae.vae_loss(RECON, TARGET, **{"kl": KL, **options})
    assert len(checked) == 2
    assert not _calls._KNOWN


def test_what_is_kept_has_a_bound(checked, monkeypatch):
    monkeypatch.setattr(_calls, "_MOST_KNOWN", 3)
    for n in range(1, 9):
        fastvae.vae_loss(RECON.repeat(n, 1), TARGET.repeat(n, 1), kl=KL.repeat(n))
        assert len(_calls._KNOWN) <= 3


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"recon": RECON.to_sparse()}, "recon must be a dense tensor"),
        ({"kl": KL.to("meta")}, "must be on one device"),
        ({"recon": RECON > 0}, "recon must be one of"),
        ({"reduction": "total"}, "reduction must be one of"),
        ({"beta": True}, "beta must be a float"),
        ({"recon_weight": torch.ones(2)}, "recon_weight must be a float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_come_after_a_call_that_was_right(other, message):
    call = {"recon": RECON, "target": TARGET, "kl": KL, "reduction": "batchmean", "beta": 1.0, "recon_weight": 1.0}
    for _ in range(2):
        fastvae.vae_loss(**call)
        with pytest.raises((ValueError, TypeError), match=message):
            fastvae.vae_loss(**{**call, **other})
