"""The launches that the gates on kernels look at: every kernel, storage dtype and size class, by the public API."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastvae

Op = Literal["noise", "sample", "sample_kl", "kl", "loss", "whole_loss"]
WHAT_IT_DOES: dict[Op, str] = {
    "noise": "`philox_normal`",
    "sample": "`reparameterize`",
    "sample_kl": "`reparameterize_kl`",
    "kl": "`gaussian_kl`",
    "loss": "`vae_loss(kl=...)`",
    "whole_loss": "`vae_loss(mu, logvar)`",
}
ALIGNED, ODD = (2, 6272), (3, 4181)  # several tiles, the last one cut off
ODD_BATCH = (3, 6272)  # rows stay aligned
SHORT_ROWS = (393, 32)  # several samples share a tile
SEVERAL_TILES = (64, 2**20)  # one program takes several tiles
HUGE = (3, 2**30)  # more than 2^31 elements


class Floor(NamedTuple):
    """The fewest bytes an element can cost: what has to be read and written once."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


class Step(NamedTuple):
    inputs: tuple[Tensor, ...]  # those that require a gradient
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op and its backward pass.

    Attributes:
        dtype: Storage dtype of all tensors but these: the KL of samples, in float32 at least; the target, if it has a
            `target_dtype`.
        shape: Of images and latents alike, unless a sample has `latent_cols` latents.
        upstream: Gradient of every output. The backward pass of a loss has nothing to do for images where it is 1.
        clamp: Whether logvar is clamped.
    """

    op: Op
    dtype: torch.dtype
    target_dtype: torch.dtype | None = None
    shape: tuple[int, int] = ALIGNED
    upstream: float = 1.0
    clamp: bool = False
    latent_cols: int | None = None

    def __str__(self) -> str:
        dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.target_dtype) if dtype)
        parts = [self.op, dtypes, "x".join(map(str, self.shape))]
        parts += [f"upstream{self.upstream:g}"] * (self.upstream != 1) + ["clamp"] * self.clamp
        return "-".join(parts + ["few_latents"] * (self.latent_cols is not None))

    @property
    def n_elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def has_noise(self) -> bool:
        return self.op in ("noise", "sample", "sample_kl")

    @property
    def forward_floor(self) -> Floor:
        size = self.dtype.itemsize
        image = Floor(size + (self.target_dtype or self.dtype).itemsize, size if self._one_pass else 0)
        return {
            "noise": Floor(0, size),
            "sample": Floor(2 * size, size),
            "sample_kl": Floor(2 * size, size),
            "kl": Floor(2 * size, 0),
            "loss": image,
            "whole_loss": Floor(image.read + 2 * size, image.written),
        }[self.op]

    @property
    def backward_floor(self) -> Floor:
        size = self.dtype.itemsize
        image = Floor(size + (self.target_dtype or self.dtype).itemsize, size)
        if self._one_pass:
            exact = size > 2 or self.upstream == 2 ** round(torch.tensor(self.upstream).log2().item())
            image = Floor(size, size) if exact else image
            image = Floor(0, 0) if self.upstream == 1 else image
        return {
            "noise": Floor(0, 0),
            "sample": Floor(2 * size, 2 * size),  # z's gradient is mu's, and mu is not needed
            "sample_kl": Floor(3 * size, 2 * size),
            "kl": Floor(2 * size, 2 * size),
            "loss": image,
            "whole_loss": Floor(image.read + 2 * size, image.written + 2 * size),
        }[self.op]

    @property
    def _one_pass(self) -> bool:
        return self.dtype != torch.float16  # where an unscaled gradient would underflow

    def forward(self, device: str = "cpu") -> Step:
        """Random inputs on the CPU, the same every time; on meta, none."""
        draw = torch.Generator().manual_seed(5) if device == "cpu" else None

        def tensor(shape: tuple[int, ...], dtype: torch.dtype, *, leaf: bool = True) -> Tensor:
            if draw is None:
                made = torch.empty(shape, dtype=dtype, device=device)
            elif dtype == torch.uint8:
                made = torch.randint(256, shape, dtype=dtype, generator=draw)
            else:
                made = torch.rand(shape, generator=draw).to(dtype)
            return made.requires_grad_(leaf)

        if self.op == "noise":
            return Step((), (fastvae.philox_normal(self.shape, seed=7, dtype=self.dtype, device=device),))
        clamp = (-30.0, 20.0) if self.clamp else None
        if self.op in ("sample", "sample_kl", "kl"):
            mu, logvar = inputs = tensor(self.shape, self.dtype), tensor(self.shape, self.dtype)
            if self.op == "sample":
                return Step(inputs, (fastvae.reparameterize(mu, logvar, seed=7, logvar_clamp=clamp),))
            if self.op == "kl":
                return Step(inputs, (fastvae.gaussian_kl(mu, logvar, logvar_clamp=clamp),))
            return Step(inputs, fastvae.reparameterize_kl(mu, logvar, seed=7, logvar_clamp=clamp))
        recon = tensor(self.shape, self.dtype)
        target = tensor(self.shape, self.target_dtype or self.dtype, leaf=False)
        if self.op == "whole_loss":
            latents = self.shape[0], self.latent_cols or self.shape[1]
            mu, logvar = tensor(latents, self.dtype), tensor(latents, self.dtype)
            terms = fastvae.vae_loss(recon, target, mu, logvar, logvar_clamp=clamp)
            return Step((recon, mu, logvar), (terms.loss,))
        kl = tensor(self.shape[:1], torch.promote_types(self.dtype, torch.float32))
        return Step((recon, kl), (fastvae.vae_loss(recon, target, kl=kl).loss,))

    def backward(self, step: Step) -> tuple[Tensor, ...]:
        if not step.inputs:
            return ()
        upstream = [torch.full_like(output, self.upstream) for output in step.outputs]
        return torch.autograd.grad(step.outputs, step.inputs, upstream)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# as autocast and data loaders leave images
MIXED = ((torch.bfloat16, torch.uint8), (torch.bfloat16, torch.float32))

CONTIGUOUS = [
    *(Case("noise", dtype) for dtype in FLOATS),
    *(Case("sample", dtype) for dtype in FLOATS),
    *(Case("sample_kl", dtype) for dtype in FLOATS),
    *(Case("kl", dtype) for dtype in FLOATS),
    *(Case("loss", dtype) for dtype in FLOATS),
    *(Case("loss", *dtypes) for dtypes in MIXED),
    *(Case("whole_loss", dtype) for dtype in FLOATS[:2]),
    Case("whole_loss", *MIXED[0]),
]
CASES = [*CONTIGUOUS, *(replace(case, shape=ODD) for case in CONTIGUOUS)]


def elements_per_program(arguments: Mapping[str, Any]) -> int:
    """Of the arm that the images take, or else the latents: in one round of its loop."""
    for rows, cols in (("IMAGE_ROWS", "IMAGE_COLS"), ("LATENT_ROWS", "LATENT_COLS"), ("BLOCK_ROWS", "BLOCK_COLS")):
        if rows in arguments and (rows != "IMAGE_ROWS" or arguments["recon_ptr"] is not None):
            return int(arguments[rows] * arguments[cols])
    return int(arguments["BLOCK_SIZE"])
