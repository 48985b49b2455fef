"""The training loop, top to bottom."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastvae import data
from fastvae.data.batches import batches_of, epoch_order, load_batches, resident_images, stack_images
from fastvae.evaluation.elbo import Evaluation, baseline_nats, evaluate, evaluation_mode
from fastvae.evaluation.objective import Objective, decode_to_images
from fastvae.models import VAE

from .._distributed import World, own_device, world_of
from .._files import write_json
from .checkpoint import CHECKPOINT_FILE, load_checkpoint, restore, save_checkpoint
from .config import CONFIG_FILE, TrainConfig
from .events import Event, Finished, Saved, Started, Stepped
from .heap import keep_freed_memory
from .interruption import TrainingInterrupted, deferred_signals
from .metrics import FiniteWatch, RunningMean
from .objective import build_objective
from .recorder import Recorder
from .run_folder import locked_run_folder, naming_the_run, resumed_after_restart
from .schedule import learning_rate
from .setup import averaged_over_steps, make_optimizer, model_config, require_memory, resolve_device
from .split import split_of_run
from .step import accumulated, clip_gradients, shared_batch_size

# devices where reading a value waits for nothing; on others the loss is checked when it is read anyway
CHECKED_EACH_STEP = frozenset({"cpu"})


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left behind.

    Attributes:
        run: Run folder.
        evaluation: The model on the validation images.
        baseline: Nats per validation image of the latent-free baseline, the per-pixel mean of the training images.
        pictures: report.html of the run folder, and its PNG files.
    """

    run: Path
    evaluation: Evaluation
    baseline: float
    pictures: list[Path]


def train(
    config: TrainConfig, *, dataset: Dataset[Any] | None = None, on_event: Callable[[Event], None] | None = None
) -> TrainResult:
    """Train a VAE, and leave weights, metrics, checkpoint and pictures in a run folder.

    On a CPU the weights follow from the config bit for bit, however often the run was stopped and resumed, and glibc's
    malloc keeps from then on what the process frees. torch's default random generators are reseeded. SIGINT, SIGTERM
    and SIGHUP, unless it is ignored as under nohup, are acted on between two steps while training.

    Under torchrun, or in a process group that exists, all processes train as one: each takes its share of every batch,
    with the noise that a single process would draw there, so their number changes results by rounding alone. The first
    one writes the files. Processes that torchrun starts anew go on from the last checkpoint in `config.out`.

    Args:
        config: Options of the run.
        dataset: Images [C, H, W], uint8 or float in [0, 1], or tuples that start with one; `config.data` if None.
        on_event: Called with each `Event`, in the thread of the training; by the first process alone.

    Returns:
        Where the results are, and the final figures.

    Raises:
        FileExistsError: the run folder holds something already, or another training writes to it (`RunLockedError`).
        ValueError: the options do not fit the data, or not the run that is resumed, or a checkpoint is damaged.
        RunFolderError: the run folder cannot be written, such as on a full disk; the last checkpoint is kept.
        NonFiniteLossError: the loss or its gradient was not finite; the last good checkpoint is kept.
        TrainingInterrupted: a signal came; the run is saved and can be resumed.
    """
    # here: matplotlib is slow to load, and missing it should show before the training, not after
    from fastvae.evaluation import pictures, report

    config = resumed_after_restart(config)
    if dataset is None:  # the same files from whatever folder the run is used
        config = replace(config, data=data.absolute_source(config.data))
    device = own_device(resolve_device(config.device))
    if device.type == "cpu":
        keep_freed_memory()
    with world_of(device) as world, ExitStack() as stack:
        first = stack.enter_context(locked_run_folder(config)) if world.is_first else None
        return _train(config, world.from_first(first), dataset, device, world, on_event, pictures, report)


