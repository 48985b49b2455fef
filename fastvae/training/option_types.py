"""The types of a dataclass of options, read from its annotations: for the command line, for JSON and for Python."""

import dataclasses
import math
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class OptionType(NamedTuple):
    """What an option holds: one value, or a tuple of them.

    Attributes:
        kind: int, float, bool, str or Path.
        choices: What a str may be; any if empty.
        length: Of the tuple; 0: any; None: no tuple.
        optional: Whether the option may be None.
    """

    kind: type
    choices: tuple[str, ...]
    length: int | None
    optional: bool

    @property
    def words(self) -> str:
        """What the option must be."""
        if self.choices:
            return f"{'one of ' if len(self.choices) > 1 else ''}{', '.join(self.choices)}"
        one = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
        if self.length is None:
            return one[self.kind]
        return f"{self.length or 'one or more'} {one[self.kind].partition(' ')[2]}s"

    def converted(self, value: object) -> Any:
        """`value` as the option holds it: a tuple for a list, a Path for a str, a float for an int.

        Raises:
            ValueError: `value` is of another type, or no finite number, or none of the choices.
        """
        if value is None and self.optional:
            return None
        if self.length is None:
            return self._single(value)
        if not isinstance(value, tuple | list) or len(value) != (self.length or max(len(value), 1)):
            raise ValueError(value)
        return tuple(map(self._single, value))

    def _single(self, value: object) -> Any:
        if isinstance(value, bool):
            if self.kind is bool:
                return value
        elif self.kind is int and isinstance(value, Integral):
            return int(value)
        elif self.kind is float and isinstance(value, Real):
            with suppress(OverflowError):
                if math.isfinite(number := float(value)):
                    return number
        elif self.kind is Path and isinstance(value, str | Path) and str(value):
            return Path(value)
        elif self.kind is str and isinstance(value, str) and (value in self.choices or not self.choices):
            return value
        raise ValueError(value)


def option_types(options: type) -> dict[str, OptionType]:
    """The types of a dataclass's fields, by name."""
    hints = get_type_hints(options)
    return {field.name: _option_type(hints[field.name]) for field in dataclasses.fields(options)}


def convert_options(options: Any) -> None:
    """Check the types of a dataclass's values, which may come from a file, and convert them in place.

    Raises:
        ValueError: names the option, and says what it must be.
    """
    for name, option in option_types(type(options)).items():
        value = getattr(options, name)
        try:
            object.__setattr__(options, name, option.converted(value))
        except ValueError:
            raise ValueError(f"{name} must be {option.words}; got {value!r}.") from None


def _option_type(hint: Any) -> OptionType:
    parts = get_args(hint)
    optional = NoneType in parts
    if optional:
        (hint,) = (part for part in parts if part is not NoneType)
    length = None
    if get_origin(hint) is tuple:
        hint, *rest = get_args(hint)
        length = 0 if rest == [...] else 1 + len(rest)
    choices: tuple[str, ...] = ()
    if get_origin(hint) is Literal:
        choices, hint = get_args(hint), str
    return OptionType(hint, choices, length, optional)
