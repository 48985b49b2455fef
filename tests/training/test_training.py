import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import fastvae
from fastvae import data
from fastvae.data import batches
from fastvae.data.batches import epoch_order, labels_of
from fastvae.evaluation.elbo import Latents, baseline_nats, evaluate
from fastvae.models import VAE, VAEConfig
from fastvae.training import (
    NonFiniteLossError,
    TrainConfig,
    TrainingInterrupted,
    bits_per_dim,
    loop,
    setup,
    train,
)
from fastvae.training.events import Logged
from fastvae.training.metrics import FiniteWatch
from fastvae.training.schedule import learning_rate

Image = pytest.importorskip("PIL.Image", reason="training draws with pillow, of the extra [train]")
pytest.importorskip("matplotlib", reason="training plots with matplotlib, of the extra [train]")
pytest.importorskip("safetensors", reason="training saves weights with safetensors, of the extra [train]")

PICTURES = ["reconstructions.png", "samples.png", "interpolations.png", "loss.png", "latent.png"]
STEPS = 18  # of the run below: 54 training images, 6 batches of 8 (and 6 images left over) in each of 3 epochs


def blobs(n, size=8, seed=0):
    """Images with something to learn: a soft disc at a random place; [n, 1, size, size] uint8."""
    random = np.random.default_rng(seed)
    centre = random.uniform(0.2, 0.8, (n, 2, 1, 1)) * size
    y, x = np.mgrid[:size, :size]
    distance = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2
    return torch.from_numpy((255 * np.exp(-distance / size)).astype(np.uint8))[:, None]


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "blobs.npy"
    np.save(path, blobs(60)[:, 0].numpy())
    return path


@pytest.fixture
def config(images_file, tmp_path):
    return TrainConfig(
        data=str(images_file),
        out=tmp_path / "run",
        epochs=3,
        batch_size=8,
        likelihood="l2",
        ema=0,
        learning_rate=2e-3,
        backbone="mlp",
        hidden=16,
        latent_dim=4,
        log_every=4,
        checkpoint_every=5,
        device="cpu",
    )


@pytest.fixture(scope="session")
def whole_run(images_file, tmp_path_factory):
    """An uninterrupted run with the options of `config`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    options = {"epochs": 3, "batch_size": 8, "backbone": "mlp", "hidden": 16, "latent_dim": 4, "device": "cpu"}
    options |= {"likelihood": "l2", "ema": 0, "learning_rate": 2e-3}
    return train(TrainConfig(data=str(images_file), out=out, log_every=4, checkpoint_every=5, **options)).run


def state_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def metrics_of(run):
    """The records, without the one figure that depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


def assert_same_run(run, other):
    """Bit for bit: weights, optimizer, metrics."""
    state, other_state = state_of(run), state_of(other)
    assert state["step"] == other_state["step"] == STEPS
    flat, spec = torch.utils._pytree.tree_flatten(state)
    other_flat, other_spec = torch.utils._pytree.tree_flatten(other_state)
    assert spec == other_spec
    for value, other_value in zip(flat, other_flat, strict=True):
        assert torch.equal(value, other_value) if isinstance(value, torch.Tensor) else value == other_value
    assert metrics_of(run) == metrics_of(other)
    weights, other_weights = (VAE.from_pretrained(folder / "model").state_dict() for folder in (run, other))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def stop_at(step, number):
    def on_event(event):
        if isinstance(event, Logged) and (event.record["step"], event.record["split"]) == (step, "train"):
            signal.raise_signal(number)

    return on_event


def test_run_folder_is_complete(whole_run):
    assert sorted(path.name for path in whole_run.iterdir()) == sorted(
        [
            "best",
            "config.json",
            "metrics.jsonl",
            "checkpoint.pt",
            "evaluation.json",
            "model",
            "progress",
            "report.html",
            "split.npz",
            *PICTURES,
        ]
    )
    records = metrics_of(whole_run)
    assert [(record["step"], record["split"]) for record in records if record["split"] == "train"] == [
        (step, "train") for step in (4, 8, 12, 16, 18)
    ]
    assert [(r["step"], r["epoch"]) for r in records if r["split"] == "validation"] == [(6, 1), (12, 2), (18, 3)]
    for record in records:
        assert record["nats"] == record["recon"] + record["kl"] == pytest.approx(record["loss"], rel=1e-5)
        nll = record["nats"] + 64 * 0.5 * math.log(math.pi)  # "l2" is a Gaussian of variance 1/2
        assert record["bits_per_dim"] == pytest.approx(nll / (64 * math.log(2)) + 8)
    evaluation = json.loads((whole_run / "evaluation.json").read_text())
    assert evaluation["nats"] == records[-1]["nats"]
    for name in PICTURES:
        with Image.open(whole_run / name) as picture:
            assert min(picture.size) > 50, name


