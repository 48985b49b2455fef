"""From arguments to options: argparse parsers, made from the option dataclasses of the subcommands."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastvae.likelihoods import SYNONYMS
from fastvae.training import TrainConfig
from fastvae.training.option_types import OptionType, option_types

from .commands import COMMANDS

DESCRIPTION = (
    "Train variational autoencoders on images, and use them. `fastvae COMMAND --help` explains a command, "
    "`fastvae --version` prints the version."
)
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
        wrong = f"there is no command {name!r}{_nearest(name, COMMANDS)}"
        if name.startswith("-"):
            wrong = f"the command comes first, as in `fastvae train --epochs 5`; got {name!r}"
        raise UsageError(f"{wrong}. The commands are {', '.join(COMMANDS)}; `fastvae --help` lists them.")
    options = COMMANDS[name].options
    given = _given(name, options, rest)
    if options is TrainConfig and given.get("resume") is not None:
        return name, dataclasses.replace(TrainConfig.from_run(given["resume"]), **given)
    return name, options(**given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` explains the options.")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar)


def _given(name: str, options: type, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that the arguments name, by field."""
    parser = _parser(name, options)
    types = option_types(options)
    values, unknown = parser.parse_known_args([_spelled(argument) for argument in arguments])
    if unknown:
        near = _nearest(unknown[0], map(_flag, types))
        parser.error(f"unrecognized arguments: {' '.join(unknown).strip()}{near}")
    given = vars(values)
    for field, value in given.items():
        try:
            given[field] = types[field].converted(value)
        except ValueError:  # of another length
            got = " ".join(map(str, value)) or "nothing"
            parser.error(f"argument {_flag(field)}: must be {types[field].words}; got {got!r}")
    return given


def _parser(name: str, options: type) -> argparse.ArgumentParser:
    width = shutil.get_terminal_size().columns - 2
    text, examples = COMMANDS[name].help.split("\nExamples:\n")
    parser = _Parser(
        prog=f"fastvae {name}",
        usage=f"fastvae {name} [--OPTION VALUE ...]",
        description="\n\n".join(textwrap.fill(part, max(width, 18)) for part in text.split("\n\n")),
        epilog=f"Examples:\n{examples}",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    docstrings, types = _docstrings(options), option_types(options)
    titles = {field: title for title, fields in COMMANDS[name].groups.items() for field in fields.split()}
    groups = {title: parser.add_argument_group(title) for title in COMMANDS[name].groups}
    for field in dataclasses.fields(options):
        kind = types[field.name]
        required = field.default is dataclasses.MISSING
        note = " (required)" if required else _default_note(field.default)
        settings: dict[str, Any] = {"help": (docstrings[field.name] + note).replace("%", "%%"), "required": required}
        if kind.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _reader(kind), "metavar": _metavar(kind)}
            if kind.length is not None:  # whose number `_given` checks, to say what was passed
                settings["nargs"] = "*"
        groups.get(titles.get(field.name, ""), parser).add_argument(_flag(field.name), **settings)
    return parser


def _reader(option: OptionType) -> Any:
    """The function that converts the text of one value."""
    single = option._replace(length=None)

    def read(text: str) -> Any:
        text = text[1:] if text.startswith(" ") and NEGATIVE_NUMBER.match(text[1:]) else text  # as `_spelled` left it
        try:
            if option.optional and option.length is None and text == "None":
                return None
            return single.converted(option.kind(text) if option.kind is not Path else text)
        except ValueError:
            hint = _nearest(text, option.choices)
            raise argparse.ArgumentTypeError(f"must be {single.words}; got {text!r}{hint}") from None

    return read


def _spelled(argument: str) -> str:
    """The argument as argparse takes it: options with dashes; a negative number not for an option."""
    if argument.startswith("--"):
        option, equals, value = argument.partition("=")
        return option.replace("_", "-") + equals + value
    return f" {argument}" if NEGATIVE_NUMBER.match(argument) else argument


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _metavar(option: OptionType) -> str:
    if option.choices:
        return f"{{{','.join(option.choices)}}}"
    one = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}[option.kind]
    return f"{one} ..." if option.length == 0 else " ".join([one] * (option.length or 1))


def _default_note(default: object) -> str:
    if default is None or default is False:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f" (default: {shown})"


def _docstrings(options: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of those it inherits from, on one line."""
    found = {}
    for cls in filter(dataclasses.is_dataclass, reversed(options.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for node, following in itertools.pairwise(getattr(tree, "body", [])):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[ast.unparse(node.target)] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def _overview() -> str:
    width = max(shutil.get_terminal_size().columns - 2, 18)
    lines = [
        "usage: fastvae COMMAND [--OPTION VALUE ...]",
        "       fastvae --version",
        "",
        DESCRIPTION,
        "",
        "commands:",
    ]
    lines += [f"  {name:<12}{command.help.splitlines()[0]}" for name, command in COMMANDS.items()]
    indent = " " * (14 if width > 40 else 4)
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent * line.startswith("  ")) for line in lines)


def _nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the known word most like this one; empty if none is."""
    word = word.partition("=")[0].lower()
    known = list(known)
    synonym = SYNONYMS.get(word, "").partition(" ")[0].strip("'")
    near = [synonym] if synonym in known else difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
