"""Ctrl-C, SIGTERM and SIGHUP end a run after the step in progress, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import FrameType

SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([SIGHUP] if SIGHUP is not None else [])]


class TrainingInterrupted(KeyboardInterrupt):
    """A signal ended the training; its last step is saved.

    Attributes:
        run: Run folder to resume.
        step: Updates done.
        signal: The signal that came.
    """

    def __init__(self, run: Path, step: int, signal: Signals) -> None:
        super().__init__(f"training stopped by {signal.name} after step {step}, which is saved in {run}")
        self.run = run
        self.step = step
        self.signal = signal


@dataclass
class PendingSignal:
    """The signal that came while a step was in progress, if one did."""

    signal: Signals | None = None


@contextmanager
def deferred_signals() -> Iterator[PendingSignal]:
    """Note SIGINT, SIGTERM and SIGHUP instead of acting on them; a second one acts as it would have without this.

    SIGHUP stays ignored where it is, as under nohup. SIGINT does not: shells ignore it for every job of a script that
    runs in the background. Only the main thread may handle signals; in any other thread nothing is changed.
    """
    pending = PendingSignal()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    # a handler that C code installed reads as None, and cannot be put back from here
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    previous = {number: old for number, old in handlers.items() if number != SIGHUP or old != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        pending.signal = Signals(number)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield pending
    finally:
        restore()
