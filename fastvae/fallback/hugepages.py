"""Huge pages for large gradients on Linux."""

import ctypes
import mmap
import sys

from torch import Tensor

_LEAST_BYTES = 1 << 25  # from here on glibc's malloc maps fresh pages for every request

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to back a large CPU tensor, to which nothing was written yet, with huge pages.

    A page fault costs more than writing the page, and one huge page replaces 512 page faults: a loss with a gradient of
    100 MB takes a third of the time (docs/benchmarks.md). The call is a hint: it changes no contents, has no effect on
    pages that are mapped already, and ends with the mapping.
    """
    if tensor.nbytes < _LEAST_BYTES or tensor.device.type != "cpu" or _ADVICE is None or sys.platform != "linux":
        return
    start = tensor.data_ptr()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _ADVICE)
