"""Philox4x32-10 normals in PyTorch: bit for bit the random words of the kernels, the normals within 1e-6.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box & Muller (1958).
"""

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = TypeVar("Words", Tensor, NDArray[np.int64])

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: the dozen int64 temporaries stay in the second-level cache


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


def _normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller on two 32-bit words, in float64 from the same uniforms that the kernels use.

    radius: u = ((word >> 8) + 1/2) / 2^24, the sum rounded to float32; angle: the two top bits choose the quarter turn,
    the other thirty, read as a signed fraction, the place in [-pi/4, pi/4) around it.
    """
    u = ((radius_word >> 8).float() + 0.5).double() * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u))
    quarter = angle_word >> 30
    signed = (angle_word << 34) >> 32  # the 30 low bits moved to the top of 32, sign extended
    angle = signed.double() * (math.pi / 4 * 2.0**-31)
    cos, sin = torch.cos(angle), torch.sin(angle)
    swap = (quarter & 1).bool()
    sign = 1 - (quarter & 2)
    radius *= sign
    return radius * torch.where(swap, sin, cos), radius * torch.where(swap, cos, sin)


def philox_normal(
    shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Normals number offset, ..., offset + n - 1 of the stream `seed`, in C order, rounded to float32 and then to
    `dtype`.
    """
    n = math.prod(shape)
    first, last = offset // 4, (offset + n + 3) // 4
    normals = torch.empty((last - first, 2, 2), dtype=dtype, device=device)
    for start in range(first, last, _CHUNK):
        w0, w1, w2, w3 = _words(seed, start, min(start + _CHUNK, last), device)
        pairs = _normal_pair(torch.stack([w0, w2], dim=1), torch.stack([w1, w3], dim=1))
        for i, values in enumerate(pairs):
            normals[start - first : start - first + _CHUNK, :, i] = values.float()
    return normals.flatten()[offset % 4 :][:n].reshape(shape)


def _words(seed: int | Tensor, start: int, stop: int, device: torch.device) -> list[Tensor]:
    """The words at counters start, ..., stop - 1."""
    if device.type != "cpu":
        return [*philox_words(seed, torch.arange(start, stop, device=device))]
    # a hundred small steps: NumPy's take a third of the time of torch's
    seed = int(seed)
    return [torch.from_numpy(words) for words in philox_words(seed, np.arange(start, stop))]
