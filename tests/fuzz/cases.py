"""Random calls of the loss, each determined by one integer."""

import math
import random

import numpy as np
import torch
from torch import Tensor

from .calls import Case
from .formula import ERRORS, Loss
from .layouts import LAYOUTS, repeats

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = ["vae_loss", "VAELoss", "reconstruction_loss", "gaussian_kl", "reparameterize", "reparameterize_kl"]
REDUCTIONS = ["batchmean", "sum", "mean", "none"]


def left_out(outside: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of a tensor that broadcasts to `outside`, or has one value a sample: those that only concern elements outside."""
    per_sample = shape == outside.shape[:1]
    aligned = (*shape, *[1] * (outside.ndim - 1)) if per_sample else (*[1] * (outside.ndim - len(shape)), *shape)
    for dim, n in enumerate(aligned):
        outside = outside.all(dim, keepdim=True) if n == 1 else outside
    return outside.reshape(shape)


class Draw(random.Random):
    """The choices and the tensors of one case."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.seed)
        self.case, self.x = case, case.inputs
        self.values = torch.Generator().manual_seed(case.seed)
        self.common, self.style = self.choice(FLOATS), self.choice(["one dtype"] * 3 + ["mixed", "autocast"])
        self.share_with_gradients = self.choice([1.0, 0.7, 0.3])

    def often(self, probability: float) -> bool:
        return self.random() < probability

    def shape(self) -> tuple[int, ...]:
        """That of a sample."""
        if self.often(0.04):
            return (2**18 + 3 if self.often(0.01) else self.choice([1025, 4096, 4099]),)
        return tuple(self.choice([0, 7, 8] if self.often(0.02) else [1, 2, 3, 4, 5]) for _ in range(self.randrange(5)))

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=self.values)

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, dtype=torch.float64, generator=self.values)

    def number(self, low: float = 0.1, high: float = 2.0) -> float:
        return self.choice([1.0, 2.0, round(low + (high - low) * self.random(), 3)])

    def dtype(self, name: str) -> torch.dtype:
        if self.style == "autocast":  # 16-bit tensors from the networks, float32 for the rest
            network = name in ("recon", "mu", "logvar") and self.common.itemsize == 2 and self.often(0.8)
            return self.common if network else torch.float32
        return self.common if self.style == "one dtype" else self.choice(FLOATS)

    def put(self, name: str, values: Tensor, outside: Tensor | None = None) -> None:
        """An input, somewhere in memory; NaN where it only concerns elements of `outside`."""
        values = values if values.dtype == torch.uint8 else values.to(self.dtype(name))
        layout = self.case.layouts[name] = self.choice(list(LAYOUTS)) if self.often(0.5) else "contiguous"
        if outside is not None and values.is_floating_point() and not layout.startswith("expanded"):
            values = values.masked_fill(left_out(outside, values.shape), math.nan)
        tensor = LAYOUTS[layout](values).detach()
        learned = tensor.is_floating_point() and self.often(self.share_with_gradients)
        setattr(self.x, name, tensor.requires_grad_(learned))

    def images(self, shape: tuple[int, ...]) -> None:
        x = self.x
        x.decoder = self.choice([None, None, "gaussian", "scaled"])
        x.error = "l2" if x.decoder == "gaussian" else self.choice(list(ERRORS))
        x.from_logits = x.error in ("l2", "l1") and self.often(0.2)
        if x.error in ("huber", "smooth_l1", "log_cosh"):
            x.parameter = self.number()
        outside = None
        if self.often(0.3):
            mask = self.uniform(tuple(n if self.often(0.7) else 1 for n in shape)) < (0.6 if self.often(0.8) else 0.0)
            x.mask = LAYOUTS[self.choice(["contiguous", "transposed", "sliced"])](mask)
            x.mask_normalize = x.recon_reduction in ("batchmean", "mean") and bool(mask.any()) and self.often(0.3)
            outside = ~mask.expand(shape) if self.often(0.5) else None

        target = self.uniform(shape)
        if self.often(0.3):
            target = (255 * target).byte()
            if not x.error.startswith("bernoulli") and self.often(0.3):
                x.target_scale, x.target_shift = 2 / 255, -1.0
        probabilities = x.error == "bernoulli_probs" or self.often(0.5)
        # float32 knows little of 1 - sigmoid(x) where x is large
        scale = 0.7 if x.from_logits else 2.0
        recon = self.uniform(shape, 0.02, 0.98) if probabilities else self.normal(shape, scale)
        if x.error == "bernoulli" and recon.numel() and self.often(0.1):  # torch has an answer for this one
            recon.view(-1)[0], target.view(-1)[0] = math.inf, 0
        self.put("recon", recon, outside)
        self.put("target", target, outside)

        if x.decoder is not None:
            self.log_scale(shape, outside)
        self.outside = outside
        if self.often(0.2):
            self.put("extra", self.uniform(self.of_images(shape)), outside)

    def of_images(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to that of images, or one value per sample."""
        like = tuple(n if self.often(0.7) else 1 for n in shape)
        per_sample = (shape[0], *[1] * self.choice([0, len(shape) - 1]))
        return self.choice([per_sample, per_sample, shape, like, like[self.randrange(len(like)) :]])

    def log_scale(self, shape: tuple[int, ...], outside: Tensor | None) -> None:
        x, batch = self.x, shape[0]
        channels = tuple(n if self.often(0.5) else 1 for n in shape[1:])
        one_a_sample = (batch, *[1] * self.choice([0, len(shape) - 1]))
        size = self.choice(["number", "optimal", (), one_a_sample, channels, shape])
        if size == "optimal" and x.decoder == "gaussian" and math.prod(shape) and (x.mask is None or x.mask.any()):
            x.log_scale = "optimal"
        elif isinstance(size, str):
            x.log_scale = self.number(-2.0, 1.0)
        else:
            self.put("log_scale", self.uniform(size, -1.0, 1.5), outside)
        if x.decoder == "gaussian":
            x.full, x.softclip = self.often(0.5), self.number(-3.0, 0.5) if self.often(0.2) else None

    def latents(self, shape: tuple[int, ...]) -> None:
        x, function = self.x, self.case.function
        measured = function in ("vae_loss", "VAELoss") and self.often(0.25)
        scale = self.choice([0.01, 1.0, 1.0, 3.0])
        if not measured or x.kl_reduction == "mean" or self.often(0.3):
            self.put("mu", self.normal(shape, scale))
        if measured:
            self.put("kl", self.uniform(shape[:1], 0.0, 4.0))
        else:
            logvar = self.normal(shape, scale)
            if logvar.numel() and self.often(0.03):
                logvar.view(-1)[0] = 85.0  # whose exponential nearly leaves float32
            self.put("logvar", logvar)
            x.clamp = self.choice([None, (-0.375, 0.25), (-30.0, 20.0), (-1.7, 0.3)])
        if not measured and not function.startswith("reparameterize") and self.often(0.25):
            like = tuple(n if self.often(0.7) else 1 for n in shape)[self.randrange(2) :]
            self.put("prior_mu", self.normal(like))
            self.put("prior_logvar", self.normal(like))
        if function in ("vae_loss", "VAELoss"):
            self.regularizers(measured)

    def regularizers(self, measured: bool) -> None:
        x, scalar = self.x, self.x.kl_reduction != "none"
        if self.often(0.3):
            modes = ["sample"] + ["dim", "dim_mask"] * (not measured) + ["dim_batch"] * (not measured and scalar)
            x.free_bits = self.number(), self.choice(modes)
        modes = ["sample"] * (not x.free_bits or x.free_bits[1] != "dim_batch") + ["batch"] * scalar
        if self.often(0.25):
            nats: float | Tensor = self.number(0.0, 9.0)
            if self.often(0.4):
                nats = torch.tensor(nats, dtype=torch.float32).requires_grad_(self.often(0.5))
            x.capacity = nats, self.choice(modes)

    def weights(self) -> None:
        x = self.x
        batchwise = "dim_batch" in (x.free_bits or ()) or "batch" in (x.capacity or ())[1:]
        for name in ("beta", "recon_weight"):
            if self.often(0.3):
                self.put(name, self.uniform((), 0.1, 2.0))
            elif self.often(0.25) and not (name == "beta" and batchwise):
                shape = x.recon.shape[:1] if name == "beta" else self.of_images(tuple(x.recon.shape))
                self.put(name, self.uniform(shape, 0.1, 2.0), self.outside if name == "recon_weight" else None)
                if x.error.startswith("bernoulli") and shape != x.recon.shape[:1]:
                    # the gradient of each weight is an error as PyTorch computes it: it cancels where it is small
                    setattr(x, name, getattr(x, name).detach())
            elif self.often(0.7):
                value = self.choice([0.0, 1e-8, 1e37]) if self.often(0.3) else self.number()
                setattr(self.x, name, float(np.float32(value)) if self.case.numpy_numbers else value)

    def ways(self) -> None:
        """What shall make no difference."""
        c, x = self.case, self.x
        c.named, c.one_pass = self.often(0.5), self.often(0.8)
        if c.function == "VAELoss":
            c.accumulate, c.beta_at_call = self.choice([1, 1, 3, 4]), self.often(0.2)
            c.cast = self.choice([None, None, torch.float16, torch.bfloat16])
        c.upstream = self.choice(["1", "1", "3", "rows", "all", "recon and kl", "last", "no grad"])
        if self.often(0.15) and c.function in ("vae_loss", "VAELoss") and may_overwrite(x):
            c.one_pass = c.inplace = True
        else:
            c.twice, c.create_graph = self.often(0.2), self.often(0.1)


def may_overwrite(x: Loss) -> bool:
    """Whether `inplace` is allowed."""
    dense = not repeats(x.recon) and x.recon.clone().stride() == x.recon.stride()
    right = dense and isinstance(x.recon_weight, float) and x.recon_weight != 0 and x.log_scale != "optimal"
    return right and x.recon.dtype != torch.float16 and not x.target.requires_grad


def case(seed: int) -> Case:
    c = Case(seed)
    draw, x = Draw(c), c.inputs
    c.function = draw.choice(["vae_loss"] * 5 + ["VAELoss"] * 3 + FUNCTIONS)
    c.numpy_numbers = draw.often(0.05)
    x.recon_reduction = x.kl_reduction = draw.choice(REDUCTIONS)
    if c.function == "reparameterize_kl":
        x.kl_reduction = "none"
    elif draw.often(0.2) and x.recon_reduction != "none":
        x.kl_reduction = draw.choice(REDUCTIONS[:3])
    batch = draw.choice([1, 2, 3, 4, 5, 7]) if draw.often(0.96) else 0
    images = c.function in ("vae_loss", "VAELoss", "reconstruction_loss")
    if images:
        draw.images((batch, *draw.shape()))
    if c.function != "reconstruction_loss":
        draw.latents((batch, *draw.shape()))
    if images and draw.often(0.3):
        draw.put("weight", draw.choice([draw.uniform, draw.normal])((batch,)))
    if c.function in ("vae_loss", "VAELoss"):
        draw.weights()
    if c.function.startswith("reparameterize"):
        seed = draw.choice([draw.randrange(9), draw.randrange(-(2**63), 2**63)])
        c.noise = {"seed": torch.tensor(seed) if draw.often(0.3) else seed, "offset": draw.randrange(9)}
    draw.ways()
    return c
