"""Loggers, to be called with each event of a run: they write its figures for other programs."""

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_bytes
from .config import TrainConfig
from .events import Drawn, Event, Finished, Logged, Started
from .run_folder import METRICS_FILE, read_metrics, wrap_io_errors

CSV_FILE = "metrics.csv"


class CsvLogger:
    """The records of metrics.jsonl as metrics.csv; a figure that a record does not have is empty."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.records: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        known = set().union(*self.records)
        if isinstance(event, Started):
            self.records = read_metrics(self.run / METRICS_FILE)  # of the part before, if the run is resumed
            self._rewrite()
        elif isinstance(event, Logged):
            self.records.append(event.record)
            if event.record.keys() <= known:
                with (self.run / CSV_FILE).open("a", newline="") as file:
                    csv.DictWriter(file, self._names()).writerow(event.record)
            else:
                self._rewrite()

    def close(self) -> None:
        """Nothing: no file stays open."""

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for record in self.records for name in record))

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._names())
        writer.writeheader()
        writer.writerows(self.records)
        write_bytes(self.run / CSV_FILE, text.getvalue().encode())


class TensorBoardLogger:
    """Figures, options and pictures for TensorBoard, in the folder `tensorboard` of the run.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('--log tensorboard needs the extra: pip install "fastvae-triton[train,log]"') from error
        self.open: Callable[[int], Any] = lambda step: SummaryWriter(run / "tensorboard", purge_step=step + 1)
        self.writer: Any = None
        self.step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):  # what an earlier process of this run wrote after the step is not shown
            self.writer = self.open(event.step)
            self._write_options(event.config)
        elif isinstance(event, Logged):
            self.step = event.record["step"]
            for name in event.record.keys() - {"step", "split"}:
                self.writer.add_scalar(f"{event.record['split']}/{name}", event.record[name], self.step)
        elif isinstance(event, Drawn):
            self._show(event.name, event.path)
        elif isinstance(event, Finished):
            for path in event.pictures:
                if path.suffix == ".png":
                    self._show(path.stem, path)
        else:
            return
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _write_options(self, options: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
        for summary in hparams(plain, {"validation/nats": 0.0}):  # type: ignore[no-untyped-call]
            self.writer.file_writer.add_summary(summary)

    def _show(self, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(name, np.asarray(picture.convert("RGB")), self.step, dataformats="HWC")


LOGGERS: dict[str, Callable[[Path], Any]] = {"csv": CsvLogger, "tensorboard": TensorBoardLogger}


@contextmanager
def notifier(
    config: TrainConfig, run: Path, on_event: Callable[[Event], None] | None
) -> Iterator[Callable[[Event], None]]:
    """A function that hands an event to the logger that the options name, and to `on_event`.

    Raises:
        ImportError: the logger needs a package that is not installed.
    """
    logger = None if config.log is None else LOGGERS[config.log](run)

    def notify(event: Event) -> None:
        if logger is not None:
            with wrap_io_errors(run):
                logger(event)
        if on_event is not None:
            on_event(event)

    try:
        yield notify
    finally:
        if logger is not None:
            logger.close()
