"""A whole training step, network and Adam included: what sampling and loss are worth in real life."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from .cases import AUTOCAST, FP32, Precision
from .comparison import Contest
from .conftest import DEVICE, Contender, scale_of
from .footprint import peak_mib
from .peers import COMPILED, OURS, OURS_IN_PLACE, function_of
from .truth import WrongResult

LATENT = 20
PROVIDERS = ("eager", COMPILED, "torch.distributions", OURS, OURS_IN_PLACE)


class Net(nn.Module):
    """Encoder to 2 * LATENT moments, decoder from LATENT; the providers stand between and after them.

    The decoder ends in a linear layer, whose output may be overwritten.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def mlp() -> Net:
    """The VAE of the textbook examples: 784-400-20."""
    encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 400), nn.ReLU(), nn.Linear(400, 784))
    return Net(encoder, decoder)


def conv() -> Net:
    """64x64 colour images through four strided convolutions."""
    down = [(3, 32), (32, 64), (64, 128), (128, 256)]
    encoder = [layer for i, o in down for layer in (nn.Conv2d(i, o, 4, 2, 1), nn.ReLU())]
    decoder = [layer for i, o in down[::-1] for layer in (nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1))]
    return Net(
        nn.Sequential(*encoder, nn.Flatten(), nn.Linear(4096, 2 * LATENT)),
        nn.Sequential(nn.Linear(LATENT, 4096), nn.Unflatten(1, (256, 4, 4)), *decoder),
    )


NETWORKS: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {"mlp": (mlp, (784,)), "conv": (conv, (3, 64, 64))}


@dataclass(frozen=True)
class StepCase:
    """Of a training step; `compiled`: network, sampling and loss by torch.compile as one."""

    network: str
    batch: int
    precision: Precision = FP32
    compiled: bool = False

    @property
    def name(self) -> str:
        compiled = " compiled" if self.compiled else ""
        return f"step {self.network} B={self.batch} {self.precision.name}{compiled}"

    @property
    def providers(self) -> tuple[str, ...]:
        return (COMPILED, OURS) if self.compiled else PROVIDERS


class Outputs(NamedTuple):
    loss: Tensor
    recon: Tensor
    mu: Tensor
    logvar: Tensor


class Step:
    """One provider's training step on its own copy of the network; all copies start alike."""

    def __init__(self, provider: str, case: StepCase, images: Tensor, backend: str) -> None:
        torch.manual_seed(0)
        self.net = NETWORKS[case.network][0]().to(DEVICE)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        if provider == COMPILED and case.compiled:
            provider = "eager"
        self.sample, self.loss = (function_of(provider, op, backend) for op in ("sample", "loss"))
        compiled = torch.compile(self._forward, dynamic=False, backend=backend)
        self.forward = compiled if case.compiled else self._forward
        self.images, self.precision = images, case.precision

    def _forward(self, images: Tensor) -> Outputs:
        mu, logvar = self.net.encoder(images).chunk(2, dim=1)
        z, kl = self.sample(mu, logvar)
        recon = self.net.decoder(z)
        return Outputs(self.loss(recon, images, kl), recon, mu, logvar)

    def __call__(self, i: int) -> Outputs:
        with self.precision.autocast(DEVICE):
            outputs = self.forward(self.images)
        self.optimizer.zero_grad()
        torch.autograd.backward(outputs.loss)
        self.optimizer.step()
        return Outputs(*(t.detach() for t in outputs))


def check_step(outputs: Outputs, images: Tensor, precision: Precision, *, overwritten: bool) -> None:
    """The loss of what the network put out; its gradients are judged in the benchmarks of the ops."""
    loss, recon, mu, logvar = (t.double() for t in outputs)
    batch = len(images)
    error = recon * (batch / 2) if overwritten else recon - images  # where recon was, there is its gradient
    kl = 0.5 * (mu.square() + torch.expm1(logvar) - logvar)
    truth = (error.square().sum() + kl.sum()) / batch
    if not abs(float(loss / truth) - 1) < (1e-5 if precision == FP32 else 1e-2):
        raise WrongResult(f"the step's loss is {float(loss):.7g}; {float(truth):.7g} is right")


def batch_that_fits(free_mib: float, trial_batch: int = 64) -> int:
    """The largest power of two whose training step of the convolutional network needs half of the free memory."""
    case = StepCase("conv", trial_batch)
    images = torch.rand(trial_batch, *NETWORKS["conv"][1], device=DEVICE)
    step = Step("eager", case, images, "inductor")
    step(0)  # which allocates the optimizer's state
    batch = int(0.5 * free_mib / peak_mib(step, DEVICE) * trial_batch)
    return 1 << max(batch.bit_length() - 1, 0)


def steps(scale: str) -> list[StepCase]:
    if scale == "tiny":
        return [StepCase("mlp", 8), StepCase("conv", 2, AUTOCAST), StepCase("mlp", 8, compiled=True)]
    large = batch_that_fits(torch.cuda.mem_get_info(DEVICE)[0] / 2**20) if DEVICE.type == "cuda" else 32
    return [
        *(StepCase("mlp", batch) for batch in (128, 8192)),
        *(StepCase("conv", large, precision) for precision in (FP32, AUTOCAST)),
        *(StepCase(network, batch, compiled=True) for network, batch in (("mlp", 128), ("conv", large))),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(case, provider) for case in steps(scale_of(metafunc.config)) for provider in case.providers]
    ids = [f"{case.name}-{provider}".replace(" ", "-") for case, provider in pairs]
    metafunc.parametrize(("step_case", "provider"), pairs, ids=ids)


def bench_train_step(contend: Contender, step_case: StepCase) -> None:
    images = torch.rand(step_case.batch, *NETWORKS[step_case.network][1], device=DEVICE)

    def contest_of(providers: list[str], backend: str) -> Contest:
        def verify(provider: str, outputs: Any) -> None:
            check_step(outputs, images, step_case.precision, overwritten=provider == OURS_IN_PLACE)

        return Contest(step_case.name, {p: Step(p, step_case, images, backend) for p in providers}, verify)

    contend(step_case.name, contest_of)
