"""Likelihoods of counts: the loss alone, and whole training steps of scvi-tools' VAE if that is installed.

    python -m benchmarks.bench_counts --out benchmarks/results/counts-default-malloc.json

The peers are scvi-tools' formulas, eager and under torch.compile. Providers take turns; see `fastvae.cli.timing`.
"""

import argparse
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvae
from fastvae.cli.timing import Timings, clock_of, interleave
from fastvae.integrations import patch_scvi
from fastvae.likelihoods import CountLikelihood, NegativeBinomial, Poisson

from .environment import environment
from .providers import COMPILED, EAGER, FALLBACK
from .results import Results

CPU = torch.device("cpu")
SIZES = ((128, 2_000), (128, 20_000), (1_024, 8_000))
FAMILIES = ("nb", "zinb", "poisson")
SCVI, PATCHED = "scvi", "scvi, patched"


def log_nb_positive(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    """The formula of scvi-tools 1.4.2, src/scvi/distributions/_negative_binomial.py:105-141."""
    log_total = torch.log(theta + mu + eps)
    result = theta * (torch.log(theta + eps) - log_total) + x * (torch.log(mu + eps) - log_total)
    return result + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)


def log_zinb_positive(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor, eps: float = 1e-8) -> Tensor:
    """The formula of scvi-tools 1.4.2, src/scvi/distributions/_negative_binomial.py:42-102."""
    softplus_pi = F.softplus(-pi)
    log_theta, log_total = torch.log(theta + eps), torch.log(theta + mu + eps)
    pi_theta_log = -pi + theta * (log_theta - log_total)
    zero = F.softplus(pi_theta_log) - softplus_pi
    nonzero = -softplus_pi + pi_theta_log + x * (torch.log(mu + eps) - log_total)
    nonzero = nonzero + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (x < eps).type(torch.float32) * zero + (x > eps).type(torch.float32) * nonzero


def textbook(family: str, y: Tensor, x: Tensor, log_library: Tensor, log_theta: Tensor, d: Tensor) -> Tensor:
    mu = log_library.exp() * torch.softmax(y, -1)
    if family == "poisson":
        log_prob = x * mu.log() - mu - torch.lgamma(x + 1)
    elif family == "nb":
        log_prob = log_nb_positive(x, mu, log_theta.exp())
    else:
        log_prob = log_zinb_positive(x, mu, log_theta.exp(), d)
    return -log_prob.sum(-1).mean()


def ours(family: str, y: Tensor, x: Tensor, log_library: Tensor, log_theta: Tensor, d: Tensor) -> Tensor:
    likelihood: CountLikelihood = Poisson(log_library=log_library)
    if family != "poisson":
        zero_logits = d if family == "zinb" else None
        likelihood = NegativeBinomial(log_theta, log_library=log_library, zero_logits=zero_logits)
    return fastvae.reconstruction_loss(y, x, likelihood=likelihood)


def counts(cells: int, genes: int) -> Tensor:
    """About a fifth are not zero, as in droplet data."""
    torch.manual_seed(0)
    return torch.poisson(0.3 * torch.rand(genes) * torch.randn(cells, genes).exp())


def loss_calls(family: str, cells: int, genes: int) -> dict[str, Callable[[int], Any]]:
    """Forward and backward, of logits that a decoder made."""
    x = counts(cells, genes)
    y, d = (torch.randn(cells, genes, requires_grad=True) for _ in range(2))
    log_theta = torch.randn(genes, requires_grad=True)
    log_library = (x.sum(1, keepdim=True) + 1).log()
    wanted = {"nb": (y, log_theta), "zinb": (y, log_theta, d), "poisson": (y,)}[family]

    def call_of(function: Callable[..., Tensor]) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            loss = function(family, y, x, log_library, log_theta, d)
            return loss.detach(), torch.autograd.grad(loss, wanted)

        return call

    functions = {FALLBACK: ours, EAGER: textbook, COMPILED: torch.compile(textbook)}
    calls = {name: call_of(function) for name, function in functions.items()}
    inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in (y, x, log_library, log_theta, d)]
    exact = textbook(family, *inputs)
    wide = {"nb": (0, 3), "zinb": (0, 3, 4), "poisson": (0,)}[family]
    loss, gradients = calls[FALLBACK](0)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
    for gradient, truth in zip(gradients, torch.autograd.grad(exact, [inputs[i] for i in wide]), strict=True):
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-3, atol=1e-5 * float(truth.abs().max()))
    return calls


def step_calls(family: str, cells: int, genes: int) -> dict[str, Callable[[int], Any]]:
    """A training step of scvi-tools' VAE with Adam, as it is and patched."""
    from scvi.module import VAE

    x = counts(cells, genes)
    tensors = {"X": x, "batch": torch.zeros(cells, 1), "labels": torch.zeros(cells, 1)}
    calls = {}
    for name in (SCVI, PATCHED):
        torch.manual_seed(0)
        module = VAE(genes, gene_likelihood=family)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)

        def step(i: int, module: Any = module, optimizer: Any = optimizer) -> Any:
            _, _, losses = module(tensors, loss_kwargs={"kl_weight": 1.0})
            optimizer.zero_grad()
            losses.loss.backward()
            optimizer.step()
            return losses.loss.detach()

        def patched(i: int, step: Callable[[int], Any] = step) -> Any:
            with patch_scvi():
                return step(i)

        calls[name] = patched if name == PATCHED else step
    return calls


def figures(calls: dict[str, Callable[[int], Any]], seconds: float, threads: int) -> dict[str, Any]:
    first = next(iter(name for name in (FALLBACK, PATCHED) if name in calls))
    timings = interleave(calls, clock_of(CPU, threads), seconds=seconds, threads=threads, min_rounds=5)
    rounds = len(timings.seconds[first])
    us = Timings({"": [1e-6] * rounds} | timings.seconds)
    peers = [name for name in calls if name != first]
    return {
        "rounds": rounds,
        "us": {name: us.ratio(name, "")._asdict() for name in calls},
        "ratio": {first: {peer: timings.ratio(peer, first)._asdict() for peer in peers}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args()
    has_scvi = find_spec("scvi") is not None
    versions = {"scvi-tools": metadata.version("scvi-tools")} if has_scvi else {}
    results = Results(options.out, environment(CPU, options.threads) | versions)
    for kind, calls_of in {"loss": loss_calls, **({"step": step_calls} if has_scvi else {})}.items():
        for family in FAMILIES:
            for cells, genes in SIZES:
                name = f"{kind} {family} {cells}x{genes}"
                if options.only in name:
                    torch.set_num_threads(options.threads)
                    found = figures(calls_of(family, cells, genes), options.seconds, options.threads)
                    results.record(name, found)
                    (ratios,) = found["ratio"].values()
                    print(name, {peer: round(ratio["median"], 2) for peer, ratio in ratios.items()}, flush=True)
    results.write_markdown()


if __name__ == "__main__":
    main()
