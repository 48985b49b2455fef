"""Progress of a training run: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from fastvae.training import Event
from fastvae.training.events import Logged, Started, Stepped

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_UPDATES = 0.1


@contextmanager
def reporter() -> Iterator[Callable[[Event], None]]:
    """What to pass to `train` as `on_event`."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield PlainLines()
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        SpeedColumn(Column(no_wrap=True)),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(highlight=False), transient=True, expand=True) as progress:
        yield Bar(progress)


class SpeedColumn(ProgressColumn):
    """Images per second of the last half minute."""

    def render(self, task: Task) -> Text:
        speed = (task.speed or 0) * task.fields["images"]
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f} images/s" if speed else "")


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
                speed = event.record.get("images_per_second")
                more = "" if speed is None else f", {speed:,.0f} images/s"
                self.write(f"step {event.record['step']:>6}/{self.total_steps}  {record_line(event.record)}{more}")

    def write(self, line: str) -> None:
        print(line, flush=True)
        self.last = time.monotonic()


class Bar:
    """A bar that moves with each step, and a line above it for each validation; rich redraws it ten times a second."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("loading", total=None, images=0)
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.progress.console.print(started_line(event), soft_wrap=True)
            self.progress.update(self.task, total=event.total_steps, completed=event.step, description="")
        elif isinstance(event, Stepped) and time.monotonic() - self.last >= SECONDS_BETWEEN_UPDATES:
            self.progress.update(self.task, completed=event.step, images=event.images)
            self.last = time.monotonic()
        elif isinstance(event, Logged) and event.record["split"] == "validation":
            self.progress.console.print(record_line(event.record), soft_wrap=True)
        elif isinstance(event, Logged):
            step, nats = event.record["step"], event.record["nats"]
            self.progress.update(self.task, completed=step, description=f"{nats:.1f} nats")


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
    """A record of metrics.jsonl in words, for 80 columns."""
    return (
        f"epoch {record['epoch']:>3}  {record['split']:<10}  {record['nats']:8.2f} nats = {record['recon']:.2f} recon "
        f"+ {record['kl']:.2f} KL, {record['bits_per_dim']:.3f} bits/dim"
    )
