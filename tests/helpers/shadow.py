"""What is known of every byte that a kernel launch was given: whose it is, who read it, who wrote it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Indices = npt.NDArray[np.int64]
NOBODY, SEVERAL = 0, -1  # in place of a program, which counts from 1


class OutOfBounds(RuntimeError):
    """A kernel reached for memory that belongs to none of its arguments."""


class Race(RuntimeError):
    """The result of a kernel depends on which of its programs, or lanes, comes first."""


@dataclass
class Traffic:
    """Bytes moved for one argument by one launch. Each byte is distinct once, however often it moves."""

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0


class _Storage:
    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, size = storage.data_ptr(), storage.nbytes()
        # zeros take no memory before they are touched, so a few elements far apart cost little
        self.owner = np.zeros(size, np.uint8)  # 1 + index of the argument; 0 for none
        self.loaded, self.stored = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        self.reader, self.writer = np.zeros(size, np.int32), np.zeros(size, np.int32)


class Shadow:
    """Shadow memory of one launch.

    A byte belongs to the first argument that covers it. An argument whose every byte belongs to one earlier argument
    shares that one's `Traffic`.
    """

    def __init__(self, *, bounds: bool, races: bool) -> None:
        self.bounds, self.races = bounds, races
        self._storages: dict[int, _Storage] = {}
        self._traffic: list[Traffic] = []
        self._extents: list[tuple[str, int, int]] = []

    def add(self, name: str, tensor: torch.Tensor) -> Traffic:
        if tensor.numel() == 0:
            return Traffic()
        start = tensor.untyped_storage().data_ptr()
        if start not in self._storages:
            self._storages[start] = _Storage(tensor.untyped_storage())
        storage = self._storages[start]
        itemsize = tensor.element_size()
        owner = np.lib.stride_tricks.as_strided(
            storage.owner[tensor.data_ptr() - start :],
            (*tensor.shape, itemsize),
            (*(stride * itemsize for stride in tensor.stride()), 1),
        )
        first = int(owner.flat[0])
        if first and (owner == first).all():
            return self._traffic[first - 1]
        self._traffic.append(Traffic())
        owner[owner == 0] = len(self._traffic)
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self._extents.append((name, tensor.data_ptr(), tensor.data_ptr() + span * itemsize))
        return self._traffic[-1]

    def load(self, addresses: Indices, itemsize: int, program: int) -> None:
        for storage, cells in self._cells("load", addresses, itemsize):
            for owner, count in enumerate(np.bincount(storage.owner[cells[:, 0]])[1:]):
                self._traffic[owner].loaded += int(count) * itemsize
            storage.loaded[cells] = True
            if self.races:
                _refuse_others("loads", "stored", storage.writer[cells], program)
                reader = storage.reader[cells]
                storage.reader[cells] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)

    def store(self, addresses: Indices, itemsize: int, program: int) -> None:
        if self.races and np.unique(addresses).size < addresses.size:
            raise Race("two lanes of one store meet in one element")
        for storage, cells in self._cells("store", addresses, itemsize):
            for owner, count in enumerate(np.bincount(storage.owner[cells[:, 0]])[1:]):
                self._traffic[owner].stored += int(count) * itemsize
            storage.stored[cells] = True
            if self.races:
                _refuse_others("stores", "stored", storage.writer[cells], program)
                _refuse_others("stores", "loaded", storage.reader[cells], program)
                storage.writer[cells] = program

    def count_distinct(self) -> None:
        for storage in self._storages.values():
            for owner, count in enumerate(np.bincount(storage.owner[storage.loaded])[1:]):
                self._traffic[owner].distinct_loaded += int(count)
            for owner, count in enumerate(np.bincount(storage.owner[storage.stored])[1:]):
                self._traffic[owner].distinct_stored += int(count)

    def _cells(self, verb: str, addresses: Indices, itemsize: int) -> Iterator[tuple[_Storage, Indices]]:
        """Yield each storage that the lanes touch, with the indices of the bytes touched, [lanes, itemsize]."""
        if self.bounds and (addresses % itemsize).any():
            raise OutOfBounds(f"{verb} of {itemsize}-byte elements that are not aligned to their size")
        outside = np.ones(addresses.shape, np.bool_)
        for storage in self._storages.values():
            first = addresses - storage.start
            inside = (first >= 0) & (first + itemsize <= storage.owner.size)
            if not inside.any():
                continue
            cells = first[inside, None] + np.arange(itemsize)
            owned = storage.owner[cells].all(axis=1)
            inside[inside] = owned
            outside &= ~inside
            yield storage, cells[owned]
        if self.bounds and outside.any():
            raise OutOfBounds(self._describe(verb, int(outside.sum()), int(addresses[outside][0])))

    def _describe(self, verb: str, lanes: int, address: int) -> str:
        message = f"{verb} of {lanes} lanes outside every tensor argument"
        if not self._extents:
            return message
        name, start, stop = min(self._extents, key=lambda extent: max(extent[1] - address, address - extent[2]))
        return f"{message}, the first at byte {address - start} of {name!r}, which spans {stop - start}"


def _refuse_others(does: str, did: str, programs: npt.NDArray[np.int32], program: int) -> None:
    others = programs[(programs != NOBODY) & (programs != program)]
    if others.size:
        who = "other programs" if others[0] == SEVERAL else f"program {others[0] - 1}"
        raise Race(f"{does} what {who} of the same launch {did}")
