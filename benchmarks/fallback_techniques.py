"""What two techniques of the CPU fallback bring to a whole step, with and without in turns on one thread:
`python -m benchmarks.fallback_techniques`. docs/benchmarks.md has the figures that keep them in the code.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import fastvae
from fastvae.cli.timing import interleave, thread_clock
from fastvae.fallback import philox

SEQUENCE = 26  # steps in a row, so that noise made ahead is paid for and used up


def step(batch: int, pixels: int, latents: int, *, sampling: bool) -> Callable[[], None]:
    """Forward and backward pass of the loss, with seeded sampling before it or without."""
    recon, target = torch.rand(batch, pixels, requires_grad=True), torch.rand(batch, pixels)
    mu, logvar = (torch.randn(batch, latents, requires_grad=True) for _ in range(2))
    offset = 0

    def run() -> None:
        nonlocal offset
        if not sampling:
            loss = fastvae.vae_loss(recon, target, mu, logvar).loss
            torch.autograd.grad(loss, [recon, mu, logvar])
            return
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=3, offset=offset)
        offset += z.numel()
        loss = fastvae.vae_loss(recon, target, kl=kl).loss
        torch.autograd.grad([loss, z], [recon, mu, logvar], [torch.ones(()), torch.ones_like(z)])

    return run


def only_what_is_asked(seed: int, offset: int, n: int) -> Any:
    return philox._made(philox.np, seed, offset, n, "cpu")[:n]


def do_nothing(tensor: torch.Tensor) -> None:
    pass


def main() -> None:
    small, large = step(128, 784, 20, sampling=True), step(128, 3 * 256 * 256, 64, sampling=False)

    def steps(i: int) -> None:
        for _ in range(SEQUENCE):
            small()

    techniques: dict[str, tuple[Callable[[int], None], str, Any]] = {
        "noise made ahead, 128x784, 20 latents": (steps, "fastvae.fallback.philox._read", only_what_is_asked),
        "huge pages, 128x3x256x256": (lambda i: large(), "fastvae.fallback.images.advise_huge_pages", do_nothing),
    }
    with fastvae.use_backend("torch"):
        for name, (call, replaced, by) in techniques.items():

            def without(i: int, call: Any = call, replaced: str = replaced, by: Any = by) -> None:
                with mock.patch(replaced, by):
                    call(i)

            timings = interleave({"with": call, "without": without}, thread_clock, seconds=10, max_rounds=1000)
            ratio = timings.ratio("without", "with")
            print(f"{name}: without / with {ratio.median:.2f} (quartiles {ratio.low:.2f} to {ratio.high:.2f})")


if __name__ == "__main__":
    main()
