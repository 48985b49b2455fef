"""Whether fastvae's results of a case are what the formula gives.

The bound of an error is that of a backward stable algorithm: a result is right if float64 gives it for inputs that are
a few roundings off. So the formula is evaluated again with every input, also every number, moved by a rounding at
random, and the spread of its results is the unit of the bound. Results in 16 bits are rounded once on top of that.
"""

import dataclasses
import os
import traceback
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import fastvae
from tests.helpers.interpreter import fix_bf16_rounding

from . import formula
from .calls import Case, call
from .cases import case
from .formula import Loss

ROUNDING = 2.0**-24  # relative, of float32
SPREADS, ROUNDINGS = 8.0, 8.0  # an error may be this many times the spread plus this many roundings of the result

Results = dict[str, Tensor]


def failures(seeds: Iterable[int], backend: str) -> tuple[list[str], int]:
    """A report of each case of `seeds` that goes wrong, and how many were skipped."""
    # new tensors hold NaN, so that an element that nobody wrote is found
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        fix_bf16_rounding()
    reports, skipped = [], 0
    for seed in seeds:
        c = case(seed)
        if interpreted and {torch.float64, torch.bfloat16} <= {t.dtype for t in c.tensors().values()}:
            skipped += 1  # the interpreter takes the bits of bfloat16 for a float64
            continue
        with fastvae.use_backend(backend):
            wrong = discrepancies(c)
        if wrong:
            reports.append("\n".join([str(c), *(f"    {line}" for line in wrong)]))
    return reports, skipped


def discrepancies(c: Case) -> list[str]:
    """What is wrong with the results, each in a line; nothing if all is well."""
    try:
        with torch.set_grad_enabled(c.upstream != "no grad"):
            outputs = call(c)
        upstream = upstream_gradients(c, outputs)
        found = outputs | gradients(outputs, upstream, c.leaves(), twice=c.twice, create_graph=c.create_graph)
    except Exception as error:  # a crash is a discrepancy, too
        where = traceback.extract_tb(error.__traceback__)[-1]
        return [f"raises {type(error).__name__}: {error} ({where.filename}:{where.lineno})"]
    values = truth(c, c.inputs, {})
    shapes = [(name, tuple(t.shape), tuple(values[name].shape)) for name, t in outputs.items()]
    if wrong := [f"{name} has shape {shape}, expected {right}" for name, shape, right in shapes if shape != right]:
        return wrong
    expected = truth(c, c.inputs, upstream)
    wrong = [f"{name} has dtype {found[name].dtype}" for name in outputs if found[name].dtype != dtype_of(c, name)]
    bounds = bounds_of(c, upstream, expected, draws=3)
    if any(off(found.get(name), value, bounds[name]).any() for name, value in expected.items()):
        bounds = bounds_of(c, upstream, expected, draws=50)  # now exactly
    for name, value in expected.items():
        actual, bound = found.get(name), bounds[name]
        bad = off(actual, value, bound)
        if bad.any():
            actual = torch.zeros_like(value) if actual is None else actual.double()
            excess = ((actual - value).abs() / bound)[bad].nan_to_num(torch.inf)
            at = excess.argmax()
            wrong.append(
                f"{name}: {len(excess)} of {value.numel()} elements, such as {actual[bad][at].item()!r} for "
                f"{value[bad][at].item()!r}, {excess[at].item():.3g} times the bound away"
            )
    return wrong


def leaf_of(name: str) -> str:
    return name.removeprefix("d/").removesuffix(" again")


def dtype_of(c: Case, name: str) -> torch.dtype:
    """That of an output."""
    if name == "z":
        return torch.promote_types(c.inputs.mu.dtype, c.inputs.logvar.dtype)
    # next to kl, mu only tells the number of latents
    silent = {"capacity", "mu" if c.inputs.kl is not None else ""}
    dtypes = [t.dtype for name, t in c.tensors().items() if name not in silent]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def upstream_gradients(c: Case, outputs: Results) -> Results:
    """Of those outputs that backward starts from."""
    generator = torch.Generator().manual_seed(c.seed)
    names = {"recon and kl": ["recon", "kl"], "all": list(outputs), "last": list(outputs)[-1:], "no grad": []}
    chosen = [name for name in names.get(c.upstream, list(outputs)[:1]) if name in outputs]
    fixed = {"1": 1.0, "3": 3.0, "rows": 0.5}

    def gradient(output: Tensor) -> Tensor:
        if c.upstream in fixed:  # of one place in memory, as that of .sum()
            return torch.tensor(fixed[c.upstream], dtype=output.dtype).expand(output.shape)
        return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)

    return {name: gradient(outputs[name]) for name in chosen}


