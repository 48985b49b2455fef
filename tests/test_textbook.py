"""The trainer beside a textbook loop: as good after the same steps. `python -m tests.support.textbook` times both."""

import pytest

from fastvae.models import VAE
from fastvae.training import TrainConfig
from fastvae.training.setup import model_config

from .support.textbook import BLOCK, Textbook, compare

for package in ("PIL.Image", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")


def test_the_textbook_has_the_same_net():
    vae = VAE(model_config(TrainConfig(), (1, 28, 28)))
    for theirs, ours in ((Textbook().encoder, vae.encoder), (Textbook().decoder, vae.decoder)):
        assert [(type(layer), repr(layer)) for layer in theirs] == [(type(layer), repr(layer)) for layer in ours]


def test_trainer_reaches_what_the_textbook_reaches():
    found = compare(TrainConfig(epochs=2, device="cpu", log_every=BLOCK))
    assert found.nats < 1.01 * found.textbook_nats
