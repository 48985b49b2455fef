"""`--log tensorboard`: the figures of metrics.jsonl, under the same names, resumed runs included."""

import json
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from fastvae.training import TrainConfig, TrainingInterrupted, train
from fastvae.training.events import Logged

for package in ("PIL.Image", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")
accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard comes with the extra [log]"
)


@pytest.fixture
def config(tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (40, 6, 6), np.uint8))
    options = {"backbone": "mlp", "hidden": 8, "latent_dim": 2, "device": "cpu", "log_every": 2, "checkpoint_every": 3}
    return TrainConfig(
        str(tmp_path / "noise.npy"), tmp_path / "run", epochs=2, batch_size=8, log="tensorboard", **options
    )


def scalars(run):
    """{(tag, step): value} of all files, those before a restart first."""
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}


def logged(run):
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        split, step = record.pop("split"), record.pop("step")
        found |= {(f"{split}/{name}", step): value for name, value in record.items()}
    return found


def test_figures_are_those_of_the_metrics_file(config):
    run = train(config).run
    assert scalars(run) == pytest.approx(logged(run), rel=1e-6)


def test_a_resumed_run_shows_each_step_once(config):
    class KilledError(Exception):
        pass

    def on_event(event):
        if isinstance(event, Logged) and event.record["step"] == 4:
            raise KilledError  # after the checkpoint at step 3: step 4 is computed and logged again

    with pytest.raises(KilledError):
        train(config, on_event=on_event)
    run = train(replace(config, out=None, resume=config.out)).run
    assert scalars(run) == pytest.approx(logged(run), rel=1e-6)


def test_a_missing_tensorboard_is_said_before_the_training(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"fastvae-triton\[train,log\]"):
        train(config)


def test_other_logs_are_refused(config):
    with pytest.raises(ValueError, match="log must be tensorboard"):
        replace(config, log="wandb")


def test_interruption_leaves_a_readable_log(config):
    def on_event(event):
        if isinstance(event, Logged) and event.record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        train(config, on_event=on_event)
    assert scalars(config.out) == pytest.approx(logged(config.out), rel=1e-6)
