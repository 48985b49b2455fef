"""Memory that costs few page faults."""

import ctypes
import mmap
import sys
import threading

import torch
from torch import Tensor

from .._strides import is_dense

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


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()

_MOST_KEPT = 1 << 20  # elements


def scratch_like(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Uninitialized memory in the shape of `tensor`, the same at each call of a thread by this name.

    It is kept, because malloc gives freed memory of this size back to the system, and fresh pages cost more than the
    arithmetic. Large requests, and those on other devices, get memory of their own.
    """
    n = tensor.numel()
    if tensor.device.type != "cpu" or n > _MOST_KEPT:
        return torch.empty_like(tensor, dtype=dtype)
    memory = _kept.memory.get((name, dtype))
    if memory is None or memory.numel() < n:
        with torch.inference_mode(False):  # else it could not be written to outside of that mode
            memory = _kept.memory[name, dtype] = torch.empty(n, dtype=dtype, device="cpu")
    if is_dense(tensor):
        return memory.as_strided(tensor.shape, tensor.stride())
    return memory[:n].view(tensor.shape)
