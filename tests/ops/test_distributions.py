import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import fastvae
from tests.helpers import oracle
from tests.ops.test_reparam_kl import check_against_oracle

SHAPES = {1: (3, 6), 2: (2, 3, 4, 5), -1: (2, 3, 8), 3: (2, 2, 3, 4, 2)}


def moments(shape, dtype=torch.float32, view=lambda t: t):
    return view(torch.randn(shape, dtype=torch.float64).to(dtype)).requires_grad_()


@pytest.mark.parametrize("dim", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_moments_along_any_dimension(backend, dim, dtype):
    """One packed gradient: that of the halves, side by side."""
    packed = moments(SHAPES[dim], dtype)
    z, kl = fastvae.DiagonalGaussian.from_moments(packed, dim, logvar_clamp=(-1.0, 1.0)).rsample_kl(seed=3)
    halves = [half.contiguous().requires_grad_() for half in packed.detach().chunk(2, dim)]
    expected_z, expected_kl = fastvae.reparameterize_kl(*halves, seed=3, logvar_clamp=(-1.0, 1.0))
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(kl, expected_kl)
    upstream = torch.randn_like(z), torch.randn_like(kl)
    torch.autograd.backward([z, kl], upstream)
    torch.autograd.backward([expected_z, expected_kl], upstream)
    torch.testing.assert_close(packed.grad, torch.cat([half.grad for half in halves], dim))


def test_packed_channels_last_keeps_its_layout(backend):
    packed = moments((2, 8, 3, 5), view=lambda t: t.contiguous(memory_format=torch.channels_last))
    z, kl = fastvae.DiagonalGaussian.from_moments(packed).rsample_kl(seed=3)
    contiguous = packed.detach().contiguous().requires_grad_()
    expected, _ = fastvae.DiagonalGaussian.from_moments(contiguous).rsample_kl(seed=3)
    torch.testing.assert_close(z, expected)
    (z.sum() + kl.sum()).backward()
    assert packed.grad.stride() == packed.stride()


def test_the_backward_pass_concatenates_nothing(backend):
    packed = moments((2, 8, 3, 5))
    z, kl = fastvae.DiagonalGaussian.from_moments(packed).rsample_kl(seed=3)
    node = z.grad_fn
    assert kl.grad_fn is node
    assert [parent for parent, _ in node.next_functions if parent] == [node.next_functions[0][0]]
    assert type(node.next_functions[0][0]).__name__ == "AccumulateGrad"  # no split or chunk in between


def test_apart_equals_packed(backend):
    mu, logvar = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    z, kl = fastvae.DiagonalGaussian(mu, logvar).rsample_kl(seed=1)
    check_against_oracle(mu, logvar, z, kl, fastvae.philox_normal((3, 5), seed=1))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5, 2)], ids=str)
def test_kl_and_nll_against_torch_distributions(backend, shape):
    mu, logvar, other_mu, other_logvar, sample = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    ours, other = fastvae.DiagonalGaussian(mu, logvar), fastvae.DiagonalGaussian(other_mu, other_logvar)
    event = len(shape) - 1
    true = Independent(Normal(mu, (0.5 * logvar).exp()), event)
    true_other = Independent(Normal(other_mu, (0.5 * other_logvar).exp()), event)
    torch.testing.assert_close(ours.kl(other), kl_divergence(true, true_other))
    torch.testing.assert_close(ours.kl(), oracle.per_sample(oracle.kl(mu, logvar)))
    torch.testing.assert_close(ours.nll(sample), -true.log_prob(sample))
    assert ours.kl(ours).abs().max() < 1e-12


def test_gradients_of_kl_on_both_sides():
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]

    def kl(a, b, c, d):
        return fastvae.DiagonalGaussian(a, b).kl(fastvae.DiagonalGaussian(c, d))

    assert torch.autograd.gradcheck(kl, inputs)


def test_deterministic_is_a_point_mass():
    packed = torch.randn(3, 8, 2, 2, dtype=torch.float64)
    posterior = fastvae.DiagonalGaussian.from_moments(packed, deterministic=True)
    z, kl = posterior.rsample_kl()
    assert torch.equal(z, packed[:, :4])
    assert torch.equal(posterior.sample(), posterior.mode())
    assert kl.tolist() == posterior.kl().tolist() == posterior.nll(z).tolist() == [0.0, 0.0, 0.0]
    assert kl.dtype == torch.float64
    assert not posterior.std.any()
    assert not posterior.var.any()


def test_clamp_is_diffusers_by_default():
    packed = torch.tensor([[0.0, -40.0], [0.0, 30.0]])
    posterior = fastvae.DiagonalGaussian.from_moments(packed)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    torch.testing.assert_close(posterior.std, torch.exp(torch.tensor([[-15.0], [10.0]])))
    torch.testing.assert_close(posterior.var, torch.exp(torch.tensor([[-30.0], [20.0]])))


@pytest.mark.parametrize(("shape", "dim"), [((2, 5), 1), ((2, 4), 0), ((2, 4), 2), ((2, 4), -2)], ids=str)
def test_what_cannot_be_halved_is_named(shape, dim):
    with pytest.raises(ValueError, match=r"two halves of dimension dim.*got shape \(2, . ?\)|two halves"):
        fastvae.DiagonalGaussian.from_moments(torch.ones(shape), dim)


def test_kl_to_a_point_is_infinite_and_of_a_point_zero(backend):
    packed = torch.randn(3, 4)
    wide, point = (fastvae.DiagonalGaussian.from_moments(packed, deterministic=d) for d in (False, True))
    assert wide.kl(point).tolist() == [torch.inf] * 3
    assert point.kl(wide).tolist() == [0] * 3
