"""Which exceptions are a user's to mend, and the one line that says how; others are bugs and keep their traceback."""

import traceback

import torch

from .doctor import TRAIN_EXTRA

FAILED, MISUSED = 1, 2  # exit status


def failure_of(error: BaseException) -> tuple[int, str] | None:
    """Exit status and message of an error that is no bug; None for a bug.

    What the system refuses (a file that is missing, a full disk, memory) is the user's to mend. So is a ValueError
    that fastvae's own code raised, whose text says what to do; out of a library's depths it is a bug.
    """
    if is_out_of_memory(error):
        return MISUSED, f"there is not enough memory for these sizes: {one_line(error)}. Choose smaller or fewer ones."
    if isinstance(error, ImportError) and _is_missing_extra(error):
        return MISUSED, one_line(error)
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_fastvae(error)):
        return MISUSED, one_line(error)
    if isinstance(error, ArithmeticError) and _raised_by_fastvae(error):
        return FAILED, one_line(error)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, or what a size can count, is at an end; on a CPU torch says so by a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, ImportError) and error.name is not None:
        package = error.name.partition(".")[0]
        return f'{package} is not installed; this command needs it. Run: pip install "fastvae-triton[train]"'
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if " in DataLoader worker process " in text:  # torch puts the worker's whole traceback into the message
        text = text.strip().rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split())


def _raised_by_fastvae(error: BaseException) -> bool:
    if type(error).__module__.partition(".")[0] == "fastvae":  # also where a worker process raised it
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    module: str = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return module.partition(".")[0] == "fastvae"


def _is_missing_extra(error: ImportError) -> bool:
    return _raised_by_fastvae(error) if error.name is None else error.name.partition(".")[0] in TRAIN_EXTRA
