"""From arguments to options: tyro reads them, and its complaint becomes one line."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Union

import tyro

from fastvae.training import TrainConfig

from .commands import COMMANDS

DESCRIPTION = "Train variational autoencoders on images, and use them. `fastvae COMMAND --help` explains a command."


class UsageError(ValueError):
    """The command line cannot be understood."""


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The name of the subcommand and its options.

    Options of a run that is resumed default to those it was started with, so that only a real difference is one.

    Raises:
        UsageError: says what is wrong and how to see the options.
        SystemExit: with status 0, after --help.
    """
    options = _parse(arguments, train_default=TrainConfig())
    if isinstance(options, TrainConfig) and options.resume is not None:
        options = _parse(arguments, train_default=TrainConfig.from_run(options.resume))
    (name,) = (name for name, command in COMMANDS.items() if command.options is type(options))
    return name, options


def _parse(arguments: Sequence[str], train_default: TrainConfig) -> Any:
    asked = arguments[0] if arguments and arguments[0] in COMMANDS else None
    subcommands = []
    for name, command in COMMANDS.items():
        # the list of commands shows one line of each; a command's own help, all
        description = command.help if name == asked else command.help.partition("\n")[0]
        default = train_default if command.options is TrainConfig else tyro.MISSING_NONPROP
        subcommands.append(
            Annotated[command.options, tyro.conf.subcommand(name, description=description, default=default)]
        )
    either: Any = Union[tuple(subcommands)]  # noqa: UP007 - made from a list
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                either,
                prog="fastvae",
                description=DESCRIPTION,
                args=list(arguments) or ["--help"],
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    hint = f"fastvae {asked} --help" if asked else "fastvae --help"
    raise UsageError(f"{_message(complaint.getvalue())} `{hint}` explains the options.")


def _message(complaint: str) -> str:
    """The first part of the box that tyro draws around its message."""
    lines = [line.strip("│ ") for line in complaint.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line and set(line) == {"─"}), len(lines))
    message = re.sub(r"\s+", " ", re.sub(r"\[/?bold\]", "", " ".join(lines[:rule]))).strip()
    return re.sub(r"^Error parsing TrainConfig: ", "", message).rstrip(".") + "."
