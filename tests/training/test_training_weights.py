"""What a run starts from and what it keeps: a learned scale, weights of another run, more epochs, the best weights."""

import errno
import json
import math
import os
from dataclasses import replace
from signal import Signals

import pytest
import torch

from fastvae import data
from fastvae.evaluation.elbo import evaluate
from fastvae.models import VAE, saving
from fastvae.training import RunFolderError, TrainConfig, TrainingInterrupted, train
from fastvae.training import state as state_module
from fastvae.training.events import Logged
from fastvae.training.schedule import learning_rate

for package in ("PIL", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")


@pytest.fixture
def config(images_file, tmp_path):
    options = {"epochs": 2, "batch_size": 9, "backbone": "mlp", "hidden": 8, "latent_dim": 3, "device": "cpu"}
    options |= {"likelihood": "l2", "ema": 0, "learning_rate": 2e-3, "beta": 1.0}
    return TrainConfig(str(images_file), tmp_path / "run", log_every=1, checkpoint_every=2, **options)


def records_of(run, split="train"):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["split"] == split]


def weights_of(run, folder="model"):
    return VAE.from_pretrained(run / folder).state_dict()


def assert_equal(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


class TestLearnedScale:
    @pytest.mark.parametrize(("likelihood", "power"), [("gaussian", 2), ("scaled_l2", 2), ("scaled_l1", 1)])
    def test_starts_at_the_error_of_the_mean_image(self, config, likelihood, power):
        run = train(replace(config, likelihood=likelihood, epochs=1, learning_rate=1e-9)).run
        train_set, _ = data.split(data.load(config.data), validation=config.validation)
        images = torch.stack([train_set[i] for i in range(len(train_set))]).double() / 255
        expected = (images - images.mean(0)).abs().pow(power).mean().log().item()
        assert records_of(run)[0]["log_scale"] == pytest.approx(expected, abs=1e-5)

    def test_starts_where_it_is_told(self, config):
        run = train(replace(config, likelihood="gaussian", likelihood_parameter=-1.5, epochs=1, learning_rate=1e-9)).run
        assert records_of(run)[0]["log_scale"] == pytest.approx(-1.5, abs=1e-5)
        run = train(
            replace(config, out=run.with_name("ldm"), preset="ldm", likelihood=None, epochs=1, learning_rate=1e-9)
        ).run
        assert records_of(run)[0]["log_scale"] == pytest.approx(0.0, abs=1e-5)

    def test_reaches_its_optimum(self, config):
        """From a variance about eight times as large, as in the default run on Fashion-MNIST."""
        draw = torch.Generator().manual_seed(0)
        y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
        centre = torch.rand(400, 2, 1, 1, generator=draw) * 6 + 1
        discs = torch.exp(-((y - centre[:, 0]).square() + (x - centre[:, 1]).square()) / 8)
        noisy = (discs * 0.8 + 0.1 + 0.08 * torch.randn(discs.shape, generator=draw)).clamp(0, 1)
        images = data.ArrayImages((255 * noisy).byte()[:, None])
        config = replace(config, likelihood="gaussian", hidden=64, batch_size=18, epochs=30)
        recon = train(config, dataset=images).evaluation.recon
        first, last = records_of(config.out)[0]["log_scale"], records_of(config.out)[-1]["log_scale"]
        error = (2 * recon / 64 - last) * math.exp(last)  # recon is 64 / 2 (error / variance + log variance)
        assert last < first - math.log(6)
        assert last == pytest.approx(math.log(error), abs=0.1)


class TestMoreEpochs:
    def test_extend_a_finished_run(self, config):
        run = train(config).run
        before = records_of(run)
        longer = train(replace(TrainConfig.from_run(run), epochs=4))
        assert longer.run == run
        after = records_of(run)
        assert after[: len(before)] == before
        steps = len(before) // 2
        assert [record["step"] for record in after] == list(range(1, 4 * steps + 1))
        assert [record["epoch"] for record in records_of(run, "validation")] == [1, 2, 3, 4]
        rates = [learning_rate(s, peak=4e-3, warmup_steps=100, total_steps=4 * steps) for s in range(4 * steps)]
        assert [record["lr"] for record in after[len(before) :]] == pytest.approx(rates[len(before) :])
        assert TrainConfig.from_run(run).epochs == 4
        assert json.loads((run / "evaluation.json").read_text())["nats"] == records_of(run, "validation")[-1]["nats"]

    def test_fewer_than_are_begun_are_refused(self, config):
        run = train(config).run
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=r"epochs must be at least 2, .*; got 1"):
            train(replace(TrainConfig.from_run(run), epochs=1))
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class TestInitFrom:
    def test_takes_the_weights_and_nothing_else(self, config, monkeypatch):
        source = train(replace(config, likelihood="gaussian")).run
        monkeypatch.chdir(source.parent)
        started = replace(config, out=source.with_name("new"), likelihood="gaussian", seed=5, learning_rate=1e-12)
        run = train(replace(started, init_from=source.relative_to(source.parent), epochs=1)).run
        ours, theirs = weights_of(run), weights_of(source)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        last = records_of(source)[-1]["log_scale"]
        assert records_of(run)[0]["log_scale"] == pytest.approx(last, abs=1e-6)
        assert records_of(run)[0]["step"] == 1
        steps = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["optimizer"]["state"][0]["step"]
        assert steps == len(records_of(run))  # a new optimizer

    @pytest.mark.parametrize("folder", [".", "model", "best"])
    def test_takes_each_folder_of_weights(self, config, folder):
        source = train(config).run
        run = train(
            replace(config, out=source.with_name("new"), init_from=source / folder, epochs=1, learning_rate=1e-12)
        )
        expected = weights_of(source, "model" if folder == "." else folder)
        torch.testing.assert_close(weights_of(run.run), expected, rtol=0, atol=1e-9)

    def test_run_that_is_resumed_needs_its_source_no_more(self, config):
        source = train(config).run
        config = replace(config, out=source.with_name("new"), init_from=source)
        whole = train(replace(config, out=source.with_name("whole"))).run

        def stop(event):
            if isinstance(event, Logged) and event.record["step"] == 3:
                raise TrainingInterrupted(config.out, 3, Signals.SIGTERM)

        with pytest.raises(TrainingInterrupted):
            train(config, on_event=stop)
        source.rename(source.with_name("moved"))
        assert_equal(weights_of(train(TrainConfig.from_run(config.out)).run), weights_of(whole))

    def test_other_sizes_are_named(self, config):
        source = train(config).run
        other = replace(config, out=source.with_name("new"), init_from=source, hidden=9)
        with pytest.raises(ValueError, match=r"the model in .*run/model has hidden 8, here 9\. Give this run"):
            train(other)
        assert not other.out.exists()
        with pytest.raises(FileNotFoundError, match="no directory"):
            train(replace(other, init_from=source / "nowhere"))


