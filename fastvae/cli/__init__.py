"""The command `fastvae`: parses, runs a subcommand, and turns mistakes into one line and a status.

Exit status: 0 done, 1 the run failed (a loss that is not finite, a problem that `doctor` found), 2 a user's mistake,
129, 130, 141 and 143 stopped by SIGHUP, SIGINT, SIGPIPE and SIGTERM. Other exceptions are bugs and keep their
traceback; with FASTVAE_TRACEBACK=1, mistakes do too.
"""

import os
import signal
import sys
from collections.abc import Sequence

import fastvae

from . import doctor
from .errors import MISUSED, failure_of
from .output import Output, complain, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastvae` with `argv` (the arguments of the process if None) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    output = Output(sys.stdout)
    try:
        with guarded(output):
            status = _run(arguments)
    except SystemExit:  # after --help
        if output.error is None:
            raise
    except KeyboardInterrupt as interrupt:
        return _stopped(interrupt)
    except Exception as error:
        failure = failure_of(error)
        if failure is None or os.environ.get("FASTVAE_TRACEBACK") == "1":
            raise
        status, message = failure
        complain(f"error: {message}")
        return status
    if isinstance(output.error, BrokenPipeError):  # who read the output, `head` say, has gone: nobody to tell
        return 128 + signal.SIGPIPE
    if output.error is not None:
        complain(f"error: cannot write to standard output: {output.error.strerror}")
        return MISUSED
    return status


def _run(arguments: list[str]) -> int:
    if arguments == ["doctor"]:  # here: it must run where the extras that the other commands need are missing
        return doctor.run(doctor.Doctor())
    if arguments in (["--version"], ["-V"]):
        print(f"fastvae {fastvae.__version__}")
        return 0
    from .commands import COMMANDS
    from .parsing import parse

    name, options = parse(arguments)
    return COMMANDS[name].run(options)


def _stopped(interrupt: KeyboardInterrupt) -> int:
    number = signal.Signals(getattr(interrupt, "signal", signal.SIGINT))
    complain(str(interrupt) or f"stopped by {number.name}")
    if hasattr(interrupt, "run"):
        complain(f"go on with: fastvae train --resume {interrupt.run}")
    return 128 + int(number)
