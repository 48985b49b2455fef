"""Philox4x32-10 normals in PyTorch: bit for bit the random words of the kernels, the normals within 1e-6.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box & Muller (1958).
"""

import math

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: the dozen int64 temporaries stay in the second-level cache


def philox_words(seed: int | Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words at each counter (c, 0) under the key `seed`, as int64 tensors.

    Products of two 32-bit words wrap around in int64; both halves survive that.
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    c0, c1 = counters & _WORD, (counters >> 32) & _WORD
    c2 = c3 = torch.zeros_like(counters)
    for _ in range(10):
        product0, product1 = c0 * _ROUND_MULTIPLIERS[0], c2 * _ROUND_MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _WORD) ^ c1 ^ key[0]
        c2 = ((product0 >> 32) & _WORD) ^ c3 ^ key[1]
        c1, c3 = product1 & _WORD, product0 & _WORD
        key = [(k + increment) & _WORD for k, increment in zip(key, _KEY_INCREMENTS, strict=True)]
    return c0, c1, c2, c3


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
    normals = torch.empty(4 * (last - first), dtype=dtype, device=device)
    for start in range(first, last, _CHUNK):
        counters = torch.arange(start, min(start + _CHUNK, last), device=device)
        w0, w1, w2, w3 = philox_words(seed, counters)
        chunk = torch.stack(_normal_pair(w0, w1) + _normal_pair(w2, w3), dim=1).flatten()
        normals[4 * (start - first) :][: chunk.numel()] = chunk.float()
    return normals[offset % 4 :][:n].reshape(shape)