class TestBestWeights:
    @pytest.fixture
    def worsening(self, config, monkeypatch):
        """A run of three epochs whose last one ends with a decoder that is far off."""
        step = state_module.TrainState.train_step

        def ruined(self, batch):
            found = step(self, batch)
            if self.step == self.total_steps:
                list(self.objective.model.decoder.parameters())[-1].data.fill_(5.0)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(state_module.TrainState, "train_step", ruined)
            return train(replace(config, epochs=3)).run

    def test_are_kept_beside_the_last(self, worsening, config):
        run = worsening
        nats = [record["nats"] for record in records_of(run, "validation")]
        assert nats[2] > nats[1]
        best = VAE.from_pretrained(run / "best")
        _, validation = data.split(data.load(config.data), validation=config.validation)
        assert evaluate(best, validation).evaluation.nats == min(nats)
        kept = saving.read_training(run / "best")
        assert kept["loss"] == min(nats)
        assert kept["step"] == len(records_of(run)) // 3 * (1 + nats.index(min(nats)))
        assert weights_of(run)["decoder.2.bias"].unique().tolist() == [5.0]

    def test_outlive_a_resumed_run(self, worsening):
        run = worsening
        before = (run / "best" / "model.safetensors").read_bytes()
        train(replace(TrainConfig.from_run(run), epochs=4))
        assert records_of(run, "validation")[-1]["nats"] > saving.read_training(run / "best")["loss"]
        assert (run / "best" / "model.safetensors").read_bytes() == before

    def test_disk_that_fills_leaves_the_better_ones_or_none(self, config, monkeypatch):
        written = []

        def full(path, content):
            if path.parent.name == "best":
                written.append(path)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_bytes(path, content)

        write_bytes = saving.write_bytes
        monkeypatch.setattr(saving, "write_bytes", full)
        with pytest.raises(RunFolderError, match="No space left"):
            train(config)
        monkeypatch.undo()
        run = train(TrainConfig.from_run(config.out)).run
        assert len(written) == 1
        whole = train(replace(config, out=config.out.with_name("whole"))).run
        assert_equal(weights_of(run, "best"), weights_of(whole, "best"))

    def test_are_averaged_ones_with_their_scale(self, config):
        run = train(replace(config, likelihood="gaussian", ema=0.5, beta=2.0)).run
        found = min(records_of(run, "validation"), key=lambda record: record["recon"] + 2 * record["kl"])
        kept = saving.read_training(run / "best")
        assert kept["loss"] == found["recon"] + 2 * found["kl"]
        if kept["step"] == len(records_of(run)):
            assert_equal(weights_of(run, "best"), weights_of(run))
            ema = torch.load(run / "checkpoint.pt", weights_only=True)["state"]["ema"]
            assert kept["scales"]["likelihood.log_scale"] == ema["module.criterion.likelihood.log_scale"].item()

    def test_a_changed_scale_is_reported(self, config):
        run = train(replace(config, likelihood="gaussian")).run
        path = run / "model" / "model.safetensors"
        content = path.read_bytes()
        at = content.index(b"log_scale") + len(b"log_scale") + 10
        path.write_bytes(content[:at] + (b"7" if content[at : at + 1] != b"7" else b"8") + content[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            VAE.from_pretrained(run / "model")
