"""Corrections that bring Triton's interpreter closer to a GPU."""

from typing import Any

import numpy as np
import numpy.typing as npt


def fix_bf16_rounding() -> None:
    """Round float32 to bfloat16 to nearest even, as GPUs and torch do; the interpreter (3.3 to 3.9) truncates.

    Calling it again changes nothing.
    """
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    original = interpreter._convert_float
    if getattr(original, "rounds_bf16_to_nearest", False):
        return

    def convert_float(values: npt.NDArray[Any], source: Any, target: Any, rounding: Any) -> npt.NDArray[Any]:
        toward_zero = getattr(rounding, "name", None) == "RTZ"
        if (source, target) == (tl.float32, tl.bfloat16) and not toward_zero:
            return bf16_bits(values)
        if (source, target) == (tl.bfloat16, tl.float32):  # exact; the interpreter's own is wrong for subnormals
            return values.astype(np.uint32) << 16
        converted: npt.NDArray[Any] = original(values, source, target, rounding)
        return converted

    convert_float.rounds_bf16_to_nearest = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert_float


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the bfloat16 nearest to each float32, ties to even. NaN stays NaN; what is too large becomes infinite."""
    # ascontiguousarray has at least one dimension: a scalar would warn of the wrap-around that NaN ends in
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet_nan = bits >> 16 | 0x0040
    return np.where(np.isnan(bits.view(np.float32)), quiet_nan, nearest).astype(np.uint16).reshape(values.shape)
