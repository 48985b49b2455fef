"""The command `fastvae`: parses, runs a subcommand, and turns mistakes into one line and a status.

Exit status: 0 done, 1 the run failed (a loss that is not finite, a problem that `doctor` found), 2 a user's mistake,
130, 141 and 143 stopped by SIGINT, SIGPIPE and SIGTERM. Other exceptions are bugs and keep their traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from . import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastvae` with `argv` (the arguments of the process if None) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output, `head` say, has gone: nobody to tell, nothing left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        return _stopped(interrupt)
    except Exception as error:
        failure = _status(error)
        if failure is None or os.environ.get("FASTVAE_TRACEBACK") == "1":
            raise
        print(f"fastvae: error: {_one_line(error)}", file=sys.stderr)
        return failure


def _run(arguments: list[str]) -> int:
    if arguments == ["doctor"]:  # here: it must run where the extras that the other commands need are missing
        return doctor.run(doctor.Doctor())
    from .commands import COMMANDS
    from .parsing import parse

    name, options = parse(arguments)
    return COMMANDS[name].run(options)


def _status(error: Exception) -> int | None:
    """Exit status of an error that is not a bug; None for a bug.

    What the system refuses (a file that is missing, a full disk) is the user's to mend. So is a ValueError
    that fastvae's own code raised, whose text says what to do; out of a library's depths it is a bug.
    """
    if isinstance(error, OSError) or (isinstance(error, ImportError) and _missing_extra(error)):
        return 2
    if isinstance(error, ValueError) and _raised_by_fastvae(error):
        return 2
    if isinstance(error, ArithmeticError) and _raised_by_fastvae(error):
        return 1
    return None


def _raised_by_fastvae(error: Exception) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    module: str = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return module.partition(".")[0] == "fastvae"


def _missing_extra(error: ImportError) -> bool:
    return _raised_by_fastvae(error) if error.name is None else error.name.partition(".")[0] in doctor.TRAIN_EXTRA


def _one_line(error: Exception) -> str:
    if isinstance(error, ImportError) and error.name is not None:
        package = error.name.partition(".")[0]
        return f'{package} is not installed; this command needs it. Run: pip install "fastvae-triton[train]"'
    return " ".join(str(error).split())


def _stopped(interrupt: KeyboardInterrupt) -> int:
    number = getattr(interrupt, "signal", signal.SIGINT)
    print(f"fastvae: {interrupt or 'stopped'}", file=sys.stderr)
    if hasattr(interrupt, "run"):
        print(f"fastvae: go on with: fastvae train --resume {interrupt.run}", file=sys.stderr)
    return 128 + int(number)
