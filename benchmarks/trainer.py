"""The trainer beside a textbook loop that trains the same net on the embedded images: what both reach, and how fast.

`python -m benchmarks.trainer` prints it. The net, its loss and the loop are written here as a tutorial would, with the
same initial weights, learning rates and number of steps; the order of the images and the noise are its own.
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
from fastvae.models import VAE
from fastvae.training import TrainConfig, train
from fastvae.training.distributed import ALONE
from fastvae.training.events import Event, Logged
from fastvae.training.objective import Objective
from fastvae.training.schedule import learning_rate
from fastvae.training.setup import make_optimizer, model_config
from fastvae.training.step import accumulated, clip_gradients

BLOCK = 20  # steps timed at once, after which the trainer logs


class Textbook(nn.Module):
    """The default VAE for 28x28 gray images, as a tutorial writes it."""

    def __init__(self, latent_dim: int = 32, width: int = 32) -> None:
        super().__init__()
        features = 2 * width * 7 * 7
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 2, stride=2), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(1, 2 * width), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(features, 2 * latent_dim)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, features), nn.Unflatten(1, (2 * width, 7, 7))),
            *(nn.GroupNorm(1, 2 * width), nn.SiLU(), nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)),
            *(nn.SiLU(), nn.ConvTranspose2d(width, 1, 2, stride=2)),
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


def bare(config: TrainConfig) -> Iterator[None]:
    """Steps of fastvae's model, loss and optimizer on one batch that is there: nothing loaded, checked or logged."""
    train_set, _ = data.split(data.load(config.data), validation=config.validation)
    model = VAE(model_config(config, (1, 28, 28)))
    objective = Objective.of(config, model, batch_size=config.batch_size, total_steps=100)
    parameters = list(objective.parameters())
    optimizer, scaler = make_optimizer(config, objective), torch.amp.GradScaler("cpu", enabled=False)
    images = torch.stack([train_set[i] for i in range(config.batch_size)])
    while True:
        for step in range(BLOCK):
            accumulated(config, objective, objective, images, 0, step, scaler, ALONE)
            clip_gradients(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        yield


class Beside:
    """The trainer's listener: after each of its blocks of steps a block of each of the others, so that a machine whose
    speed drifts drifts for all."""

    def __init__(self, config: TrainConfig) -> None:
        self.others = {"textbook": textbook(config), "bare": bare(config)}
        self.seconds: dict[str, list[float]] = {"trainer": [], **{name: [] for name in self.others}}
        self.started: float | None = None  # of the block, unless something else than steps came between

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if not isinstance(event, Logged):
            return
        if event.record["split"] == "validation" or event.record["step"] % BLOCK:
            self.started = None
            return
        if self.started is not None:
            self.seconds["trainer"].append(now - self.started)
        for name, other in self.others.items():
            before = time.perf_counter()
            next(other)
            if self.started is not None:
                self.seconds[name].append(time.perf_counter() - before)
        self.started = time.perf_counter()


class Compared(NamedTuple):
    """The trainer beside the textbook."""

    nats: float
    textbook_nats: float
    over_textbook: float
    """Time of a step over that of the textbook's: median of paired blocks."""
    over_bare: float
    """Over that of model, loss and optimizer alone."""


def compare(config: TrainConfig) -> Compared:
    """Train both."""
    beside = Beside(config)
    with tempfile.TemporaryDirectory() as folder:
        nats = train(replace(config, out=Path(folder) / "run"), on_event=beside).evaluation.nats
    (*_, textbook_nats) = beside.others["textbook"]
    ours = beside.seconds["trainer"]
    over = (statistics.median(a / b for a, b in zip(ours, beside.seconds[name], strict=True)) for name in beside.others)
    return Compared(nats, textbook_nats, *over)


def same_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters in their order."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    config = TrainConfig(epochs=parser.parse_args().epochs, device="cpu", log_every=BLOCK)
    found = compare(config)
    print(f"validation negative ELBO: fastvae {found.nats:.2f}, textbook {found.textbook_nats:.2f} nats/image")
    print(f"a step takes {found.over_textbook:.3f} times as long as the textbook's, loading included in both,")
    print(f"and {found.over_bare:.3f} times as long as model, loss and optimizer alone")


if __name__ == "__main__":
    main()
