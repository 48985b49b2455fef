"""The trainer beside a textbook loop: as good after the same steps. `python -m tests.helpers.textbook` times both."""

import pytest
import torch

from fastvae.models import VAE
from fastvae.training import TrainConfig
from fastvae.training.setup import model_config
from tests.helpers.textbook import Textbook, compare, same_weights, textbook_config

for package in ("PIL.Image", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")


def test_the_textbook_has_the_same_net():
    vae, theirs = VAE(model_config(TrainConfig(), (1, 28, 28))), Textbook()
    same_weights(vae, theirs)
    x, z = torch.rand(2, 1, 28, 28), torch.randn(2, 32)
    assert torch.equal(theirs.encoder(x), vae.encoder(x))
    assert torch.equal(theirs.decoder(z), vae.decoder(z))


def test_trainer_reaches_what_the_textbook_reaches():
    found = compare(textbook_config(epochs=1))
    assert found.nats < 1.02 * found.textbook_nats
