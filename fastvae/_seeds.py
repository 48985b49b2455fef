"""Where noise comes from, as a caller passes it: a seed and an offset, or a generator."""

from typing import Any, cast

import torch
from torch import Tensor

from . import _checks
from ._numbers import is_integer

Seed = int | Tensor


def noise_source(like: Tensor, generator: torch.Generator | None, seed: Any, offset: Any) -> tuple[Seed | None, int]:
    """Check all three; return (seed, offset) as the ops take them: ints, the seed wrapped into int64, or its tensor."""
    if generator is not None:
        _check_generator(like, generator, seed)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
            raise ValueError(
                f"a seed tensor must hold one int64 on {like.device}; got {str(seed.dtype).removeprefix('torch.')} of "
                f"shape {tuple(seed.shape)} on {seed.device}. Pass an int, or move the tensor."
            )
        seed = seed.resolve_neg()
    elif seed is not None:
        if not is_integer(seed):
            raise TypeError(f"seed must be an int or a one-element int64 tensor; got {type(seed).__name__}.")
        seed = int64(seed)
    if isinstance(offset, torch.SymInt):
        return seed, cast(int, offset)
    if not is_integer(offset):
        raise TypeError(f"offset must be an int, counted in elements; got {type(offset).__name__}.")
    if not 0 <= offset < 2**62:
        raise ValueError(
            f"offset must lie in [0, 2^62); got {offset}. Count it in elements from the start of the whole batch."
        )
    if seed is None and offset != 0:
        raise ValueError(f"offset selects a part of a seeded stream; got offset={offset} without seed. Pass seed= too.")
    return seed, int(offset)


def _check_generator(like: Tensor, generator: object, seed: object) -> None:
    if seed is not None:
        raise ValueError(
            "generator and seed exclude each other; got both. Pass the one that the noise shall come from."
        )
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator; got {type(generator).__name__}. For a number, pass seed=."
        )
    if generator.device.type not in ("cpu", like.device.type):
        raise ValueError(
            f"generator must be on the CPU or on the inputs' device {like.device}; got one on {generator.device}. "
            f"Make it with torch.Generator({str(like.device)!r})."
        )


def given_noise(noise: Tensor, like: Tensor, generator: object, seed: object, offset: Any) -> Tensor:
    """Check noise that the caller passed; return it without its graph."""
    for name, value in (("generator", generator), ("seed", seed)):
        if value is not None:
            raise ValueError(f"noise and {name} exclude each other; got both. Leave one of them out.")
    noise_source(like, None, None, offset)
    _checks.float_tensor("noise", noise)
    _checks.same_shape("noise", noise, "mu", like)
    _checks.same_device("noise", noise, "mu", like)
    return noise.detach()


def int64(number: int) -> int:
    """The int64 with the bits of number mod 2^64."""
    number = int(number)  # of NumPy's types, too, whose own arithmetic would overflow
    if -(2**63) <= number < 2**63:  # so would that of a traced int
        return number
    return (number + 2**63) % 2**64 - 2**63
