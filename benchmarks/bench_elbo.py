"""The whole loss: sampling, reconstruction and KL, with the gradients of all."""

import pytest

OPS = ("whole",)


@pytest.mark.usefixtures("contend_op")
def bench_elbo() -> None:
    """The fixture does it: see conftest."""
