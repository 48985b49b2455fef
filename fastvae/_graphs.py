"""CUDA graphs: where they can be captured, and how."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# optimizers whose state before the first step is all zeros: what the warm-up made of it can be undone
_START_AT_ZERO = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD)


class Graph:
    """A CUDA graph and the random numbers around its warm-up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, step: Callable[[], Any], times: int) -> Any:
        """Run the step on a side stream, as capture will; return tensors like its results."""
        random = torch.cuda.get_rng_state(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(times):
                results = step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.set_rng_state(random, self._device)
        return results

    def capture(self, step: Callable[[], None]) -> None:
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        self._graph.replay()


def obstacle(
    device: torch.device, model: Callable[..., Any], optimizer: torch.optim.Optimizer, *, scaled: bool
) -> str | None:
    """Why this step cannot become a graph."""
    if not has_graphs(device):
        return f"the images are on {device.type!r}; CUDA graphs exist on GPUs only"
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel synchronises gradients by hooks that a graph of one step does not hold"
    if scaled:
        return "float16 needs a GradScaler, which reads on the host whether gradients are finite"
    if any(p.device != device for group in optimizer.param_groups for p in group["params"]):
        return f"some parameters are not on {device}, where the images are"
    if not all("capturable" in group for group in optimizer.param_groups) and not isinstance(
        optimizer, torch.optim.SGD
    ):
        return f"{type(optimizer).__name__} has no option capturable"
    fresh = not any(optimizer.state.values())
    if fresh and not isinstance(optimizer, _START_AT_ZERO):
        return f"the state of {type(optimizer).__name__} cannot be taken back after the warm-up; take one step first"
    if fresh and any(group.get("dampening") for group in optimizer.param_groups):
        return "SGD with dampening treats its first step differently; take one step first"
    return None


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=device)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
