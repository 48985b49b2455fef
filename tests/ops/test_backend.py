import threading

import pytest
import torch

import fastvae
from fastvae import _backend

TENSOR = torch.ones(1)


@pytest.fixture(autouse=True)
def _clean_choice(monkeypatch):
    monkeypatch.setattr(_backend, "_process_choice", None)
    monkeypatch.delenv("FASTVAE_BACKEND", raising=False)
    _backend._environment_choice.cache_clear()  # it is read once
    yield
    _backend._environment_choice.cache_clear()


def test_cpu_tensors_get_pytorch_unless_the_kernels_are_asked_for():
    assert _backend.backend_of(TENSOR) == "torch"
    with fastvae.use_backend("triton"):
        assert _backend.backend_of(TENSOR) == "triton"
        with fastvae.use_backend("torch"):
            assert _backend.backend_of(TENSOR) == "torch"
        assert _backend.backend_of(TENSOR) == "triton"
    assert _backend.backend_of(TENSOR) == "torch"


def test_set_backend_holds_in_every_thread_and_use_backend_in_one():
    fastvae.set_backend("triton")
    with fastvae.use_backend("torch"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(_backend.backend_of(TENSOR)))
        thread.start()
        thread.join()
        assert seen == ["triton"]
        assert _backend.backend_of(TENSOR) == "torch"


def test_environment(monkeypatch):
    monkeypatch.setenv("FASTVAE_BACKEND", "triton")
    assert _backend.backend_of(TENSOR) == "triton"
    fastvae.set_backend("auto")
    assert _backend.backend_of(TENSOR) == "torch"


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("FASTVAE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTVAE_BACKEND must be one of 'auto', 'triton', 'torch'; got 'cuda'"):
        _backend.backend_of(TENSOR)


def test_backward_runs_where_forward_ran(monkeypatch):
    mu = torch.ones(2, 3, requires_grad=True)
    with fastvae.use_backend("triton"):
        z, kl = fastvae.reparameterize_kl(mu, mu, seed=1)
    used = []
    kernels = _backend.load_backend("triton", "reparam_kl")
    real = kernels.reparam_kl_bwd
    monkeypatch.setattr(kernels, "reparam_kl_bwd", lambda *args: (used.append(1), real(*args)))
    (z.sum() + kl.sum()).backward()
    assert used == [1]


def test_unsupported_devices_say_why(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of"):
        fastvae.set_backend("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    _backend._triton_obstacle.cache_clear()
    try:
        with (
            fastvae.use_backend("triton"),
            pytest.raises(RuntimeError, match=r'cannot serve.*does not compile for CPUs.*"auto"'),
        ):
            _backend.backend_of(TENSOR)
        assert "does not compile for CPUs" in _backend.explain("cpu")
    finally:
        _backend._triton_obstacle.cache_clear()


def test_explanations():
    assert _backend.explain("cpu").startswith("torch: ")
    with fastvae.use_backend("torch"):
        assert "as chosen" in _backend.explain("cpu")
    with fastvae.use_backend("triton"):
        assert _backend.explain("mps") == "none: triton is chosen, but the kernels are not verified on 'mps' devices"
