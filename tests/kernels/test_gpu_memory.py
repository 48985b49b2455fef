"""Addresses on a GPU: more elements than 32 bits count, and not one access out of bounds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from tests.helpers.oracle import assert_near

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ROOT = Path(__file__).parents[2]


def memory_or_skip(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.1f} are there")


def test_more_than_2_to_the_31_image_elements():
    memory_or_skip(16)
    rows, cols = 2**19 + 3, 4096
    recon = torch.rand(rows, cols, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    target = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, device=DEVICE)
    loss = fastvae.reconstruction_loss(recon, target, reduction="sum")
    loss.backward()
    truth = 0.0
    with torch.no_grad():
        for start in range(0, rows, 4096):
            piece = slice(start, start + 4096)
            difference = recon[piece].double() - target[piece].double() / 255
            truth += float(difference.square().sum())
            assert_near(recon.grad[piece], 2 * difference, 2.0)
    assert abs(loss.item() / truth - 1) < 1e-6


def test_more_than_2_to_the_31_latents():
    """The last rows draw what they draw alone at their offset."""
    memory_or_skip(16)
    rows, cols = 2**19 + 3, 4096
    mu = torch.zeros(rows, cols, dtype=torch.bfloat16, device=DEVICE)
    z, kl = fastvae.reparameterize_kl(mu, mu, seed=3)
    for start in (0, 2**19 - 2, rows - 2):
        alone = fastvae.reparameterize(mu[:2], mu[:2], seed=3, offset=start * cols)
        assert torch.equal(z[start : start + 2], alone)
    assert not kl.any()


SANITIZED = """
import torch, fastvae
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for image, latent in (((3, 1, 7, 11), (3, 5)), ((2, 5003), (2, 1025)), ((4, 3, 32, 32), (4, 128))):
        recon = torch.rand(image, device="cuda").to(dtype).requires_grad_()
        mu, logvar = (torch.randn(latent, device="cuda").to(dtype).requires_grad_() for _ in range(2))
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1, offset=3)
        loss = fastvae.vae_loss(recon, torch.rand(image, device="cuda"), kl=kl).loss
        loss = 3 * loss + fastvae.vae_loss(recon, torch.rand_like(recon), mu, logvar, reduction="none").loss.sum()
        (loss + z.sum()).backward()
torch.cuda.synchronize()
print("done")
"""


def test_no_access_out_of_bounds_under_compute_sanitizer():
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    tool = shutil.which("compute-sanitizer", path=places)
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    # without the caching allocator every tensor is an allocation of its own, so that its end is a bound
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [tool, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "done" in run.stdout
