"""From arguments to options: argparse reads them, as the dataclasses of the subcommands say."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastvae.training import TrainConfig
from fastvae.training.option_types import OptionType, option_types

from .commands import COMMANDS

DESCRIPTION = "Train variational autoencoders on images, and use them. `fastvae COMMAND --help` explains a command."
NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


class UsageError(ValueError):
    """The command line cannot be understood."""


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The name of the subcommand and its options.

    Options of a run that is resumed default to those it was started with, so that only a real difference is one.

    Raises:
        UsageError: says what is wrong and how to see the options.
        SystemExit: with status 0, after --help.
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h"):
        print(_overview())
        raise SystemExit(0)
    if name not in COMMANDS:
        known = f"The commands are {', '.join(COMMANDS)}"
        raise UsageError(
            f"there is no command {name!r}{_nearest(name, COMMANDS)}. {known}; `fastvae --help` lists them."
        )
    options = COMMANDS[name].options
    given = _given(name, options, rest)
    if options is TrainConfig and given.get("resume") is not None:
        return name, dataclasses.replace(TrainConfig.from_run(given["resume"]), **given)
    return name, options(**given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` explains the options.")


def _given(name: str, options: type, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that the arguments name, by field."""
    parser = _parser(name, options)
    values, unknown = parser.parse_known_args([_spelled(argument) for argument in arguments])
    if unknown:
        names = [f"--{_dashed(field)}" for field in option_types(options)]
        parser.error(f"unrecognized arguments: {' '.join(unknown).strip()}{_nearest(unknown[0], names)}")
    types = option_types(options)
    return {field: types[field].converted(value) for field, value in vars(values).items()}


def _parser(name: str, options: type) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"fastvae {name}",
        usage=_fill(f"usage: fastvae {name} [--OPTION VALUE ...]", hang=4).removeprefix("usage: "),
        description=_wrapped(COMMANDS[name].help),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    docstrings = _docstrings(options)
    types = option_types(options)
    for field in sorted(
        dataclasses.fields(options), key=lambda field: bool(field.kw_only)
    ):  # those of a base class last
        kind = types[field.name]
        required = field.default is dataclasses.MISSING
        note = " (required)" if required else _default_note(field.default)
        settings: dict[str, Any] = {"help": (docstrings[field.name] + note).replace("%", "%%"), "required": required}
        if kind.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _reader(kind), "metavar": _metavar(kind)}
            if kind.length is not None:
                settings["nargs"] = kind.length or "+"
        parser.add_argument(f"--{_dashed(field.name)}", **settings)
    return parser


def _reader(option: OptionType) -> Any:
    """What turns the text of one value into that value."""
    single = option._replace(length=None)

    def read(text: str) -> Any:
        text = text[1:] if text.startswith(" ") and NEGATIVE_NUMBER.match(text[1:]) else text  # as `_spelled` left it
        try:
            if option.optional and option.length is None and text == "None":
                return None
            return single.converted(option.kind(text) if option.kind is not Path else text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {single.words}; got {text!r}") from None

    return read


def _spelled(argument: str) -> str:
    """The argument as argparse takes it: options with dashes; a negative number not for an option."""
    if argument.startswith("--"):
        option, equals, value = argument.partition("=")
        return option.replace("_", "-") + equals + value
    return f" {argument}" if NEGATIVE_NUMBER.match(argument) else argument


def _dashed(field: str) -> str:
    return field.replace("_", "-")


def _metavar(option: OptionType) -> str:
    if option.choices:
        return f"{{{','.join(option.choices)}}}"
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}[option.kind]


def _default_note(default: object) -> str:
    if default is None or default is False:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


def _docstrings(options: type) -> dict[str, str]:
    """What stands below each field of a dataclass and its bases, on one line."""
    found = {}
    for owner in filter(dataclasses.is_dataclass, options.__mro__):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for node, following in itertools.pairwise(definition.body):  # type: ignore[attr-defined]
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(following, ast.Expr)
            ):
                found[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def _overview() -> str:
    lines = [_fill("usage: fastvae COMMAND [--OPTION VALUE ...]", hang=4), "", _fill(DESCRIPTION), "", "commands:"]
    summaries = ((name, command.help.partition("\n")[0]) for name, command in COMMANDS.items())
    return "\n".join(lines + [_fill(f"  {name:<12}{summary}", hang=14) for name, summary in summaries])


def _wrapped(text: str) -> str:
    """A command's help as wide as the terminal; lines that are indented a little stay lines."""
    paragraphs: list[str] = []
    for line in text.splitlines():
        goes_on = line.startswith(" " * 8) or not line.startswith(" ")
        if (
            paragraphs
            and paragraphs[-1]
            and line
            and goes_on
            and line.startswith(" ") == paragraphs[-1].startswith(" ")
        ):
            paragraphs[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line)
    hangs = {"  --": 16, "  fa": 4}
    return "\n".join(_fill(paragraph, hang=hangs.get(paragraph[:4], 0)) for paragraph in paragraphs)


def _fill(line: str, *, hang: int = 0) -> str:
    width = max(shutil.get_terminal_size().columns - 2, 18)
    indent = " " * (hang if hang < width // 2 else min(hang, 4))
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
