"""The example of docs/architecture.md, followed to the letter: a likelihood is added and works on both backends."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch, fastvae
recon, target = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
kl = torch.zeros(3)
for backend in ("triton", "torch"):
    for scale in (None, torch.randn(3, 5, 7)):
        likelihood = "charbonnier"
        if scale is not None:
            likelihood = fastvae.likelihoods.Scaled(likelihood, scale)
        with fastvae.use_backend(backend):
            loss = fastvae.vae_loss(recon, target, kl=kl, likelihood=likelihood).loss
        exact = ((recon.double() - target.double()).square() + 1e-6).sqrt()
        if scale is not None:
            exact = exact / scale.double().exp() + scale
        exact = exact.sum() / 3
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        for one, other in zip(torch.autograd.grad(loss, [recon, target]), torch.autograd.grad(exact, [recon, target])):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
"""


def additions():
    """The lines of each added block, and the line that they stand before or after."""
    page = (ROOT / "docs/architecture.md").read_text()
    example = page[page.index("## How to add a likelihood") :]
    files = re.findall(r"in `(\S+/(?:_elementwise|likelihoods)\.py)`\. ", example)
    diffs = re.findall(r"^```diff\n(.*?)^```", example, re.DOTALL | re.MULTILINE)
    return list(zip(files, diffs, strict=True))


def test_the_example_of_the_documentation(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    ignored = shutil.ignore_patterns("__pycache__", "*.npz")
    shutil.copytree(ROOT / "fastvae", tmp_path / "fastvae", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)
    assert len(additions()) == 2
    for file, diff in additions():
        path = tmp_path / file
        new = "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True))
        (old,) = (line[1:] for line in diff.splitlines(keepends=True) if line.startswith(" "))
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
