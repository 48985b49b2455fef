"""A change of another package that can be taken back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Self

_ABSENT = object()
_in_effect: set[str] = set()


@dataclass(frozen=True)
class Replacement:
    """`new` in the place of what `owner` holds under `name`: a class's own attribute, or an entry of a dict."""

    owner: type | dict[Any, Any]
    name: Any
    new: object

    def current(self) -> object:
        entries = vars(self.owner) if isinstance(self.owner, type) else self.owner
        return entries.get(self.name, _ABSENT)

    def put(self, value: object) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        elif value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


class Patch:
    """Functions of another package replaced by fastvae's, from its creation to `undo()` or the end of a `with` block.

    torch.compile does not see either: what is compiled by then keeps the functions that it was compiled with. Patch
    before the first call of a compiled model, or call torch.compiler.reset().

    Args:
        function: The function that patches, which may have one patch at a time.
        replacements: What goes where.
        undoing: Called by `undo()` before anything is put back.

    Raises:
        RuntimeError: `function` has a patch in effect.
    """

    def __init__(
        self, function: str, replacements: Sequence[Replacement], *, undoing: Callable[[], object] = lambda: None
    ) -> None:
        if function in _in_effect:
            raise RuntimeError(f"{function}() may be in effect once; it is already. Call undo() of what it returned.")
        self._function, self._undoing = function, undoing
        self._former = [(replacement, replacement.current()) for replacement in replacements]
        _in_effect.add(function)
        for replacement in replacements:
            replacement.put(replacement.new)

    def undo(self) -> None:
        """Put back what was there; nothing happens the second time.

        Raises:
            RuntimeError: the functions were replaced again since, and undoing would lose that.
        """
        for replacement, _ in self._former:
            if replacement.current() is not replacement.new:
                raise RuntimeError(
                    f"{self._function}() cannot be undone: {replacement.name} was replaced again by other code. "
                    "Undo that first."
                )
        if not self._former:
            return
        try:
            self._undoing()
        finally:
            _in_effect.remove(self._function)
            while self._former:
                replacement, former = self._former.pop()
                replacement.put(former)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def imported(module: str) -> ModuleType:
    """A module of the package to patch, which is imported here and not before.

    Raises:
        ImportError: the package is not installed.
    """
    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise ImportError(f"{package} must be installed to be patched; it is not. Run: pip install {package}")
    return import_module(module)
