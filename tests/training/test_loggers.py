"""Loggers: TensorBoard and CSV get the figures of metrics.jsonl, under the same names, resumed runs included."""

import csv
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

from PIL import Image  # noqa: E402
from tensorboard.plugins.hparams import plugin_data_pb2  # noqa: E402


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


def test_pictures_and_options_are_logged(config):
    result = train(config)
    events = accumulator.EventAccumulator(str(result.run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    pictures = ["interpolations", "latent", "loss", "progress", "reconstructions", "samples"]
    assert sorted(events.Tags()["images"]) == pictures
    assert [image.step for image in events.Images("progress")] == [4, 8]
    (samples,) = events.Images("samples")
    with Image.open(result.run / "samples.png") as picture:
        assert (samples.step, samples.width, samples.height) == (8, *picture.size)
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = plugin_data_pb2.HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert options["batch_size"].number_value == 8
    assert options["backbone"].string_value == "mlp"


def rows_of(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def as_text(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: str(value) for name, value in json.loads(line).items()} for line in lines]


def test_csv_holds_the_records_of_a_run_and_of_its_continuation(config):
    class KilledError(Exception):
        pass

    def on_event(event):
        if isinstance(event, Logged) and event.record["step"] == 4:
            raise KilledError

    with pytest.raises(KilledError):
        train(replace(config, log="csv"), on_event=on_event)
    assert rows_of(config.out) == as_text(config.out)
    run = train(replace(config, log="csv", out=None, resume=config.out)).run
    assert rows_of(run) == as_text(run)
    assert {row["split"] for row in rows_of(run)} == {"train", "validation"}
    assert not (run / "tensorboard").exists()


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
    with pytest.raises(ValueError, match="log must be one of tensorboard, csv"):
        replace(config, log="wandb")


def test_interruption_leaves_a_readable_log(config):
    def on_event(event):
        if isinstance(event, Logged) and event.record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        train(config, on_event=on_event)
    assert scalars(config.out) == pytest.approx(logged(config.out), rel=1e-6)
