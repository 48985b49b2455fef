"""What modules of the library have in common."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose buffers stay what they are when it is cast to 16 bits.

    They hold weights of a loss: `model.half()` would round a beta of 1e-8 to 0. Other casts, and moves to another
    device, apply to buffers as in every module.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(now.device)
        return self
