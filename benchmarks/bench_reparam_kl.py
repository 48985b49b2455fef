"""Sampling z and measuring its KL, noise drawn inside: (mu, logvar) -> (z, kl), and the same of packed moments."""

import pytest

OPS = ("sample", "moments")


@pytest.mark.usefixtures("contend_op")
def bench_reparam_kl() -> None:
    """The fixture does it: see conftest."""
