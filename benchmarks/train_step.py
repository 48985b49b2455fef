"""A whole training step, network and Adam included: what sampling and loss are worth in real life."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .comparison import Call, Run
from .precision import AUTOCAST, FP32, Precision
from .providers import BACKENDS, COMPILED, DISTRIBUTIONS, EAGER, FALLBACK, IN_PLACE, KERNELS, function_of, on_backend
from .truth import WrongResult

LATENT = 20
Outputs = tuple[Tensor, ...]  # loss, recon, mu, logvar


def mlp() -> tuple[nn.Module, nn.Module]:
    """The VAE of the textbook examples: 784-400-20. The decoder's output may be overwritten: no sigmoid follows."""
    encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 2 * LATENT))
    return encoder, nn.Sequential(nn.Linear(LATENT, 400), nn.ReLU(), nn.Linear(400, 784))


def conv() -> tuple[nn.Module, nn.Module]:
    """64x64 colour images through four strided convolutions."""
    down = [(3, 32), (32, 64), (64, 128), (128, 256)]
    encoder = [layer for i, o in down for layer in (nn.Conv2d(i, o, 4, 2, 1), nn.ReLU())]
    decoder = [layer for i, o in down[::-1] for layer in (nn.ReLU(), nn.ConvTranspose2d(o, i, 4, 2, 1))]
    encoder += nn.Flatten(), nn.Linear(4096, 2 * LATENT)
    return nn.Sequential(*encoder), nn.Sequential(nn.Linear(LATENT, 4096), nn.Unflatten(1, (256, 4, 4)), *decoder)


NETWORKS = {"mlp": (mlp, (784,)), "conv": (conv, (3, 64, 64))}


@dataclass(frozen=True)
class StepCase:
    """Of a training step; `compiled`: network, sampling and loss by torch.compile as one."""

    network: str
    batch: int
    precision: Precision = FP32
    compiled: bool = False
    moved_bytes: None = None

    @property
    def name(self) -> str:
        return f"step {self.network} {self.batch} {self.precision.name}{' compiled' * self.compiled}"

    @property
    def providers(self) -> tuple[str, ...]:
        return (COMPILED, KERNELS, FALLBACK) if self.compiled else (EAGER, COMPILED, DISTRIBUTIONS, *BACKENDS)

    def setup(self, device: torch.device, compiler: str = "inductor") -> Callable[[str], Run]:
        """Make the images; returns the function that makes a provider's run."""
        images = torch.rand(self.batch, *NETWORKS[self.network][1], device=device)

        def run_of(provider: str) -> Run:
            check = partial(check_step, images, self.precision, overwritten=provider == IN_PLACE)
            return Run(on_backend(self._step(provider, images, compiler), provider), check)

        return run_of

    def _step(self, provider: str, images: Tensor, compiler: str) -> Call:
        """Each provider trains its own copy of the network, and all copies start alike."""
        torch.manual_seed(0)
        encoder, decoder = (net.to(images.device) for net in NETWORKS[self.network][0]())
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-4)
        inner = EAGER if provider == COMPILED and self.compiled else provider
        sample, loss = (function_of(inner, op, compiler) for op in ("sample", "loss"))

        def forward() -> Outputs:
            mu, logvar = encoder(images).chunk(2, dim=1)
            z, kl = sample(mu, logvar)
            recon = decoder(z)
            return loss(recon, images, kl)[0], recon, mu, logvar

        if self.compiled:
            forward = torch.compile(forward, dynamic=False, backend=compiler)

        def step(i: int) -> Outputs:
            with self.precision.autocast(images.device):
                outputs = forward()
            optimizer.zero_grad()
            torch.autograd.backward(outputs[0])
            optimizer.step()
            return tuple(t.detach() for t in outputs)

        return step


def check_step(images: Tensor, precision: Precision, outputs: Outputs, *, overwritten: bool) -> None:
    """The loss of what the network put out; gradients are checked in the cases of the ops."""
    loss, recon, mu, logvar = (t.double() for t in outputs)
    batch = len(images)
    error = recon * (batch / 2) if overwritten else recon - images  # where recon was, there is its gradient
    kl = 0.5 * (mu.square() + torch.expm1(logvar) - logvar)
    truth = (error.square().sum() + kl.sum()) / batch
    if not abs(float(loss / truth) - 1) < (1e-5 if precision == FP32 else 1e-2):
        raise WrongResult(f"the step's loss is {float(loss):.7g}; {float(truth):.7g} is right")


def steps(scale: str, device: torch.device) -> list[StepCase]:
    if scale == "tiny":
        return [StepCase("mlp", 8), StepCase("conv", 2, AUTOCAST), StepCase("mlp", 8, compiled=True)]
    large = 4096 if device.type == "cuda" else 32
    plain = StepCase("mlp", 128), StepCase("mlp", 8192), StepCase("conv", large), StepCase("conv", large, AUTOCAST)
    return [*plain, StepCase("mlp", 128, compiled=True), StepCase("conv", large, compiled=True)]
