"""The reconstruction term alone: (recon, target) -> loss, and the gradient of recon."""

import pytest

OPS = ("recon",)


@pytest.mark.usefixtures("contend_op")
def bench_reconstruction() -> None:
    """The fixture does it: see conftest."""