def test_saved_model_is_the_trained_one(whole_run):
    model = VAE.from_pretrained(whole_run / "model")
    for name, tensor in state_of(whole_run)["objective"].items():
        assert torch.equal(model.state_dict()[name.removeprefix("model.")], tensor)


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 8), (signal.SIGINT, 12)], ids=["mid-epoch", "epoch's end"]
)
def test_interrupted_run_goes_on_bit_for_bit(config, whole_run, number, step):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingInterrupted) as caught:
        train(config, on_event=stop_at(step, number))
    assert (caught.value.step, caught.value.signal, caught.value.run) == (step, number, config.out)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert state_of(config.out)["step"] == step
    torch.rand(3)  # a new process would stand elsewhere in the default generator
    resumed = train(replace(config, out=None, resume=config.out, checkpoint_every=1))
    assert resumed.run == config.out
    assert_same_run(config.out, whole_run)


def test_interruption_between_two_log_lines_keeps_the_running_mean(config, whole_run):
    # the checkpoint of step 10 lies two steps into the mean that is logged at step 12
    def fail_at_12(event):
        if isinstance(event, Logged) and event.record["step"] == 12:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        train(config, on_event=fail_at_12)
    assert state_of(config.out)["step"] == 10
    train(replace(config, out=None, resume=config.out))
    assert_same_run(config.out, whole_run)


def test_killed_process_leaves_a_run_that_resumes(config, whole_run):
    program = (
        "import json, os, signal, sys\n"
        "from fastvae.training import TrainConfig, train\n"
        "def kill(event):\n"
        "    if getattr(event, 'record', {}).get('step') == 16: os.kill(os.getpid(), signal.SIGKILL)\n"
        "train(TrainConfig.from_json(json.loads(sys.argv[1])), on_event=kill)\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the split of a sum depends on it
    command = [sys.executable, "-c", program, json.dumps(config.to_json())]
    process = subprocess.run(command, env=os.environ | threads, timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL
    assert state_of(config.out)["step"] == 15
    assert metrics_of(config.out)[-1]["step"] == 16
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "ep')  # a line that the kill cut off
    train(replace(config, out=None, resume=config.out))
    assert_same_run(config.out, whole_run)


def test_run_killed_before_its_first_checkpoint_starts_again(config, whole_run):
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(config.to_json()))
    (config.out / ".checkpoint.pt.tmp").write_bytes(b"half")
    train(TrainConfig.from_run(config.out))
    assert_same_run(config.out, whole_run)


def test_crash_while_saving_keeps_the_checkpoint_before(config, whole_run, monkeypatch):
    save, calls = torch.save, []

    def crash_on_second_call(content, file):
        calls.append(content["state"]["step"])
        if len(calls) == 2:
            file.write(b"half a checkpoint")
            raise OSError("No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", crash_on_second_call)
    with pytest.raises(OSError, match="No space left"):
        train(config)
    assert calls == [5, 10]
    assert state_of(config.out)["step"] == 5
    monkeypatch.undo()
    train(replace(config, out=None, resume=config.out))
    assert_same_run(config.out, whole_run)


def test_resuming_a_finished_run_changes_nothing(config, whole_run):
    handler = signal.getsignal(signal.SIGTERM)
    train(config)
    assert signal.getsignal(signal.SIGTERM) is handler
    before = (config.out / "checkpoint.pt").read_bytes()
    result = train(TrainConfig.from_run(config.out))
    assert (config.out / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in result.pictures] == ["report.html", *PICTURES]
    assert_same_run(config.out, whole_run)


def test_loading_in_other_processes_changes_nothing(config, whole_run):
    train(replace(config, workers=1))
    assert_same_run(config.out, whole_run)


def test_mirrored_images_are_the_same_after_a_continuation(config, whole_run, tmp_path):
    config = replace(config, flip=True)
    run = train(config).run
    assert metrics_of(run) != metrics_of(whole_run)

    def stop(event):
        if isinstance(event, Logged) and event.record["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        train(replace(config, out=tmp_path / "parts"), on_event=stop)
    assert_same_run(train(TrainConfig.from_run(tmp_path / "parts")).run, run)


def test_another_seed_gives_other_weights_on_the_same_images(config, whole_run):
    train(replace(config, seed=1))
    assert not torch.equal(*(state_of(run)["objective"]["model.encoder.1.weight"] for run in (config.out, whole_run)))
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (config.out, whole_run))
    assert ours["baseline"] == theirs["baseline"]


def test_resume_refuses_other_options_and_names_them(config):
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop_at(4, signal.SIGTERM))
    before = (config.out / "checkpoint.pt").read_bytes()
    other = replace(config, out=None, resume=config.out, learning_rate=0.5, ema=0.9, log_every=1)
    with pytest.raises(ValueError, match=r"learning_rate was 0.002, now 0.5; ema was 0.0, now 0.9\.") as caught:
        train(other)
    assert "log_every" not in str(caught.value)
    with pytest.raises(ValueError, match=r"stays in its folder"):
        train(replace(config, resume=config.out, out=config.out.parent / "elsewhere"))
    # a config.json that was edited to match does not help: the checkpoint knows
    (config.out / "config.json").write_text(json.dumps(replace(other, resume=None, ema=0).to_json()))
    with pytest.raises(ValueError, match=r"checkpoint.pt has other options: learning_rate was 0.002, now 0.5\."):
        train(replace(other, ema=0))
    assert (config.out / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_images(config):
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop_at(4, signal.SIGTERM))
    with pytest.raises(ValueError, match=r"other images: it had 60, now there are 40\."):
        train(TrainConfig.from_run(config.out), dataset=blobs(40))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text"], ids=["half", "empty", "text"]
)
def test_damaged_checkpoint_is_named_and_left_alone(config, damage):
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop_at(4, signal.SIGTERM))
    path = config.out / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged or cut off"):
        train(TrainConfig.from_run(config.out))
    assert path.read_bytes() == damaged


