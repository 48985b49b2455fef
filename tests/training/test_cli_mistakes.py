"""Whatever a user does wrong, and whatever the system takes away, is one line and a status; no training is lost."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.cli import doctor, errors, main, output
from fastvae.data import DataError
from tests.helpers.command import TINY, error_of, fastvae

for package in ("PIL", "matplotlib", "safetensors", "rich"):
    pytest.importorskip(package, reason="the command line needs the extra [train]")
commands = pytest.importorskip("fastvae.cli.commands")


@pytest.fixture(scope="session")
def run(images_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("mistakes") / "run"
    assert main(["train", "--data", str(images_file), "--out", str(out), "--epochs", "1", *TINY]) == 0
    return out


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def training(images_file):
    """Arguments of a training that takes longer than a test."""
    return ["train", "--data", str(images_file), "--out", "run", "--epochs", "100000", "--log-every", "1", *TINY]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def step_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["state"]["step"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--epoch", "3"], "--epoch 3 (did you mean --epochs?). `fastvae train --help`"),
        (["train", "--epochs", "1e3"], "--epochs: must be a whole number; got '1e3'"),
        (["train", "--epochs", "9" * 5000], "must be a whole number"),
        (["train", "--beta", "-1e-3"], "beta must be a finite number, at least 0; got -0.001"),
        (["train", "--beta", "inf"], "--beta: must be a finite number; got 'inf'"),
        (["train", "--beta", "nan"], "--beta: must be a finite number; got 'nan'"),
        (["train", "--logvar-clamp", "-10", "inf"], "--logvar-clamp: must be a finite number; got 'inf'"),
        (["train", "--logvar-clamp", "-inf", "10"], "must be a finite number"),
        (["train", "--logvar-clamp", "-1e1"], "--logvar-clamp: must be 2 finite numbers; got '-10.0'"),
        (["train", "--image-size", "64"], "--image-size: must be 2 whole numbers; got '64'. `fastvae train --help`"),
        (["train", "--image-size"], "--image-size: must be 2 whole numbers; got 'nothing'"),
        (["train", "--likelihood", "mse"], "got 'mse' (did you mean l2?)"),
        (["train", "--backbone", "cnv"], "one of conv, mlp, autoencoder_kl; got 'cnv' (did you mean conv?)"),
        (["--epochs", "3", "train"], "the command comes first, as in `fastvae train --epochs 5`; got '--epochs'"),
        (
            ["train", "--seed", "18446744073709551616"],
            "seed must be at least 0 and below 2**64; got 18446744073709551616",
        ),
        (["train", "--beta-schedule", "linear", "--beta-steps", str(2**70)], f"beta_steps must be at most {2**31 - 1}"),
        (["train", "--backbone", "big"], "--backbone: must be one of conv, mlp, autoencoder_kl; got 'big'"),
        (["train", "--out", ""], "--out: must be a path; got ''"),
        (["train", "--compile=1"], "--compile"),
        (["train", "photos"], "unrecognized arguments: photos"),
        (["train", "--hidden", str(2**31 - 1), "--backbone", "mlp"], "a model of these sizes"),
        (["bench", "--batch", str(10**12)], "--batch must be at most"),
        (["bench", "--batch", str(10**9)], "to time a batch of these sizes takes"),
        (["bench", "--image"], "--image: must be one or more whole numbers; got 'nothing'"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert message in error_of(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_no_memory_holds_are_one_line(run, capsys):
    model = ["--model", str(run)]
    huge = str(2**31 - 1)
    for command, *options in (
        ["sample", "--n", huge],
        ["sample", "--n", str(10**12)],
        ["sample", "--seed", str(2**64)],
        ["interpolate", "--steps", huge],
        ["evaluate", "--samples", huge, "--chunk", huge],
        ["reconstruct", "--n", str(2**70)],
    ):
        assert "takes" in (error := error_of(capsys, command, *model, *options)) or "must be at most" in error
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        torch.empty(10**12, 1000)
    assert errors.failure_of(caught.value)[0] == 2
    with pytest.raises(RuntimeError, match="Storage size") as caught:
        torch.empty(2**62, 1000)
    assert errors.failure_of(caught.value)[0] == 2
    assert errors.failure_of(MemoryError("Unable to allocate 3 TiB"))[0] == 2


def test_options_can_be_spelled_with_underscores_and_equals_signs(capsys):
    for spelled in (["--warmup_steps", "-1"], ["--warmup-steps=-1"], ["--warmup_steps=-1"]):
        assert "warmup_steps must be at least 0; got -1" in error_of(capsys, "train", *spelled)


def test_values_that_look_like_numbers_or_nothing(capsys):
    assert "no model: -5 is not a folder" in error_of(capsys, "sample", "--model", "-5")
    assert "--image-size: must be a whole number; got 'None'" in error_of(capsys, "train", "--image-size", "None", "3")
    assert "no model: None is not a folder" in error_of(capsys, "sample", "--model", "None")


def test_switches_can_be_turned_off_again(run, tmp_path, capsys):
    error = error_of(capsys, "train", "--resume", str(run), "--compile")
    assert "compile was False, now True" in error
    assert main(["train", "--resume", str(run), "--strict", "--no-strict", "--log", "None"]) == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are missing"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE must be a whole number; it is 'many'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but RANK is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "cannot meet: port"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT must be a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_environment_of_another_program_is_one_line(environment, message, images_file, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in error_of(capsys, "train", "--data", str(images_file), *TINY)


def test_rank_without_a_world_size_silences_nothing(images_file, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--data", str(images_file), "--epochs", "1", *TINY]) == 0
    assert "results in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "message"), [("triton", "cannot serve tensors on cpu"), ("tritn", "must be one of")]
)
def test_backend_that_cannot_compute_is_one_line(backend, message, images_file, run):
    environment = {"FASTVAE_BACKEND": backend, "TRITON_INTERPRET": "0"}
    for arguments in (["train", "--data", images_file, *TINY], ["sample", "--model", run, "--device", "cpu"]):
        process = fastvae(*arguments, environment=environment)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2
        assert error.startswith("fastvae: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not Path("samples.png").exists()


def copied(run, name, change):
    """The run's folder, copied, with one of its files changed."""
    copy = Path("copy")
    for path in run.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    change(copy / name)
    return copy


