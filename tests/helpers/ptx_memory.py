"""Memory of an interpreted kernel: addresses, bounds, alignment, and who touched which byte since the last barrier."""

from collections.abc import Iterator, Sequence

import numpy as np

from tests.helpers.ptx_arithmetic import Array, Fault

NOBODY, SEVERAL = -1, -2  # in place of a thread


class Buffer:
    """Bytes from an address on; of each, the thread that last wrote it, the one that last read it, and when."""

    def __init__(self, start: int, data: Array) -> None:
        self.start, self.data = start, data
        self.writer, self.reader = (np.full(data.size, NOBODY, np.int64) for _ in range(2))
        self.written, self.read = (np.zeros(data.size, np.int32) for _ in range(2))


class Memory:
    """A space of addresses. When is counted in barriers, which order the threads of a program and no others."""

    def __init__(self, space: str, buffers: Sequence[tuple[int, Array]], threads: int) -> None:
        self.space, self.threads = space, threads  # threads of a program
        self.buffers = [Buffer(start, data) for start, data in sorted(buffers, key=lambda b: b[0])]

    def load(self, size: int, address: Array, thread: Array, when: Array) -> Array:
        """`size` bytes for each thread, [threads, size]."""
        found = np.empty((len(address), size), np.uint8)
        for lanes, buffer, at in self._places(address, size):
            who, now = thread[lanes, None], when[lanes, None]
            self._refuse_race(buffer.writer[at], buffer.written[at], who, now, "loads what another thread stored")
            if self.space == "shared":
                if (buffer.writer[at] == NOBODY).any():
                    raise Fault("loads shared memory that nothing was stored to")
                alone = (buffer.reader[at] == NOBODY) | (buffer.reader[at] == who) | (buffer.read[at] != now)
                buffer.reader[at], buffer.read[at] = np.where(alone, who, SEVERAL), now
                buffer.reader[at[buffer.reader[at] != who]] = SEVERAL  # another lane of this load
            found[lanes] = buffer.data[at]
        return found

    def store(self, values: Array, address: Array, thread: Array, when: Array) -> None:
        values = np.ascontiguousarray(values).view(np.uint8)
        for lanes, buffer, at in self._places(address, values.shape[1]):
            who, now = thread[lanes, None], when[lanes, None]
            self._refuse_race(buffer.writer[at], buffer.written[at], who, now, "overwrites what another thread stored")
            self._refuse_race(buffer.reader[at], buffer.read[at], who, now, "overwrites what another thread loaded")
            buffer.data[at], buffer.writer[at], buffer.written[at] = values[lanes], who, now
            if (buffer.data[at] != values[lanes]).any():
                raise Fault(f"stores different values to one address of {self.space} memory")

    def _places(self, address: Array, size: int) -> Iterator[tuple[Array, Buffer, Array]]:
        """Lanes, the buffer that they reach, and its bytes, [lanes, size]."""
        if (address % size).any():
            raise Fault(f"is misaligned: an address of {self.space} memory is no multiple of {size} bytes")
        which = np.maximum(np.searchsorted([b.start for b in self.buffers], address, side="right") - 1, 0)
        for number in np.unique(which):
            lanes, buffer = np.flatnonzero(which == number), self.buffers[number]
            at = address[lanes, None] - buffer.start + np.arange(size)
            if (outside := (at < 0) | (at >= buffer.data.size)).any():
                raise Fault(f"is out of bounds: byte {at[outside][0]} of {buffer.data.size} of {self.space} memory")
            yield lanes, buffer, at

    def _refuse_race(self, other: Array, then: Array, who: Array, now: Array, what: str) -> None:
        ordered = (then != now) & ((other < 0) | (other // self.threads == who // self.threads))
        if ((other != NOBODY) & (other != who) & ~ordered).any():
            raise Fault(f"is a race: it {what} in {self.space} memory, with no barrier in between")
