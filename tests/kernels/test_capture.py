"""What a captured CUDA graph needs of a training step, proven without a GPU: no launch depends on a tensor's value."""

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits

pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Record what is launched, and launch nothing."""
    import triton

    recorded = []

    def run(kernel, *args, grid, warmup, **options):
        signature = [plain(x) for x in (*args, *sorted(options.items()))]
        recorded.append((kernel.__name__, grid, signature))

    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    with fastvae.use_backend("triton"):
        yield recorded


def plain(x):
    """An argument without the memory it points to: a graph keeps that."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride()
    return (
        type(x)(*map(plain, x)) if hasattr(x, "_fields") else tuple(map(plain, x)) if isinstance(x, tuple) else str(x)
    )


OPTIONS = {
    "textbook": lambda new: {},
    "beta": lambda new: {"beta": new(()), "recon_weight": new(())},
    "learned": lambda new: {"likelihood": Gaussian(new(()), full=True)},
    "learned, softly clipped": lambda new: {"likelihood": Gaussian(new(()), softclip=-6.0)},
    "per sample": lambda new: {"likelihood": Scaled("l1", new((4,))), "weight": new((4,)), "extra": new((4,))},
    "per element": lambda new: {"likelihood": Gaussian(new((4, 30)))},
    "optimal": lambda new: {"likelihood": Gaussian("optimal", softclip=-6.0)},
    "mask": lambda new: {"mask": new((4, 30)) > 0.5, "likelihood": Gaussian(mask_normalize=True)},
    "prior": lambda new: {"prior": (new((4, 6)), new((6,))), "logvar_clamp": (-3.0, 3.0)},
    "capacity": lambda new: {"capacity": Capacity(new(()), "batch")},
    **{mode: lambda new, mode=mode: {"free_bits": FreeBits(0.3, mode)} for mode in ("dim", "dim_batch", "sample")},
}


def step(options, new, seed):
    """Sampling, loss and backward pass of a step with an upstream gradient of any value."""
    recon, target, mu, logvar = new((4, 30)), new((4, 30)), new((4, 6)), new((4, 6))
    for t in (recon, mu, logvar):
        t.requires_grad_()
    z, _ = fastvae.reparameterize_kl(mu, logvar, seed=seed)
    terms = fastvae.vae_loss(recon, target, mu, logvar, **OPTIONS[options](new))
    torch.autograd.backward([terms.loss, z], [new(()), new(z.shape)])
    fastvae.latent_stats(mu, logvar, logvar_clamp=(-3.0, 3.0))


@pytest.mark.parametrize("options", OPTIONS)
def test_launches_are_the_same_whatever_the_values(launches, options):
    taken = []
    for value in (0.0, 1.0, 3.7):

        def new(shape, value=value):
            return torch.full(shape, value)

        step(options, new, torch.tensor([int(value * 10)]))
        taken.append(list(launches))
        launches.clear()
    assert len(taken[0]) >= 5
    assert taken[0] == taken[1] == taken[2]


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_waits_for_a_value(launches, options):
    """A meta tensor has none: whoever asks for it gets an error."""

    def new(shape):
        return torch.empty(shape, device="meta")

    step(options, new, torch.empty(1, dtype=torch.int64, device="meta"))
    assert len(launches) >= 5


def test_a_schedule_and_a_noise_seed_step_on_the_device():
    schedule = fastvae.schedules.Cyclical(0.0, 1.0, 100).to("meta")
    criterion = fastvae.VAELoss(beta=schedule)
    recon, mu = torch.empty(4, 30, device="meta", requires_grad=True), torch.empty(4, 6, device="meta")
    criterion(recon, recon.detach(), mu, mu).backward()
    schedule.step()