def gradients(
    outputs: Results, upstream: Results, leaves: Results, *, twice: bool = False, create_graph: bool = False
) -> Results:
    """Those of the leaves, and once more if `twice`."""
    found: Results = {}
    used = {name: g for name, g in upstream.items() if outputs[name].requires_grad}
    for suffix in ["", " again"] if twice else [""]:
        if used and leaves:
            grads = torch.autograd.grad(
                [outputs[name] for name in used],
                list(leaves.values()),
                list(used.values()),
                allow_unused=True,
                retain_graph=twice or create_graph,
                create_graph=create_graph,
            )
            found |= {f"d/{name}{suffix}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: g.detach() for name, g in found.items()}


def truth(c: Case, inputs: Loss, upstream: Results, move: Callable[[Tensor], Tensor] = lambda t: t) -> Results:
    """The formula's results of these inputs, each of which `move` may change."""

    def double(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        if isinstance(value, float):
            return move(torch.tensor(value, dtype=torch.float64))
        if isinstance(value, Tensor) and value.is_floating_point():
            return move(value.detach().double()).requires_grad_(value.requires_grad)
        return value

    x = Loss(**{f.name: double(getattr(inputs, f.name)) for f in dataclasses.fields(inputs)})
    x.rounded = move
    loss, recon, kl = formula.terms(x) if c.function != "reparameterize" else (None, None, None)
    outputs = {"loss": loss, "recon": recon, "kl": kl}
    if c.function == "VAELoss":
        outputs["loss"] = loss / c.accumulate
    if c.function.startswith("reparameterize"):
        noise = fastvae.philox_normal(inputs.mu.shape, dtype=torch.float64, **c.noise)
        outputs["z"] = formula.sample(x, move(noise))
    names = {
        "reconstruction_loss": ["recon"],
        "gaussian_kl": ["kl"],
        "reparameterize": ["z"],
        "reparameterize_kl": ["z", "kl"],
    }.get(c.function, ["loss", "recon", "kl"])
    outputs = {name: outputs[name] for name in names}
    leaves = dataclasses.replace(c, inputs=x).leaves()
    moved = {name: move(g.double()) for name, g in upstream.items()}
    found = gradients(outputs, moved, leaves)
    zeros = {f"d/{name}": torch.zeros_like(t) for name, t in leaves.items()}
    defined = not any(outputs[name].isnan().any() for name in upstream)  # a mean over nothing is not, nor is its slope
    found = zeros | found if upstream and defined else {}
    if c.twice:
        found |= {f"{name} again": g for name, g in found.items()}
    return {name: t.detach() for name, t in outputs.items()} | found


def bounds_of(c: Case, upstream: Results, expected: Results, draws: int) -> Results:
    """Of the errors of all results."""
    generator = torch.Generator().manual_seed(c.seed)

    def move(t: Tensor) -> Tensor:
        # of each element, and of all in common: equal numbers are rounded alike
        each, all_of_them = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in (t.shape, ()))
        return t * (1 + ROUNDING * (each + all_of_them))

    squares = {name: torch.zeros_like(t) for name, t in expected.items()}
    for _ in range(draws):
        moved = truth(c, c.inputs, upstream, move)
        for name in squares.keys() & moved.keys():  # no gradients where a result is NaN, which a rounding may decide
            squares[name] += (moved[name] - expected[name]) ** 2 / draws
    exact = all(t.dtype == torch.float64 for t in c.tensors().values() if t.is_floating_point())
    unit = 2.0**-26 if exact else 1.0  # float64 is 2^29 times as fine; the formula itself needs the rest
    bounds = {}
    for name, value in expected.items():
        bound = unit * (SPREADS * squares[name].sqrt() + ROUNDINGS * ROUNDING * value.abs())
        dtype = c.tensors()[leaf_of(name)].dtype if name.startswith("d/") else dtype_of(c, name)
        limits = torch.finfo(dtype)
        if dtype.itemsize == 2:
            roundings = 2 if c.inplace else 1
            bound = bound + roundings * limits.eps / 2 * value.abs()
        bounds[name] = bound + limits.smallest_normal * limits.eps
    return bounds


def off(actual: Tensor | None, value: Tensor, bound: Tensor) -> Tensor:
    """Where the result is wrong; no gradient is a gradient of 0."""
    if actual is None:
        return value != 0
    actual, rounded = actual.detach(), value.to(actual.dtype)
    # where float32 nearly overflows, a factor may have: then the result need not be finite, either
    near = value.numel() > 0 and bool((value.abs() > 2.0**96).any())
    overflow = value.isfinite() & (rounded.isinf() | near)
    same = (actual == rounded) | (actual.isnan() & value.isnan()) | (overflow & ~actual.isfinite())
    return ~same & ~((actual.double() - value).abs() <= bound)
