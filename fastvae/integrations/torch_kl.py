"""torch.distributions' KL between normal distributions, without cancellation."""

from functools import reduce

import torch
from torch import Tensor
from torch.distributions import Normal, kl

from .. import reference
from .._dtypes import compute_dtype
from ._patch import Patch, Replacement


def register_torch_kl() -> Patch:
    """Let `torch.distributions.kl_divergence(Normal, Normal)` be computed by fastvae, `Independent` ones included.

        KL(p || q) = (((mu_p - mu_q) / sigma_q)^2 + expm1(r) - r) / 2,  r = log(sigma_p^2 / sigma_q^2)

    Shape, broadcasting and dtype of the result are torch's. What changes:

    - Where p and q nearly agree, torch's formula loses the result among terms of size 1: at means and scales 1 % apart
      a third of it in bfloat16 and 1e-4 of it in float32, at 0.1 % all of it and 5e-3. This one loses 1e-6 and 1e-5.
    - Arithmetic is float32 for 16-bit inputs; the result and each gradient are rounded once.
    - A ratio of scales down to 1e-38 has a finite KL in float32; squared first, as torch does it, it ends at 1e-19.
    - The first call may be inside `torch.compile(fullgraph=True)`, if the distributions' own validation is off.

    Only elementwise arithmetic of PyTorch is involved, on any device.

    Returns:
        Patch: `undo()`, or the end of its `with` block, registers torch's own function again.

    Raises:
        RuntimeError: it is registered already.

    Source: the formula of torch.distributions.kl, with expm1.
    """
    pair = (Normal, Normal)
    patch = Patch("register_torch_kl", [Replacement(kl._KL_REGISTRY, pair, normal_kl)], undoing=kl._KL_MEMOIZE.clear)
    kl._KL_MEMOIZE.clear()
    kl._KL_MEMOIZE[pair] = normal_kl  # torch.compile cannot trace the look-up that would put it there
    return patch


def normal_kl(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) element by element, in nats."""
    dtype = compute_dtype(p.loc, p.scale, q.loc, q.scale)
    distance = (p.loc.to(dtype) - q.loc.to(dtype)) / q.scale.to(dtype)
    log_ratio = 2 * torch.log(p.scale.to(dtype) / q.scale.to(dtype))
    return reference.gaussian_kl(distance, log_ratio).to(_result_dtype(p, q))


def _result_dtype(p: Normal, q: Normal) -> torch.dtype:
    """As torch promotes: a 0-dimensional tensor does not widen the others, and integers are divided to floats."""
    deciding = [normal for normal in (p, q) if normal.loc.ndim] or [p, q]
    dtype = reduce(torch.promote_types, [t.dtype for normal in deciding for t in (normal.loc, normal.scale)])
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
