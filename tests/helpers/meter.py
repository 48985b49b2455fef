"""Watch what interpreted kernels do to memory.

    with Meter() as meter:
        kernel[grid](x, y, n, BLOCK_SIZE=1024)
    assert meter.total == 8 * n, meter.table()

It counts bytes by argument and fails on what the interpreter forgives and a GPU does not: an access out of bounds, a
masked-off lane that is used though its load names no `other`, two programs (or lanes of a store) that meet in one
element. Atomics are refused as races: the kernels use none, so that the same input gives the same bits.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from tests.helpers.shadow import OutOfBounds, Race, Shadow, Traffic

__all__ = ["Launch", "Meter", "OutOfBounds", "Race", "Traffic"]

# triton 3.6 has the first two
ATOMICS = ("create_atomic_rmw", "create_atomic_cas", "create_atomic_load", "create_atomic_store", "create_atomic_poll")


@dataclass
class Launch:
    """One kernel launch. Arguments that are the same memory share one `Traffic`."""

    name: str
    grid: tuple[int, ...] = ()
    arguments: dict[str, Traffic] = field(default_factory=dict)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Each `Traffic` once, under the names of all its arguments."""
        names: dict[int, list[str]] = {}
        for name, traffic in self.arguments.items():
            names.setdefault(id(traffic), []).append(name)
        return {" = ".join(group): self.arguments[group[0]] for group in names.values()}

    @property
    def loaded(self) -> int:
        return sum(traffic.loaded for traffic in self.traffic.values())

    @property
    def stored(self) -> int:
        return sum(traffic.stored for traffic in self.traffic.values())


class Meter:
    """Context manager that meters every launch of an interpreted kernel made inside it.

    Args:
        bounds: Raise `OutOfBounds`, before the pointer is followed, for an active lane that is at no element of any
            tensor argument (in a hole of a strided view, too) or is not aligned to its size.
        poison: Give masked-off lanes of loads without `other=` a NaN or an extreme integer.
        races: Raise `Race` where the outcome depends on which program, or lane, comes first.
        order: In which order the programs of a grid run: None (ascending), "reverse", or the seed of a permutation.
    """

    def __init__(
        self,
        *,
        bounds: bool = True,
        poison: bool = True,
        races: bool = True,
        order: Literal["reverse"] | int | None = None,
    ) -> None:
        self.bounds, self.poison, self.races, self.order = bounds, poison, races, order
        self.launches: list[Launch] = []

    @property
    def loaded(self) -> int:
        return sum(launch.loaded for launch in self.launches)

    @property
    def stored(self) -> int:
        return sum(launch.stored for launch in self.launches)

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    def table(self) -> str:
        row = "{:<40} {:<28}{:>12}{:>12}{:>12}{:>12}".format
        lines = [row("launch", "argument", "loaded", "distinct", "stored", "distinct")]
        for launch in self.launches:
            for name, moved in launch.traffic.items():
                counts = (moved.loaded, moved.distinct_loaded, moved.stored, moved.distinct_stored)
                lines.append(row(f"{launch.name}{launch.grid}", name, *counts))
        lines.append(row(f"{len(self.launches)} launches", f"{self.total} bytes", self.loaded, "", self.stored, ""))
        return "\n".join(lines)

    def __enter__(self) -> Self:
        import triton
        import triton.runtime.interpreter as interpreter

        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Meter sees interpreted kernels only: set TRITON_INTERPRET=1 before triton is imported")
        self._patches = ExitStack()
        self._wrap(interpreter.GridExecutor, "__call__", self._launch)
        self._wrap(interpreter.GridExecutor, "_init_args_hst", self._arguments)
        builder = interpreter.InterpreterBuilder
        self._wrap(builder, "set_grid_idx", self._next_program)
        self._wrap(builder, "create_masked_load", self._load)  # unmasked loads end up here, too
        self._wrap(builder, "create_masked_store", self._store)
        for name in filter(functools.partial(hasattr, builder), ATOMICS):
            self._wrap(builder, name, self._atomic)
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _wrap(self, owner: type, name: str, hook: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(owner, name, wrapper))

    def _launch(self, original: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
        from triton.runtime.interpreter import interpreter_builder

        self._current = Launch(executor.fn.__name__)
        self._shadow = Shadow(bounds=self.bounds, races=self.races)
        try:
            original(executor, *args, **kwargs)
        except Exception as error:
            # the interpreter wraps what a kernel raises, once for every function that it leaves
            fault = next((cause for cause in _causes(error) if isinstance(cause, OutOfBounds | Race)), None)
            if fault is None:
                raise
            where = f"{self._current.name}, program {interpreter_builder.grid_idx}"
            raise type(fault)(f"{where}: {fault}") from None
        self._current.grid = interpreter_builder.grid_dim
        self._shadow.count_distinct()
        self.launches.append(self._current)

    def _arguments(self, original: Callable[..., Any], executor: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = original(executor, args, kwargs)  # on the host, at the addresses that the kernel will see
        for name, value in inspect.getcallargs(executor.fn, *args, **kwargs).items():
            for tensor_name, tensor in _tensors(name, value):
                self._current.arguments[tensor_name] = self._shadow.add(tensor_name, tensor)
        return args, kwargs

    def _next_program(self, original: Callable[..., None], builder: Any, *program: int) -> None:
        grid = builder.grid_dim
        position = _position(int(np.ravel_multi_index(program, grid)), int(np.prod(grid)), self.order)
        original(builder, *(int(index) for index in np.unravel_index(position, grid)))

    def _load(
        self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any
    ) -> Any:
        active = np.broadcast_to(mask.data, pointers.data.shape)
        self._shadow.load(pointers.data[active].astype(np.int64), _itemsize(pointers), _program(builder))
        loaded = original(builder, pointers, mask, other, *rest)
        if self.poison and other is None:
            loaded.data[~active] = _poison(loaded.data.dtype)
        return loaded

    def _store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        active = np.broadcast_to(mask.data, pointers.data.shape)
        self._shadow.store(pointers.data[active].astype(np.int64), _itemsize(pointers), _program(builder))
        return original(builder, pointers, value, mask, *rest)

    def _atomic(self, original: Callable[..., Any], builder: Any, *args: Any, **kwargs: Any) -> None:
        raise Race(f"{original.__name__}: programs that meet in an atomic come in any order")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)
    else:
        value = getattr(value, "base", value)  # of Triton's TensorWrapper and TensorDescriptor
        if isinstance(value, torch.Tensor):
            yield name, value


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _program(builder: Any) -> int:
    """The running program, counted from 1."""
    return 1 + int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))


def _itemsize(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


@functools.lru_cache(maxsize=1)
def _permutation(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


def _position(index: int, count: int, order: Literal["reverse"] | int | None) -> int:
    if order is None:
        return index
    return count - 1 - index if order == "reverse" else int(_permutation(count, order)[index])


def _poison(dtype: np.dtype[Any]) -> Any:
    """NaN, also in the unsigned integers that hold bfloat16 and float8; else an extreme integer."""
    if dtype.kind == "f":
        return np.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max if dtype.kind == "u" else np.iinfo(dtype).min
