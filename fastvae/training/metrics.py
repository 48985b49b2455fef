"""Figures of training steps, kept on the device until they are read."""

import math

import torch
from torch import Tensor

from fastvae import VAELossTerms

from .._distributed import World


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became infinite or NaN; the message says when and what to try."""


class RunningMean:
    """Mean of loss, reconstruction and KL since the last reset, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)
        self.steps = 0

    def add(self, terms: VAELossTerms) -> None:
        self.sums += torch.stack([terms.loss, terms.recon, terms.kl]).detach()
        self.steps += 1

    def take(self, world: World) -> tuple[float, float, float]:
        """The means of (loss, recon, kl) over steps and processes, and a new start."""
        loss, recon, kl = (world.sum(self.sums) / (self.steps * world.size)).tolist()
        self.sums.zero_()
        self.steps = 0
        return loss, recon, kl

    def join(self, world: World) -> None:
        """Let every process hold the mean over all of them, as one that takes over from them will."""
        self.sums = world.sum(self.sums) / world.size

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"sums": self.sums.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.sums.copy_(torch.as_tensor(state["sums"]))
        self.steps = int(state["steps"])


class FiniteWatch:
    """Remembers, on the device, the first step whose value was not finite.

    Adding a value never waits for a GPU; only `check` does.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none

    def add(self, step: int, value: Tensor) -> None:
        if value.device.type == "cpu" and math.isfinite(value.item()):  # as it nearly always is
            return
        bad = ~torch.isfinite(value.detach()) & (self.first_bad_step == 0)
        self.first_bad_step.masked_fill_(bad, step)

    def check(self) -> None:
        """Raise if a value was not finite.

        Raises:
            NonFiniteLossError: names the step and the remedies.
        """
        step = int(self.first_bad_step)
        if step:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite at step {step}; the run stopped there and kept its last "
                "good checkpoint. Start a new run with a lower --learning-rate, more --warmup-steps or a smaller "
                "--clip-norm; "
                "with --precision fp16, try bf16 or fp32; check that the images hold no NaN."
            )
