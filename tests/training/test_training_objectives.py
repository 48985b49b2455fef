"""What `fastvae train` minimises: likelihoods, presets, schedules, regularisers, averaged weights."""

import errno
import json
import math
import os
import resource
import signal
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastvae
from fastvae import data
from fastvae.evaluation.elbo import baseline_nats, evaluate
from fastvae.evaluation.objective import decode_to_images
from fastvae.models import VAE, VAEConfig
from fastvae.presets import PRESETS
from fastvae.training import RunFolderError, TrainConfig, TrainingInterrupted, setup, train
from fastvae.training.events import Logged, Saved
from fastvae.training.objective import build_objective

EXTRA = "training needs the extra [train]"
for package in ("PIL", "matplotlib", "safetensors", "rich"):
    pytest.importorskip(package, reason=EXTRA)
cli = pytest.importorskip("fastvae.cli", reason=EXTRA)

N_IMAGES, PIXELS, LATENTS, BATCH = 30, 36, 3, 9


def images_of(n=N_IMAGES, seed=0):
    """Smooth gray images with black and white in them; [n, 1, 6, 6] uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:6, :6]
    wave = np.sin(random.uniform(0, 6, (n, 1, 1)) + x * random.uniform(0.2, 1, (n, 1, 1)) + y * 0.5)
    return torch.from_numpy((127.5 + 127.5 * wave).round().astype(np.uint8))[:, None]


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npy"
    np.save(path, images_of()[:, 0].numpy())
    return path


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take most of a small run's time."""
    from fastvae.evaluation import plots  # here: importing it needs the extra

    monkeypatch.setattr(plots, "png", lambda *plots, **options: b"")
    monkeypatch.setattr(plots, "svg", lambda *plots, **options: {})


@pytest.fixture
def config(images_file, tmp_path):
    """27 training images: 3 steps in each of 4 epochs."""
    return TrainConfig(
        data=str(images_file),
        out=tmp_path / "run",
        epochs=4,
        batch_size=BATCH,
        backbone="mlp",
        hidden=8,
        latent_dim=LATENTS,
        log_every=1,
        checkpoint_every=5,
        device="cpu",
    )


def objective_of(config, total_steps=12, seed=0):
    torch.manual_seed(seed)
    model = VAE(VAEConfig(image_size=(6, 6), latent_dim=LATENTS, backbone="mlp", hidden=8))
    return build_objective(config, model, batch_size=BATCH, total_steps=total_steps)


def metrics_of(run, split="train"):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records if r["split"] == split]


def state_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]


