"""Defaults of torch decide where tensors are made; the library's numbers depend on its inputs alone."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch

import fastvae
from fastvae import parametrizations, schedules
from fastvae.likelihoods import Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits, balance
from tests.helpers.ambient import STATES

CPU32 = {"device": "cpu", "dtype": torch.float32}


def results():
    """Numbers of everything public that computes, with gradients."""
    generator = torch.Generator("cpu").manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, **CPU32).requires_grad_()

    recon, target, mu, logvar, p_mu, p_logvar = rand(3, 8), rand(3, 8), *(rand(3, 4) for _ in range(4))
    leaves = recon, target, mu, logvar, p_mu, p_logvar
    half = torch.tensor(0.5, **CPU32)
    per_sample = torch.tensor([0.5, 2.0, 1.0], **CPU32)
    byte = torch.arange(24, dtype=torch.uint8, device="cpu").reshape(3, 8)
    mask = torch.ones(3, 8, dtype=torch.bool, device="cpu")
    found = []
    for options in (
        {},
        {"reduction": "none", "beta": half, "recon_weight": half},
        {"free_bits": FreeBits(0.1), "prior": (p_mu, p_logvar), "logvar_clamp": (0.1, 0.9)},
        {"free_bits": FreeBits(0.1, "dim_batch"), "weight": per_sample, "extra": per_sample, "mask": mask},
        {"capacity": Capacity(half), "likelihood": Gaussian("optimal", full=True), "reduction": "mean"},
        {"likelihood": Scaled("l1", per_sample), "recon_weight": 0.3},
        {"likelihood": Gaussian(half, softclip=-6.0), "mask": mask},
    ):
        terms = fastvae.vae_loss(recon, target, mu, logvar, **options)
        found += [*terms, *torch.autograd.grad(terms.loss.sum(), leaves, allow_unused=True)]
    shifted = fastvae.likelihoods.L2(target_shift=0.1)
    found.append(fastvae.reconstruction_loss(recon, byte, likelihood=shifted))
    for sample in (
        fastvae.reparameterize_kl(mu, logvar, seed=5, logvar_clamp=(-1.0, 1.0)),
        fastvae.DiagonalGaussian(mu, logvar).rsample_kl(seed=6),
    ):
        found += [*sample, *torch.autograd.grad([x.sum() for x in sample], (mu, logvar))]
    found += fastvae.latent_stats(mu, logvar, logvar_clamp=(0.2, 0.8))
    found += [fastvae.philox_normal(5, seed=3, device="cpu", dtype=torch.float32)]
    found += [parametrizations.logvar_from_softplus(mu, 1e-4), parametrizations.soft_clamp(mu, 0.5)]
    found += balance(mu, logvar, (p_mu, p_logvar), 0.8)[:2]
    found += [torch.tensor(schedules.Sigmoid(0.0, 1.0, 10).value_at(3), device="cpu", dtype=torch.float64)]
    return [None if t is None else (str(t.dtype), t.tolist()) for t in found]


FRESH_PROCESS = """
import json, torch
from tests.helpers.ambient import STATES

torch.use_deterministic_algorithms(True)
with STATES[{state!r}]():
    from tests.ops.test_ambient import fastvae, results
    with fastvae.use_backend({backend!r}), torch.inference_mode(False):
        within = results()
with fastvae.use_backend({backend!r}):
    print(json.dumps([within, results()]))
"""


@pytest.mark.parametrize("state", STATES)
def test_numbers_do_not_depend_on_the_defaults_of_torch(backend, state):
    """Neither on those at the import, which a call may trigger, nor on those at the call."""
    script = FRESH_PROCESS.format(state=state, backend=backend)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = json.loads(json.dumps(results()))
    assert json.loads(done.stdout) == [expected, expected]


def test_no_module_holds_a_tensor():
    """Such a tensor would have the default device and dtype, and the inference mode, of whoever imports it first."""
    for package in (fastvae, pytest.importorskip("fastvae_kernels")):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                module = importlib.import_module(found.name)
                held = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
                assert not held, found.name
