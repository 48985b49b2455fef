"""Standard normals as a function of (seed, element): Philox4x32-10 and a portable Box-Muller.

Key: (lo, hi) word of the seed mod 2^64. Counter: (lo, hi, 0, 0) of c = element // 4. Words (w0, w1) give normals 0 and
    1 of
the four as (r cos, r sin), words (w2, w3) normals 2 and 3.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box & Muller (1958); polynomials: Cephes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import NUM_WARPS, on_device, tile


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two uint32 -> two standard normals, by integer, multiply-add, select and square root alone.

    radius: u = ((word >> 8) + 1/2) / 2^24, the sum rounded to float32, r = sqrt(-2 log u); angle: the two top bits
        choose the
    quarter turn, the other thirty, read as a signed fraction, the place in [-pi/4, pi/4) around it.
    """
    # u = 2^e (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)); the first constant holds that bound's bits and 2^24's exponent
    # e stays in the bits of the exponent, that is times 2^23: an instruction less, and the same result to the bit
    bits = ((radius_word >> 8).to(tl.int32).to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    exponent = (bits - (0x3F3504F3 + (24 << 23))) & -0x00800000
    m = (bits - exponent - (24 << 23)).to(tl.float32, bitcast=True) - 1.0
    # -2 log(1 + m) = (p m + 1) m^2 - 2 m
    p = m * -0.1407536716 + 0.2302922062
    p = p * m - 0.2335399748
    p = p * m + 0.2484028176
    p = p * m - 0.2849864556
    p = p * m + 0.3333611532
    p = p * m - 0.4000142952
    p = p * m + 0.4999998798
    p = p * m - 0.6666666234
    p = p * m + 1.0
    r = tl.sqrt(exponent.to(tl.float32) * -1.6525916589735634e-07 + (p * (m * m) - 2.0 * m))

    x = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951981440e-10  # pi/4 * 2^-31
    x2 = x * x
    sin = ((-1.9515295891e-4 * x2 + 8.3321608736e-3) * x2 - 1.6666654611e-1) * (x2 * x) + x
    cos = (((2.443315711809948e-5 * x2 - 1.388731625493765e-3) * x2 + 4.166664568298827e-2) * x2 - 0.5) * x2 + 1.0
    swap = ((angle_word >> 30) & 1) != 0
    sign = (angle_word & 0x80000000).to(tl.int32, bitcast=True)
    r = (r.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return r * tl.where(swap, sin, cos), r * tl.where(swap, cos, sin)


@triton.jit
def _words(seed, counter):
    """Philox4x32-10 at int64 counters, bit for bit that of tl.philox, which takes two multiplications for a product."""
    w0, w1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    w2, w3 = w0 * 0, w0 * 0
    bits = seed.to(tl.uint64)
    key0, key1 = bits.to(tl.uint32), (bits >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _product(w0, 0xD2511F53)
        high2, low2 = _product(w2, 0xCD9E8D57)
        w0, w1, w2, w3 = high2 ^ w1 ^ key0, low2, high0 ^ w3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return w0, w1, w2, w3


@triton.jit
def _product(word, factor: tl.constexpr):
    """(upper, lower) half of the product of two words: one instruction of a GPU."""
    product = word.to(tl.uint64) * tl.full([], factor, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _four_normals(seed, counter):
    w0, w1, w2, w3 = _words(seed, counter)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def tile_normals(seed, first, BLOCK_COLS: tl.constexpr, ELEMENTS_PER_THREAD: tl.constexpr):
    """Normals number first + (0, ..., BLOCK_COLS - 1), for each row of `first`: [BLOCK_ROWS, 1] int64 -> float32.

    ELEMENTS_PER_THREAD: 4, or 8 (two counters, for the 16-byte accesses of 16-bit tensors), if every `first` is a
    multiple of 4; else 1, a counter of its own for each element. All give the same normals.
    """
    if ELEMENTS_PER_THREAD == 1:
        element = first + tl.arange(0, BLOCK_COLS)[None, :]
        w0, w1, w2, w3 = _words(seed, element >> 2)
        upper = (element & 2) != 0
        even, odd = normal_pair(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
        normals = tl.where((element & 1) != 0, odd, even)
    else:
        counter = (first >> 2) + tl.arange(0, BLOCK_COLS // ELEMENTS_PER_THREAD)[None, :] * (ELEMENTS_PER_THREAD // 4)
        n0, n1, n2, n3 = _four_normals(seed, counter)
        # joined axes, from the last: odd, upper pair, second counter: the order of the elements, so that no lane moves
        if ELEMENTS_PER_THREAD == 4:
            run = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        else:
            n4, n5, n6, n7 = _four_normals(seed, counter + 1)
            run = tl.join(tl.join(tl.join(n0, n4), tl.join(n2, n6)), tl.join(tl.join(n1, n5), tl.join(n3, n7)))
        normals = run.reshape(first.shape[0], BLOCK_COLS)
    return normals


@triton.jit(do_not_specialize=["seed", "offset"])
def _philox_normal_kernel(
    normals_ptr,  # [n_elements] contiguous, written
    seed,  # int64, or pointer to one
    offset,
    n_elements,
    ELEMENTS_PER_THREAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if seed.dtype.is_ptr():
        seed = tl.load(seed)
    first = offset + pid * BLOCK_SIZE + tl.zeros([1, 1], tl.int64)
    normals = tile_normals(seed, first, BLOCK_SIZE, ELEMENTS_PER_THREAD).to(normals_ptr.dtype.element_ty)
    offsets = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if pid * BLOCK_SIZE + BLOCK_SIZE <= n_elements:
        tl.store(normals_ptr + offsets, normals)
    else:
        tl.store(normals_ptr + offsets, normals, mask=offsets < n_elements)


def elements_per_thread(element_size: int, *starts: int) -> int:
    """ELEMENTS_PER_THREAD of `tile_normals` for tiles that begin at multiples of all `starts` in the stream."""
    if any(start % 4 for start in starts):
        return 1
    return 8 if element_size == 2 else 4


def philox_normal(
    shape: torch.Size, seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Normals number offset, ..., offset + n - 1 of the stream `seed`, in C order, rounded to float32 and then to
    `dtype`.
    """
    normals = torch.empty(shape, dtype=dtype, device=device)
    if n := normals.numel():
        size = tile(1, n, normals.element_size(), noise=True).cols
        with on_device(normals.device):
            _philox_normal_kernel[(triton.cdiv(n, size),)](
                *(normals, seed, offset, n),
                ELEMENTS_PER_THREAD=elements_per_thread(normals.element_size(), offset),
                BLOCK_SIZE=size,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
    return normals