def assert_equal_trees(a, b):
    flat, spec = torch.utils._pytree.tree_flatten(a)
    other, other_spec = torch.utils._pytree.tree_flatten(b)
    assert spec == other_spec
    for x, y in zip(flat, other, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def expected_sum(name, parameter, of_mean, of_logits, x, logits):
    """The reconstruction term summed over everything; `of_mean` and `of_logits` are x' - x."""
    zero, number, s = torch.zeros_like(x), x.numel(), parameter or 0.0
    match name:
        case "l2" | "l1":
            return (of_mean**2 if name == "l2" else of_mean.abs()).sum()
        case "l2_logits" | "l1_logits":
            return (of_logits**2 if name == "l2_logits" else of_logits.abs()).sum()
        case "bernoulli" | "bernoulli_probs":
            return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        case "huber":
            return nn.functional.huber_loss(of_mean, zero, delta=parameter, reduction="sum")
        case "smooth_l1":
            return nn.functional.smooth_l1_loss(of_mean, zero, beta=parameter, reduction="sum")
        case "log_cosh":
            return torch.log(torch.cosh(parameter * of_mean)).sum() / parameter
        case "gaussian":
            return 0.5 * (of_mean**2 / math.exp(s) + s).sum()
        case "gaussian_fixed":  # with its constant and softclip=-6
            log_sigma = -6 + math.log1p(math.exp(s / 2 + 6))
            constant = log_sigma + 0.5 * math.log(2 * math.pi)
            return (0.5 * of_mean**2 / math.exp(2 * log_sigma) + constant).sum()
        case "gaussian_optimal":
            return 0.5 * number * (1 + torch.log((of_mean**2).mean()))
        case "scaled_l1" | "scaled_l2":
            error = of_mean.abs() if name == "scaled_l1" else of_mean**2
            return (error / math.exp(s) + s).sum()


CASES = [
    ("l2", None, {}),
    ("l1", None, {}),
    ("huber", 0.2, {}),
    ("smooth_l1", 0.3, {}),
    ("log_cosh", 3.0, {}),
    ("bernoulli", None, {}),
    ("bernoulli_probs", None, {}),
    ("l2_logits", None, {}),
    ("l1_logits", None, {}),
    ("gaussian", -1.5, {}),
    ("gaussian_fixed", -2.0, {"likelihood_full": True, "likelihood_softclip": -6.0}),
    ("gaussian_optimal", None, {}),
    ("scaled_l1", 0.7, {}),
    ("scaled_l2", None, {}),
]


def test_the_cases_are_all_likelihoods():
    (field,) = (f for f in fields(TrainConfig) if f.name == "likelihood")
    assert sorted(name for name, _, _ in CASES) == sorted(field.type.__args__[0].__args__)


@pytest.mark.parametrize(("name", "parameter", "more"), CASES, ids=[case[0] for case in CASES])
def test_likelihood_in_nats_per_image_in_training_and_evaluation(config, name, parameter, more):
    config = replace(config, likelihood=name, likelihood_parameter=parameter, **more)
    objective, images = objective_of(config), images_of()
    out, terms = objective(images, seed=0)
    with torch.no_grad():
        raw = objective.model(images, seed=0).recon.double()
    x = images.double() / 255
    expected = expected_sum(name, parameter, raw - x, raw.sigmoid() - x, x, raw).item() / N_IMAGES
    assert terms.recon.item() == pytest.approx(expected, rel=1e-5)
    assert terms.kl.item() == pytest.approx(out.kl.mean().item(), rel=1e-6)
    # in batches of another size, the last one smaller
    evaluation = evaluate(objective, data.ArrayImages(images), batch_size=7).evaluation
    assert evaluation.recon == pytest.approx(expected, rel=1e-5)
    assert evaluation.nats == evaluation.recon + evaluation.kl


@pytest.mark.parametrize(("name", "parameter", "more"), CASES, ids=[case[0] for case in CASES])
def test_baseline_has_the_unit_of_the_likelihood(config, name, parameter, more):
    objective = objective_of(replace(config, likelihood=name, likelihood_parameter=parameter, **more))
    images, others = images_of(), images_of(12, seed=1)
    mean = (images.double() / 255).mean(0)
    x = others.double() / 255
    d = mean - x
    if name in ("gaussian", "gaussian_optimal"):
        expected = 0.5 * d.numel() * (1 + torch.log((d**2).mean()))
    elif name in ("scaled_l1", "scaled_l2"):
        expected = d.numel() * (1 + torch.log((d.abs() if name == "scaled_l1" else d**2).mean()))
    else:
        expected = expected_sum(name, parameter, d, d, x, torch.logit(mean).expand_as(x))
    nats = baseline_nats(data.ArrayImages(images), data.ArrayImages(others), objective.likelihood, batch_size=5)
    assert nats == pytest.approx(expected.item() / 12, rel=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_the_loss_of_that_name(config, preset):
    objective, images = objective_of(replace(config, preset=preset)), images_of(BATCH)
    out, terms = objective(images, seed=0)
    theirs = fastvae.VAELoss.preset(preset)(out.recon, images, out.mu, out.logvar)
    torch.testing.assert_close(terms.loss, theirs, rtol=1e-5, atol=1e-6)
    assert terms.kl.item() == pytest.approx(out.kl.mean().item(), rel=1e-6)  # in its own unit, whatever the reduction
    assert len(list(objective.criterion.parameters())) == (preset == "ldm")
    objective(images, seed=0)[1].loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_options_that_are_given_replace_the_presets(config):
    ldm = replace(config, preset="ldm")
    ours = objective_of(replace(ldm, beta=0.5, likelihood="l1", logvar_clamp=(-3.0, 2.0)))
    assert (ours.criterion.beta, ours.criterion.likelihood, ours.logvar_clamp) == (0.5, "l1", (-3.0, 2.0))
    theirs = objective_of(ldm)
    assert (theirs.criterion.beta, theirs.logvar_clamp) == (1e-6, (-30.0, 20.0))
    summed = objective_of(replace(config, preset="pyro", reduction="batchmean", recon_reduction="mean"))
    assert summed.criterion.recon_weight == pytest.approx(1 / PIXELS)
    assert summed.criterion.beta == 1.0


def test_clamp_holds_for_the_noise_and_the_kl(config):
    objective = objective_of(replace(config, logvar_clamp=(-0.01, 0.01)))
    with torch.no_grad():
        objective.model.encoder[-1].bias[LATENTS:] = 5.0  # of logvar
    images = images_of(BATCH)
    out, terms = objective(images, seed=3)
    noise = fastvae.philox_normal((BATCH, LATENTS), seed=3)
    torch.testing.assert_close(out.z, out.mu + math.exp(0.005) * noise, rtol=1e-5, atol=1e-5)
    expected = 0.5 * (out.mu.square() + math.exp(0.01) - 1 - 0.01).sum() / BATCH
    assert terms.kl.item() == pytest.approx(expected.item(), rel=1e-5)
    by_dimension = objective_of(replace(config, logvar_clamp=(-0.01, 0.01), free_bits=0.0))
    by_dimension.load_state_dict(objective.state_dict())
    assert by_dimension(images, seed=3)[1].loss.item() == pytest.approx(terms.loss.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["dim", "dim_batch", "dim_mask", "sample"])
def test_free_bits_change_the_loss_and_not_the_kl(config, mode):
    objective = objective_of(replace(config, likelihood="l2", free_bits=0.2, free_bits_mode=mode, beta=3.0))
    images = images_of(BATCH)
    out, terms = objective(images, seed=0)
    k = 0.5 * (out.mu.square() + out.logvar.exp() - 1 - out.logvar)
    expected = {
        "dim": k.clamp(min=0.2).sum(1).mean(),
        "dim_batch": k.mean(0).clamp(min=0.2).sum(),
        "dim_mask": torch.where(k > 0.2, k, 0.0).sum(1).mean(),
        "sample": k.sum(1).clamp(min=0.2).mean(),
    }[mode]
    assert terms.kl.item() == pytest.approx(k.sum(1).mean().item(), rel=1e-5)
    assert terms.loss.item() == pytest.approx((terms.recon + 3 * expected).item(), rel=1e-5)
    assert terms.loss.item() != pytest.approx((terms.recon + 3 * terms.kl).item(), rel=1e-3)


def test_beta_and_capacity_go_their_way_once_a_step(config):
    schedule = {"beta_schedule": "linear", "beta": 2.0, "beta_start": 0.5, "beta_steps": 4, "beta_delay": 2}
    config = replace(config, **schedule, capacity=6.0, capacity_steps=3, capacity_mode="batch", epochs=3)
    train(config)
    records = metrics_of(config.out)
    betas = [0.5, 0.5, 0.5, 0.875, 1.25, 1.625, 2.0, 2.0, 2.0]
    assert [record["beta"] for record in records] == betas
    for record, beta, capacity in zip(records, betas, [0, 2, 4, 6, 6, 6, 6, 6, 6], strict=True):
        expected = record["recon"] + beta * abs(record["kl"] - capacity)
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
        assert record["nats"] == record["recon"] + record["kl"]
    # what the run minimises by then
    (last,) = metrics_of(config.out, "validation")[-1:]
    assert last["loss"] == pytest.approx(last["recon"] + 2 * abs(last["kl"] - 6), rel=1e-5)


def test_schedules_have_the_length_of_the_run_unless_told(config):
    config = replace(config, likelihood="l2")

    def beta(step, total_steps=100, **options):
        return objective_of(replace(config, **options), total_steps).beta_at(step)

    assert beta(25, beta_schedule="linear") == 0.5
    assert beta(50, beta_schedule="cosine", beta=4.0) == 4.0
    assert beta(5, beta_schedule="sigmoid", beta_steps=10) == pytest.approx(0.5)
    cycles = {"beta_schedule": "cyclical", "beta_cycles": 2, "beta_ratio": 0.5}
    assert [beta(step, **cycles) for step in (0, 20, 25, 49, 50, 75, 100)] == [0, 0.8, 1, 1, 0, 1, 1]
    assert beta(16, **cycles, beta_shape="cosine", beta_zero_ratio=0.2) < 0.2
    # a loss that is a sum has its beta in its own unit; the logs have not
    summed = objective_of(replace(config, beta_schedule="linear", beta_steps=4, reduction="sum"))
    summed.step()
    assert summed.criterion.beta.value.item() == BATCH / 4
    assert summed.beta_at(1) == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "gaussian", "likelihood_parameter": -2.0, "ema": 0.9},
        {"preset": "ldm", "beta_schedule": "cyclical", "beta_cycles": 2, "capacity": 2.0, "capacity_steps": 9},
    ],
    ids=["learned variance, averages", "preset, schedules"],
)
def test_stopped_run_goes_on_bit_for_bit(config, options):
    config = replace(config, **options)

    def stop(event):
        if isinstance(event, Logged) and (event.record["step"], event.record["split"]) == (7, "train"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        train(config, on_event=stop)
    assert state_of(config.out)["step"] == 7
    train(TrainConfig.from_run(config.out))
    whole = replace(config, out=config.out.with_name("whole"))
    train(whole)
    assert_equal_trees(state_of(config.out), state_of(whole.out))
    assert metrics_of(config.out) == metrics_of(whole.out)
    assert (config.out / "evaluation.json").read_text() == (whole.out / "evaluation.json").read_text()
    scales = [record["log_scale"] for record in metrics_of(config.out)]
    assert len(set(scales)) == len(scales)  # it is trained at every step


def test_loss_parameters_do_not_decay(config):
    optimizer = setup.make_optimizer(
        replace(config, likelihood="gaussian", weight_decay=0.1), objective_of(replace(config, likelihood="gaussian"))
    )
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(8, 0.1), (1, 0.0)]


