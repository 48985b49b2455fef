"""What is timed: an op, its shape, the storage types of its tensors; inputs, and the bytes that must be moved."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

OPS = ("sample", "moments", "recon", "whole")  # names of what a Provider offers
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
    """Of a batch of images and of its latents; for the op `moments`, mean and log variance lie along dimension 1."""

    name: str
    image: tuple[int, ...]
    latent: tuple[int, ...]
    channels_last: bool = False


TINY = Shape("4x1x8x8", (4, 1, 8, 8), (4, 6))
MLP = Shape("128x784", (128, 784), (128, 20))
MEDIUM = Shape("256x3x64x64", (256, 3, 64, 64), (256, 128))
CONV = Shape("1024x3x64x64", (1024, 3, 64, 64), (1024, 128))
CONV_CHANNELS_LAST = replace(CONV, name="1024x3x64x64 channels_last", channels_last=True)
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
        return f"{self.op} {self.size} {self.precision.name} {self.phase}{scaled}"

    @property
    def kind(self) -> str:
        """The name without the size."""
        layout = " channels_last" if self.shape.channels_last else ""
        return f"{self.op}{layout} {self.precision.name} {self.phase}"

    @property
    def size(self) -> str:
        if self.op != "moments":
            return self.shape.name
        batch, channels, *rest = self.shape.latent
        return "x".join(map(str, (batch, 2 * channels, *rest)))

    @property
    def elements(self) -> int:
        """Of the images, or of the latents where there are no images."""
        return math.prod(self.shape.image if self.op in ("recon", "whole") else self.shape.latent)

    @property
    def moved_bytes(self) -> int:
        """Each input read once, each output and gradient written once; the latents' backward reads its inputs again."""
        n = math.prod(self.shape.image)
        latents = math.prod(self.shape.latent) * self.precision.latent.itemsize
        images = self.precision.recon.itemsize, self.precision.target.itemsize
        backward = self.phase == "forward+backward"
        sample = latents * (8 if backward else 3)
        recon = n * (sum(images) + images[0] * backward)
        return {"sample": sample, "moments": sample, "recon": recon, "whole": sample + recon}[self.op]


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
        op, precision = self.case.op, self.case.precision
        latent = self.case.shape.latent
        if op == "moments":
            return (self._latent((latent[0], 2 * latent[1], *latent[2:])),)
        images = (
            () if op == "sample" else (self._image(precision.recon).requires_grad_(), self._image(precision.target))
        )
        return (*images, *(() if op == "recon" else (self._latent(latent), self._latent(latent))))

    def _image(self, dtype: torch.dtype) -> Tensor:
        """No element is 0: what passes in place leave of it would shrink to subnormals, on which CPUs are slow."""
        shape = self.case.shape
        if dtype == torch.uint8:
            image = torch.randint(1, 256, shape.image, dtype=dtype, device=self.device)
        else:
            image = torch.rand(shape.image, dtype=dtype, device=self.device).clamp_(min=1 / 256)
        return image.contiguous(memory_format=torch.channels_last) if shape.channels_last else image

    def _latent(self, shape: tuple[int, ...]) -> Tensor:
        latent = torch.randn(shape, dtype=self.case.precision.latent, device=self.device)
        return latent.mul_(0.5).requires_grad_()

    def caller(
        self, function: Callable[..., tuple[Tensor, ...]], *, overwrites: bool = False
    ) -> Callable[[int], Result]:
        """Call number i of a provider's function, on input set i modulo their number.

        A function that overwrites its reconstruction gets copies, which are no leaves.
        """
        precision = self.case.precision
        of_latents, of_loss = (self.dz, self.dkl), (self.dloss,)
        upstream = {"sample": of_latents, "moments": of_latents, "recon": of_loss, "whole": (self.dloss, self.dz)}
        sets = [(recon.clone(), *rest) for recon, *rest in self.inputs] if overwrites else self.inputs
        cast: dict[tuple[torch.dtype, ...], list[Tensor]] = {}

        def forward(i: int) -> Result:
            with torch.no_grad(), precision.autocast(self.device):
                return Result(function(*sets[i % len(sets)]), None)

        def forward_backward(i: int) -> Result:
            inputs = sets[i % len(sets)]
            with precision.autocast(self.device):
                outputs = function(*inputs)
            dtypes = tuple(output.dtype for output in outputs)
            if dtypes not in cast:  # providers differ in them; converting is no part of what is timed
                cast[dtypes] = [u.to(dtype) for u, dtype in zip(upstream[self.case.op], dtypes, strict=True)]
            gradients = torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], cast[dtypes])
            return Result(outputs, gradients)

        return forward if self.case.phase == "forward" else forward_backward
