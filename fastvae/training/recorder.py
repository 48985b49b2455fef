"""Records of a run: written to metrics.jsonl and TensorBoard, and reported as events."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .config import TrainConfig
from .events import Event, Logged
from .run_folder import METRICS_FILE, MetricsFile, wrap_io_errors


class Recorder:
    """The figures of a run, step by step.

    Args:
        run: Folder of the run.
        config: Its options.
        notify: Gets each record as an event.
        step: Updates done already; records of later steps, which a resumed run repeats, are removed.
        steps_per_epoch: Updates in a pass over the training images.
        writes: Whether this process writes files.

    Attributes:
        records: What metrics.jsonl holds.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        notify: Callable[[Event], None],
        *,
        step: int,
        steps_per_epoch: int,
        writes: bool,
    ) -> None:
        self.run = run
        self.notify = notify
        self.steps_per_epoch = steps_per_epoch
        self.metrics: MetricsFile | None = None
        self.board: Any = None
        if writes:
            with wrap_io_errors(run):
                self.metrics = MetricsFile(run / METRICS_FILE, step=step)
                self.board = _tensorboard(run, step) if config.log == "tensorboard" else None

    @property
    def records(self) -> list[dict[str, Any]]:
        return [] if self.metrics is None else self.metrics.records

    def log(self, split: str, step: int, loss: float, recon: float, kl: float, **more: float) -> None:
        """Record what the images of `split` cost after `step` updates."""
        record = {"step": step, "epoch": -(-step // self.steps_per_epoch), "split": split}
        record |= {"loss": loss, "recon": recon, "kl": kl}
        record |= {"nats": recon + kl, **more}
        with wrap_io_errors(self.run):
            if self.metrics is not None:
                self.metrics.append(record)
            if self.board is not None:
                for name in record.keys() - {"step", "split"}:
                    self.board.add_scalar(f"{split}/{name}", record[name], step)
                self.board.flush()
        self.notify(Logged(record))

    def sync(self) -> None:
        """Bring what was logged to the disk: before a checkpoint, so that none is newer than its metrics."""
        if self.metrics is not None:
            with wrap_io_errors(self.run):
                self.metrics.sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.board is not None:
            self.board.close()


def _tensorboard(run: Path, step: int) -> Any:
    """A writer of TensorBoard's files; what an earlier process of this run wrote after `step` is not shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('--log tensorboard needs the extra: pip install "fastvae-triton[train,log]"') from error
    return SummaryWriter(run / "tensorboard", purge_step=step + 1)