def test_averages_are_evaluated_and_exported(config):
    seen = []

    def remember(event):
        if isinstance(event, Saved):
            seen.append(state_of(config.out)["objective"]["model.decoder.0.weight"])

    train(replace(config, likelihood="l2", ema=0.3, checkpoint_every=1, epochs=2), on_event=remember)
    average = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        decay = min(0.3, (1 + n) / (10 + n))  # so that the first weights are soon forgotten
        average = decay * average + (1 - decay) * weight
    model = VAE.from_pretrained(config.out / "model")
    torch.testing.assert_close(model.decoder[0].weight, average, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model.decoder[0].weight, seen[-1], rtol=1e-5, atol=1e-6)
    _, validation = data.split(data.load(config.data), validation=config.validation)
    figures = json.loads((config.out / "evaluation.json").read_text())
    assert (
        figures["nats"]
        == evaluate(model, validation).evaluation.nats
        == metrics_of(config.out, "validation")[-1]["nats"]
    )


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs"])
def test_pictures_show_probabilities_of_logits(config, monkeypatch, likelihood):
    from fastvae.evaluation import pictures  # here: importing it needs the extra

    config = replace(config, likelihood=likelihood)
    drawn, save_grid = {}, pictures.save_grid

    def seen(path, images, *, columns, title=""):
        drawn[path.name] = images
        return save_grid(path, images, columns=columns)

    monkeypatch.setattr(pictures, "save_grid", seen)
    train(config)
    model = VAE.from_pretrained(config.out / "model")
    z = fastvae.philox_normal((64, LATENTS), seed=0)
    with torch.no_grad():
        torch.testing.assert_close(drawn["samples.png"], model.decode(z).sigmoid())
    expected = drawn.copy()
    monkeypatch.chdir(config.out.parent)
    for folder in (config.out, config.out / "model"):
        drawn.clear()
        assert cli.main(["sample", "--model", str(folder), "--force", "--device", "cpu"]) == 0
        assert cli.main(["reconstruct", "--model", str(config.out), "--n", "3", "--force", "--device", "cpu"]) == 0
        assert torch.equal(drawn["samples.png"], expected["samples.png"])
        assert torch.equal(drawn["reconstructions.png"], expected["reconstructions.png"])


