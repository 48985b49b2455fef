"""A whole training step, network and Adam included: what sampling and loss are worth in real life."""

import pytest
import torch
from torch import Tensor, nn

from .comparison import Contest
from .conftest import DEVICE, Contender
from .peers import function_of
from .truth import WrongResult

LATENT = 20


class Net(nn.Module):
    """Encoder to 2 * LATENT moments, decoder from LATENT; the providers stand between and after them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def mlp() -> Net:
    """The VAE of the textbook examples: 784-400-20."""
    encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 400), nn.ReLU(), nn.Linear(400, 784), nn.Sigmoid())
    return Net(encoder, decoder)


def conv() -> Net:
    """64x64 colour images through four strided convolutions."""
    down = [(3, 32), (32, 64), (64, 128), (128, 256)]
    encoder = [layer for i, o in down for layer in (nn.Conv2d(i, o, 4, 2, 1), nn.ReLU())]
    decoder = [layer for i, o in down[::-1] for layer in (nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1))]
    return Net(
        nn.Sequential(*encoder, nn.Flatten(), nn.Linear(4096, 2 * LATENT)),
        nn.Sequential(nn.Linear(LATENT, 4096), nn.Unflatten(1, (256, 4, 4)), *decoder, nn.Sigmoid()),
    )


STEPS = {"mlp": (mlp, (784,), [128, 4096]), "conv": (conv, (3, 64, 64), [32])}
STEPS_ON_GPU = {"mlp": (mlp, (784,), [128, 8192]), "conv": (conv, (3, 64, 64), [256, 4096])}
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Step:
    """One provider's training step on its own copy of the network; all copies start alike."""

    def __init__(self, provider: str, network: str, images: Tensor) -> None:
        torch.manual_seed(0)
        self.net = STEPS[network][0]().to(DEVICE)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.sample, self.loss = function_of(provider, "sample"), function_of(provider, "loss")
        self.images = images

    def __call__(self, i: int) -> Outputs:
        mu, logvar = self.net.encoder(self.images).chunk(2, dim=1)
        z, kl = self.sample(mu, logvar)
        recon = self.net.decoder(z)
        loss = self.loss(recon, self.images, kl)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), recon.detach(), self.images, mu.detach(), logvar.detach()


def check_step(outputs: Outputs) -> None:
    """The loss of what the network put out; its gradients are judged in the benchmarks of the ops."""
    loss, recon, images, mu, logvar = (t.double() for t in outputs)
    kl = 0.5 * (mu.square() + torch.expm1(logvar) - logvar)
    truth = ((recon - images).square().sum() + kl.sum()) / len(images)
    if not abs(float(loss / truth) - 1) < 1e-5:
        raise WrongResult(f"the step's loss is {float(loss):.7g}; {float(truth):.7g} is right")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    table = STEPS_ON_GPU if DEVICE.type == "cuda" else STEPS
    disabled = metafunc.config.getoption("benchmark_disable")
    steps = [(network, batch) for network, (_, _, sizes) in table.items() for batch in sizes]
    metafunc.parametrize(("network", "batch"), [("mlp", 8), ("conv", 2)] if disabled else steps)


def bench_train_step(contend: Contender, network: str, batch: int) -> None:
    images = torch.rand(batch, *STEPS[network][1], device=DEVICE)

    def contest_of(providers: list[str]) -> Contest:
        return Contest(f"step {network} B={batch}", {p: Step(p, network, images) for p in providers}, check_step)

    contend(f"step {network} B={batch}", contest_of)
