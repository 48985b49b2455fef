"""Files that are written whole or not at all, and strict JSON: the only reader and writer of both."""

import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

CONFIG_FILE = "config.json"  # of a run folder
TEMPORARY_SUFFIX = ".tmp"


def require_regular(path: Path) -> None:
    """Refuse a path that exists and is no regular file: opening a pipe may block for ever, and replacing it breaks it.

    Raises:
        FileExistsError: a folder, a pipe, a socket or a device.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise FileExistsError(f"{path} is {kind}, not a regular file. Choose another name.")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` whole when the block ends, and not at all when it raises.

    The bytes go to a hidden file beside `path`, reach the disk, and then take its name. A symbolic link stays one: the
    file that it leads to is replaced. What a killed process leaves behind, `remove_leftovers` removes.

    Raises:
        FileExistsError: `path` is no regular file.
    """
    path = Path(os.path.realpath(path))
    require_regular(path)
    # a name of its own, since another process may be writing the same path
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the hidden files of processes that were killed while they wrote `path`; no process may be writing it."""
    for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; errors as `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, whole or not at all; errors as `atomic_write` and `dump_json`."""
    write_bytes(path, (dump_json(value, indent=2) + "\n").encode())


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON text in ASCII.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no words for; `null_non_finite` takes them out.
    """
    return json.dumps(value, indent=indent, allow_nan=False)


def null_non_finite(value: Any) -> Any:
    """`value` with None in place of every NaN and infinity, in lists, tuples and dictionaries too."""
    if isinstance(value, dict):
        return {key: null_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes, source: str) -> Any:
    """The value that JSON `text` stands for; `source` names it in errors.

    Raises:
        ValueError: not JSON as RFC 8259 defines it, or a number that is NaN or does not fit a float.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # JSON and encoding errors are ValueErrors
        raise ValueError(f"{source} is not valid JSON: {error}. Copy or write it again.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file `path` holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or JSON of something else than an object.
    """
    require_regular(path)
    return require_object(parse_json(path.read_bytes(), str(path)), str(path))


def require_object(value: Any, source: str) -> dict[str, Any]:
    """`value` if it is a JSON object; ValueError with the name of its `source` if not."""
    if not isinstance(value, dict):
        raise ValueError(
            f"{source} must hold a JSON object; it holds a {type(value).__name__}. Copy or write it again."
        )
    return value


def is_run_folder(path: Path) -> bool:
    """Whether training made this folder: whether its config.json holds options of a run."""
    try:
        return {"data", "resume", "checkpoint_every"} <= read_json_object(path / CONFIG_FILE).keys()
    except (OSError, ValueError):
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large")
    return number