def test_decoder_gives_logits_again_after_the_pictures(config):
    objective = objective_of(replace(config, likelihood="bernoulli"))
    z = torch.randn(4, LATENTS)
    logits = objective.model.decode(z)
    with decode_to_images(objective):
        assert torch.equal(objective.model.decode(z), logits.sigmoid())
    assert torch.equal(objective.model.decode(z), logits)
    plain = objective_of(config)
    recon = plain.model.decode(z)
    with decode_to_images(plain):
        assert torch.equal(plain.model.decode(z), recon)


@pytest.mark.parametrize(
    "options",
    [
        {"likelihood": "bernoulli"},
        {"likelihood": "gaussian", "ema": 0.5},
        {"likelihood": "scaled_l1"},
        {"preset": "sigma_vae_optimal", "logvar_clamp": (-1.0, 1.0)},
    ],
    ids=lambda options: options.get("likelihood", "preset"),
)
def test_evaluate_command_agrees_with_the_training(config, tmp_path, options):
    train(replace(config, **options))
    expected = json.loads((config.out / "evaluation.json").read_text())
    assert (
        cli.main(["evaluate", "--model", str(config.out), "--out", str(tmp_path / "again.json"), "--device", "cpu"])
        == 0
    )
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: again[name] for name in expected} == expected


