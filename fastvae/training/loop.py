"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvae import data
from fastvae.data.batches import batches_of, epoch_order, load_batches, resident_images, spread_images
from fastvae.evaluation.density import Density
from fastvae.evaluation.elbo import Evaluation, Scores, baseline_nats, evaluate, evaluation_mode
from fastvae.evaluation.objective import decode_to_images
from fastvae.models import saving

from .._distributed import World, own_device, world_of
from .._files import write_json
from .checkpoint import BEST, CHECKPOINT_FILE, LAST, load_checkpoint, save_checkpoint
from .config import CONFIG_FILE, TrainConfig
from .events import Drawn, Event, Finished, Saved, Started, Stepped
from .interruption import TrainingInterrupted, deferred_signals
from .loggers import notifier
from .metrics import FiniteWatch
from .recorder import Recorder
from .run_folder import locked_run_folder, resumed_after_restart, wrap_io_errors
from .setup import resolve_device
from .split import Split, split_of_run
from .state import TrainState
from .step import shared_batch_size

CHECKED_EACH_STEP = frozenset({"cpu"})  # devices where reading a value waits for nothing
SCALE_IMAGES = 512  # training images whose error a learned scale starts at


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

    On a CPU the weights follow from the config bit for bit, however often the run was stopped and resumed. torch's
    default random generators are reseeded. SIGINT, SIGTERM and SIGHUP, unless it is ignored as under nohup, are acted
    on between two steps while training.

    Under torchrun, or in a process group that exists, all processes train as one: each takes its share of every batch,
    with the noise that a single process would draw there, so their number changes results by rounding alone. The first
    one writes the files. Processes that torchrun restarts continue from the last checkpoint in `config.out`.

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
    from fastvae.evaluation import report  # noqa: F401, slow to load; what it lacks should show before the training

    config = resumed_after_restart(config)
    source = ""
    if dataset is None:  # the run finds the same files from whatever folder it is used
        config = replace(config, data=data.absolute_source(config.data))
        source = config.data
    if config.init_from is not None:
        config = replace(config, init_from=config.init_from.resolve())
    device = own_device(resolve_device(config.device))
    with world_of(device) as world, ExitStack() as stack:
        run = world.broadcast(stack.enter_context(locked_run_folder(config)) if world.is_first else None)
        if dataset is None:
            dataset = data.load(config.data, image_size=config.image_size, strict=config.strict)
        split = world.broadcast(split_of_run(run, config, dataset, source) if world.is_first else None)
        notify: Callable[[Event], None] = lambda event: None  # noqa: E731
        if world.is_first:
            notify = stack.enter_context(notifier(config, run, on_event))
        trainer = Trainer(config, run, dataset, split, device, world, notify)
        trainer.resume()
        trainer.start()
        trainer.fit()
        return trainer.finish()


