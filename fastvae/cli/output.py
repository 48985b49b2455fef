"""Standard output and standard error that may be lost: a closed pipe, a full disk, a terminal that has gone."""

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Output(io.TextIOBase):
    """Standard output whose loss stops nothing: the first error is kept, and what follows goes nowhere.

    Args:
        stream: Standard output; None where the process has none.

    Attributes:
        notice: What to tell on standard error when it is lost, by a command that takes long; nothing if empty.
        error: What the system said when the output was lost; None if it is there.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.notice = ""
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.stream is not None and self.error is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.stream is not None and self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._lose(error)

    def isatty(self) -> bool:
        return self.stream is not None and self.error is None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    def _lose(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError):  # what is still buffered would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self.notice:
            complain(f"standard output is lost ({error.strerror}); {self.notice}")


@contextmanager
def guarded(output: Output) -> Iterator[None]:
    """`output` in the place of sys.stdout inside the block, and warnings as one line each on standard error."""
    previous = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the terminal has no characters for
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = output
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        output.flush()
        warnings.showwarning = show
        sys.stdout = previous


def complain(text: str) -> None:
    """Print a line of the command on standard error, if there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"fastvae: {text}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    complain(f"warning: {' '.join(str(message).split())}")