def _train(
    config: TrainConfig,
    run: Path,
    dataset: Dataset[Any] | None,
    device: torch.device,
    world: World,
    on_event: Callable[[Event], None] | None,
    draw: Any,
    report: Any,
) -> TrainResult:
    notify = on_event if on_event is not None and world.is_first else lambda event: None
    source = config.data if dataset is None else ""
    if dataset is None:
        dataset = data.load(config.data, image_size=config.image_size, strict=config.strict)
    skipped: dict[str, str] = getattr(dataset, "skipped", {})
    split = world.from_first(split_of_run(run, config, dataset, source) if world.is_first else None)
    train_set, validation_set = split.subsets(dataset)
    shape = tuple(stack_images([train_set[0]]).shape[1:])
    batch_size = shared_batch_size(config, len(train_set), world.size)
    steps_per_epoch = len(train_set) // batch_size
    total_steps = config.epochs * steps_per_epoch

    sharded = config.shard and world.size > 1
    if not sharded:
        require_memory(model_config(config, shape), device)
    torch.manual_seed(config.seed)
    model = VAE(model_config(config, shape)).to(device)
    if config.channels_last and not sharded:  # FSDP2 takes contiguous weights only
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = build_objective(config, model, batch_size=batch_size, total_steps=total_steps).to(device)
    baseline = baseline_nats(train_set, validation_set, objective.likelihood, workers=config.workers)
    averaged = averaged_over_steps(objective, config.ema, sharded=sharded) if config.ema else None
    result = best = cast(Objective, averaged.module) if averaged else objective  # best: to evaluate, draw and export
    module: nn.Module = objective
    clip = clip_gradients
    if sharded:
        from . import sharding  # and with it much of torch.distributed

        clip = sharding.clip_gradients
        best = copy.deepcopy(objective)
        for each in dict.fromkeys((objective, result)):
            sharding.shard(each, device, world)
        if config.compile:
            for part in (objective.model.encoder, objective.model.decoder):
                part.compile()
    else:
        module = cast(nn.Module, torch.compile(objective)) if config.compile else objective
        module = world.wrap(module, device)
    parameters = list(objective.parameters())
    optimizer = make_optimizer(config, objective)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    running = RunningMean(device)
    watch = FiniteWatch(device)
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler, "running": running}
    stateful |= {"criterion": objective.criterion} | ({"ema": averaged} if averaged else {})
    images_id = {"train": len(train_set), "validation": len(validation_set), "shape": list(shape)}

    step = 0
    if config.resume and (run / CHECKPOINT_FILE).exists():
        state = load_checkpoint(run / CHECKPOINT_FILE, config=config, images=images_id)
        if sharded or "shards" in state:
            from . import sharding

            state = sharding.fitted(run / CHECKPOINT_FILE, state, stateful, world)
        step = restore(run / CHECKPOINT_FILE, state, stateful)
    if world.is_first:
        with naming_the_run(run):
            write_json(run / CONFIG_FILE, replace(config, out=run.resolve(), resume=None).to_json())
            split.save(run)
            if skipped:
                write_json(run / "skipped.json", skipped)
    counts = {"step": step, "steps_per_epoch": steps_per_epoch, "dimensions": math.prod(shape)}
    recorder = Recorder(run, config, notify, **counts, writes=world.is_first)
    n_parameters = sum(p.numel() for p in parameters)
    sizes = len(train_set), len(validation_set), n_parameters
    notify(Started(run, str(device), *sizes, step, total_steps, baseline, skipped))

    def gather_best() -> None:
        if sharded:
            sharding.gather(result, best)

    def save() -> None:
        watch.check()  # never replace a good checkpoint by a broken one
        running.join(world)
        recorder.sync()
        gather_best()
        state = {"step": step} | {name: part.state_dict() for name, part in stateful.items()}
        with naming_the_run(run):
            if sharded:
                state = sharding.save_shards(run / CHECKPOINT_FILE, state, world)
            if world.is_first:
                save_checkpoint(run / CHECKPOINT_FILE, config=config, images=images_id, state=state)
                best.model.save_pretrained(run / "model")
        notify(Saved(step, run / CHECKPOINT_FILE))

    resident = resident_images(train_set, device, config.cache, workers=config.workers)
    with deferred_signals() as pending, recorder:
        while step < total_steps:
            epoch, done = divmod(step, steps_per_epoch)
            order = epoch_order(len(train_set), batch_size, seed=config.seed, epoch=epoch)[done:]
            own = world.part(batch_size)
            own_order = [batch[own.start : own.stop] for batch in order]
            if resident is None:
                batches: Iterable[Tensor] = load_batches(train_set, own_order, workers=config.workers, device=device)
            else:
                batches = batches_of(resident, own_order)
            logged_at, logged_step = time.perf_counter(), step
            for batch in batches:
                rate = learning_rate(
                    step, peak=config.learning_rate, warmup_steps=config.warmup_steps, total_steps=total_steps
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images = batch.to(device, non_blocking=True)
                if config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                terms = accumulated(config, objective, module, images, own.start, step, scaler, world)
                if sharded:
                    sharding.average_whole_gradients(objective, world)
                scaler.unscale_(optimizer)
                norm = clip(parameters, config.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                objective.step()
                if averaged:
                    averaged.update_parameters(objective)
                step += 1
                notify(Stepped(step, batch_size))
                running.add(terms)
                # loss scaling meets infinite gradients on its way and skips those steps
                watch.add(step, terms.loss if scaler.is_enabled() else terms.loss + norm)
                at_log = step % config.log_every == 0 or step == total_steps
                if at_log or device.type in CHECKED_EACH_STEP:
                    watch.check()
                if at_log:
                    now = time.perf_counter()
                    speed = (step - logged_step) * batch_size / (now - logged_at)
                    beta, learned = objective.beta_at(step - 1), objective.learned_scale()
                    scale = {} if learned is None else {"log_scale": learned.item()}
                    figures = {"lr": rate, "beta": beta, **scale, "images_per_second": speed}
                    recorder.log("train", step, *running.take(world), **figures)
                    logged_at, logged_step = now, step
                if step % steps_per_epoch == 0:
                    watch.check()
                    gather_best()
                    scores = evaluate(best, validation_set, workers=config.workers, world=world)
                    found, passes = scores.evaluation, step // steps_per_epoch
                    figures = {"lr": rate, "beta": objective.beta_at(step), "active_units": found.active_units}
                    recorder.log("validation", step, scores.loss, found.recon, found.kl, **figures)
                    if world.is_first and draw.is_in_progress(passes, config.epochs):
                        with naming_the_run(run), decode_to_images(best), evaluation_mode(best):
                            draw.save_progress(run, best.model, validation_set, passes)
                signal = world.largest(pending.signal or 0)  # all stop at one step, whoever was told to
                if step % config.checkpoint_every == 0 or step == total_steps or signal:
                    save()
                if signal:
                    raise TrainingInterrupted(run, step, Signals(signal))

    gather_best()
    scores = evaluate(best, validation_set, workers=config.workers, world=world)
    drawn: list[Path] = []
    if world.is_first:
        with naming_the_run(run):
            shown = {"records": recorder.records, "baseline": baseline}
            drawn = report.summarize(run, best, validation_set, scores, **shown)
    notify(Finished(run, scores.evaluation, drawn))
    return TrainResult(run, scores.evaluation, baseline, drawn)
