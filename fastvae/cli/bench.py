"""`fastvae bench`: what sampling and loss cost for the user's own shapes, and what share of a training step they are.

The benchmarks of the repository measure more, by the same clock and against the same formulas; they import this module,
so that it needs torch alone until it runs.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae

from .timing import Call, Timings, clock_of, interleave, on_threads

HELP = """Time sampling and loss against textbook PyTorch, and say what share of a training step they are.

Forward and backward pass, every candidate in turn; on a CPU one thread and its CPU time. A ratio above 1 is how many
times as fast as eager PyTorch something is, with quartiles.

Examples:
  fastvae bench
  fastvae bench --batch 1024 --image 3 64 64 --latent 128
  fastvae bench --batch 16 --image 3 256 256 --latent 4 32 32 --dtype autocast --compile
"""

EAGER, COMPILED, OURS, IN_PLACE = "eager", "torch.compile", "fastvae", "fastvae in place"
Sampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # mu, logvar -> z, kl [B]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # recon, target, kl [B] -> loss
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.bfloat16}


@dataclass(frozen=True)
class Bench:
    """Options of `fastvae bench`."""

    batch: int = 128
    """Images in a training step."""
    image: tuple[int, ...] = (1, 28, 28)
    """Shape of an image."""
    latent: tuple[int, ...] = (32,)
    """Shape of an image's latent."""
    dtype: Literal["fp32", "bf16", "fp16", "autocast"] = "fp32"
    """Storage of images and latents; "autocast" is a bf16 network with images as loaded, in fp32."""
    compile: bool = False
    """Time torch.compile, too, which takes a while to build."""
    loss_only: bool = False
    """Leave the training step out."""
    seconds: float = 4.0
    """Time for each comparison."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", ..."""


def run(options: Bench) -> int:
    """Print the figures."""
    from fastvae.training.config import MOST
    from fastvae.training.setup import require_fits, resolve_device

    from .inputs import require_positive

    require_positive("batch", options.batch)
    for name, shape in (("image", options.image), ("latent", options.latent)):
        if not shape or not 1 <= min(shape) <= max(shape) <= MOST:
            allowed = f"at most {MOST}" if shape and min(shape) >= 1 else "at least 1"
            raise ValueError(f"--{name} must be one or more sizes of {allowed}; got {' '.join(map(str, shape))}.")
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be above 0; got {options.seconds}.")
    device = resolve_device(options.device)
    # recon, target, their gradient and a peer's error, and as many for the latents
    elements = options.batch * (math.prod(options.image) + math.prod(options.latent))
    require_fits(4 * elements * STORAGE[options.dtype].itemsize, device, "to time a batch of these sizes")
    clock = "1 thread, CPU time" if device.type == "cpu" else "device time" if device.type == "cuda" else "wall time"
    image, latent = ("x".join(map(str, shape)) for shape in (options.image, options.latent))
    print(f"{options.batch} images {image}, latents {latent}, {options.dtype}, on {device} ({clock})")
    torch.manual_seed(0)
    with on_threads(1):
        print("\n".join(_report(options, device)))
    return 0


def textbook_sample(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """z and its KL, [B], as the VAE of pytorch/examples has them."""
    std = torch.exp(0.5 * logvar)
    z = mu + torch.randn_like(std) * std
    return z, -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)


def textbook_recon(recon: Tensor, target: Tensor) -> Tensor:
    """Sum of squared errors, mean over the batch."""
    return F.mse_loss(recon, target, reduction="sum") / recon.shape[0]


def _textbook_loss(recon: Tensor, target: Tensor, kl: Tensor) -> Tensor:
    return textbook_recon(recon, target) + kl.mean()


