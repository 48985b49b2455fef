"""The next seed of a `NoiseState` in one launch; as PyTorch operators on numbers, it is twenty."""

import triton
import triton.language as tl
from torch import Tensor

from ._tile import on_device


@triton.jit
def _advance_kernel(
    base_ptr,  # int64, as all three; read
    step_ptr,  # read and written
    seed_ptr,  # written
    INCREMENT: tl.constexpr,  # of SplitMix64, as unsigned numbers
    SHIFT_1: tl.constexpr,
    FACTOR_1: tl.constexpr,
    SHIFT_2: tl.constexpr,
    FACTOR_2: tl.constexpr,
    SHIFT_3: tl.constexpr,
):
    step = tl.load(step_ptr) + 1
    x = tl.load(base_ptr).to(tl.uint64, bitcast=True)
    x += (step + 1).to(tl.uint64, bitcast=True) * tl.full((), INCREMENT, tl.uint64)
    x = (x ^ (x >> SHIFT_1)) * tl.full((), FACTOR_1, tl.uint64)
    x = (x ^ (x >> SHIFT_2)) * tl.full((), FACTOR_2, tl.uint64)
    x = x ^ (x >> SHIFT_3)
    tl.store(step_ptr, step)
    tl.store(seed_ptr, x.to(tl.int64, bitcast=True))


def advance(
    base: Tensor, step: Tensor, seed: Tensor, increment: int, mixing: tuple[tuple[int, int], ...], last_shift: int
) -> None:
    """step += 1; seed = number `step` of SplitMix64 with these constants, started at `base`."""
    (shift_1, factor_1), (shift_2, factor_2) = mixing
    with on_device(seed.device):
        _advance_kernel[(1,)](
            base,
            step,
            seed,
            INCREMENT=increment,
            SHIFT_1=shift_1,
            FACTOR_1=factor_1,
            SHIFT_2=shift_2,
            FACTOR_2=factor_2,
            SHIFT_3=last_shift,
            num_warps=1,
            enable_fp_fusion=True,
        )