def test_folder_that_is_not_a_run_is_neither_overwritten_nor_resumed(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not empty and nothing in it is overwritten"):
        train(config)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        train(replace(config, out=None, resume=config.out))
    assert [path.name for path in config.out.iterdir()] == ["thesis.txt"]


def test_bad_data_leaves_no_run_folder(config):
    with pytest.raises(ValueError, match="nowhere"):
        train(replace(config, data="nowhere"))
    assert not config.out.exists()


@pytest.mark.parametrize("checked", [{"cpu"}, set()], ids=["at once", "like a GPU"])
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_non_finite_step_stops_the_run_and_keeps_the_last_good_checkpoint(config, monkeypatch, part, checked):
    monkeypatch.setattr(loop, "CHECKED_EACH_STEP", checked)

    class BreaksAtStep8(fastvae.VAELoss):
        calls = 0

        def forward(self, *args, **kwargs):
            terms = super().forward(*args, **kwargs)
            if torch.is_grad_enabled():
                BreaksAtStep8.calls += 1
            if BreaksAtStep8.calls != 8:
                return terms
            if part == "loss":
                return terms._replace(loss=terms.loss * math.nan)
            terms.loss.register_hook(lambda gradient: gradient * math.nan)
            return terms

    monkeypatch.setattr(fastvae, "VAELoss", BreaksAtStep8)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 8; .*--learning-rate"):
        train(replace(config, checkpoint_every=2, log_every=100))
    state = state_of(config.out)
    assert state["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in state["objective"].values())
    assert all(math.isfinite(record["loss"]) for record in metrics_of(config.out))


def test_finite_watch_names_the_first_bad_step():
    watch = FiniteWatch(torch.device("cpu"))
    for step, value in enumerate([1.0, math.inf, math.nan, 2.0], start=1):
        watch.add(step, torch.tensor(value))
    with pytest.raises(NonFiniteLossError, match="at step 2;"):
        watch.check()


def test_learning_rate_warms_up_and_decays_to_the_floor():
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, total_steps=105, floor=0.1) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4 + 50] == pytest.approx((2.0 + 0.2) / 2)  # half-way down
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_short_run_still_reaches_the_peak():
    rates = [learning_rate(step, peak=1.0, warmup_steps=100, total_steps=30) for step in range(30)]
    assert rates[:4] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=1) == 1.0


