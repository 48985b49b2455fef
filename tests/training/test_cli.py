import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae as fastvae_package
from fastvae.cli import doctor, main
from fastvae.training import TrainConfig, TrainingInterrupted, train
from fastvae.training.events import Logged, Started, Stepped
from tests.helpers.command import TINY, error_of, fastvae

EXTRA = "the command line needs the extra [train]"
Image = pytest.importorskip("PIL.Image", reason=EXTRA)
for package in ("matplotlib", "safetensors", "rich"):
    pytest.importorskip(package, reason=EXTRA)
import rich.console  # noqa: E402

commands = pytest.importorskip("fastvae.cli.commands", reason=EXTRA)
inputs = pytest.importorskip("fastvae.cli.inputs", reason=EXTRA)
progress = pytest.importorskip("fastvae.cli.progress", reason=EXTRA)


@pytest.fixture(scope="session")
def run(images_file, tmp_path_factory):
    """The run folder of a tiny `fastvae train`."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert (
        main(["train", "--data", str(images_file), "--out", str(out), "--epochs", "2", "--likelihood", "l2", *TINY])
        == 0
    )
    return out


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_train_says_where_the_results_are(images_file, tmp_path, capsys):
    assert main(["train", "--data", str(images_file), "--out", "mine", "--epochs", "1", *TINY]) == 0
    output = capsys.readouterr().out
    for name in ("reconstructions.png", "samples.png", "interpolations.png", "loss.png", "latent.png"):
        assert f"mine/{name}" in output
        assert (tmp_path / "mine" / name).is_file()
    figures = json.loads((tmp_path / "mine" / "evaluation.json").read_text())
    assert f"{figures['nats']:.2f} nats/image" in output
    assert f"{figures['baseline']:.2f} nats/image" in output
    assert output.rstrip().endswith("fastvae sample --model mine")


def test_train_makes_a_folder_under_runs_by_default(images_file, tmp_path):
    assert main(["train", "--data", str(images_file), "--epochs", "1", *TINY]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("noise-20")


def test_train_resumes_with_the_options_of_the_run(run, capsys):
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "metrics.jsonl").read_text() == before
    error = error_of(capsys, "train", "--resume", str(run), "--learning-rate", "1")
    assert "learning_rate was 0.004, now 1.0" in error
    assert "batch_size" not in error


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_each_command_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: fastvae {name}" in text
    assert f"Examples:\n  fastvae {name}" in text
    for option in vars(commands.COMMANDS[name].options)["__dataclass_fields__"]:
        assert f"--{option.replace('_', '-')}" in text


def test_help_of_training_groups_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w[^:\n]*):$", text, re.MULTILINE)
    assert titles == ["options", *commands.COMMANDS["train"].groups, "Examples"]
    grouped = " ".join(commands.COMMANDS["train"].groups.values()).split()
    assert sorted(grouped) == sorted(TrainConfig.__dataclass_fields__)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastvae {fastvae_package.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "--help"])
def test_help_lists_the_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in commands.COMMANDS)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def grid_shape(path, tile=58, gap=2, title=22):
    """(rows, columns) of a grid of small images below a title."""
    images = pixels(path)[title:]
    columns = np.flatnonzero((images < 255).any(axis=0))  # a long title is wider than a few images
    return (len(images) - gap) / tile, (columns[-1] + 1) / tile


def test_sample_follows_the_seed(run):
    assert main(["sample", "--model", str(run), "--n", "9", "--seed", "3", "--out", "a.png"]) == 0
    assert main(["sample", "--model", str(run / "model"), "--n", "9", "--seed", "3", "--out", "deep/b.png"]) == 0
    assert main(["sample", "--model", str(run), "--n", "9", "--seed", "4"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("deep/b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("samples.png"))


@pytest.fixture
def exported(run, tmp_path):
    """The model alone, away from its run."""
    return shutil.copytree(run / "model", tmp_path / "exported")


def test_reconstruct_shows_every_image(run, exported, images_file):
    assert main(["reconstruct", "--model", str(run), "--n", "4"]) == 0
    assert grid_shape("reconstructions.png") == (2, 4)
    arguments = ["--model", str(exported), "--data", str(images_file), "--n", "12", "--out", "twelve.png"]
    assert main(["reconstruct", *arguments]) == 0
    assert grid_shape("twelve.png") == (4, 10)
    last_rows = pixels("twelve.png")[22 + 118 :]
    assert last_rows[:, : 2 * 58].min() < 255
    assert last_rows[:, 2 * 58 + 2 :].min() == 255


def test_interpolate_both_ways(run):
    options = ["--model", str(run), "--n", "2", "--steps", "5"]
    assert main(["interpolate", *options]) == 0
    assert main(["interpolate", *options, "--mode", "linear", "--out", "linear.png"]) == 0
    assert grid_shape("interpolations.png") == grid_shape("linear.png") == (2, 1 + 5 + 1)
    spherical, linear = (pixels(name)[22:] for name in ("interpolations.png", "linear.png"))
    assert not np.array_equal(linear, spherical)
    images, *_ = inputs.load_images(run, inputs.load_model(run, "cpu"), None)
    for row, column, index in ((0, 0, 0), (1, 0, 1), (0, 6, 2), (1, 6, 3)):  # the originals at both ends
        tile = spherical[2 + 58 * row :][:56, 2 + 58 * column :][:, :56]
        assert np.array_equal(tile[::7, ::7], images[index][0].numpy())


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "evaluate"])
def test_a_missing_model_is_said_before_an_existing_file(command, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert "no model: nowhere" in error_of(capsys, command, "--model", "nowhere", "--out", "mine")


def test_evaluate_agrees_with_the_training(run, exported, images_file, tmp_path, capsys):
    assert main(["evaluate", "--model", str(run)]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    at_end_of_training = json.loads((run / "evaluation.json").read_text())
    assert {name: figures[name] for name in at_end_of_training} == at_end_of_training
    assert f"{figures['nats']:.2f} nats/image" in capsys.readouterr().out

    assert main(["evaluate", "--model", str(exported), "--data", str(images_file), "--out", "all.json"]) == 0
    assert (figures["images"], json.loads((tmp_path / "all.json").read_text())["images"]) == (4, 40)
    for weights in ("model", "best"):  # of the run too: with its validation images
        assert main(["evaluate", "--model", str(run / weights), "--out", f"{weights}.json"]) == 0
    last, best = (json.loads((tmp_path / f"{weights}.json").read_text()) for weights in ("model", "best"))
    assert {name: last[name] for name in at_end_of_training} == at_end_of_training
    assert best["images"] == 4
    assert best["nats"] <= last["nats"]


def test_evaluate_bounds_the_likelihood_and_shows_outliers(run, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the quality of reconstructions needs the extra [photos]")
    for samples in ("1", "200"):
        arguments = ["--samples", samples, "--chunk", "64", "--outliers", "3", "--out", f"{samples}.json"]
        assert main(["evaluate", "--model", str(run), *arguments]) == 0
    one, many = (json.loads((tmp_path / f"{samples}.json").read_text()) for samples in ("1", "200"))
    likelihood = many["likelihood"]
    constant = 64 * 0.5 * math.log(math.pi)  # of "l2", a Gaussian of variance 1/2
    assert likelihood["nll_elbo"] == pytest.approx(many["nats"] + constant, rel=1e-6)
    assert likelihood["nll"] < one["likelihood"]["nll"] == pytest.approx(likelihood["nll_elbo"], rel=0.05)
    assert likelihood["bits_per_dim"] == pytest.approx(likelihood["nll"] / (64 * math.log(2)) + 8)
    images, *_ = inputs.load_images(run, inputs.load_model(run, "cpu"), None)
    batch = torch.stack(list(images)).double() / 255
    errors = (inputs.load_model(run, "cpu").reconstruct(batch) - batch).square().mean(dim=(1, 2, 3))
    assert many["psnr"] == pytest.approx(float(-10 * errors.log10().mean()), rel=1e-5)
    assert -0.2 < many["ssim"] < 0.6
    worst = [outlier["nll"] for outlier in many["outliers"]]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) == 3
    assert worst[0] > likelihood["nll"]
    assert grid_shape("200-outliers.png") == (2, 3)
    assert "importance-weighted, K = 200" in capsys.readouterr().out
    assert "must be at least 1" in error_of(capsys, "evaluate", "--model", str(run), "--samples", "0", "--force")
    assert "200-outliers.png exists already" in error_of(
        capsys, "evaluate", "--model", str(run), "--out", str(_without("200.json"))
    )


def _without(name):
    Path(name).unlink()
    return name


def test_evaluate_says_what_it_misses(run, monkeypatch, capsys):
    for module in ("skimage", "skimage.metrics"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["evaluate", "--model", str(run), "--samples", "1", "--outliers", "0"]) == 0
    assert 'need scikit-image: pip install "fastvae-triton[photos]"' in capsys.readouterr().out
    assert json.loads(Path("evaluation.json").read_text())["psnr"] is None
    assert not Path("evaluation-outliers.png").exists()


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs", "gaussian", "gaussian_optimal", "scaled_l1"])
def test_evaluate_knows_every_kind_of_likelihood(likelihood, images_file, tmp_path, capsys):
    arguments = ["--data", str(images_file), "--out", "run", "--epochs", "1", "--likelihood", likelihood, *TINY]
    assert main(["train", *arguments]) == 0
    assert main(["evaluate", "--model", "run", "--samples", "50", "--outliers", "0"]) == 0
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["likelihood"]["nll"] < figures["likelihood"]["nll_elbo"]
    assert figures["likelihood"]["of"].startswith("probability" if "bernoulli" in likelihood else "density")


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "evaluate"])
def test_nothing_is_overwritten_without_force(run, command, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert "mine exists already" in error_of(capsys, command, "--model", str(run), "--out", "mine")
    assert (tmp_path / "mine").read_text() == "precious"
    assert main([command, "--model", str(run), "--out", "mine", "--force"]) == 0
    assert (tmp_path / "mine").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly"),
        (["train", "--epoch", "3"], "--epoch"),
        (["train", "--epochs", "many"], "'many'"),
        (["train", "--epochs", "0"], "epochs must be at least 1; got 0"),
        (["train", "--image-size", "3"], "--image-size"),
        (["train", "--data", "nowhere.npy"], "nowhere.npy"),
        (["train", "--device", "toaster"], "got 'toaster'"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["bench", "--batch", "0"], "--batch must be at least 1; got 0"),
        (["bench", "--latent", "4", "0"], "--latent must be one or more sizes of at least 1; got 4 0"),
        (["bench", "--seconds", "0"], "--seconds must be above 0; got 0.0"),
        (["sample"], "--model"),
        (["sample", "--model", "nowhere"], "nowhere is not a folder"),
        (["sample", "--model", "."], "config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert message in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_model_are_one_line_and_status_2(run, exported, images_file, tmp_path, capsys):
    assert "Pass --data" in error_of(capsys, "reconstruct", "--model", str(exported))
    assert "--n must be at least 1" in error_of(capsys, "sample", "--model", str(run), "--n", "0")
    assert "--steps must be at least 2" in error_of(capsys, "interpolate", "--model", str(run), "--steps", "1")
    np.save("colour.npy", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    assert "have 3" in error_of(capsys, "evaluate", "--model", str(run), "--data", "colour.npy")
    assert "not empty" in error_of(capsys, "train", "--data", str(images_file), "--out", str(run))


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FASTVAE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["sample", "--model", "nowhere"])


@pytest.mark.parametrize(
    "bug", [RuntimeError("shapes"), AssertionError("no"), TypeError("None"), KeyError("x")], ids=repr
)
def test_bugs_keep_their_traceback(monkeypatch, bug):
    def broken(options):
        raise bug

    monkeypatch.setitem(commands.COMMANDS, "doctor", commands.Command(doctor.Doctor, broken, "help"))
    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(type(bug)):
        main(["doctor"])


def test_value_error_out_of_a_library_is_a_bug(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda options: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["doctor"])


def test_loss_that_is_not_finite_is_one_line_and_status_1(images_file, tmp_path, capsys):
    arguments = ["train", "--data", str(images_file), "--out", "run", *TINY, "--learning-rate", "1e30"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastvae: error: the loss or its gradient was not finite at step ")
    assert error.count("\n") == 1


def test_signal_saves_and_says_how_to_resume(images_file, tmp_path):
    process = fastvae("train", "--data", images_file, "--out", tmp_path / "run", "--epochs", "100000", *TINY)
    for line in process.stdout:
        if line.startswith("step"):  # the loop is running
            break
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"fastvae train --resume {tmp_path / 'run'}\n" in error
    assert "Traceback" not in error
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert main(["sample", "--model", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "interrupt",
    [KeyboardInterrupt(), TrainingInterrupted(Path("runs/x"), 3, signal.SIGINT)],
    ids=["anywhere", "training"],
)
def test_ctrl_c_is_status_130(monkeypatch, capsys, interrupt):
    def run(options):
        raise interrupt

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 128 + signal.SIGINT
    assert ("--resume runs/x" in capsys.readouterr().err) == isinstance(interrupt, TrainingInterrupted)


def test_reader_that_has_gone_is_no_error():
    process = fastvae("doctor")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_missing_parser_is_one_line_that_names_the_extra():
    process = fastvae(
        "train", code="import sys; sys.modules['rich'] = None; from fastvae.cli import main; sys.exit(main())"
    )
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == (
        'fastvae: error: rich is not installed; this command needs it. Run: pip install "fastvae-triton[train]"\n'
    )


def test_missing_plotting_shows_before_the_training(monkeypatch, images_file, tmp_path, capsys):
    for name in ("plots", "report"):
        monkeypatch.delitem(sys.modules, f"fastvae.evaluation.{name}", raising=False)
        monkeypatch.delattr(f"fastvae.evaluation.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert "matplotlib is not installed" in error_of(capsys, "train", "--data", str(images_file))
    assert list(tmp_path.iterdir()) == []


def test_module_runs_like_the_command():
    process = subprocess.run([sys.executable, "-m", "fastvae", "fly"], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("fastvae: error: ")


def test_doctor_reports_versions_devices_and_reasons(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("fastvae", "rich") else "1.2.3")
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for text in (
        "python",
        "torch       1.2.3",
        "triton",
        "cpu",
        "backend torch",
        "never mixes the rank",
        "no other project",
    ):
        assert text in report
    assert "rich        not installed" in report
    assert 'pip install "fastvae-triton[train]"' in report


def test_doctor_finds_the_other_fastvae(capsys, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0" if name == "fastvae" else version(name))
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "PROBLEM: the PyPI project fastvae 0.1.0 is installed" in report
    assert "pip uninstall fastvae" in report


RECORD = {
    "step": 5,
    "epoch": 1,
    "split": "train",
    "loss": 3.0,
    "recon": 2.0,
    "kl": 1.0,
    "nats": 3.0,
    "bits_per_dim": 0.1,
}


def test_plain_lines_are_few(tmp_path, capsys):
    report = progress.PlainLines()
    report(Started(tmp_path, "cpu", 9, 1, 1000, 0, 20, 4.0))
    for step in range(1, 6):
        report(Logged(RECORD | {"step": step, "images_per_second": 7.0}))
    report(Logged(RECORD | {"split": "validation"}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "9 training and 1 validation images" in lines[0]
    assert "step      5/20" in lines[1]
    assert "3.00 nats = 2.00 recon + 1.00 KL" in lines[1]


def test_terminal_gets_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    with progress.reporter() as report:
        assert isinstance(report, progress.Bar)
        report(Started(tmp_path, "cpu", 9, 1, 1000, 3, 20, 4.0))
        assert (report.progress.tasks[0].completed, report.progress.tasks[0].total) == (3, 20)
        report(Stepped(4, 8))
        assert report.progress.tasks[0].completed == 4
        report(Logged(RECORD | {"images_per_second": 7.0}))
        assert report.progress.tasks[0].completed == 5
        report(Logged(RECORD | {"split": "validation"}))
    assert "validation" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_bar_shows_steps_time_and_speed_while_a_step_takes_long(width, tmp_path, monkeypatch):
    terminal = io.StringIO()
    console = rich.console.Console(file=terminal, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    with progress.reporter() as report:
        report(Started(tmp_path, "cpu", 9000, 1000, 1000, 5000, 20000, 4.0))
        for step in (5001, 5002):
            time.sleep(0.25)
            report(Stepped(step, 128))
        report(Logged(RECORD | {"step": 5002, "nats": -1234.5}))
        before = len(terminal.getvalue())
        time.sleep(2.2)  # of a long step, whose seconds show without an event
        shown = re.findall(
            r"[^\r\n]*images/s[^\r\n]*", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", terminal.getvalue()[before:])
        )
    line = re.compile(r" 5002/20000 ━{4,}[━╸╺ ]+ (\d:\d\d:\d\d) ETA \d:\d\d:\d\d \d\d\d images/s -1234.5 nats *")
    found = [line.fullmatch(text) for text in shown]
    assert all(found), shown
    assert all(len(text) <= width for text in shown)
    assert len({match[1] for match in found}) >= 3


def test_training_reports_every_step(images_file, tmp_path):
    seen = []
    options = {"backbone": "mlp", "hidden": 8, "latent_dim": 3, "batch_size": 8, "device": "cpu", "epochs": 1}
    train(TrainConfig(str(images_file), tmp_path / "run", **options), on_event=seen.append)
    steps = [event for event in seen if isinstance(event, Stepped)]
    assert [event.step for event in steps] == list(range(1, 5))
    assert {event.images for event in steps} == {8}
