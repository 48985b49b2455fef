"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastvae.training import Event
from fastvae.training.events import Logged, Started

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def reporter() -> Iterator[Callable[[Event], None]]:
    """What to pass to `train` as `on_event`."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield PlainLines()
        return
    words = TextColumn("{task.description}")
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), words)
    with Progress(*columns, console=Console(highlight=False), transient=True) as progress:
        yield Bar(progress)


class PlainLines:
    """A line for each validation, and for training at most every ten seconds."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.total_steps = 0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Started):
            self.total_steps = event.total_steps
            self.write(started_line(event))
        elif isinstance(event, Logged):
            validation = event.record["split"] == "validation"
            if validation or now - self.last >= SECONDS_BETWEEN_LINES:
                self.write(f"step {event.record['step']:>6}/{self.total_steps}  {record_line(event.record)}")

    def write(self, line: str) -> None:
        print(line, flush=True)
        self.last = time.monotonic()


class Bar:
    """A bar with the latest training figures, and a line above it for each validation."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.progress.console.print(started_line(event), soft_wrap=True)
            self.progress.update(self.task, total=event.total_steps, completed=event.step)
        elif isinstance(event, Logged):
            line = record_line(event.record)
            if event.record["split"] == "validation":
                self.progress.console.print(line, soft_wrap=True)
            self.progress.update(self.task, completed=event.record["step"], description=line)


def started_line(event: Started) -> str:
    """What is trained on what."""
    resumed = f", resumed after step {event.step}" if event.step else ""
    if event.skipped:
        names = ", ".join(list(event.skipped)[:3]) + (", ..." if len(event.skipped) > 3 else "")
        resumed += f"; {len(event.skipped)} files or folders left out, listed in {event.run / 'skipped.json'}: {names}"
    return (
        f"{event.run}: {event.train_images} training and {event.validation_images} validation images, "
        f"{event.parameters:,} parameters on {event.device}{resumed}; baseline {event.baseline:.2f} nats/image"
    )


def record_line(record: dict[str, Any]) -> str:
    """A record of metrics.jsonl in words."""
    speed = f"  {record['images_per_second']:,.0f} images/s" if "images_per_second" in record else ""
    return (
        f"epoch {record['epoch']:>3}  {record['split']:<10}  {record['nats']:8.2f} nats/image = {record['recon']:.2f} "
        f"reconstruction + {record['kl']:.2f} KL  ({record['bits_per_dim']:.4f} bits/dim){speed}"
    )
