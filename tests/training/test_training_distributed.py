"""The trainer under torchrun: two processes are one run, whoever falls and whoever is told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastvae._distributed import World
from fastvae.models import VAE
from fastvae.training import TrainConfig, TrainingInterrupted, train
from fastvae.training.events import Logged
from fastvae.training.run_folder import resumed_after_restart

for package in ("PIL", "matplotlib", "safetensors"):
    pytest.importorskip(package, reason="training needs the extra [train]")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

STEPS = 18  # 54 training images, 6 batches of 8 in each of 3 epochs
SECONDS = 120

# rank 1 falls once, by a signal that nothing can catch, before its share of step 11; or all are slow enough to be hit
PROGRAM = """
import json, os, signal, sys, time
from fastvae import data
from fastvae.training import TrainConfig, TrainingInterrupted, train
from fastvae.training.events import Saved

sys.setswitchinterval(60)  # whatever another thread frees too late, it frees while the interpreter ends
mode, values = sys.argv[1], json.loads(sys.argv[2])
config = TrainConfig.from_json(values)

class Images(data.ArrayImages):
    seen = 0

    def __getitem__(self, i):
        Images.seen += 1
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        # two images are read to learn their shape and, by each pass of the baseline and the evaluation, all of them
        if mode == "fall" and os.environ["RANK"] == "1" and first and Images.seen > 110:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "wait" and Images.seen > 65:
            time.sleep(0.05)
        return super().__getitem__(i)

def on_event(event):  # of the first process: all must stop at the step that it is told at
    kind, _, step = mode.partition(" ")
    if kind == "stop" and isinstance(event, Saved) and event.step == int(step):  # seen after the next step
        os.kill(os.getpid(), signal.SIGTERM)

