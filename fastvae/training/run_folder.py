"""The folder of a run: which one it is, and its metrics."""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .._distributed import restarts
from .._files import (
    TEMPORARY_SUFFIX,
    dump_json,
    null_non_finite,
    parse_json,
    require_object,
    require_regular,
    write_bytes,
)
from .checkpoint import CHECKPOINT_FILE
from .config import CONFIG_FILE, TrainConfig
from .run_lock import LOCK_FILE, RunLockedError, lock_run

METRICS_FILE = "metrics.jsonl"
# what the pictures, the report and a resumed run read of each line
NUMBER = (int, float)
RECORD = {"step": int, "epoch": int, "split": str} | dict.fromkeys(
    ("loss", "recon", "kl", "nats", "bits_per_dim"), NUMBER
)


class RunFolderError(OSError):
    """The run folder cannot be written."""


@contextmanager
def wrap_io_errors(run: Path) -> Iterator[None]:
    """Let what the system refuses be a `RunFolderError` that says what to do.

    Files are replaced whole, so the last checkpoint is as it was.
    """
    try:
        yield
    except (FileNotFoundError, RunLockedError):  # the folder or an image to draw has gone: their own words are clearer
        raise
    except OSError as error:
        remedy = "Free space, set its permissions, or choose another --out; there is no checkpoint yet."
        if (run / CHECKPOINT_FILE).exists():
            remedy = (
                "The last checkpoint is intact: free space or set the permissions, then continue with "
                f"fastvae train --resume {run}"
            )
        raise RunFolderError(f"cannot write to the run folder {run}: {error}. {remedy}") from error


@contextmanager
def locked_run_folder(config: TrainConfig) -> Iterator[Path]:
    """`choose_run_folder`, made and kept from other trainings inside the block.

    Raises:
        RunFolderError: it cannot be made.
        RunLockedError: another training writes to it.
        FileExistsError: a new run would start in a folder that is not empty.
        FileNotFoundError, ValueError: as `choose_run_folder`.
    """
    run = choose_run_folder(config)
    with ExitStack() as stack:
        with wrap_io_errors(run):
            stack.enter_context(lock_run(run))
        if config.resume is None:
            _require_empty(run)
        yield run


def choose_run_folder(config: TrainConfig) -> Path:
    """The folder of the run: the one to resume, `out`, or runs/DATA-TIMESTAMP.

    Raises:
        FileExistsError: a new run would start in the place of a file.
        FileNotFoundError: there is no run to resume.
        ValueError: the run has other options, or `out` is another folder than `resume`.
    """
    if config.resume is None:
        name = Path(config.data.removeprefix("idx:")).stem or "data"
        run = config.out or _unused(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        if run.exists() and not run.is_dir():
            raise FileExistsError(f"the run folder {run} is a file. Choose another --out.")
        return run
    run = config.resume
    if config.out is not None and os.path.realpath(config.out) != os.path.realpath(run):
        raise ValueError(f"a resumed run stays in its folder {run}; got --out {config.out}. Leave --out away.")
    TrainConfig.from_run(run).require_same(config, f"the run {run}")
    return run


def resumed_after_restart(config: TrainConfig) -> TrainConfig:
    """The config, set to resume its run if torchrun has restarted the processes.

    Raises:
        ValueError: the run's folder has no name that a restart can know.
    """
    if restarts() == 0 or config.resume is not None:
        return config
    if config.out is None:
        raise ValueError("torchrun has restarted the processes, which do not know their run folder. Pass --out.")
    if not (config.out / CONFIG_FILE).exists():
        return config
    if not (
        config.out / CHECKPOINT_FILE
    ).exists():  # stopped before its first checkpoint: start again in the same folder
        return replace(config, resume=config.out)
    return replace(TrainConfig.from_run(config.out), device=config.device, workers=config.workers)


def _unused(path: Path) -> Path:
    """`path`, or with a number after it if something is there, such as a run that began in the same second."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], numbered) if not candidate.exists())


def _require_empty(path: Path) -> None:
    if any(entry.name != LOCK_FILE and not entry.name.endswith(TEMPORARY_SUFFIX) for entry in path.iterdir()):
        raise FileExistsError(
            f"the run folder {path} is not empty and nothing in it is overwritten. "
            f"Choose another --out, or continue that run with --resume {path}."
        )


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of its steps, each step and split once.

    A resumed run starts from its checkpoint, so lines after the checkpoint's step, and a line that a kill cut off,
    are taken out first.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        """Open `path` for appending, and keep only the lines up to `step`."""
        self.path = path
        self.records = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
        write_bytes(path, "".join(map(_line, self.records)).encode())

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def sync(self) -> None:
        """Wait until all lines are on the disk, which takes as long as a step of training, or ten."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, NaN where a figure was not finite; a last line that a kill cut off is left out.

    Raises:
        ValueError: another line is not a JSON object with a step, a split and figures; the message has its number.
    """
    require_regular(path)
    content = path.read_bytes()
    lines = content.split(b"\n")
    end = lines.pop()  # empty, unless the last line was cut off
    records = [_record(line, f"{path}, line {number},") for number, line in enumerate(lines, start=1)]
    if end:
        with suppress(ValueError):
            records.append(_record(end, str(path)))
    return records


def _line(record: dict[str, Any]) -> str:
    return dump_json(null_non_finite(record)) + "\n"


def _record(line: bytes, source: str) -> dict[str, Any]:
    values = require_object(parse_json(line, source), source)
    record = {name: math.nan if value is None else value for name, value in values.items()}
    for name, kind in RECORD.items():
        if isinstance(record.get(name), bool) or not isinstance(record.get(name), kind):
            raise ValueError(
                f"{source} must hold a {name}; it holds {values.get(name)!r}. Restore or remove that line."
            )
    return record
