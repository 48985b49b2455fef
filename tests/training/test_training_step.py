"""One step of training: the batch that it takes, the noise that it draws, the gradients that it clips."""

import pytest
import torch
from torch import nn

from fastvae import VAELossTerms
from fastvae._distributed import World
from fastvae.models import VAE, VAEConfig
from fastvae.training import TrainConfig
from fastvae.training.step import clip_gradients, noise_seed, shared_batch_size, train_step


@pytest.mark.parametrize(("batch_size", "processes", "accumulate"), [(8, 3, 1), (8, 2, 8), (128, 64, 1)])
def test_batches_that_cannot_be_shared_are_refused(batch_size, processes, accumulate):
    options = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(ValueError, match=f"must be a multiple of {processes * accumulate} and there must be as many"):
        shared_batch_size(options, 54, processes)
    assert shared_batch_size(TrainConfig(batch_size=8), 54, 2) == 8
    assert shared_batch_size(TrainConfig(batch_size=128), 54, 4) == 52


def test_all_images_of_a_run_draw_from_one_stream_once():
    """Each step, process and part a stretch of its own, side by side."""
    drawn = []

    class Recording(nn.Module):
        model = VAE(VAEConfig(latent_dim=3))

        def forward(self, images, *, seed, offset):
            drawn.extend((seed, offset + i) for i in range(3 * len(images)))
            zero = torch.zeros((), requires_grad=True)
            return None, VAELossTerms(zero, zero, zero)

    config, module, scaler = TrainConfig(accumulate=2), Recording(), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(3):
        for rank in range(2):
            train_step(config, module, module, torch.zeros(4, 1), step, scaler, World(rank, 2))
    assert drawn == [(noise_seed(config.seed), i) for i in range(3 * 8 * 3)]
    seeds = {noise_seed(seed) for seed in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0, float("inf"), float("nan")])
def test_gradients_are_clipped_as_torch_does(monkeypatch, scale):
    """Those that are short enough without a pass over them."""
    passes = []
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *args: passes.append(1) or clip(*args))
    ours, theirs = ([nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(5))] for _ in range(2))
    for parameters in (ours, theirs):
        parameters[0].grad = torch.full((2, 3), scale) / 6**0.5
    norm = clip_gradients(ours, 1.0)
    assert len(passes) == (not scale <= 0.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0), equal_nan=True)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=0, atol=0, equal_nan=True)
    assert ours[1].grad is None
