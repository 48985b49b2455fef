"""The launches that the gates on kernels look at: every kernel, storage dtype and size class, by the public API."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae._elementwise import ERRORS
from fastvae.likelihoods import L2, Gaussian, Scaled
from fastvae.regularizers import FreeBits
from fastvae.statistics import latent_stats

Op = Literal["noise", "sample", "sample_kl", "kl", "stats", "loss", "whole_loss"]
WHAT_IT_DOES: dict[Op, str] = {
    "noise": "`philox_normal`",
    "sample": "`reparameterize`",
    "sample_kl": "`reparameterize_kl`",
    "kl": "`gaussian_kl`",
    "stats": "`latent_stats`",
    "loss": "`vae_loss(kl=...)`",
    "whole_loss": "`vae_loss(mu, logvar)`",
}
ALIGNED, ODD = (2, 6272), (3, 4181)  # several tiles, the last one cut off
ODD_BATCH = (3, 6272)  # rows stay aligned
SHORT_ROWS = (393, 32)  # several samples share a tile
SEVERAL_TILES = (64, 2**20)  # one program takes several tiles
# for statistics of columns: ranges of rows that are merged, the last one cut off; a single range
RANGES, ODD_RANGES, ONE_RANGE = (1024, 64), (1031, 37), (64, 512)
HUGE = (3, 2**30)  # more than 2^31 elements


Plane = Literal["image", "weights", "mask", "latent", "sample"]


class Option(NamedTuple):
    """A part of the loss surface.

    Attributes:
        arguments: Makes what `vae_loss` is told of one tensor for each of `planes`.
        planes: Shapes of those tensors; such as are like images or latents get a gradient.
    """

    arguments: Callable[..., dict[str, Any]]
    planes: tuple[Plane, ...] = ()


OPTIONS = {
    **{name: Option(partial(dict, likelihood=likelihood)) for name, likelihood in ERRORS.items()},
    "shifted": Option(partial(dict, likelihood=L2(target_scale=2 / 255, target_shift=-1.0))),  # of a uint8 target
    "gaussian": Option(lambda logvar: {"likelihood": Gaussian(logvar)}, ("image",)),
    "scaled_l1": Option(lambda log_scale: {"likelihood": Scaled("l1", log_scale)}, ("image",)),
    "scaled_sample": Option(lambda log_scale: {"likelihood": Scaled("l1", log_scale)}, ("sample",)),
    "mask": Option(lambda mask: {"mask": mask}, ("mask",)),
    "weight": Option(lambda weight: {"weight": weight}, ("sample",)),
    "extra_map": Option(lambda extra: {"extra": extra}, ("image",)),
    "recon_weight_map": Option(lambda weight: {"recon_weight": weight}, ("weights",)),
    "recon_weight": Option(lambda weight: {"recon_weight": weight}, ("sample",)),
    "beta": Option(lambda beta: {"beta": beta}, ("sample",)),
    "target": Option(dict),  # wants a gradient
    "prior": Option(lambda mu, logvar: {"prior": (mu, logvar)}, ("latent", "latent")),
    **{mode: Option(partial(dict, free_bits=FreeBits(0.1, mode))) for mode in ("dim", "dim_mask", "dim_batch")},
}
LIKELIHOODS = tuple(name for name in ERRORS if name != "l2")


class Floor(NamedTuple):
    """The fewest bytes an element can cost: what has to be read and written once."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


class Call(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]
    inputs: tuple[Tensor, ...]  # those that require a gradient
    planes: tuple[Tensor, ...]  # what the options were made of


