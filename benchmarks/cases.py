"""What is timed: an op, its shape, the storage types of its tensors; inputs, and the bytes that must be moved."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

OPS = ("sample", "recon", "whole")  # names of what a Provider offers
PHASES = ("forward", "forward+backward")  # forward: under no_grad, as in evaluation


@dataclass(frozen=True)
class Precision:
    """Storage types as training code meets them."""

    name: str
    recon: torch.dtype
    target: torch.dtype
    latent: torch.dtype

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The mode of 16-bit training; without it PyTorch would sum the squares of 16-bit images in 16 bits."""
        if self.recon == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.recon)


FP32 = Precision("fp32", torch.float32, torch.float32, torch.float32)
BF16 = Precision("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16)
FP16 = Precision("fp16", torch.float16, torch.float16, torch.float16)
AUTOCAST = Precision("autocast", torch.bfloat16, torch.float32, torch.bfloat16)  # bf16 decoder, images as loaded
BYTES = Precision("bytes", torch.bfloat16, torch.uint8, torch.bfloat16)  # the same, images left as uint8


@dataclass(frozen=True)
class Shape:
    name: str
    image: tuple[int, ...]
    latent: tuple[int, ...]


TINY = Shape("4x1x8x8", (4, 1, 8, 8), (4, 6))
MLP = Shape("128x784", (128, 784), (128, 20))
CONV = Shape("1024x3x64x64", (1024, 3, 64, 64), (1024, 128))
AUTOENCODER = Shape("256x3x256x256", (256, 3, 256, 256), (256, 4, 32, 32))  # of latent diffusion


def square(n: int) -> Shape:
    """About n image elements and n latents, in rows of 4096 or fewer."""
    rows = max(n // 4096, 8)  # few samples and a loss scale of 65536 would overflow float16
    size = (rows, n // rows)
    return Shape(f"{n:.0e}".replace("e+0", "e"), size, size)


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape
    precision: Precision
    phase: str
    upstream: float = 1.0  # gradient of the loss: 65536 is what a gradient scaler starts with

    @property
    def name(self) -> str:
        scaled = "" if self.upstream == 1 else f" upstream {self.upstream:g}"
        return f"{self.op} {self.shape.name} {self.precision.name} {self.phase}{scaled}"

    @property
    def moved_bytes(self) -> int:
        """Each input read once, each output and gradient written once; the latents' backward reads its inputs again."""
        n = math.prod(self.shape.image)
        latents = math.prod(self.shape.latent) * self.precision.latent.itemsize
        images = self.precision.recon.itemsize, self.precision.target.itemsize
        backward = self.phase == "forward+backward"
        sample = latents * (8 if backward else 3)
        recon = n * (sum(images) + images[0] * backward)
        return {"sample": sample, "recon": recon, "whole": sample + recon}[self.op]


class Result(NamedTuple):
    """Of one call; no gradients from a forward pass alone."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] | None


class Trial:
    """A case with its tensors: so many sets of inputs that on a GPU none is still cached when its turn comes again."""

    def __init__(self, case: Case, device: torch.device, sets: int = 1) -> None:
        self.case, self.device = case, device
        self.inputs = [self._inputs() for _ in range(sets)]
        self.dloss = torch.tensor(case.upstream, device=device)
        self.dz = torch.randn(case.shape.latent, device=device).to(case.precision.latent)
        self.dkl = torch.full(case.shape.latent[:1], 1 / case.shape.latent[0], device=device)

    def _inputs(self) -> tuple[Tensor, ...]:
        """The inputs of the op, those that are a network's output requiring a gradient."""
        shape, precision = self.case.shape, self.case.precision

        def image(dtype: torch.dtype) -> Tensor:
            if dtype == torch.uint8:
                return torch.randint(0, 256, shape.image, dtype=dtype, device=self.device)
            return torch.rand(shape.image, dtype=dtype, device=self.device)

        def latent() -> Tensor:
            return torch.randn(shape.latent, dtype=precision.latent, device=self.device).mul_(0.5).requires_grad_()

        images = () if self.case.op == "sample" else (image(precision.recon).requires_grad_(), image(precision.target))
        return (*images, *(() if self.case.op == "recon" else (latent(), latent())))

    def caller(self, function: Callable[..., tuple[Tensor, ...]]) -> Callable[[int], Result]:
        """Call number i of a provider's function, on input set i modulo their number."""
        precision = self.case.precision
        upstream = {"sample": (self.dz, self.dkl), "recon": (self.dloss,), "whole": (self.dloss, self.dz)}[self.case.op]

        cast: dict[tuple[torch.dtype, ...], list[Tensor]] = {}

        def forward(i: int) -> Result:
            with torch.no_grad(), precision.autocast(self.device):
                return Result(function(*self.inputs[i % len(self.inputs)]), None)

        def forward_backward(i: int) -> Result:
            inputs = self.inputs[i % len(self.inputs)]
            with precision.autocast(self.device):
                outputs = function(*inputs)
            dtypes = tuple(output.dtype for output in outputs)
            if dtypes not in cast:  # providers differ in them; converting is no part of what is timed
                cast[dtypes] = [u.to(dtype) for u, dtype in zip(upstream, dtypes, strict=True)]
            gradients = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], cast[dtypes])
            return Result(outputs, gradients)

        return forward if self.case.phase == "forward" else forward_backward
