"""The trainer beside a textbook loop: as good after the same steps, and no slower than noise explains."""

import pytest

from benchmarks.trainer import BLOCK, Textbook, compare
from fastvae.models import VAE
from fastvae.training import TrainConfig
from fastvae.training.setup import model_config

for package in ("PIL.Image", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")

ATTEMPTS = 3


def test_the_textbook_has_the_same_net():
    vae = VAE(model_config(TrainConfig(), (1, 28, 28)))
    for theirs, ours in ((Textbook().encoder, vae.encoder), (Textbook().decoder, vae.decoder)):
        assert [(type(layer), repr(layer)) for layer in theirs] == [(type(layer), repr(layer)) for layer in ours]


def test_trainer_reaches_what_the_textbook_reaches():
    """Bounds that hold on a busy machine; docs/training.md has the figures of a quiet one."""
    config = TrainConfig(epochs=2, device="cpu", log_every=BLOCK)
    for _ in range(ATTEMPTS):
        found = compare(config)
        assert found.nats < 1.01 * found.textbook_nats
        if found.over_textbook < 1.2 and found.over_bare < 1.15:
            return
    pytest.fail(f"a step takes too long: {found}")
