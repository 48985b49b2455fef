"""What is timed: an op, its shape, the storage types of its tensors, a phase; its inputs and the bytes it must move."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .comparison import Run
from .losses import LOSSES, tensor
from .precision import AUTOCAST, BF16, BYTES, FP32, Precision
from .providers import IN_PLACE, LOSS, function_of, on_backend, providers_of
from .train_step import StepCase, steps
from .truth import Result, check

OPS = ("sample", "moments", "recon", "whole", *(LOSS + name for name in LOSSES))
PHASES = FORWARD, BACKWARD, EVALUATION = "forward", "forward+backward", "evaluation"  # the last under torch.no_grad


@dataclass(frozen=True)
class Shape:
    """Of a batch of images and of its latents; for the op `moments`, mean and log variance lie along dimension 1."""

    name: str
    image: tuple[int, ...]
    latent: tuple[int, ...]
    channels_last: bool = False


TINY = Shape("8x1x8x8", (8, 1, 8, 8), (8, 3, 4, 4))
TINY_MLP = Shape("8x64", (8, 64), (8, 12))
MLP = Shape("128x784", (128, 784), (128, 20))
MEDIUM = Shape("256x3x64x64", (256, 3, 64, 64), (256, 128))
CONV = Shape("1024x3x64x64", (1024, 3, 64, 64), (1024, 128))
CONV_CHANNELS_LAST = replace(CONV, name="1024x3x64x64 channels_last", channels_last=True)
AUTOENCODER = Shape("256x3x256x256", (256, 3, 256, 256), (256, 4, 32, 32))  # of latent diffusion


@dataclass(frozen=True)
class OpCase:
    op: str
    shape: Shape
    precision: Precision
    phase: str

    @property
    def name(self) -> str:
        size = self.shape.name
        if self.op == "moments":
            batch, channels, *rest = self.shape.latent
            size = "x".join(map(str, (batch, 2 * channels, *rest)))
        return f"{self.op} {size} {self.precision.name} {self.phase}"

    @property
    def providers(self) -> tuple[str, ...]:
        return providers_of(self.op, len(self.shape.latent), backward=self.phase == BACKWARD)

    @property
    def moved_bytes(self) -> int:
        """Each input read once, each output and gradient written once; the latents' backward reads its inputs again.
        Of the tensors that only some losses need, nothing is counted."""
        backward = self.phase == BACKWARD
        recon, target = self.precision.recon.itemsize, self.precision.target.itemsize
        images = math.prod(self.shape.image) * (recon + target + recon * backward)
        latents = math.prod(self.shape.latent) * self.precision.latent.itemsize
        sample = latents * (8 if backward else 3)
        losses = images + latents * (6 if backward else 2)  # which draw no z
        return {"sample": sample, "moments": sample, "recon": images, "whole": sample + images}.get(self.op, losses)

    def setup(self, device: torch.device, compiler: str = "inductor") -> Callable[[str], Run]:
        """Make the tensors, which all providers share; returns the function that makes a provider's run."""
        trial = Trial(self, device)

        def run_of(provider: str) -> Run:
            call = trial.caller(function_of(provider, self.op, compiler), overwrites=provider == IN_PLACE)
            return Run(on_backend(call, provider), trial.check)

        return run_of


