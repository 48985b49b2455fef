"""Python functions of the library that a cached call of `vae_loss` on the kernels enters; see docs/architecture.md.

`python -m pytest -q -s tests/kernels/test_python_calls.py` prints them. Launches are replaced by a function that does
nothing.
"""

import sys
from pathlib import Path

import pytest
import torch

import fastvae
import fastvae_kernels

pytestmark = pytest.mark.compiled

FOLDERS = [Path(package.__file__).parent for package in (fastvae, fastvae_kernels)]


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    import triton

    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    with fastvae.use_backend("triton"):
        yield


def entered(function):
    """(file, function) of each Python function of the library that is entered."""
    calls = []

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(folder in path.parents for folder in FOLDERS):
            calls.append((path.name, frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


MOST = {"forward": (12, 7), "backward": (7, 5)}  # (calls, files)


def test_a_cached_call_enters_few_functions():
    recon, target = torch.rand(8, 3, 4, requires_grad=True), torch.rand(8, 3, 4)
    mu, logvar = (torch.rand(8, 5, requires_grad=True) for _ in range(2))
    losses = []

    def forward():
        losses.append(fastvae.vae_loss(recon, target, mu, logvar).loss)

    forward()
    losses.pop().backward()  # the plan is made
    with torch.autograd.set_multithreading_enabled(False):  # a profiler sees its own thread alone
        for name, calls in {"forward": entered(forward), "backward": entered(lambda: losses[0].backward())}.items():
            files = {file for file, _ in calls}
            print(f"\n{name}: {len(calls)} calls in {len(files)} files")
            print(*(f"  {file}: {function}" for file, function in calls), sep="\n")
            assert len(calls) <= MOST[name][0]
            assert len(files) <= MOST[name][1]
