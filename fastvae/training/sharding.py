"""Weights, gradients and optimizer state sharded over the processes (FSDP2)."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastvae.evaluation.objective import Objective

from .._distributed import World

ON_EVERY_RANK = StateDictOptions(full_state_dict=True)
ON_THE_FIRST_RANK = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(objective: Objective, device: torch.device, world: World) -> None:
    """Let each process keep a shard of every tensor of the model, in place.

    The parameters of the loss are single numbers, of which every process keeps a copy.
    """
    # the model's outputs are views of its last layer's; nothing writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world.size,))
    for part in (objective.model.encoder, objective.model.decoder):
        fully_shard(part, mesh=mesh)
    fully_shard(objective, mesh=mesh, ignored_params=set(objective.criterion.parameters()))


def reduce_and_clip(parameters: Sequence[nn.Parameter], max_norm: float, world: World) -> Tensor:
    """Average the gradients that FSDP2 has not averaged, and clip all by their common norm, which is returned."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    others = [p for p in parameters if not isinstance(p, DTensor)]
    for parameter in others:
        if parameter.grad is not None:
            world.sum(parameter.grad).div_(world.size)
    kinds = [kind for kind in (sharded, others) if kind]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norm = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return cast(Tensor, norm)


def copy_weights(source: Objective, target: Objective) -> None:
    """Copy a sharded objective into one that each process has all of; every process calls this."""
    target.load_state_dict(get_model_state_dict(source, options=ON_EVERY_RANK))


def full_state(objective: Objective, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    """The state that a run of one process would have, on the first process; every process calls this."""
    weights, found = get_state_dict(objective, optimizer, options=ON_THE_FIRST_RANK)
    numbers = {name: number for number, (name, _) in enumerate(objective.named_parameters())}
    found = cast(dict[str, Any], found.get("state", {}))  # only the first process has it
    moments = {numbers[name]: value for name, value in found.items()}
    groups = optimizer.state_dict()["param_groups"]
    state = {"objective": weights, "optimizer": {"state": moments, "param_groups": groups}}
    return state if ema is None else state | {"ema": get_model_state_dict(ema, options=ON_THE_FIRST_RANK)}


def load_full_state(
    state: dict[str, Any], objective: Objective, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Load the state of a run of one process; every process calls this, with all of the state."""
    names = [name for name, _ in objective.named_parameters()]
    moments = {names[number]: value for number, value in state["optimizer"]["state"].items()}
    groups = [
        group | {"params": [names[number] for number in group["params"]]}
        for group in state["optimizer"]["param_groups"]
    ]
    set_state_dict(
        objective,
        optimizer,
        model_state_dict=state["objective"],
        optim_state_dict={"state": moments, "param_groups": groups},
        options=ON_EVERY_RANK,
    )
    if ema is not None:
        set_model_state_dict(ema, state["ema"], options=ON_EVERY_RANK)
