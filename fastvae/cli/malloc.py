"""Memory of the host: what one step frees, the next one takes."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST_TRIM, _MOST_MMAP = (1 << 31) - 1, 1 << 25  # bytes, the highest that glibc takes


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed in this process, as jemalloc or CUDA's caching allocator does.

    Left alone it hands the end of the heap back to the system after each step, and the next one pays for every page
    again: a sixth of a step of the default model on two cores. Buffers of more than 32 MiB still come and go. Nothing
    happens where malloc is not glibc's.

    Source: mallopt(3).
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if mallopt := getattr(library, "mallopt", None):
        mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM)
        mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP)