images = data.load(config.data)
train(config, dataset=Images(images.images), on_event=on_event)
"""

CLIPPING = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from fastvae._distributed import world_of
from fastvae.training.sharding import reduce_and_clip

with world_of(torch.device("cpu")) as world:
    mesh = init_device_mesh("cpu", (2,))
    values = [torch.arange(15.0).reshape(5, 3), torch.tensor(7.0)]
    expected = [torch.nn.Parameter(torch.zeros_like(value)) for value in values]
    ours = [torch.nn.Parameter(distribute_tensor(values[0], mesh, [Shard(0)])), torch.nn.Parameter(values[1])]
    for parameter, other, value in zip(expected, ours, values):
        parameter.grad = value.clone()
        alone = value * (2 if world.is_first else 0)  # to be averaged
        other.grad = distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else alone
    torch.testing.assert_close(reduce_and_clip(ours, 2.0, world), torch.nn.utils.clip_grad_norm_(expected, 2.0))
    for parameter, other, value in zip(expected, ours, values):
        grad = other.grad.full_tensor() if value.ndim else other.grad
        torch.testing.assert_close(grad, parameter.grad)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    options = {"epochs": 3, "batch_size": 8, "backbone": "mlp", "hidden": 16, "latent_dim": 4, "device": "cpu"}
    return TrainConfig(str(folder / "noise.npy"), folder / "one", log_every=4, checkpoint_every=5, **options)


@pytest.fixture(scope="module")
def alone(config):
    """The run of a single process."""
    return train(config).run


ALL_PARTS = {"likelihood": "gaussian", "ema": 0.9, "accumulate": 2, "clip_norm": 0.5}


@pytest.fixture(scope="module")
def alone_with_all_parts(config, tmp_path_factory):
    return train(replace(config, out=tmp_path_factory.mktemp("parts") / "one", **ALL_PARTS)).run


@pytest.fixture
def torchrun(tmp_path):
    """Start a program in two processes."""

    def start(text, *arguments, max_restarts=0):
        program = tmp_path / "program.py"
        program.write_text(text)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["--max-restarts", str(max_restarts), str(program), *arguments]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture
def start(torchrun):
    """Start a training in two processes."""

    def start(config, mode="", **options):
        return torchrun(PROGRAM, mode, json.dumps(config.to_json()), **options)

    return start


def output_of(process):
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_but_for_rounding(run, alone):
    weights, expected = (VAE.from_pretrained(folder / "model").state_dict() for folder in (run, alone))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["state"]["step"] == STEPS
    ours, theirs = records_of(run), records_of(alone)
    # each step and split once
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in theirs]
    for name in ("loss", "recon", "kl"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-4)
    evaluations = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, alone))
    assert next(evaluations) == pytest.approx(next(evaluations), rel=1e-4)


def test_a_rank_that_is_killed_costs_nothing_but_time(start, config, alone, tmp_path):
    run = tmp_path / "run"
    process = start(replace(config, out=run), "fall", max_restarts=1)
    output = output_of(process)
    assert process.returncode == 0, output
    assert "exitcode: -9) local_rank: 1" in output, output
    assert_same_but_for_rounding(run, alone)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_a_run_that_is_told_to_stop_goes_on_alone(start, config, alone, tmp_path):
    """Two processes leave one checkpoint, at the same step; one process loads it."""
    run = tmp_path / "run"
    process = start(replace(config, out=run), "wait")
    deadline = time.monotonic() + SECONDS
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = output_of(process)
    assert process.returncode != 0
    assert "training stopped by SIGTERM" in output, output
    state = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    assert 5 <= state["step"] < STEPS
    train(TrainConfig.from_run(run))
    assert_same_but_for_rounding(run, alone)


class TestSharded:
    """Each process keeps a share of the weights; a learned scale, which is one number, is kept by all."""

    @pytest.fixture
    def alone(self, alone_with_all_parts):
        return alone_with_all_parts

    @pytest.fixture
    def sharded(self, config, tmp_path):
        return replace(config, out=tmp_path / "run", shard=True, **ALL_PARTS)

    def test_two_processes_are_one(self, start, alone, sharded):
        process = start(sharded)
        output = output_of(process)
        assert process.returncode == 0, output
        assert "Warning" not in output
        run = sharded.out
        assert_same_but_for_rounding(run, alone)
        states = [torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (run, alone)]
        assert states[0].keys() == states[1].keys()  # that of one process
        torch.testing.assert_close(states[0]["objective"], states[1]["objective"], rtol=1e-4, atol=1e-5)

    def test_two_then_one_then_two(self, start, alone, sharded):
        """Each goes on from what another number of processes left."""
        run = sharded.out
        process = start(sharded, "stop 5")
        output = output_of(process)
        assert "training stopped by SIGTERM" in output, output

        def stop(event):
            if isinstance(event, Logged) and (event.record["step"], event.record["split"]) == (12, "train"):
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(TrainingInterrupted):
            train(TrainConfig.from_run(run), on_event=stop)
        process = start(TrainConfig.from_run(run))
        output = output_of(process)
        assert process.returncode == 0, output
        assert_same_but_for_rounding(run, alone)

    def test_gradients_are_clipped_by_the_norm_of_all(self, torchrun):
        process = torchrun(CLIPPING)
        output = output_of(process)
        assert process.returncode == 0, output

    def test_losses_that_are_scaled_are_refused(self, config):
        with pytest.raises(ValueError, match="fp32 or bf16 with shard"):
            replace(config, shard=True, precision="fp16")


def test_parts_of_a_batch_add_up_to_it(config, alone, tmp_path):
    run = train(replace(config, out=tmp_path / "run", accumulate=4)).run
    assert_same_but_for_rounding(run, alone)


def test_shares_cover_everything_once():
    for n in (0, 1, 7, 8):
        parts = [World(rank, 3).shard_range(n) for rank in range(3)]
        assert [i for part in parts for i in part] == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_restart_needs_a_folder_that_it_knows(config, monkeypatch, alone):
    assert resumed_after_restart(config) is config
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ValueError, match="Pass --out"):
        resumed_after_restart(replace(config, out=None))
    resumed = resumed_after_restart(replace(config, workers=3))
    assert (resumed.resume, resumed.out, resumed.workers) == (alone, None, 3)
