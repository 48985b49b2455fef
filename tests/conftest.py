"""One process tests either interpreted kernels (no GPU needed) or compiled ones: Triton decides when it is imported."""

import os
import signal

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Makefile sets 0 for the tests that compile
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("compiled") and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs a process with TRITON_INTERPRET=0 (see the Makefile)"))


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_like_a_gpu():
    if INTERPRETED:
        pytest.importorskip("triton", reason="the kernels need Triton")
        from tests.helpers.interpreter import fix_bf16_rounding

        fix_bf16_rounding()


@pytest.fixture(autouse=True)
def _reproducible_and_poisoned():
    """A seed for every test; unwritten elements of new tensors are NaN, so a kernel that forgets one is found out."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Each test that names it runs on the fallback and on the (here: interpreted) kernels."""
    import fastvae

    with fastvae.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def images_file(tmp_path_factory):
    """A .npy file of 40 images of noise."""
    path = tmp_path_factory.mktemp("data") / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def hangups_not_ignored():
    """SIGHUP acts as by default, also in processes that the test starts, where pytest itself runs under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)
