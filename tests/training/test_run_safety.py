"""Runs that are killed, damaged, or started twice: each problem is reported, and no data is lost."""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import _files
from fastvae.models import VAE, VAEConfig
from fastvae.training import RunLockedError, TrainConfig, TrainingInterrupted, train
from fastvae.training.checkpoint import TRAILER, TRAILER_BYTES, load_checkpoint
from fastvae.training.events import Logged, Started
from fastvae.training.interruption import SIGNALS, deferred_signals
from fastvae.training.run_folder import choose_run_folder, read_metrics
from fastvae.training.run_lock import LOCK_FILE, lock_run

for package in ("PIL", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")

PROGRAM = """
import json, sys
from fastvae.training import TrainConfig, train
def wait(event):
    if getattr(event, "record", {}).get("step") == 4:
        print("training", flush=True)
        sys.stdin.readline()
train(TrainConfig.from_json(json.loads(sys.argv[1])), on_event=wait)
"""


@pytest.fixture
def config(images_file, tmp_path):
    options = {"epochs": 2, "batch_size": 9, "backbone": "mlp", "hidden": 8, "latent_dim": 3, "device": "cpu"}
    return TrainConfig(str(images_file), tmp_path / "run", log_every=1, checkpoint_every=2, **options)


@pytest.fixture
def run(config):
    return train(config).run


@pytest.fixture
def waiting(config):
    """Start a training of `config` in another process, which waits in its fourth step for a line on its stdin."""
    processes = []

    def start(config):
        command = [sys.executable, "-c", PROGRAM, json.dumps(config.to_json())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "training\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def content_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE}


def write_checked(path, content):
    """A checkpoint of any content with a checksum that is right."""
    torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + TRAILER + digest.encode() + b"\n")


def flipped(content, place, bit):
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_each_of_200_flipped_bits_in_a_checkpoint_is_reported(config, run):
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        path.write_bytes(flipped(content, draw.randrange(len(content)), draw.randrange(8)))
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
            load_checkpoint(path, config=TrainConfig.from_run(run), images={})
    before = content_of(run)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        train(TrainConfig.from_run(run))
    assert content_of(run) == before  # what is damaged is left for its owner to see
    path.write_bytes(content)
    assert train(TrainConfig.from_run(run)).run == run


def test_a_damaged_checksum_is_reported_as_well(run):
    path = run / "checkpoint.pt"
    content = path.read_bytes()
    assert content[-TRAILER_BYTES:].startswith(TRAILER)
    for place in range(len(content) - TRAILER_BYTES, len(content)):
        for damaged in (flipped(content, place, 0), content[:place]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
                load_checkpoint(path, config=TrainConfig.from_run(run), images={})


@pytest.mark.parametrize(
    "name", ["config", "images", "random", "state", "state.step", "state.objective", "state.optimizer"]
)
def test_checkpoint_that_lacks_something_is_named(run, name):
    path = run / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    part, _, key = name.rpartition(".")
    del (content[part] if part else content)[key]
    write_checked(path, content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (has no|does not fit)"):
        train(TrainConfig.from_run(run))


def test_each_flipped_bit_in_exported_weights_is_reported(tmp_path):
    VAE(VAEConfig(image_size=(3, 3), backbone="mlp", hidden=4, latent_dim=2)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        path.write_bytes(flipped(content, draw.randrange(len(content) - 200, len(content)), draw.randrange(8)))
        with pytest.raises(ValueError, match="damaged"):
            VAE.from_pretrained(tmp_path)


def test_second_training_in_a_folder_is_refused_and_the_first_goes_on(config, waiting):
    first = waiting(config)
    before = content_of(config.out)
    for second in (config, TrainConfig.from_run(config.out)):
        with pytest.raises(RunLockedError, match=rf"another training \(process {first.pid} on .*\) writes to .*run\."):
            train(second)
    assert content_of(config.out) == before
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0
    assert [record["step"] for record in read_metrics(config.out / "metrics.jsonl")] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert not (config.out / LOCK_FILE).exists()


def test_second_resume_of_a_run_is_refused(config, waiting):
    with pytest.raises(TrainingInterrupted):
        train(config, on_event=lambda event: isinstance(event, Logged) and signal.raise_signal(signal.SIGTERM))
    resumed = TrainConfig.from_run(config.out)
    first = waiting(resumed)
    with pytest.raises(RunLockedError):
        train(resumed)
    first.communicate("go on\n", timeout=60)
    assert first.returncode == 0


def test_lock_of_a_killed_training_keeps_nobody_out(config, waiting):
    first = waiting(config)
    first.kill()
    first.wait()
    assert (config.out / LOCK_FILE).exists()
    leftover = config.out / f".checkpoint.pt.0123abcd{_files.TEMPORARY_SUFFIX}"
    leftover.write_bytes(b"half")
    assert train(TrainConfig.from_run(config.out)).run == config.out
    assert not (config.out / LOCK_FILE).exists()
    assert not leftover.exists()


def test_training_inside_a_training_is_refused(config):
    refused = []

    def on_event(event):
        if isinstance(event, Started):
            with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
                train(TrainConfig.from_run(config.out))
            refused.append(event)

    train(config, on_event=on_event)
    assert len(refused) == 1


def test_processes_that_a_training_forked_do_not_keep_its_lock(tmp_path):
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fastvae.training.run_lock import lock_run\n"
        "with lock_run(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(60)\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunLockedError), lock_run(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with lock_run(tmp_path / "run"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_folder_of_a_training_that_wrote_nothing_is_removed(tmp_path):
    with lock_run(tmp_path / "deep" / "run"):
        assert (tmp_path / "deep" / "run" / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with lock_run(tmp_path / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_runs_that_begin_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Noon:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2026, 1, 1, 12)

    monkeypatch.setattr("fastvae.training.run_folder.datetime", Noon)
    first = choose_run_folder(TrainConfig())
    with lock_run(first):
        (first / "config.json").write_text("{}")
        assert choose_run_folder(TrainConfig()) == first.with_name(f"{first.name}-2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": NaN}', "holds NaN"),
        ('{"a": [-Infinity]}', "holds -Infinity"),
        ('{"a": 1e999}', "1e999 is too large"),
        ("[" * 100_000, "recursion"),
        ('{"a": "\udcff"}'.encode("utf-8", "surrogateescape"), "decode"),
        ("", "Expecting value"),
    ],
    ids=["NaN", "infinity", "large", "deep", "bytes", "empty"],
)
def test_json_is_read_strictly(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"x\.json is not valid JSON: .*{message}"):
        _files.read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json must hold a JSON object; it holds a list"):
        _files.read_json_object(path)


def test_json_is_written_strictly(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        _files.write_json(tmp_path / "x.json", {"a": [math.inf]})
    assert list(tmp_path.iterdir()) == []
    value = {"a": [math.inf, 1.5, (math.nan, None)], "b": {"c": -math.inf}}
    assert _files.null_non_finite(value) == {"a": [None, 1.5, [None, None]], "b": {"c": None}}


OPTIONS = {
    "epochs": ["2", 2.5, True, None, [2], 2**31],
    "beta": ["1", math.inf, math.nan, 10**400, [1.0], True, -1.0],
    "data": [3, None],
    "out": [3, ""],
    "compile": [1, "true", None],
    "image_size": [3, [3], [3, 4, 5], ["3", "4"], "34", [0, 1], [1, 2**31]],
    "logvar_clamp": [[-10.0, math.inf], [1.0]],
    "likelihood": ["l3", 2, {}],
    "backbone": ["transformer"],
    "seed": [-1, 2**64, "0"],
    "beta_steps": [2**70],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_option_of_another_type_or_size_is_named(name, value):
    schedule = {"beta_schedule": "linear"} if name == "beta_steps" else {}
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        TrainConfig.from_json({name: value, **schedule})


def test_options_are_converted_to_their_types():
    config = TrainConfig(out="runs/x", beta=np.float32(0.5), epochs=np.int64(3), image_size=[8, 9], seed=2**64 - 1)
    assert config.out == Path("runs/x")
    assert config.image_size == (8, 9)
    assert [type(value) for value in (config.beta, config.epochs)] == [float, int]
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_of_a_run_is_named_with_what_is_wrong_in_it(run):
    path = run / "config.json"
    values = json.loads(path.read_text())
    for name, value, message in (("epochs", "2", "epochs must be a whole number; got '2'"), ("magic", 1, "magic")):
        path.write_text(json.dumps(values | {name: value}))
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            TrainConfig.from_run(run)


@pytest.mark.parametrize(
    "line", ["{}", "[]", '"step"', '{"step": "1"}', '{"step": 1, "split": 3}', "nonsense", '{"step": NaN}'], ids=str
)
def test_line_of_the_metrics_is_named_with_what_is_wrong_in_it(run, line):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3, (is not|must hold)"):
        train(TrainConfig.from_run(run))


def test_figures_that_are_not_finite_are_null_in_files(run):
    path = run / "metrics.jsonl"
    records = read_metrics(path)
    path.write_text("".join(json.dumps(record | {"kl": None}) + "\n" for record in records))
    assert all(math.isnan(record["kl"]) for record in read_metrics(path))
    train(TrainConfig.from_run(run))  # draws them
    assert all(json.loads(line)["kl"] is None for line in path.read_text().splitlines())


def test_only_regular_files_are_written(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null"), tmp_path):
        with pytest.raises(FileExistsError, match="not a regular file"):
            _files.write_bytes(path, b"x")
        with pytest.raises(FileExistsError, match="not a regular file"):
            _files.read_json_object(path)
    assert pipe.is_fifo()
    target, link = tmp_path / "deep.txt", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        _files.write_bytes(link, content)
        assert target.read_bytes() == content
        assert link.is_symlink()


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", "config.json"])
def test_pipe_in_a_run_folder_blocks_nothing(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(OSError, match=r"not a regular file|is not a run folder"):
        train(TrainConfig.from_run(run))


def test_writers_of_one_path_do_not_mix(tmp_path):
    path = tmp_path / "x"
    started = threading.Barrier(2)

    def write(letter):
        with _files.atomic_write(path) as file:
            started.wait()
            file.write(letter * 1000)
            started.wait()
            file.write(letter * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("hangups_not_ignored")
def test_a_terminal_that_closes_saves_a_checkpoint(config):
    def hang_up(event):
        if isinstance(event, Logged) and event.record["step"] == 3:
            signal.raise_signal(signal.SIGHUP)

    with pytest.raises(TrainingInterrupted, match="SIGHUP after step 3"):
        train(config, on_event=hang_up)
    assert torch.load(config.out / "checkpoint.pt", weights_only=True)["state"]["step"] == 3


def test_hangups_that_are_ignored_stay_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with deferred_signals() as pending:
            signal.raise_signal(signal.SIGHUP)
            assert pending.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert set(SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_interrupts_are_handled_where_they_are_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for the background jobs of a script
    try:
        with deferred_signals() as pending:
            signal.raise_signal(signal.SIGINT)
            assert pending.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "linear", "beta_steps": 9}, r"of beta takes 9 steps and the run has 8.*--beta-steps"),
        ({"beta_schedule": "cyclical", "beta_steps": 4, "beta_delay": 5}, r"of beta takes 9 steps.*--beta-delay"),
        ({"beta_schedule": "cosine", "beta_delay": 9}, r"of beta takes 1\d steps"),
        ({"capacity": 1.0, "capacity_steps": 9}, r"of capacity takes 9 steps and the run has 8.*--capacity-steps"),
    ],
    ids=["steps", "delay", "delay alone", "capacity"],
)
def test_schedule_longer_than_the_run_is_warned_of(config, options, message):
    with pytest.warns(UserWarning, match=message):
        train(replace(config, **options))


def test_model_that_cannot_fit_is_refused_before_it_is_built(config):
    with pytest.raises(ValueError, match=r"model of these sizes.* GiB or more; cpu has"):
        train(replace(config, hidden=2**31 - 1))
    with pytest.raises(ValueError, match="model of these sizes is too large"):
        train(replace(config, backbone="conv", width=2**31 - 1, image_size=(64, 64)))
    assert not config.out.exists()
