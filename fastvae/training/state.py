"""What a run trains: model and loss, optimizer and averaged weights, whole or sharded over the processes."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvae.data.batches import mirrored
from fastvae.evaluation.objective import Objective
from fastvae.models import VAE, saving

from .._distributed import World
from .config import TrainConfig
from .metrics import RunningMean
from .objective import build_objective, initialize_scale, load_weights
from .schedule import learning_rate
from .setup import averaged_over_steps, make_optimizer, model_config, require_memory
from .step import clip_gradients, train_step


class TrainState:
    """All that a checkpoint holds; every process of a run has one, and calls its methods in the same order.

    Args:
        config: Options of the run.
        sample: [n, C, H, W] training images, whose shape is that of all and whose variance a learned scale starts at.
        batch_size: Images of a step, of all processes together.
        total_steps: Steps of the run.
        init_from: Where the first weights are from, see `load_weights`; drawn at random if None.
        device: Of this process.
        world: The processes of the run.

    Attributes:
        step: Updates done.
        objective: What is trained.
        evaluated: What is evaluated, drawn and exported, after `update_evaluated`: the averaged weights if there are.
        running: Mean of the terms since the last log.
    """

    def __init__(
        self,
        config: TrainConfig,
        sample: Tensor,
        *,
        batch_size: int,
        total_steps: int,
        init_from: Path | None,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.total_steps, self.device, self.world = config, total_steps, device, world
        self.sharded = config.shard and world.size > 1
        self.step = 0
        self.objective = self._build(sample, batch_size, init_from)
        self.averaged = averaged_over_steps(self.objective, config.ema, sharded=self.sharded) if config.ema else None
        self._result = cast(Objective, self.averaged.module) if self.averaged else self.objective
        self.evaluated = copy.deepcopy(self.objective) if self.sharded else self._result
        self.module = self._wrap()
        self.optimizer = make_optimizer(config, self.objective)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.running = RunningMean(device)

    def _build(self, sample: Tensor, batch_size: int, init_from: Path | None) -> Objective:
        """Model and loss before the first step."""
        config, shape = self.config, model_config(self.config, tuple(sample.shape[1:]))
        if not self.sharded:
            require_memory(shape, self.device)
        torch.manual_seed(config.seed)
        model = VAE(shape).to(self.device)
        if config.channels_last and not self.sharded:  # FSDP2 takes contiguous weights only
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = build_objective(config, model, batch_size=batch_size, total_steps=self.total_steps)
        if config.likelihood is not None and config.likelihood_parameter is None:  # a preset has its own start
            initialize_scale(objective, sample)
        if init_from is not None:
            load_weights(objective, init_from)
        return objective.to(self.device)

    def _wrap(self) -> nn.Module:
        """The module whose backward pass averages gradients over the processes, compiled if that is asked for."""
        if not self.sharded:
            compiled = torch.compile(self.objective) if self.config.compile else self.objective
            return self.world.wrap(cast(nn.Module, compiled), self.device)
        from .sharding import shard  # here: much of torch.distributed, which is slow to load

        for objective in dict.fromkeys((self.objective, self._result)):
            shard(objective, self.device, self.world)
        if self.config.compile:
            self.objective.model.encoder.compile()
            self.objective.model.decoder.compile()
        return self.objective

    def train_step(self, batch: Tensor) -> Tensor:
        """Update the weights by the gradient of this process's share of a batch; returns what must be finite."""
        config = self.config
        for group in self.optimizer.param_groups:
            peak, steps = group["initial_lr"], {"warmup_steps": config.warmup_steps, "total_steps": self.total_steps}
            group["lr"] = learning_rate(self.step, peak=peak, **steps)
        images = batch.to(self.device, non_blocking=True)
        if config.flip:
            images = mirrored(images, seed=config.seed, step=self.step, first=self.world.rank * len(images))
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        terms = train_step(config, self.objective, self.module, images, self.step, self.scaler, self.world)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.objective.step()
        if self.averaged:
            self.averaged.update_parameters(self.objective)
        self.step += 1
        self.running.add(terms)
        # loss scaling meets infinite gradients on its way and skips those steps
        return terms.loss if self.scaler.is_enabled() else terms.loss + norm

    def _clip_gradients(self) -> Tensor:
        parameters = list(self.objective.parameters())
        if not self.sharded:
            return clip_gradients(parameters, self.config.clip_norm)
        from .sharding import reduce_and_clip

        return reduce_and_clip(parameters, self.config.clip_norm, self.world)

    @property
    def rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update_evaluated(self) -> Objective:
        """Bring `evaluated` to the current weights, and return it."""
        if self.sharded:
            from .sharding import copy_weights

            copy_weights(self._result, self.evaluated)
        return self.evaluated

    def export(self, folder: Path, **figures: float) -> None:
        """Write `evaluated` for `VAE.from_pretrained`, and with it the learned scales, the step and `figures`."""
        model = self.evaluated.model
        scales = {name: scale.tolist() for name, scale in self.evaluated.scales().items()}
        saving.save(folder, model.config, model.state_dict(), {"step": self.step, "scales": scales, **figures})

    def state_dict(self) -> dict[str, Any]:
        """The state of a run of one process, on the first process."""
        self.running.join(self.world)
        state = {"step": self.step, "scaler": self.scaler.state_dict(), "running": self.running.state_dict()}
        if self.sharded:
            from .sharding import full_state

            return state | full_state(self.objective, self.optimizer, self.averaged)
        state |= {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.averaged is None else state | {"ema": self.averaged.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned in a run of any number of processes."""
        self.step = int(state["step"])
        self.scaler.load_state_dict(state["scaler"])
        self.running.load_state_dict(state["running"])
        if self.sharded:
            from .sharding import load_full_state

            load_full_state(state, self.objective, self.optimizer, self.averaged)
            return
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["ema"])
