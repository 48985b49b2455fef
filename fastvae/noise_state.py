"""The seed of a training step as a tensor that is advanced in place.

    noise = fastvae.NoiseState(0).to(device)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=noise.seed)
    loss.backward()
    noise.advance()

`seed` is one tensor for the whole run, so a CUDA graph that holds these lines draws fresh noise at every replay, and a
run that is resumed from `state_dict` continues with the noise that it would have drawn.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import _backend
from ._numbers import integer, is_integer
from ._seeds import int64

# of SplitMix64: the increment of its state, and the shifts and multipliers that mix it
_INCREMENT = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


class NoiseState(nn.Module):
    """A seed for every step, on the device: output number `step`, counted from 0, of SplitMix64 started at `seed`.

        x = seed + (step + 1) * 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)                           all mod 2^64

    No two steps of a run share a seed. Data-parallel ranks draw different noise with NoiseState(seed + rank), and what
    one process would draw for the whole batch with one seed for all and, at the call, `offset`: the elements of the
    ranks before. `offset` also keeps several draws of one step apart. Under DDP with different seeds leave it out of
    the wrapped module, whose buffers rank 0 overwrites.

    Args:
        seed: Any int; counts mod 2^64.
        step: Steps that are over.

    Attributes:
        seed: 0-d int64 tensor, the seed of this step: hand it to `reparameterize_kl(..., seed=)`. Not in `state_dict`,
            where `base` (the argument) and `step` are. `to(device)` replaces all three; `load_state_dict` does not.

    Raises:
        TypeError: seed is not an int. ValueError: step is not an int of at least 0.

    Source: Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, as Vigna's splitmix64.c.
    """

    base: Tensor
    step: Tensor
    seed: Tensor

    def __init__(self, seed: int, step: int = 0) -> None:
        super().__init__()
        if not is_integer(seed):
            raise TypeError(f"seed must be an int; got {type(seed).__name__}. For a tensor, pass its item().")
        step = integer("step", step, least=0)
        if step >= 2**63:
            raise ValueError(f"step must fit into int64; got {step}.")
        self.register_buffer("base", torch.tensor(int64(seed)))
        self.register_buffer("step", torch.tensor(step))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]
        _refresh(self)

    def advance(self) -> None:
        """Advance to the next step, on the device. Call it after `backward()`, which draws the noise again."""
        if _backend.needs_reference() or _backend.backend_of(self.seed) != "triton":
            self.step.add_(1)
            _refresh(self)
        else:
            kernels: Any = _backend.load_backend("triton", "noise_state")
            # a kernel's stores do not count versions: autograd notices by them that a saved seed has changed
            torch.autograd.graph.increment_version((self.step, self.seed))
            kernels.advance(self.base, self.step, self.seed, _INCREMENT, _MIXING, _LAST_SHIFT)


def _refresh(state: nn.Module, _: Any = None) -> None:
    """Bring the seed up to the step; also the hook of `load_state_dict`."""
    assert isinstance(state, NoiseState)
    state.seed.copy_(_splitmix64(state.base, state.step))


def _splitmix64(base: Tensor, step: Tensor) -> Tensor:
    """uint64 arithmetic in int64, which wraps around in the same way."""
    x = base + (step + 1) * int64(_INCREMENT)
    for shift, multiplier in _MIXING:
        x = (x ^ _shifted(x, shift)) * int64(multiplier)
    return x ^ _shifted(x, _LAST_SHIFT)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by with zeros from the left, where int64 repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