def test_epoch_order_is_a_shuffle_of_full_batches_by_seed_and_epoch():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    order = epoch_order(11, 3, seed=5, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch) for batch in order] == [3, 3, 3]
    assert len({index for batch in order for index in batch} & set(range(11))) == 9
    assert order == epoch_order(11, 3, seed=5, epoch=2)
    assert order != epoch_order(11, 3, seed=5, epoch=3)
    assert order != epoch_order(11, 3, seed=2, epoch=5)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_convolutions_go_on_bit_for_bit_too(config, channels_last):
    config = replace(config, backbone="conv", width=4, image_size=(20, 20), channels_last=channels_last)
    whole = train(replace(config, out=config.out.with_name("whole"))).run
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop_at(8, signal.SIGTERM))
    train(TrainConfig.from_run(config.out))
    assert_same_run(config.out, whole)
    weight = next(
        tensor for tensor in state_of(config.out)["objective"].values() if min(tensor.shape) > 1 and tensor.ndim == 4
    )
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last


def test_images_that_stay_on_the_device_change_nothing(config, whole_run):
    config = replace(config, cache="device")
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop_at(8, signal.SIGTERM))
    train(TrainConfig.from_run(config.out))
    assert_same_run(config.out, whole_run)


@pytest.mark.parametrize(("cache", "free", "stay"), [("auto", 4, True), ("auto", 3.9, False), ("none", 9, False)])
def test_images_stay_where_they_fit(monkeypatch, cache, free, stay):
    images = blobs(700)
    monkeypatch.setattr(batches, "free_bytes", lambda device: int(free * images.nbytes))
    found = batches.resident_images(TensorDataset(images), torch.device("cpu"), cache)
    assert (found is not None) == stay
    if stay:
        assert torch.equal(found, images)
        order = [[3, 1], [699, 0]]
        for batch, rows in zip(batches.batches_of(found, order), order, strict=True):
            assert torch.equal(batch, images[rows])


def test_images_stay_out_of_memory_that_is_not_an_accelerators():
    assert batches.free_bytes(torch.device("cpu")) == 0
    assert batches.resident_images(TensorDataset(blobs(3)), torch.device("cpu"), "auto") is None


@pytest.mark.parametrize("batch_size", [7, 64])
def test_evaluation_against_the_formulas_in_float64(batch_size):
    torch.manual_seed(0)
    model = VAE(VAEConfig(image_size=(8, 8), latent_dim=5, backbone="mlp", hidden=12))
    with torch.no_grad():
        model.encoder[-1].weight[:5] *= 20  # means that vary enough to count as active ...
        model.encoder[-1].weight[:2] *= 0  # ... in all but two dimensions
    images = blobs(20)
    before = torch.get_rng_state()
    evaluation, latents, loss, _ = evaluate(model, data.ArrayImages(images), batch_size=batch_size)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    evaluate(model.eval(), data.ArrayImages(images))
    assert not model.training

    with torch.no_grad():
        mu, logvar = model.encode(images)
        noise = fastvae.philox_normal(mu.shape, seed=0)
        recon = model.decode(mu + torch.exp(logvar / 2) * noise)
    squared_error = (recon.double() - images.double() / 255).square().sum() / 20
    kl = 0.5 * (mu.double() ** 2 + logvar.double().exp() - 1 - logvar.double()).sum(dim=0) / 20
    assert evaluation.recon == pytest.approx(squared_error.item(), rel=1e-5)
    assert evaluation.kl == pytest.approx(kl.sum().item(), rel=1e-5)
    assert evaluation.nats == evaluation.recon + evaluation.kl
    assert loss == pytest.approx(evaluation.nats, rel=1e-6)
    assert evaluation.bits_per_dim == bits_per_dim(evaluation.nats + 32 * math.log(math.pi), 64)
    torch.testing.assert_close(latents.kl_per_dim.double(), kl, rtol=1e-4, atol=1e-6)
    assert (mu.var(dim=0) > 0.01).tolist() == [False, False, True, True, True]
    assert (evaluation.active_units, evaluation.latent_dim, evaluation.images) == (3, 5, 20)


def test_active_units_are_those_of_latent_stats():
    """Unbiased, from 0.01 on: two means 0.142 apart have a variance of 0.0101, or a biased one of half of that."""
    for mu in (torch.tensor([[0.0, 0.0, 5.0], [0.142, 0.1, 5.142]]), torch.tensor([[0.3, 0.1, 0.2]])):
        active = Latents(mu, torch.zeros_like(mu)).active
        assert active.tolist() == [len(mu) > 1, False, len(mu) > 1]
        assert active.sum() == fastvae.latent_stats(mu, mu).active


