"""A call of fastvae as data, and the call itself."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastvae
from fastvae import likelihoods
from fastvae.regularizers import Capacity, FreeBits

from .formula import Loss

SHOWN = (bool, int, float, str, tuple, torch.dtype)  # in a report
KINDS = {  # likelihood and its parameter
    "l2": (likelihoods.L2, None),
    "l1": (likelihoods.L1, None),
    "huber": (likelihoods.Huber, "delta"),
    "smooth_l1": (likelihoods.SmoothL1, "beta"),
    "log_cosh": (likelihoods.LogCosh, "alpha"),
    "bernoulli": (likelihoods.Bernoulli, None),
    "bernoulli_probs": (likelihoods.BernoulliProbs, None),
}


@dataclass
class Case:
    """A call of fastvae, and what is asked of autograd."""

    seed: int
    function: str = "vae_loss"
    inputs: Loss = field(default_factory=Loss)  # as fastvae gets them
    layouts: dict[str, str] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)  # seed and offset of reparameterize
    numpy_numbers: bool = False  # beta and recon_weight are NumPy scalars
    named: bool = False  # the likelihood is a name where there is one
    one_pass: bool = True
    inplace: bool = False
    accumulate: int = 1  # this and the next two: VAELoss alone
    cast: torch.dtype | None = None  # of the module
    beta_at_call: bool = False
    upstream: str = "1"  # gradients of the outputs that backward starts from: see `upstream_gradients`
    create_graph: bool = False
    twice: bool = False  # a second backward pass through the same graph

    def tensors(self) -> dict[str, Tensor]:
        given = {f.name: getattr(self.inputs, f.name) for f in fields(Loss)}
        given["capacity"] = self.inputs.capacity[0] if self.inputs.capacity else None
        return {name: t for name, t in given.items() if isinstance(t, Tensor)}

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if t.requires_grad}

    def __str__(self) -> str:
        """A program that makes the call; its comments tell what the call is."""
        lines = [f"from tests.fuzz import call, case  # {self.function}", f"outputs = call(case({self.seed}))"]
        for name, t in self.tensors().items():
            memory = f"{self.layouts.get(name, '')}, strides {t.stride()}" if t.ndim else ""
            gradient = ", requires grad" if t.requires_grad else ""
            lines.append(f"#   {name}: {str(t.dtype)[6:]} {list(t.shape)} {memory}{gradient}")
        for thing in (self.inputs, self):
            options = {f.name: (getattr(thing, f.name), f.default) for f in fields(thing)}
            shown = {k: v for k, (v, default) in options.items() if isinstance(v, SHOWN) and v != default}
            lines.append("#   " + ", ".join(f"{k}={v!r}" for k, v in shown.items()))
        return "\n".join(lines)


def call(c: Case) -> dict[str, Tensor]:
    """The outputs of fastvae by name."""
    x = c.inputs
    latents = {"mu": x.mu, "logvar": x.logvar, "logvar_clamp": x.clamp}
    prior = None if x.prior_mu is None else (x.prior_mu, x.prior_logvar)
    if c.function == "reparameterize":
        return {"z": fastvae.reparameterize(**latents, **c.noise)}
    if c.function == "reparameterize_kl":
        return dict(zip(("z", "kl"), fastvae.reparameterize_kl(**latents, **c.noise), strict=True))
    if c.function == "gaussian_kl":
        return {"kl": fastvae.gaussian_kl(**latents, prior=prior, reduction=x.kl_reduction)}
    images = {"recon": x.recon.clone() if c.inplace else x.recon, "target": x.target}  # no leaf may be overwritten
    images |= {"weight": x.weight, "mask": x.mask, "extra": x.extra}
    if c.function == "reconstruction_loss":
        reduction = x.recon_reduction
        return {"recon": fastvae.reconstruction_loss(**images, likelihood=likelihood_of(c), reduction=reduction)}
    given = images | {"mu": x.mu, "logvar": x.logvar, "kl": x.kl, "prior": prior}
    options = {
        "beta": number(c, x.beta),
        "recon_weight": number(c, x.recon_weight),
        "likelihood": likelihood_of(c),
        "recon_reduction": x.recon_reduction,
        "kl_reduction": x.kl_reduction,
        "logvar_clamp": x.clamp,
        "free_bits": None if x.free_bits is None else FreeBits(*x.free_bits),
        "capacity": None if x.capacity is None else Capacity(*x.capacity),
        "one_pass": c.one_pass,
        "inplace": c.inplace,
    }
    if c.function == "vae_loss":
        return fastvae.vae_loss(**given, **options)._asdict()
    if c.beta_at_call:
        given["beta"] = options.pop("beta")
    module = fastvae.VAELoss(**options, return_terms=True, accumulate=c.accumulate)
    if c.cast is not None and not isinstance(x.log_scale, Tensor):  # a likelihood's tensor is cast, as a parameter is
        module.to(c.cast)
    return module(**given)._asdict()


def number(c: Case, value: Any) -> Any:
    return np.float32(value) if c.numpy_numbers and isinstance(value, float) else value


def likelihood_of(c: Case) -> Any:
    x = c.inputs
    kind, parameter = KINDS[x.error]
    options = {"target_scale": x.target_scale, "target_shift": x.target_shift, "mask_normalize": x.mask_normalize}
    if x.error in ("l2", "l1"):
        options["from_logits"] = x.from_logits
    if x.decoder == "gaussian":
        return likelihoods.Gaussian(x.log_scale, full=x.full, softclip=x.softclip, **options)
    if parameter is not None:
        options[parameter] = x.parameter
    base = kind(**options)
    if c.named and base == kind():
        base = x.error
    return likelihoods.Scaled(base, x.log_scale) if x.decoder == "scaled" else base
