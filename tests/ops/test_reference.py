"""The reference against the oracle: it stands in for the kernels under torch.compile and in second derivatives."""

import pytest
import torch

from fastvae import reference
from fastvae_kernels.types import ElboNumbers, ElboOptions, ElboTensors
from tests.helpers import oracle
from tests.helpers.oracle import DTYPES, assert_near


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 7), (2, 3, 5), (2, 3, 2, 2), (2, 2, 3, 2, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("bounds", [None, (-0.5, 0.5)], ids=str)
def test_sampling_and_kl(shape, dtype, bounds):
    mu, logvar, noise = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    inputs = [t.clone().requires_grad_() for t in (mu, logvar)]
    true_inputs = [oracle.leaf(t) for t in (mu, logvar)]
    outputs = reference.reparameterize_kl(*inputs, noise, bounds)
    truth = oracle.sample(*true_inputs, noise, bounds), oracle.per_sample(oracle.kl(*true_inputs, bounds))
    for actual, true in zip(outputs, truth, strict=True):
        assert_near(actual, true.detach(), true.detach().abs() + 10, ulps=8)
    upstream = [torch.randn_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    expected = torch.autograd.grad(truth, true_inputs, [u.double() for u in upstream])
    for actual, true in zip(gradients, expected, strict=True):
        assert actual.dtype == dtype
        # autograd rounds the two terms of a 16-bit gradient apart before it adds them
        assert_near(actual, true, true.abs() + (10 if dtype.itemsize > 2 else 2e5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("bytes_target", [False, True])
def test_loss(dtype, per_sample, bytes_target):
    recon = torch.rand(3, 2, 5, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.rand(3, 2, 5, dtype=torch.float64)
    target = (target * 255).byte() if bytes_target else target.to(dtype)
    mu, logvar = (torch.randn(3, 4, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    normalizers = (1.0, 1.0) if per_sample else (0.25, 0.125)
    options = ElboOptions(recon_normalizer=normalizers[0], kl_normalizer=normalizers[1], per_sample=per_sample)
    tensors = ElboTensors(recon, target, mu=mu, logvar=logvar)
    loss, recon_term, kl_term = reference.elbo(tensors, ElboNumbers(beta=0.5, recon_weight=2.0), options)

    leaves = [oracle.leaf(t) for t in (recon, mu, logvar)]
    true_target = target if bytes_target else target.double()
    reduction = "none" if per_sample else "sum"
    true_recon = normalizers[0] * oracle.reduce(oracle.squared_error(leaves[0], true_target), reduction)
    true_kl = normalizers[1] * oracle.reduce(oracle.kl(*leaves[1:]), reduction)
    true_loss = 2.0 * true_recon + 0.5 * true_kl
    for actual, true in ((loss, true_loss), (recon_term, true_recon), (kl_term, true_kl)):
        assert_near(actual.detach(), true.detach(), true.detach().abs() + 1, ulps=8)
    gradients = torch.autograd.grad(loss.sum(), [recon, mu, logvar])
    for actual, true in zip(gradients, torch.autograd.grad(true_loss.sum(), leaves), strict=True):
        assert_near(actual, true, 2.0)