class Trial:
    """A case with its tensors: so many sets of inputs that on a GPU none is still cached when its turn comes again."""

    def __init__(self, case: OpCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.inputs = [self._inputs() for _ in range(uncached_sets(case.moved_bytes, device))]
        batch, shape = case.shape.latent[0], case.shape.latent
        loss = torch.ones((batch,) if case.op == f"{LOSS}reduction_none" else (), device=device)
        dz = torch.randn(shape, device=device).to(case.precision.latent)
        sample = dz, torch.full((batch,), 1 / batch, device=device)
        self.upstream = {"sample": sample, "moments": sample, "whole": (loss, dz)}.get(case.op, (loss,))

    def _inputs(self) -> tuple[Tensor, ...]:
        """The inputs of the op, those that are a network's output requiring a gradient."""
        op, precision, shape = self.case.op, self.case.precision, self.case.shape
        if op == "moments":
            return (self._latent((shape.latent[0], 2 * shape.latent[1], *shape.latent[2:])),)
        images = [self._image(dtype) for dtype in (precision.recon, precision.target) if op != "sample"]
        latents = [self._latent(shape.latent) for _ in range(2) if op != "recon"]
        needs = LOSSES[op.removeprefix(LOSS)].needs if op.startswith(LOSS) else ()
        further = (tensor(name, shape.image, shape.latent, precision.latent, self.device) for name in needs)
        return (*(image.requires_grad_(i == 0) for i, image in enumerate(images)), *latents, *further)

    def _image(self, dtype: torch.dtype) -> Tensor:
        """No element is 0: what passes in place leave of it would shrink to subnormals, on which CPUs are slow."""
        image = torch.rand(self.case.shape.image, device=self.device).clamp_(1 / 256, 255 / 256)
        image = (image * 256).to(dtype) if dtype == torch.uint8 else image.to(dtype)
        return image.contiguous(memory_format=torch.channels_last) if self.case.shape.channels_last else image

    def _latent(self, shape: tuple[int, ...]) -> Tensor:
        latent = torch.randn(shape, dtype=self.case.precision.latent, device=self.device)
        return latent.mul_(0.5).requires_grad_()

    def caller(
        self, function: Callable[..., tuple[Tensor, ...]], *, overwrites: bool = False
    ) -> Callable[[int], Result]:
        """Call number i of a function, on input set i modulo their number.

        A function that overwrites its reconstruction gets copies, which are no leaves.
        """
        sets = [(recon.clone(), *rest) for recon, *rest in self.inputs] if overwrites else self.inputs
        phase, device, autocast = self.case.phase, self.device, self.case.precision.autocast
        cast: dict[tuple[torch.dtype, ...], list[Tensor]] = {}

        def call(i: int) -> Result:
            inputs = sets[i % len(sets)]
            with torch.set_grad_enabled(phase != EVALUATION), autocast(device):
                outputs = function(*inputs)
            if phase != BACKWARD:
                return outputs, None
            dtypes = tuple(output.dtype for output in outputs)
            if dtypes not in cast:  # providers differ in them; converting is no part of what is timed
                cast[dtypes] = [u.to(dtype) for u, dtype in zip(self.upstream, dtypes, strict=True)]
            return outputs, torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], cast[dtypes])

        return call

    def check(self, result: Result) -> None:
        """Raises WrongResult: what the first call returned is off."""
        check(self.case.op, self.inputs[0], self.upstream, result)


def uncached_sets(moved_bytes: int, device: torch.device) -> int:
    """How many sets of inputs it takes that none is still in the second-level cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-2 * cache // max(moved_bytes, 1))))


SCALES = ("tiny", "default", "full")  # tiny shows that everything runs, default has what matters most
Row = tuple[Shape, list[Precision], tuple[str, ...]]  # every combination of it
BATCHES = (8, 32, 200)  # of 3x64x64 images, for every likelihood and option
_TINY: list[Row] = [(TINY_MLP, [FP32], PHASES), (TINY, [AUTOCAST], (BACKWARD,))]
_LATENTS: dict[str, list[Row]] = {
    "sample": [(MLP, [FP32], PHASES), (CONV, [FP32, BF16], PHASES)],
    "moments": [(AUTOENCODER, [FP32], PHASES), (AUTOENCODER, [BF16], (BACKWARD,))],
}
_IMAGES: list[Row] = [(MLP, [FP32], PHASES), (MEDIUM, [FP32], (BACKWARD,)), (CONV, [FP32, AUTOCAST, BF16], PHASES)]


def suite(scale: str, device: torch.device) -> list[OpCase | StepCase]:
    """The cases of a scale; the long table of losses comes last, in case the time runs out."""
    rows = [(op, row) for op in OPS for row in _rows(op, scale, device)]
    ops = [OpCase(op, shape, p, phase) for op, (shape, ps, phases) in rows for p in ps for phase in phases]
    return sorted([*ops, *steps(scale, device)], key=lambda case: case.name.startswith(LOSS))


def _rows(op: str, scale: str, device: torch.device) -> list[Row]:
    if scale == "tiny":
        return [(TINY, [FP32], (BACKWARD,))] if op.startswith(LOSS) else _TINY
    if op in _LATENTS:
        return _LATENTS[op]
    if op.startswith(LOSS):
        shapes = [Shape(f"{batch}x3x64x64", (batch, 3, 64, 64), (batch, 128)) for batch in BATCHES]
        return [(s, [FP32, BF16], PHASES) for s in shapes] if scale == "full" else [(shapes[1], [FP32], (BACKWARD,))]
    rows = [*_IMAGES, *([(CONV_CHANNELS_LAST, [FP32], (BACKWARD,))] if op == "recon" else [])]
    if device.type == "cuda" or scale == "full":
        rows.append((AUTOENCODER, [FP32, AUTOCAST], (BACKWARD,)))
    return [*rows, (CONV, [BYTES], (BACKWARD, EVALUATION))] if device.type == "cuda" else rows
