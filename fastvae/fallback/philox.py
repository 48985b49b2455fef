"""Philox4x32-10 normals for any device: bit for bit the random words of the kernels, the normals within 1e-6.

Written once for two libraries. NumPy takes a third of torch's time for a hundred small steps, so it makes the noise on
CPUs; torch makes it on devices that must not wait for the host.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box & Muller (1958).
"""

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = TypeVar("Words", Tensor, NDArray[np.int64])

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 13  # counters at a time: the dozen int64 temporaries stay in the second-level cache
_AHEAD = 8 * _CHUNK  # normals that are made at once for a small draw and those that follow it
_STREAMS = 4  # that are continued at a time: of a training, its evaluation, ...
_BY_NUMPY = ("cpu", "mps")  # the latter has no float64


def philox_normal(
    shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Normals number offset, ..., offset + n - 1 of the stream `seed`, in C order, rounded to float32 and then to
    `dtype`.
    """
    n = math.prod(shape)
    normals = _read(int(seed), offset, n) if device.type in _BY_NUMPY else _made(torch, seed, offset, n, device)[:n]
    normals = normals.reshape(shape)
    # not torch.as_tensor, which moves an array to the default device
    return (normals if isinstance(normals, Tensor) else torch.from_numpy(normals)).to(device, dtype)


class _Cached(NamedTuple):
    """Normals of a stream, from number `first` on."""

    seed: int
    first: int
    normals: NDArray[np.float32]


_cache: tuple[_Cached, ...] = ()  # of the last streams, the newest first; replaced as a whole, so threads need no lock


def _read(seed: int, offset: int, n: int) -> NDArray[np.float32]:
    """Normals on a CPU. A draw that continues a stream, as each step of a training does, also makes the normals of the
    next draws: in one large call a normal takes a third of its time in a small one (docs/benchmarks.md).
    """
    global _cache
    normals: NDArray[np.float32]
    if n > _AHEAD // 4:
        normals = _made(np, seed, offset, n, "cpu")
        return normals[:n]
    size = n
    streams = _cache
    for cached in streams:
        place = offset - cached.first
        if seed == cached.seed and 0 <= place <= len(cached.normals):
            if place + n <= len(cached.normals):
                return cached.normals[place : place + n].copy()
            size, streams = _AHEAD, tuple(other for other in streams if other is not cached)
            break
    normals = _made(np, seed, offset, size, "cpu")
    _cache = (_Cached(seed, offset, normals), *streams[: _STREAMS - 1])
    return normals[:n].copy()


def _made(library: Any, seed: int | Tensor, offset: int, n: int, device: torch.device | str) -> Any:
    """float32 normals from number `offset` on, up to three more than `n`."""
    first, last = offset // 4, (offset + n + 3) // 4
    normals = library.empty((last - first, 2, 2), dtype=library.float32, device=device)
    for start in range(first, last, _CHUNK):
        counters = library.arange(start, min(start + _CHUNK, last), device=device)
        w0, w1, w2, w3 = philox_words(seed, counters)
        pairs = _normal_pair(library, library.stack([w0, w2], axis=1), library.stack([w1, w3], axis=1))
        for i, values in enumerate(pairs):
            normals[start - first : start - first + _CHUNK, :, i] = values
    return normals.reshape(-1)[offset % 4 :]


def philox_words(seed: int | Tensor, counters: Words) -> tuple[Words, Words, Words, Words]:
    """The four 32-bit words at each counter (c, 0) under the key `seed`, as int64.

    Products of two 32-bit words wrap around in int64; both halves survive that. Odd words carry the upper half along
    from one round to the next, because only a factor has to be free of it.
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    w0, w1, w2, w3 = counters & _WORD, counters >> 32, counters * 0, counters * 0
    for _ in range(10):
        product0, product1 = w0 * _ROUND_MULTIPLIERS[0], w2 * _ROUND_MULTIPLIERS[1]
        for odd, product, k in ((w1, product1, key[0]), (w3, product0, key[1])):
            odd ^= product >> 32
            odd ^= k
            odd &= _WORD
        w0, w1, w2, w3 = w1, product1, w3, product0
        key = [(k + increment) & _WORD for k, increment in zip(key, _KEY_INCREMENTS, strict=True)]
    return w0, w1 & _WORD, w2, w3 & _WORD


def _normal_pair(library: Any, radius_word: Any, angle_word: Any) -> tuple[Any, Any]:
    """Box-Muller on 32-bit words, in float64 from the same uniforms that the kernels use.

    radius: u = ((word >> 8) + 1/2) / 2^24, the sum rounded to float32; angle: the two top bits choose the quarter turn,
    the other thirty, read as a signed fraction, the place in [-pi/4, pi/4) around it.
    """
    # not left to the default dtype, which torch brings integers and floats together in
    middle = library.asarray(radius_word >> 8, dtype=library.float64) + 0.5
    u = library.asarray(library.asarray(middle, dtype=library.float32), dtype=library.float64) * 2.0**-24
    radius = library.sqrt(library.log(u) * -2.0)
    radius *= 1 - ((angle_word >> 30) & 2)
    signed = library.asarray((angle_word << 34) >> 32, dtype=library.float64)  # its 30 low bits at the top of 32
    sin = library.sin(signed * (math.pi / 4 * 2.0**-31))
    cos = library.sqrt(1.0 - sin * sin)  # at least sqrt(1/2), so that nothing cancels
    swap = (angle_word & (1 << 30)) != 0
    return radius * library.where(swap, sin, cos), radius * library.where(swap, cos, sin)