def test_baseline_is_the_error_of_the_training_mean():
    train_images, validation_images = blobs(30), blobs(12, seed=1)
    pixels, mean = validation_images.numpy() / 255, train_images.numpy().mean(axis=0) / 255
    expected = ((pixels - mean) ** 2).sum() / 12
    nats = baseline_nats(data.ArrayImages(train_images), data.ArrayImages(validation_images), batch_size=7)
    assert nats == pytest.approx(expected, rel=1e-12)


def test_float_images_with_labels_train_like_uint8(config, whole_run):
    images = blobs(60)
    train(config, dataset=TensorDataset(images.float() / 255, torch.arange(60)))
    ours, theirs = metrics_of(config.out), metrics_of(whole_run)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)


def test_labels_follow_the_split():
    dataset = data.ArrayImages(blobs(20))
    dataset.labels = np.arange(20)
    _, validation = data.split(dataset, validation=0.25)
    assert labels_of(validation).tolist() == list(validation.indices)
    assert labels_of(data.ArrayImages(blobs(3))) is None


@pytest.mark.parametrize(
    "images", [torch.zeros(10, 8, 8), [np.zeros((1, 8, 8))] * 10], ids=["no channels", "no tensors"]
)
def test_datasets_of_something_else_are_refused(config, images):
    with pytest.raises((ValueError, TypeError), match="a dataset must give"):
        train(config, dataset=images)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(config, whole_run, precision):
    train(replace(config, precision=precision))
    ours, theirs = metrics_of(config.out), metrics_of(whole_run)
    assert ours[-1]["nats"] == pytest.approx(theirs[-1]["nats"], rel=0.05)
    assert ours[-1]["nats"] != theirs[-1]["nats"]


def test_textbook_loss_gives_the_same_loss_curve():
    def curve(loss_of):
        torch.manual_seed(0)
        model = VAE(VAEConfig(image_size=(12, 12), latent_dim=8, backbone="mlp", hidden=64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images = blobs(320, size=12).float() / 255
        losses = []
        for step in range(200):
            x = images[(step * 32) % 320 :][:32]
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return np.array(losses)

    def ours(model, x):
        out = model(x)
        return fastvae.VAELoss()(out.recon, x, kl=out.kl)

    def textbook(model, x):
        mu, logvar = model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        recon = model.decode(z)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(x)
        return ((recon - x) ** 2).sum() / len(x) + kl

    with fastvae.use_backend("torch"):
        losses, textbook_losses = curve(ours), curve(textbook)
    assert textbook_losses[-1] < 0.5 * textbook_losses[0]  # it learnt something to compare
    assert np.max(np.abs(losses / textbook_losses - 1)) < 1e-4


def test_grid_places_images_row_by_row(tmp_path):
    from fastvae.evaluation import pictures  # here: importing it needs the extra

    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.0, 0.5, 1.0)])
    pictures.save_grid(tmp_path / "grid.png", images, columns=2)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    tile = pictures.SMALLEST_TILE + pictures.GAP
    assert pixels.shape == (2 * tile + pictures.GAP, 2 * tile + pictures.GAP)
    assert [
        pixels[pictures.GAP, pictures.GAP],
        pixels[pictures.GAP, pictures.GAP + tile],
        pixels[pictures.GAP + tile, pictures.GAP],
    ] == [0, 128, 255]
    assert pixels[pictures.GAP + tile, pictures.GAP + tile] == 255  # no fourth image: background
    assert pixels[0].min() == 255


def test_grid_of_colour_images_keeps_the_colours(tmp_path):
    from fastvae.evaluation import pictures  # here: importing it needs the extra

    red = torch.tensor([200, 10, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    pictures.save_grid(tmp_path / "red.png", red, columns=1)
    with Image.open(tmp_path / "red.png") as picture:
        assert picture.getpixel((pictures.GAP, pictures.GAP)) == (200, 10, 0)
        assert picture.size == (64 + 2 * pictures.GAP, 64 + 2 * pictures.GAP)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("learning_rate", math.nan),
        ("validation", 1.0),
        ("seed", -1),
        ("beta", -1.0),
        ("image_size", (0, 3)),
        ("precision", "int8"),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^{option} must be .*got"):
        TrainConfig(**{option: value})


def test_config_survives_json():
    config = TrainConfig(out=Path("runs/x"), image_size=(3, 4), beta=0.5)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="does not know: momentum"):
        TrainConfig.from_json({"momentum": 0.99})


@pytest.mark.parametrize(("name", "message"), [("gpu", "device must be"), ("cuda:99", "is not there")])
def test_device_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        setup.resolve_device(name)