class Trainer:
    """A training run, step by step.

    Args:
        config: Options.
        run: Folder of the run.
        dataset: All its images.
        split: Which of them are held out.
        device: Of this process.
        world: All processes of the run; each has a Trainer, and calls the same methods in the same order.
        notify: Called with each event.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        dataset: Dataset[Any],
        split: Split,
        device: torch.device,
        world: World,
        notify: Callable[[Event], None],
    ) -> None:
        self.config, self.run, self.device, self.world, self.notify = config, run, device, world, notify
        self.split, self.skipped = split, cast(dict[str, str], getattr(dataset, "skipped", {}))
        self.train_set, self.validation_set = split.subsets(dataset)
        self.batch_size = shared_batch_size(config, len(self.train_set), world.size)
        self.steps_per_epoch = len(self.train_set) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        sample = spread_images(self.train_set, SCALE_IMAGES)
        sizes = {"batch_size": self.batch_size, "total_steps": self.total_steps}
        self.continues = config.resume is not None and (run / CHECKPOINT_FILE).exists()
        init_from = None if self.continues else config.init_from
        self.state = TrainState(config, sample, **sizes, init_from=init_from, device=device, world=world)
        self.shape = list(sample.shape[1:])
        self.images_id = {"train": len(self.train_set), "validation": len(self.validation_set), "shape": self.shape}
        likelihood, workers = self.state.objective.likelihood, config.workers
        self.baseline = baseline_nats(self.train_set, self.validation_set, likelihood, workers=workers)
        self.watch = FiniteWatch(device)
        self.scores: Scores | None = None  # of the last step, where it ended an epoch

    def resume(self) -> None:
        """Load the last checkpoint of a run that is resumed, and open the metrics."""
        path = self.run / CHECKPOINT_FILE
        if self.continues:
            state = load_checkpoint(path, config=self.config, images=self.images_id)
            try:
                self.state.load_state_dict(state)
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise ValueError(f"the state in {path} does not fit its run: {error}. Start a new run.") from error
        step = self.state.step
        if step > self.total_steps:
            done = -(-step // self.steps_per_epoch)
            raise ValueError(f"epochs must be at least {done}, which {self.run} has begun; got {self.config.epochs}.")
        counts = {"step": step, "steps_per_epoch": self.steps_per_epoch}
        self.recorder = Recorder(self.run, self.notify, **counts, writes=self.world.is_first)
        has_best = (self.run / BEST / saving.WEIGHTS).exists()
        self.best = float(saving.read_training(self.run / BEST)["loss"]) if has_best else math.inf

    def start(self) -> None:
        """Write config.json, the split and what was left out of the data, and report the start."""
        if self.world.is_first:
            with wrap_io_errors(self.run):
                write_json(self.run / CONFIG_FILE, replace(self.config, out=self.run.resolve(), resume=None).to_json())
                self.split.save(self.run)
                if self.skipped:
                    write_json(self.run / "skipped.json", self.skipped)
        parameters = sum(p.numel() for p in self.state.objective.parameters())
        sizes = len(self.train_set), len(self.validation_set), parameters, self.state.step, self.total_steps
        self.notify(Started(self.run, str(self.device), *sizes, self.baseline, self.skipped, self.config.to_json()))

    def fit(self) -> None:
        """Train to the last step; validate after each epoch, and save from time to time and when a signal comes."""
        config, state = self.config, self.state
        resident = resident_images(self.train_set, self.device, config.cache, workers=config.workers)
        with deferred_signals() as pending:
            while state.step < self.total_steps:
                self.logged_at, self.logged_step = time.perf_counter(), state.step
                for batch in self.rest_of_epoch(resident):
                    self.scores = None
                    self.watch.add(state.step + 1, state.train_step(batch))
                    self.notify(Stepped(state.step, self.batch_size))
                    at_log = state.step % config.log_every == 0 or state.step == self.total_steps
                    if at_log or self.device.type in CHECKED_EACH_STEP:
                        self.watch.check()
                    if at_log:
                        self.log()
                    if state.step % self.steps_per_epoch == 0:
                        self.validate()
                    signal = self.world.all_reduce_max(pending.signal or 0)  # all processes stop at the same step
                    if state.step % config.checkpoint_every == 0 or state.step == self.total_steps or signal:
                        self.save()
                    if signal:
                        raise TrainingInterrupted(self.run, state.step, Signals(signal))

    def rest_of_epoch(self, resident: Tensor | None) -> Iterable[Tensor]:
        """This process's share of each batch that is left of the epoch."""
        epoch, done = divmod(self.state.step, self.steps_per_epoch)
        order = epoch_order(len(self.train_set), self.batch_size, seed=self.config.seed, epoch=epoch)[done:]
        own = self.world.shard_range(self.batch_size)
        own_order = [batch[own.start : own.stop] for batch in order]
        if resident is not None:
            return batches_of(resident, own_order)
        return load_batches(self.train_set, own_order, workers=self.config.workers, device=self.device)

    def log(self) -> None:
        """Record the mean terms of the steps since the last record, and the speed."""
        state, objective, now = self.state, self.state.objective, time.perf_counter()
        figures = {"lr": state.rate, "beta": objective.beta_at(state.step - 1)}
        figures |= {name.rpartition(".")[2]: scale.item() for name, scale in objective.scales().items()}
        figures["images_per_second"] = (state.step - self.logged_step) * self.batch_size / (now - self.logged_at)
        loss, recon, kl = state.running.take(self.world)
        bits = Density.of(objective.likelihood).bits_per_dim(recon + kl, math.prod(self.shape))
        self.recorder.log("train", state.step, loss, recon, kl, bits_per_dim=bits, **figures)
        self.logged_at, self.logged_step = now, state.step

    def validate(self) -> None:
        """Evaluate on the validation images, keep the best weights, and draw the progress."""
        from fastvae.evaluation import pictures

        self.watch.check()
        step, objective = self.state.step, self.state.update_evaluated()
        self.scores = evaluate(objective, self.validation_set, workers=self.config.workers, world=self.world)
        found, epoch = self.scores.evaluation, step // self.steps_per_epoch
        figures = {"bits_per_dim": found.bits_per_dim, "lr": self.state.rate, "beta": objective.beta_at(step)}
        figures["active_units"] = found.active_units
        self.recorder.log("validation", step, self.scores.loss, found.recon, found.kl, **figures)
        if not self.world.is_first:
            return
        loss = objective.weighted_nats(found.recon, found.kl)
        with wrap_io_errors(self.run):
            if loss < self.best:
                self.best = loss
                self.state.export(self.run / BEST, loss=loss)
            if pictures.is_in_progress(epoch, self.config.epochs):
                with decode_to_images(objective), evaluation_mode(objective):
                    path = pictures.save_progress(self.run, objective.model, self.validation_set, epoch)
                self.notify(Drawn(step, "progress", path))

    def save(self) -> None:
        """Write the checkpoint and the exported weights."""
        self.watch.check()  # never replace a good checkpoint by a broken one
        self.recorder.sync()
        self.state.update_evaluated()
        path, content = self.run / CHECKPOINT_FILE, self.state.state_dict()
        if self.world.is_first:
            with wrap_io_errors(self.run):
                save_checkpoint(path, config=self.config, images=self.images_id, state=content)
                self.state.export(self.run / LAST)
        self.notify(Saved(self.state.step, path))

    def finish(self) -> TrainResult:
        """Evaluate the final weights, and draw the pictures and the report."""
        from fastvae.evaluation import report

        objective, validation, workers = self.state.update_evaluated(), self.validation_set, self.config.workers
        scores = self.scores or evaluate(objective, validation, workers=workers, world=self.world)
        drawn: list[Path] = []
        if self.world.is_first:
            with wrap_io_errors(self.run):
                records, baseline = self.recorder.records, self.baseline
                drawn = report.summarize(self.run, objective, validation, scores, records=records, baseline=baseline)
        self.notify(Finished(self.run, scores.evaluation, drawn))
        return TrainResult(self.run, scores.evaluation, self.baseline, drawn)
