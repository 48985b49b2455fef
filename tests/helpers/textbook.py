"""The trainer beside a textbook loop that trains the same net on the embedded images: what both reach, and how fast.

`python -m tests.helpers.textbook` prints it. The net, its loss and the loop are written here as a tutorial would, with
the same initial weights, learning rates and number of steps; the order of the images and the noise are its own.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastvae import data
from fastvae.cli.malloc import keep_freed_memory
from fastvae.models import VAE
from fastvae.training import TrainConfig, train
from fastvae.training.events import Event, Logged
from fastvae.training.schedule import learning_rate
from fastvae.training.setup import model_config

BLOCK = 20  # steps timed at once, after which the trainer logs


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Textbook(nn.Module):
    """The default VAE for 28x28 gray images, as a tutorial writes it."""

    def __init__(self, latent_dim: int = 32, width: int = 32) -> None:
        super().__init__()
        features = 2 * width * 7 * 7
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 2, stride=2), Residual(width)),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), Residual(2 * width)),
            *(nn.GroupNorm(1, 2 * width), nn.SiLU(), nn.Flatten(), nn.Linear(features, 2 * latent_dim)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, features), nn.Unflatten(1, (2 * width, 7, 7)), Residual(2 * width)),
            *(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.PixelShuffle(2), Residual(width)),
            *(nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def loss_function(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Negative ELBO, mean over the batch."""
    error = F.mse_loss(recon, x, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (error + kld) / len(x)


def textbook(config: TrainConfig) -> Iterator[float]:
    """Train the textbook's way: yields after each block of steps, and last the validation negative ELBO."""
    train_set, validation_set = data.split(data.load(config.data), validation=config.validation)
    torch.manual_seed(config.seed)
    model = Textbook(config.latent_dim, config.width)
    same_weights(VAE(model_config(config, (1, 28, 28))), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    loader = DataLoader(train_set, batch_size=config.batch_size, shuffle=True, drop_last=True)
    total = config.epochs * len(loader)
    step = 0
    for _ in range(config.epochs):
        for images in loader:
            rate = learning_rate(step, peak=config.learning_rate, warmup_steps=config.warmup_steps, total_steps=total)
            optimizer.param_groups[0]["lr"] = rate
            x = images.float() / 255
            recon, mu, logvar = model(x)
            loss = loss_function(recon, x, mu, logvar)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            step += 1
            if step % BLOCK == 0:
                yield loss.item()
    with torch.no_grad():
        x = torch.stack([validation_set[i] for i in range(len(validation_set))]).float() / 255
        recon, mu, logvar = model(x)
        yield loss_function(recon, x, mu, logvar).item()


class InTurns:
    """The trainer's listener: after each of its blocks of steps it runs one of the textbook's, so that a machine whose
    speed drifts drifts for both."""

    def __init__(self, config: TrainConfig) -> None:
        self.textbook = textbook(config)
        self.ratios: list[float] = []  # time of the trainer's block over the textbook's
        self.started: float | None = None  # of the block, unless something else than steps came between

    def __call__(self, event: Event) -> None:
        seconds = None if self.started is None else time.perf_counter() - self.started
        if not isinstance(event, Logged):
            return
        if event.record["split"] == "validation" or event.record["step"] % BLOCK:
            self.started = None
            return
        before = time.perf_counter()
        next(self.textbook)
        self.started = time.perf_counter()
        if seconds is not None:
            self.ratios.append(seconds / (self.started - before))


class Compared(NamedTuple):
    """The trainer and the textbook after the same steps."""

    nats: float
    textbook_nats: float
    step_ratio: float
    """Time of a step over that of the textbook's: median of paired blocks."""


def textbook_config(epochs: int) -> TrainConfig:
    """Options under which the trainer does no more than the textbook."""
    return TrainConfig(epochs=epochs, likelihood="l2", ema=0, device="cpu", log_every=BLOCK)


def compare(config: TrainConfig) -> Compared:
    """Train both, with glibc's malloc set as `fastvae train` sets it."""
    keep_freed_memory()
    turns = InTurns(config)
    with tempfile.TemporaryDirectory() as folder:
        nats = train(replace(config, out=Path(folder) / "run"), on_event=turns).evaluation.nats
    (*_, textbook_nats) = turns.textbook
    return Compared(nats, textbook_nats, statistics.median(turns.ratios))


def same_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters in their order."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    found = compare(textbook_config(epochs=parser.parse_args().epochs))
    print(f"validation negative ELBO: fastvae {found.nats:.2f}, textbook {found.textbook_nats:.2f} nats/image")
    print(f"a step takes {found.step_ratio:.3f} times as long as the textbook's, loading included in both")


if __name__ == "__main__":
    main()
