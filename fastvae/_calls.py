"""Calls that were checked before: a training makes the same one again and again, and only the numbers change."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._strides import readable

Call = tuple[Any, ...]  # all that a usual call's checks and its way to a kernel depend on, but for numbers

_KNOWN: dict[Call, Any] = {}
_MOST_KNOWN = 1024


def signature(tensors: Sequence[Tensor | None], *options: Any) -> Call | None:
    """None where something unusual came, or where somebody looks on."""
    if _backend.is_traced() or torch._C._len_torch_dispatch_stack():
        return None
    seen: list[Any] = [_backend.choice(), *options]
    try:
        for tensor in tensors:
            if tensor is None:
                seen.append(None)
            elif type(tensor) is Tensor:
                seen.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg()))
            else:
                return None
    except RuntimeError:  # no strides: it is not dense
        return None
    return tuple(seen)


def remember(call: Call | None, known: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keep what checking and resolving a call came to, if it can read its tensors as they are."""
    if call is None or any(t is not None and readable(t) is not t for t in tensors):
        return
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    with suppress(TypeError):  # an option that cannot be hashed
        _KNOWN[call] = known


def recall(call: Call | None) -> Any:
    """None if the call is not known."""
    try:
        return None if call is None else _KNOWN.get(call)
    except TypeError:
        return None


def forget() -> None:
    """For who changes what is not in a signature: how kernels cut their work, say."""
    _KNOWN.clear()