def test_command_line_reaches_the_options():
    configs = []
    from fastvae.cli.parsing import parse  # here: importing it needs the extra

    for name, parameter, _ in CASES:
        flags = [] if parameter is None else ["--likelihood-parameter", str(parameter)]
        _, parsed = parse(["train", "--likelihood", name, *flags])
        configs.append((parsed.likelihood, parsed.likelihood_parameter))
    assert configs == [(name, parameter) for name, parameter, _ in CASES]
    flags = ["--preset", "ldm", "--beta", "2", "--beta-schedule", "cyclical", "--beta-cycles", "3", "--ema", "0.99"]
    flags += ["--free-bits", "0.1", "--free-bits-mode", "sample", "--capacity", "5", "--capacity-steps", "9"]
    flags += ["--logvar-clamp", "-4", "4", "--recon-weight", "2", "--kl-reduction", "mean", "--likelihood-full"]
    _, parsed = parse(["train", *flags, "--likelihood", "gaussian_optimal"])
    assert (parsed.preset, parsed.beta, parsed.beta_cycles, parsed.logvar_clamp) == ("ldm", 2.0, 3, (-4.0, 4.0))
    assert (parsed.free_bits_mode, parsed.capacity_steps, parsed.ema, parsed.likelihood_full) == (
        "sample",
        9,
        0.99,
        True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lmd"}, r"preset must be one of .*Did you mean 'ldm'"),
        ({"likelihood": "l3"}, r"likelihood must be one of l2, l1, .*got 'l3'"),
        ({"likelihood_parameter": 1.0}, r"likelihood_parameter 1.0 has no meaning without --likelihood huber"),
        (
            {"likelihood": "huber", "likelihood_parameter": 0.0},
            r"likelihood_parameter must be a positive finite number",
        ),
        ({"likelihood": "gaussian", "likelihood_parameter": math.inf}, r"likelihood_parameter must be a finite number"),
        ({"likelihood": "l1", "likelihood_full": True}, r"likelihood_full True has no meaning without .*gaussian"),
        ({"beta": math.nan}, r"beta must be a finite number"),
        ({"beta_steps": 10}, r"beta_steps 10 has no meaning without a --beta-schedule"),
        ({"beta_schedule": "linear", "beta_cycles": 2}, r"beta_cycles 2 has no meaning without --beta-schedule cycl"),
        ({"beta_schedule": "steps"}, r"beta_schedule must be one of constant, linear"),
        ({"beta_schedule": "cyclical", "beta_ratio": 0.8, "beta_zero_ratio": 0.3}, r"beta_zero_ratio must be .*0.3"),
        ({"beta_schedule": "linear", "beta_steps": 0}, r"beta_steps must be at least 1"),
        ({"free_bits": -1.0}, r"free_bits must be"),
        ({"free_bits_mode": "sample"}, r"free_bits_mode 'sample' has no meaning without --free-bits"),
        ({"capacity_steps": 3}, r"capacity_steps 3 has no meaning without --capacity"),
        ({"logvar_clamp": (2.0, -2.0)}, r"logvar_clamp must be a lower and a larger upper bound"),
        ({"ema": 1.0}, r"ema must be at least 0 and below 1; got 1.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_without_meaning_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_objective_survives_json():
    config = TrainConfig(preset="ldm", logvar_clamp=(-3.0, 2.0), free_bits=0.1, beta_schedule="cosine", beta_steps=7)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_of_a_former_version_keeps_its_meaning():
    """Its defaults were the loss "l2", no averages and another net; a null stood for the first two."""
    former = TrainConfig(batch_size=9).to_json() | {"ema": None}
    del former["residual"]
    config = TrainConfig.from_json(former)
    assert (config.likelihood, config.ema, config.residual, config.batch_size) == ("l2", 0, False, 9)
    assert TrainConfig.from_json(former | {"preset": "ldm", "ema": 0.9}) == replace(
        config, preset="ldm", likelihood=None, ema=0.9
    )
    assert TrainConfig.from_json(former | {"likelihood": "l1"}).likelihood == "l1"
    assert TrainConfig.from_json(TrainConfig().to_json()) == TrainConfig()


def test_default_loss_is_that_of_a_run_that_names_neither_likelihood_nor_preset(config):
    def loss(**options):
        objective = objective_of(replace(config, **options))
        return getattr(objective.likelihood, "log_scale", None), objective.beta_at(0)

    assert loss() == loss(reduction="sum") == (-4.25, 8)
    assert loss(beta=2.0) == (-4.25, 2)
    assert loss(likelihood="l2") == (None, 1)
    assert loss(preset="pythae") == (0, 1)


def test_resume_refuses_another_objective(config):
    config = replace(config, beta_schedule="linear", epochs=1)
    train(config)
    with pytest.raises(ValueError, match=r"likelihood was None, now 'l1'; beta_schedule was 'linear', now"):
        train(replace(config, out=None, resume=config.out, likelihood="l1", beta_schedule="constant"))


def assert_resumes_like(config, whole):
    train(TrainConfig.from_run(config.out))
    train(replace(config, out=whole))
    assert_equal_trees(state_of(config.out), state_of(whole))


def test_full_disk_is_said_and_the_last_checkpoint_kept(config, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"cannot write to the run folder .*No space left on device.* --resume"):
        train(config)
    monkeypatch.undo()
    step = state_of(config.out)["step"]
    assert step in (5, 10)
    assert not list(config.out.glob(".*.tmp"))
    assert_resumes_like(config, tmp_path / "whole")


def test_disk_that_fills_within_the_checkpoint(config, tmp_path):
    """The system itself refuses, in the midst of what torch writes: its own error would be another one."""
    config = replace(config, hidden=500)  # so that a tensor is longer than what Python buffers
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(event):
        if isinstance(event, Saved) and event.step == 5:
            size = (config.out / "checkpoint.pt").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    try:
        with pytest.raises(RunFolderError, match=r"cannot write .*File too large.*last checkpoint is intact"):
            train(config, on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert state_of(config.out)["step"] == 5
    assert_resumes_like(config, tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_read_only_folder_is_said(config, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match=r"cannot write .*Permission denied.*choose another --out"):
            train(config)
    finally:
        tmp_path.chmod(0o700)


def test_run_folder_that_cannot_be_made_is_said_in_one_line(config, monkeypatch, capsys):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cli.main(["train", "--data", config.data, "--out", str(config.out), "--epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert "Permission denied" in error
    assert "choose another --out" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("part", [0, 29], ids=["training", "validation"])
def test_nan_in_the_images_is_said_before_the_training(config, part):
    _, validation = data.split(range(N_IMAGES), validation=0.1)
    held_out = list(validation.indices)
    images = images_of().float() / 255
    training = [i for i in range(N_IMAGES) if i not in held_out]
    images[training[0] if part == 0 else held_out[0], 0, 2, 2] = math.nan
    with pytest.raises(ValueError, match=rf"the {'training' if part == 0 else 'validation'} images hold NaN"):
        train(config, dataset=images)
    assert not config.out.exists()


class TestPerceptual:
    """With a stand-in for lpips, whose weights come from the network."""

    WEIGHT = 0.5

    @pytest.fixture(autouse=True)
    def lpips(self, monkeypatch):
        class LPIPS(torch.nn.Module):
            def __init__(self, net, verbose):
                super().__init__()
                assert (net, verbose) == ("vgg", False)
                torch.manual_seed(9)
                self.features = torch.nn.Conv2d(3, 4, 3)

            def forward(self, recon, images, normalize):
                assert normalize
                assert recon.shape[1] == images.shape[1] == 3
                difference = self.features(2 * recon - 1) - self.features(2 * images - 1)
                return difference.square().mean(dim=(1, 2, 3), keepdim=True)

        module = types.ModuleType("lpips")
        module.LPIPS = LPIPS
        monkeypatch.setitem(sys.modules, "lpips", module)
        return LPIPS

    @pytest.mark.parametrize("likelihood", ["l2", "bernoulli", "bernoulli_probs"])
    def test_it_is_added_to_each_element_while_training(self, config, lpips, likelihood):
        with_it = objective_of(replace(config, likelihood=likelihood, perceptual=self.WEIGHT))
        without = objective_of(replace(config, likelihood=likelihood))
        images = images_of(BATCH)
        _, terms = with_it(images, seed=0)
        out, plain = without(images, seed=0)
        x = (images / 255).expand(-1, 3, -1, -1)
        recon = out.recon.sigmoid() if likelihood == "bernoulli" else out.recon
        distances = lpips("vgg", False)(recon.expand(-1, 3, -1, -1), x, normalize=True)
        torch.testing.assert_close(terms.loss, plain.loss + self.WEIGHT * PIXELS * distances.mean())
        assert torch.equal(with_it.eval()(images, seed=0)[1].loss, without.eval()(images, seed=0)[1].loss)

    def test_its_network_is_no_part_of_the_run(self, config):
        run = train(replace(config, perceptual=self.WEIGHT, ema=0.9)).run
        state = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
        names = [*state["objective"], *state["ema"]]
        assert not any("features" in name or "perceptual" in name for name in names)
        assert len(state["optimizer"]["state"]) == len(list(objective_of(config).parameters()))
        other = train(replace(config, out=config.out.with_name("plain"), ema=0.9)).run
        assert metrics_of(run)[-1]["loss"] != metrics_of(other)[-1]["loss"]

    def test_missing_package_is_said(self, config, monkeypatch):
        monkeypatch.setitem(sys.modules, "lpips", None)
        with pytest.raises(ImportError, match="pip install lpips"):
            train(replace(config, perceptual=1.0))
        assert not config.out.exists()
