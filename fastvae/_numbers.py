"""Checks of numbers, NumPy's scalars included. Each returns the number as a Python float or int."""

import math
from numbers import Integral, Real
from typing import SupportsFloat, SupportsIndex, cast


def number(name: str, value: object) -> float:
    """A float; infinite where a whole number is beyond float64."""
    if type(value) is float:
        return value
    # builtin types first: torch.compile cannot trace the check of an abstract class
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}.")
    try:
        return float(cast(SupportsFloat, value))
    except OverflowError:
        return math.inf if cast(int, value) > 0 else -math.inf


def _within(name: str, value: object, required: str, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {required}; got {value!r}.")


def positive(name: str, value: object) -> float:
    x = number(name, value)
    _within(name, value, "positive and finite", holds=0 < x < math.inf)
    return x


def not_negative(name: str, value: object) -> float:
    x = number(name, value)
    _within(name, value, "0 or more, and finite", holds=0 <= x < math.inf)
    return x


def finite(name: str, value: object) -> float:
    x = number(name, value)
    _within(name, value, "finite", holds=math.isfinite(x))
    return x


def fraction(name: str, value: object) -> float:
    x = number(name, value)
    _within(name, value, "between 0 and 1", holds=0 <= x <= 1)
    return x


def is_integer(value: object) -> bool:
    return isinstance(value, int | Integral) and not isinstance(value, bool)


def integer(name: str, value: object, *, least: int) -> int:
    if not is_integer(value) or cast(int, value) < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {value!r}.")
    return int(cast(SupportsIndex, value))
