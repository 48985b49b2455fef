"""Weights, gradients and optimizer state spread over the processes (FSDP2): made, put together, saved and loaded."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastvae.evaluation.objective import Objective

from .._distributed import World
from .checkpoint import SHARDS, file_digest

Keys = tuple[str | int, ...]  # keys through nested dictionaries


def shard(objective: Objective, device: torch.device, world: World) -> None:
    """Let each process keep a share of every tensor of the model, in place.

    The parameters of the loss are single numbers, which every process keeps: `average_whole_gradients` is theirs.
    """
    # the model's outputs are views of its last layer's; nothing writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world.size,))
    for part in (objective.model.encoder, objective.model.decoder):
        fully_shard(part, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=set(objective.criterion.parameters()))


def average_whole_gradients(objective: Objective, world: World) -> None:
    """Average the gradients that are not sharded over the processes."""
    for parameter in objective.criterion.parameters():
        if parameter.grad is not None:
            world.sum(parameter.grad).div_(world.size)


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` where some gradients are sharded and some are not; the norm is that of all."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    norm = torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return cast(Tensor, norm)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process takes part."""
    all_of_it: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return all_of_it


@torch.no_grad()
def gather(sharded: Objective, into: Objective) -> None:
    """Copy weights and buffers into an objective that each process has all of, a tensor at a time."""
    source = sharded.state_dict()
    for name, tensor in into.state_dict().items():
        tensor.copy_(whole(source[name]))


def save_shards(path: Path, state: dict[str, Any], world: World) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint to a folder beside it, a safetensors file of each process.

    The checkpoint, written after them, names the folder: until then the former one is whole.

    Args:
        path: The checkpoint.
        state: "step", and state dictionaries by name.
        world: All processes call this.

    Returns:
        The state to put into the checkpoint.

    Raises:
        OSError: a file cannot be written.
    """
    shards = {keys: value for keys, value in leaves(state) if isinstance(value, DTensor)}
    folder = path.with_name(f"{SHARDS}{state['step']:08d}")
    if world.is_first:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that fell while it wrote
    dist.barrier()
    try:
        # safetensors: nothing is pickled
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        state_dict_saver.save({_name(keys): value for keys, value in shards.items()}, storage_writer=writer)
    except CheckpointException as error:
        raise OSError(f"{folder}: {next(iter(error.failures.values()))[0]}") from error
    own = sorted(folder.iterdir())[world.rank :: world.size]
    digests = world.gathered({file.name: file_digest(file) for file in own})
    return _without(state, shards) | {"shards": {"folder": folder.name, "keys": list(shards), "sha256": digests}}


def fitted(path: Path, state: dict[str, Any], stateful: dict[str, Any], world: World) -> dict[str, Any]:
    """The state of a checkpoint, sharded as the run now is: from any number of processes to any other.

    Args:
        path: The checkpoint.
        state: What it holds.
        stateful: What will load it, by name; the state of "optimizer" is sharded like its parameters.
        world: All processes call this.

    Raises:
        ValueError: the folder beside the checkpoint is damaged.
    """
    template = _templates(stateful)
    if "shards" in state:
        saved = state["shards"]
        _verify(path.with_name(saved["folder"]), saved.get("sha256", {}), world)
        tensors = {keys: torch.empty_like(template(keys)) for keys in saved["keys"]}
        _read(path.with_name(saved["folder"]), {_name(keys): tensor for keys, tensor in tensors.items()})
    else:
        whole_tensors = {keys: value for keys, value in leaves(state) if isinstance(value, Tensor) and value.ndim}
        tensors = {keys: _distributed(value, template(keys)) for keys, value in whole_tensors.items()}
    for keys, tensor in tensors.items():
        place = state
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = tensor
    return state


def leaves(tree: dict[Any, Any], keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """What nested dictionaries hold, each with its keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _without(tree: dict[Any, Any], out: dict[Keys, Any], keys: Keys = ()) -> dict[Any, Any]:
    return {
        key: _without(value, out, (*keys, key)) if isinstance(value, dict) else value
        for key, value in tree.items()
        if (*keys, key) not in out
    }


def _templates(stateful: dict[str, Any]) -> Callable[[Keys], Tensor]:
    """Which tensor, sharded or not, a tensor of the state is like."""
    parameters = [parameter for group in stateful["optimizer"].param_groups for parameter in group["params"]]
    own = {name: part.state_dict() for name, part in stateful.items() if name != "optimizer"}

    def template(keys: Keys) -> Tensor:
        if keys[0] == "optimizer":
            return cast(Tensor, parameters[int(keys[2])].detach())
        place: Any = own
        for key in keys:
            place = place[key]
        return cast(Tensor, place)

    return template


def _distributed(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _name(keys: Keys) -> str:
    return "/".join(map(str, keys))


def _verify(folder: Path, digests: dict[str, str], world: World) -> None:
    own = list(digests.items())[world.rank :: world.size]
    differ = [name for name, digest in own if not (folder / name).is_file() or file_digest(folder / name) != digest]
    if damaged := world.gathered(dict.fromkeys(differ)):
        raise ValueError(
            f"the folder {folder} of the checkpoint is damaged or not complete: {', '.join(damaged)}. "
            "Copy it again, or start a new run."
        )


def _read(folder: Path, tensors: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant
            state_dict_loader.load(
                tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized()
            )
    except (Exception, CheckpointException) as error:  # each damage raises another one; the latter is no Exception
        raise ValueError(
            f"the folder {folder} of the checkpoint is damaged or not complete. Copy it again, or start a new run."
        ) from error
