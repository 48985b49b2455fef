"""Sampling z and measuring its KL: (mu, logvar) -> (z, kl), noise drawn inside."""

import pytest

OPS = ("sample",)


@pytest.mark.usefixtures("contend_op")
def bench_reparam_kl() -> None:
    """The fixture does it: see conftest."""