class Step(NamedTuple):
    inputs: tuple[Tensor, ...]
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
        options: Names in `OPTIONS`: of a loss; of a sample and its KL, or of the KL, "prior" alone.
    """

    op: Op
    dtype: torch.dtype
    target_dtype: torch.dtype | None = None
    shape: tuple[int, int] = ALIGNED
    upstream: float = 1.0
    clamp: bool = False
    latent_cols: int | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.target_dtype) if dtype)
        parts = [self.op, *self.options, dtypes, "x".join(map(str, self.shape))]
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
        size, latents = self.dtype.itemsize, self._latent_floor.read
        image = self._image_floor._replace(written=self._image_floor.written if self._one_pass else 0)
        return {
            "noise": Floor(0, size),
            "sample": Floor(2 * size, size),
            "sample_kl": Floor(latents, size),
            "kl": Floor(latents, 0),
            "stats": Floor(2 * size, 0),
            "loss": image,
            "whole_loss": Floor(image.read + latents, image.written),
        }[self.op]

    @property
    def backward_floor(self) -> Floor:
        size, latent, image = self.dtype.itemsize, self._latent_floor, self._image_floor
        if self._one_pass:
            exact = size > 2 or self.upstream == 2 ** round(torch.tensor(self.upstream).log2().item())
            image = Floor(image.written, image.written) if exact else image
            image = Floor(0, 0) if self.upstream == 1 else image
        return {
            "noise": Floor(0, 0),
            "stats": Floor(0, 0),
            "sample": Floor(2 * size, 2 * size),  # z's gradient is mu's, and mu is not needed
            "sample_kl": Floor(size + latent.read, latent.written),
            "kl": latent,
            "loss": image,
            "whole_loss": Floor(image.read + latent.read, image.written + latent.written),
        }[self.op]

    @property
    def _image_floor(self) -> Floor:
        """Of the errors and their gradients, where they are computed."""
        size, target_size = self.dtype.itemsize, (self.target_dtype or self.dtype).itemsize
        planes = size * (1 + self._planes("image"))
        fixed = self._planes("mask") + size * self._planes("weights")
        return Floor(planes + target_size + fixed, planes + target_size * ("target" in self.options))

    @property
    def _latent_floor(self) -> Floor:
        """Of the KL (what is read) and its gradients."""
        planes = self.dtype.itemsize * (2 + self._planes("latent"))
        return Floor(planes, planes)

    def _planes(self, plane: Plane) -> int:
        return sum(OPTIONS[option].planes.count(plane) for option in self.options)

    @property
    def _one_pass(self) -> bool:
        # in float16 an unscaled gradient would underflow
        return self.dtype != torch.float16 and "target" not in self.options

    def call(self, device: str = "cpu") -> Call:
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
            arguments = {"shape": self.shape, "seed": 7, "dtype": self.dtype, "device": device}
            return Call(fastvae.philox_normal, arguments, (), ())
        latents = self.shape[0], self.latent_cols or self.shape[1]
        wide = torch.promote_types(self.dtype, torch.float32)
        make = {
            "image": lambda: tensor(self.shape, self.dtype),
            "weights": lambda: tensor(self.shape, self.dtype, leaf=False),
            "mask": lambda: tensor(self.shape, torch.uint8, leaf=False) > 127,
            "latent": lambda: tensor(latents, self.dtype),
            "sample": lambda: tensor(self.shape[:1], wide, leaf=False),
        }
        planes, arguments = [], {"logvar_clamp": (-30.0, 20.0)} if self.clamp else {}
        for option in map(OPTIONS.__getitem__, self.options):
            made = [make[plane]() for plane in option.planes]
            arguments |= option.arguments(*made)
            planes += made
        if self.op != "loss":
            leaf = self.op != "stats"
            arguments |= {name: tensor(latents, self.dtype, leaf=leaf) for name in ("mu", "logvar")}
        if "loss" in self.op:
            arguments["recon"] = tensor(self.shape, self.dtype)
            arguments["target"] = tensor(self.shape, self.target_dtype or self.dtype, leaf="target" in self.options)
        if self.op == "loss":
            arguments["kl"] = tensor(self.shape[:1], wide)
        if self.op in ("sample", "sample_kl"):
            arguments["seed"] = 7
        inputs = [arguments[name] for name in ("recon", "mu", "logvar", "kl", "target") if name in arguments]
        function = {
            **{"sample": fastvae.reparameterize, "sample_kl": fastvae.reparameterize_kl, "kl": fastvae.gaussian_kl},
            **{"stats": latent_stats, "loss": fastvae.vae_loss, "whole_loss": fastvae.vae_loss},
        }[self.op]
        return Call(function, arguments, tuple(t for t in (*inputs, *planes) if t.requires_grad), tuple(planes))

    def forward(self, device: str = "cpu") -> Step:
        call = self.call(device)
        result = call.function(**call.arguments)
        if isinstance(result, fastvae.VAELossTerms):
            result = result.loss
        return Step(call.inputs, (result,) if isinstance(result, Tensor) else tuple(result))

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
    *(Case("sample_kl", dtype, options=("prior",)) for dtype in FLOATS),
    *(Case("whole_loss", dtype) for dtype in FLOATS[:2]),
    Case("whole_loss", *MIXED[0]),
]
CASES = [*CONTIGUOUS, *(replace(case, shape=ODD) for case in CONTIGUOUS)]
STATS = [Case("stats", dtype, shape=shape) for shape in (RANGES, ODD_RANGES, ONE_RANGE) for dtype in FLOATS]


def geometry(arguments: Mapping[str, Any]) -> Any:
    """Of the arm that the images take, or else the latents; None for kernels of one arm."""
    for tensors in ("images", "latents"):
        kind = tensors.removesuffix("s")
        at = arguments.get(f"{kind}_geometry", arguments.get(f"{kind}_at"))
        if at is not None and arguments[tensors][0] is not None:
            return at
    return None


def elements_per_program(arguments: Mapping[str, Any]) -> int:
    """In one round of its loop."""
    if (at := geometry(arguments)) is not None:
        return int(at.block_rows.value * at.block_cols.value)
    if "BLOCK_ROWS" in arguments:
        return int(arguments["BLOCK_ROWS"] * arguments["BLOCK_COLS"])
    return int(arguments["BLOCK_SIZE"])
