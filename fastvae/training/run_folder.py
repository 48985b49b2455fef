"""The folder of a run: which one it is, and its metrics."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from .._files import TEMPORARY_SUFFIX, write_bytes
from .checkpoint import CHECKPOINT_FILE
from .config import TrainConfig

METRICS_FILE = "metrics.jsonl"


class RunFolderError(OSError):
    """The run folder cannot be written."""


@contextmanager
def naming_the_run(run: Path) -> Iterator[None]:
    """Let what the system refuses be a `RunFolderError` that says what to do.

    Files are replaced whole, so the last checkpoint is as it was.
    """
    try:
        yield
    except FileNotFoundError:  # the folder itself has gone, or an image to draw: its own words are clearer
        raise
    except OSError as error:
        remedy = "Free space, set its permissions, or choose another --out; there is no checkpoint yet."
        if (run / CHECKPOINT_FILE).exists():
            remedy = (
                "The last checkpoint is intact: free space or set the permissions, then go on with "
                f"fastvae train --resume {run}"
            )
        raise RunFolderError(f"cannot write to the run folder {run}: {error}. {remedy}") from error


def choose_run_folder(config: TrainConfig) -> Path:
    """The folder of the run: the one to resume, `out`, or runs/DATA-TIMESTAMP; made later, once the data is there.

    Raises:
        FileExistsError: a new run would start in a folder that is not empty.
        FileNotFoundError: there is no run to resume.
        ValueError: the run has other options, or `out` is another folder than `resume`.
    """
    if config.resume is None:
        name = Path(config.data.removeprefix("idx:")).stem or "data"
        run = config.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        _require_free(run)
        return run
    run = config.resume
    if config.out is not None and config.out.resolve() != run.resolve():
        raise ValueError(f"a resumed run stays in its folder {run}; got --out {config.out}. Leave --out away.")
    TrainConfig.from_run(run).require_same(config, f"the run {run}")
    return run


def _require_free(path: Path) -> None:
    """Refuse a run folder that already holds something.

    Raises:
        FileExistsError: `path` is a folder with files in it, or a file.
    """
    if path.is_dir():
        if any(not entry.name.endswith(TEMPORARY_SUFFIX) for entry in path.iterdir()):
            raise FileExistsError(
                f"the run folder {path} is not empty and nothing in it is overwritten. "
                f"Choose another --out, or continue that run with --resume {path}."
            )
    elif path.exists():
        raise FileExistsError(f"the run folder {path} is a file. Choose another --out.")


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in order of its steps, each step and split once.

    A resumed run starts from its checkpoint, so lines after the checkpoint's step, and a line that a kill cut off,
    are taken out first.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        """Open `path` for appending, and keep only the lines up to `step`."""
        self.path = path
        self.records = [record for record in read_metrics(path) if record["step"] <= step] if path.exists() else []
        write_bytes(path, "".join(json.dumps(record) + "\n" for record in self.records).encode())

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Wait until all lines are on the disk, which takes as long as a step of training, or ten."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut off is left out.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not valid JSON: {error}.") from error
        records.append(record)
    return records