def _providers(options: Bench) -> dict[str, tuple[Sampler, Loss]]:
    def loss(recon: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return fastvae.vae_loss(recon, target, kl=kl).loss

    def loss_in_place(recon: Tensor, target: Tensor, kl: Tensor) -> Tensor:
        return fastvae.vae_loss(recon, target, kl=kl, inplace=True).loss

    found: dict[str, tuple[Sampler, Loss]] = {EAGER: (textbook_sample, _textbook_loss)}
    if options.compile:
        found[COMPILED] = torch.compile(textbook_sample), torch.compile(_textbook_loss)
    found[OURS] = fastvae.reparameterize_kl, loss
    if options.dtype != "fp16":  # whose gradient may underflow before a loss scaler can help
        found[IN_PLACE] = fastvae.reparameterize_kl, loss_in_place
    return found


def _report(options: Bench, device: torch.device) -> list[str]:
    providers = _providers(options)
    losses = {name: _loss_call(options, device, *functions) for name, functions in providers.items()}
    _require_same_loss(losses, STORAGE[options.dtype])
    clock = clock_of(device)
    timings = interleave(losses, clock, seconds=options.seconds)
    lines = ["sampling and loss, forward and backward:", *_lines(timings)]
    if options.loss_only:
        return lines
    steps: dict[str, Call] = {}
    for name, functions in providers.items():
        steps[name], parameters = _step_call(options, device, *functions)
    loss_of_eager = f"loss of {EAGER}"
    timings = interleave({**steps, loss_of_eager: losses[EAGER]}, clock, seconds=options.seconds)
    share = 100 / timings.ratio(EAGER, loss_of_eager).median
    del timings.seconds[loss_of_eager]
    return [
        *lines,
        f"a whole training step with Adam, of a VAE of fastvae's with {parameters:,} parameters:",
        *_lines(timings),
        f"Sampling and loss are {share:.1f} % of the step with eager PyTorch: that is the most that any loss can save "
        "here. A larger network has a smaller share.",
    ]


def _lines(timings: Timings) -> list[str]:
    lines = []
    for name in timings.seconds:
        ratio = timings.ratio(EAGER, name)
        versus = "" if name == EAGER else f"  {ratio.median:6.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
        lines.append(f"  {name:<18}{timings.median(name) * 1e3:>12.3f} ms{versus}")
    return lines


def _autocast(options: Bench, device: torch.device) -> AbstractContextManager[object]:
    """Without it, eager PyTorch would sum 16-bit squares in 16 bits."""
    return nullcontext() if options.dtype == "fp32" else torch.autocast(device.type, dtype=STORAGE[options.dtype])


def _loss_call(options: Bench, device: torch.device, sample: Sampler, loss: Loss) -> Call:
    """Sampling and loss, and the gradients of recon, mu and logvar."""
    storage = STORAGE[options.dtype]
    torch.manual_seed(0)  # the same inputs for each provider
    images = (options.batch, *options.image)
    # no leaf, so that it may be overwritten; no zero, which being overwritten would turn into slow subnormals
    recon = torch.rand(images, device=device).to(storage).requires_grad_().clone()
    target = torch.rand(images, device=device).clamp_(min=1 / 256)
    if options.dtype != "autocast":
        target = target.to(storage)
    mu, logvar = (
        torch.randn(options.batch, *options.latent, device=device).to(storage).requires_grad_() for _ in range(2)
    )
    dz = torch.randn(mu.shape, device=device).to(storage)

    def call(i: int) -> Tensor:
        with _autocast(options, device):
            z, kl = sample(mu, logvar)
            value = loss(recon, target, kl)
        torch.autograd.grad((value, z), (recon, mu, logvar), (torch.ones_like(value), dz.to(z.dtype)))
        return value.detach()

    return call


def _step_call(options: Bench, device: torch.device, sample: Sampler, loss: Loss) -> tuple[Call, int]:
    """A training step, and the number of parameters."""
    from fastvae.models import VAE, VAEConfig

    is_picture = len(options.image) == 3
    channels, *size = options.image if is_picture else (1, 1, math.prod(options.image))
    torch.manual_seed(0)
    config = VAEConfig(
        image_size=(size[0], size[1]),
        channels=channels,
        latent_dim=math.prod(options.latent),
        backbone="conv" if is_picture else "mlp",
    )
    model = VAE(config).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(options.batch, *config.image_shape, device=device)

    def call(i: int) -> None:
        with _autocast(options, device):
            z, kl = sample(*model.encode(images))
            value = loss(model.decode(z), images, kl)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()

    return call, sum(parameter.numel() for parameter in model.parameters())


def _require_same_loss(calls: dict[str, Call], storage: torch.dtype) -> None:
    """No speed without the right result; noise does not enter the loss of given images."""
    losses = {name: float(call(0)) for name, call in calls.items()}
    tolerance = 1e-5 if storage == torch.float32 else 2e-2
    if not all(abs(loss / losses[EAGER] - 1) < tolerance for loss in losses.values()):
        raise RuntimeError(f"the losses differ: {losses}")
