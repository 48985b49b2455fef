"""Several processes that train as one: who they are, what they add up, and how their module is wrapped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NOT_TORCHRUN = "Start several processes with torchrun; for a single one, unset WORLD_SIZE."


@dataclass(frozen=True)
class World:
    """The processes of a run; a single one unless torchrun started several.

    Every process calls each method at the same place of the program: they wait for each other there.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def shard_range(self, n: int) -> range:
        """This process's share of n things in a row; shares differ by one at most."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The CPU tensors of all processes, one after the other."""
        if self.size == 1:
            return tensor
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, tensor)
        return torch.cat(parts)

    def all_reduce_max(self, number: int) -> int:
        """The largest of the processes' numbers, which no GPU has to wait for."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def broadcast(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module that averages gradients over the processes in its backward pass."""
        if self.size == 1:
            return module
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    @contextmanager
    def without_averaging(self, module: nn.Module) -> Iterator[None]:
        """For backward passes whose gradients only add up to those of a later one."""
        if isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
        elif set_averaging := getattr(module, "set_requires_gradient_sync", None):  # FSDP2, which imports slowly
            set_averaging(False)
            yield
            set_averaging(True)
        else:
            yield


ALONE = World()


@contextmanager
def world_of(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, over gloo and, for GPUs, NCCL; alone without torchrun.

    A process group that exists already is used, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if not is_started_by_torchrun():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the processes of torchrun cannot meet: {str(error).rstrip('.')}. {NOT_TORCHRUN}") from error
    # torchrun keeps its store through restarts: the prefix hides addresses of processes that have ended
    store = dist.PrefixStore(f"attempt {restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size
    )
    try:
        yield World(dist.get_rank(), dist.get_world_size())
        wait_for_all(store, size)  # who leaves while the first one still draws would be taken for fallen
    finally:
        dist.destroy_process_group()


def wait_for_all(store: Any, size: int) -> None:
    """A barrier through a `torch.distributed.Store`, without the group.

    After a barrier of gloo's, one of its threads frees tensors of Python; if the interpreter ends at that time, that
    aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if store.add("done", 1) == size:
        store.set("all done", "")
    else:
        store.wait(["all done"], dist.default_pg_timeout)


def restarts() -> int:
    """How many times torchrun has restarted the processes."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def is_started_by_torchrun() -> bool:
    """Whether this is one of several processes, as the environment says.

    Raises:
        ValueError: the environment says so and lacks what torchrun sets, or holds no numbers.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return False
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not 0 <= _number("RANK", 0) < size:
        lacks = f"{' and '.join(missing)} are missing" if missing else f"RANK is {os.environ['RANK']}"
        raise ValueError(f"WORLD_SIZE is {size}, but {lacks}. {NOT_TORCHRUN}")
    return True


def is_first_process() -> bool:
    """Whether this process reports, known before any group is made; errors as `is_started_by_torchrun`."""
    return not is_started_by_torchrun() or _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number; it is {text!r}. {NOT_TORCHRUN}")
    return int(text)


def own_device(device: torch.device) -> torch.device:
    """Of the machine's devices of this kind, the one of this process, unless one is named."""
    if device.type == "cpu" or (device.index or 0) > 0 or "LOCAL_RANK" not in os.environ:
        return device
    if not (dist.is_available() and dist.is_initialized()) and not is_started_by_torchrun():
        return device
    return torch.device(device.type, _number("LOCAL_RANK", 0))
