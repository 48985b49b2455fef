"""Two processes reach the weights that one process reaches on the joint batch.

The processes start once, train in every way of `WAYS`, and leave their weights in a file; each test trains alone and
compares. With `seed` and `offset` the ranks draw the noise that one process draws for all of its batch.
"""

import os
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastvae
from fastvae._distributed import wait_for_all
from fastvae.likelihoods import Gaussian
from fastvae.models import VAE, VAEConfig
from fastvae.noise_state import NoiseState

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")

WORLD_SIZE, STEPS, BATCH, LATENTS = 2, 20, 8, 3
SECONDS = 120  # for both processes, from their start to their end


def batches():
    return torch.rand(STEPS, BATCH, 1, 4, 5, generator=torch.Generator().manual_seed(1))


class VAEWithLoss(nn.Module):
    """The loss within what is wrapped, for the sake of its parameter."""

    def __init__(self):
        super().__init__()
        self.model = model()
        self.criterion = fastvae.VAELoss(0.5, Gaussian(nn.Parameter(torch.tensor(0.3))))

    def forward(self, x, **noise):
        out = self.model(x, **noise)
        return self.criterion(out.recon, x, kl=out.kl)


def model():
    torch.manual_seed(0)
    return VAE(VAEConfig(image_size=(4, 5), latent_dim=LATENTS, backbone="mlp", hidden=8))


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)


def place(rows):
    """Where the noise of a rank's rows begins."""
    return {"offset": rows.start * LATENTS}


def train(forward, own_rows, weight=lambda rows: None):
    """A step a batch, on the rows of it that are this process's own."""
    optimizer, criterion = optimizer_of(forward), fastvae.VAELoss(0.5)
    for step, x in enumerate(batches()):
        rows = own_rows
        out = forward(x[rows], seed=step, **place(rows))
        optimizer.zero_grad()
        criterion(out.recon, x[rows], kl=out.kl, weight=weight(rows)).backward()
        optimizer.step()


def train_with_noise_state(forward, own_rows):
    optimizer, noise = optimizer_of(forward), NoiseState(7)
    for x in batches():
        out = forward(x[own_rows], seed=noise.seed, **place(own_rows))
        optimizer.zero_grad()
        fastvae.vae_loss(out.recon, x[own_rows], kl=out.kl).loss.backward()
        optimizer.step()
        noise.advance()


def train_by_parts(forward, own_rows, *, n_parts, no_sync=nullcontext):
    """Gradients of micro-batches add up; processes exchange them with the last one's backward pass."""
    optimizer, criterion = optimizer_of(forward), fastvae.VAELoss(0.5, accumulate=n_parts)
    size = (own_rows.stop - own_rows.start) // n_parts
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        for part in range(n_parts):
            rows = slice(own_rows.start + part * size, own_rows.start + (part + 1) * size)
            with nullcontext() if part == n_parts - 1 else no_sync():
                out = forward(x[rows], seed=step, **place(rows))
                criterion(out.recon, x[rows], kl=out.kl).backward()
        optimizer.step()


def train_with_loss(forward, own_rows):
    optimizer = optimizer_of(forward)
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        forward(x[own_rows], seed=step, **place(own_rows)).backward()
        optimizer.step()


# one process, the whole batch


def whole_batch(module, how=train, **options):
    how(module, slice(0, BATCH), **options)
    return weights_of(module)


def weights_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


# two processes, half of it each, or five rows and three

HALVES = [slice(0, 4), slice(4, 8)]
RAGGED = [slice(0, 5), slice(5, 8)]


def sample_weights(rows):
    """Ranks are averaged as equals; by this each sample counts the same."""
    size = rows.stop - rows.start
    return torch.full([size], size * WORLD_SIZE / BATCH)


def in_ddp(module, rank, how=train, rows=HALVES, **options):
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    if how is train_by_parts:
        options["no_sync"] = wrapped.no_sync
    how(wrapped, rows[rank], **options)
    return weights_of(module)


def in_fsdp(module, rank):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD_SIZE,))
    for part in (module.encoder, module.decoder, module):
        fully_shard(part, mesh=mesh)
    assert isinstance(module, FSDPModule)
    train(module, HALVES[rank])
    sharded = module.state_dict()
    assert all(tensor.to_local().numel() < tensor.numel() or len(tensor) == 1 for tensor in sharded.values())
    return {name: tensor.full_tensor() for name, tensor in sharded.items()}


WAYS = {
    "DDP": (lambda rank: in_ddp(model(), rank), lambda: whole_batch(model())),
    "DDP, noise state": (
        lambda rank: in_ddp(model(), rank, train_with_noise_state),
        lambda: whole_batch(model(), train_with_noise_state),
    ),
    "DDP, accumulated without sync": (
        lambda rank: in_ddp(model(), rank, train_by_parts, n_parts=2),
        lambda: whole_batch(model()),
    ),
    "DDP, ragged batch": (
        lambda rank: in_ddp(model(), rank, rows=RAGGED, weight=sample_weights),
        lambda: whole_batch(model()),
    ),
    "DDP around a loss with a parameter": (
        lambda rank: in_ddp(VAEWithLoss(), rank, train_with_loss),
        lambda: whole_batch(VAEWithLoss(), train_with_loss),
    ),
    "FSDP2": (lambda rank: in_fsdp(model(), rank), lambda: whole_batch(model())),
}


def run_rank(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/rendezvous", WORLD_SIZE)
    timeout = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    found = {name: in_two(rank) for name, (in_two, _) in WAYS.items()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    wait_for_all(store, WORLD_SIZE)
    dist.destroy_process_group()
    # without Python's own end, during which a thread of gloo may abort the process (torch's issue 190489)
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """For each way of training, the weights of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = torch.multiprocessing.spawn(run_rank, args=(folder,), nprocs=WORLD_SIZE, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1.0):  # raises what a process raised
            assert time.monotonic() < deadline, f"the processes have not ended after {SECONDS} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_reach_the_weights_of_one(found, way):
    first, second = (ranks[way] for ranks in found)
    expected = WAYS[way][1]()
    start = weights_of(VAEWithLoss() if "parameter" in way else model())
    assert first.keys() == second.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=0, atol=1e-5)
        assert (weights - start[name]).abs().max() > 1e-3  # they have come a long way


def test_other_noise_reaches_other_weights():
    """What the tests above would not see if noise did not matter."""
    expected = whole_batch(model())
    shifted = model()
    optimizer = optimizer_of(shifted)
    for step, x in enumerate(batches()):
        out = shifted(x, seed=step, offset=LATENTS)
        optimizer.zero_grad()
        fastvae.VAELoss(0.5)(out.recon, x, kl=out.kl).backward()
        optimizer.step()
    assert max((expected[name] - w).abs().max() for name, w in weights_of(shifted).items()) > 1e-3