def with_value(name, value):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.mark.parametrize(
    ("command", "name", "change", "message"),
    [
        ("sample", "config.json", with_value("epochs", [1]), "config.json: epochs must be a whole number; got [1]"),
        ("train", "config.json", with_value("beta", "much"), "config.json: beta must be a finite number; got 'much'"),
        ("train", "config.json", lambda p: p.write_text('{"beta": Infinity}'), "config.json is not valid JSON"),
        ("sample", "model/config.json", with_value("hidden", "8"), "model/config.json: hidden must be"),
        ("sample", "model/config.json", lambda p: p.write_text("[NaN]"), "model/config.json is not valid JSON"),
        ("report", "metrics.jsonl", lambda p: p.write_text('{"loss": 1}\n'), "metrics.jsonl, line 1, must hold a step"),
        ("train", "checkpoint.pt", lambda p: torch.save({}, p), "checkpoint.pt is damaged"),
        ("train", "checkpoint.pt", lambda p: p.write_bytes(b"PK" + p.read_bytes()), "checkpoint.pt is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_run_is_one_line_that_names_the_file(command, name, change, message, run, capsys):
    copy = copied(run, name, change)
    error = error_of(capsys, command, "--resume" if command == "train" else "--model", str(copy))
    assert f"{copy}/{message}" in error


def test_system_errors_are_called_by_their_name(run, monkeypatch, capsys):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("fastvae._files.Path.read_bytes", refuse)
    assert f"{run}/model/config.json: Permission denied" in error_of(capsys, "sample", "--model", str(run))


def test_unreadable_images_are_called_by_the_systems_name(monkeypatch, capsys):
    from PIL import Image

    Path("folder").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(f"folder/{name}")
    np.save("images.npy", np.zeros((8, 8, 8), np.uint8))

    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(np.lib.format, "open_memmap", refuse)
    for source in ("folder", "images.npy"):
        error = error_of(capsys, "train", "--data", source)
        assert "Permission denied" in error
        assert "damaged" not in error


def test_too_few_images_names_the_damaged_file(capsys):
    from PIL import Image

    Path("folder").mkdir()
    Image.new("L", (8, 8)).save("folder/good.png")
    Path("folder/bad.png").write_bytes(b"no picture")
    error = error_of(capsys, "train", "--data", "folder")
    assert "got 1. folder/bad.png was left out: folder/bad.png is not an image" in error.replace(f"{Path.cwd()}/", "")


def test_error_of_a_process_that_loads_images_is_one_line():
    from torch.utils.data import DataLoader, Dataset

    class Damaged(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise DataError("b.png is damaged.\nReplace it.")

    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(Damaged(), num_workers=1)))
    assert errors.failure_of(caught.value) == (2, "b.png is damaged. Replace it.")


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_only_regular_files_are_overwritten(command, run, capsys):
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/null"):
        assert "not a regular file" in error_of(capsys, command, "--model", str(run), "--out", path, "--force")
    assert Path("pipe").is_fifo()


def test_second_training_is_one_line(training, capsys):
    first = fastvae(*training)
    try:
        wait_for(lambda: Path("run/config.json").exists())
        assert f"another training (process {first.pid} on " in error_of(capsys, *training)
        assert "another training" in error_of(capsys, "train", "--resume", "run")
        assert first.poll() is None
    finally:
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM


def test_ctrl_c_says_what_stopped_it(monkeypatch, capsys):
    def run(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "fastvae: stopped by SIGINT\n"


@pytest.mark.parametrize("shell", ['"$@" | head -n 1', '"$@" > /dev/full', '"$@" >&-'], ids=["head", "full", "closed"])
def test_training_goes_on_without_standard_output(shell, training, tmp_path):
    process = fastvae(*training, shell=f"set -o pipefail; {shell}", start_new_session=True)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    wait_for(checkpoint.exists)
    before = step_of(tmp_path / "run")
    wait_for(lambda: step_of(tmp_path / "run") > before)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert "training stopped by SIGTERM" in error
    assert ("the training goes on" in error) == ("full" in shell or "head" in shell)


@pytest.mark.parametrize(("shell", "status"), [("> /dev/full", 2), ("| true", 141), (">&-", 0)])
def test_finished_training_without_standard_output(shell, status, images_file, tmp_path):
    arguments = ["train", "--data", images_file, "--out", "run", "--epochs", "1", *TINY]
    process = fastvae(*arguments, shell=f'set -o pipefail; "$@" {shell}')
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert (tmp_path / "run" / "report.html").exists()
    assert ("cannot write to standard output: No space left on device" in error) == (status == 2)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor"]], ids=" ".join)
def test_full_disk_below_standard_output_is_one_line(arguments):
    process = fastvae(*arguments, shell='"$@" > /dev/full')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == "fastvae: error: cannot write to standard output: No space left on device\n"


def test_standard_error_that_is_lost_changes_no_status():
    process = fastvae("fly", shell='"$@" 2> /dev/full')
    process.communicate(timeout=60)
    assert process.returncode == 2


def test_path_that_the_terminal_cannot_encode(images_file, tmp_path):
    arguments = ["train", "--data", images_file, "--epochs", "1", *TINY, "--out", os.fsdecode("ü".encode() + b"-\xff")]
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = fastvae(*arguments, environment=environment)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "next: fastvae sample --model \\xfc-\\udcff" in out
    (folder,) = tmp_path.iterdir()
    assert os.fsencode(folder.name) == "ü".encode() + b"-\xff"
    process = fastvae("train", "--resume", folder, environment=environment)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.usefixtures("hangups_not_ignored")
def test_terminal_that_closes_leaves_a_checkpoint(training, tmp_path):
    process = fastvae(*training)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGHUP)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGHUP
    assert "training stopped by SIGHUP" in error
    assert step_of(tmp_path / "run") > 0


def test_warning_is_one_line(images_file):
    schedule = ["--beta-schedule", "linear", "--beta-steps", "1000"]
    process = fastvae("train", "--data", images_file, "--epochs", "1", *schedule, *TINY)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error.startswith("fastvae: warning: the schedule of beta takes 1000 steps and the run has 4")
    assert error.count("\n") == 1


def test_output_keeps_the_first_error():
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

        def fileno(self):
            raise OSError

    lost = output.Output(Full())
    assert lost.write("text") == 4
    lost.flush()
    assert lost.error.errno == errno.ENOSPC
    assert not lost.isatty()
