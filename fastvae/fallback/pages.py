"""Memory that comes in large pages."""

import ctypes
import mmap
import sys

from torch import Tensor

_WORTH_IT = 1 << 25  # bytes: from here on glibc's malloc always maps afresh, and unmaps what is freed

_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def advise_large_pages(tensor: Tensor) -> None:
    """Ask Linux to back a large CPU tensor that nothing was written to yet by large pages.

    A fresh page costs more than what is written to it, and one of 2 MiB a quarter of 512 small ones. It is a hint: it
    touches no contents, does nothing to pages that are there already (those that a caching allocator hands out again)
    and ends with the mapping.
    """
    if tensor.nbytes < _WORTH_IT or tensor.device.type != "cpu" or _ADVICE is None or sys.platform != "linux":
        return
    start = tensor.data_ptr()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _ADVICE)
