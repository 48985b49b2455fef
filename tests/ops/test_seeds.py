"""Where noise comes from: torch's generators, or a seed and a place in its stream."""

import pytest
import torch

import fastvae
from fastvae.models import VAE, VAEConfig

DRAWS = {
    "reparameterize": lambda: fastvae.reparameterize(torch.zeros(3, 7), torch.zeros(3, 7)),
    "reparameterize_kl": lambda: fastvae.reparameterize_kl(torch.zeros(3, 7), torch.zeros(3, 7))[0],
    "posterior": lambda: fastvae.DiagonalGaussian(torch.zeros(3, 7), torch.zeros(3, 7)).sample(),
    "packed posterior": lambda: fastvae.DiagonalGaussian.from_moments(torch.zeros(3, 14)).rsample_kl()[0],
}
any_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@any_draw
def test_the_state_of_the_default_generator_is_all_there_is(backend, draw):
    torch.manual_seed(3)
    first = draw()
    state = torch.get_rng_state()
    second = draw()
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw(), second)
    torch.manual_seed(3)
    assert torch.equal(draw(), first)


@any_draw
def test_a_forked_generator_leaves_no_trace(backend, draw):
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        assert not torch.equal(draw(), second)
    assert torch.equal(draw(), second)


def test_a_generator_and_a_seed_leave_the_default_generator_alone(backend):
    mu = logvar = torch.zeros(3, 7)
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    fastvae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(1))
    fastvae.reparameterize(mu, logvar, seed=1)
    fastvae.philox_normal(5, seed=1)
    assert torch.equal(torch.randn(5), expected)


def test_a_backward_pass_draws_nothing(backend):
    logvar = torch.zeros(3, 7, requires_grad=True)
    for create_graph in (False, True):
        z = fastvae.reparameterize(torch.zeros(3, 7), logvar)
        state = torch.get_rng_state()
        torch.autograd.grad(z.sum(), logvar, create_graph=create_graph)
        assert torch.equal(torch.get_rng_state(), state)


def test_ranks_seeded_apart_draw_apart(backend):
    """What the trainer does: each rank reseeds its default generator."""
    drawn = []
    for rank in range(4):
        torch.manual_seed(100 + rank)
        drawn.append(fastvae.reparameterize(torch.zeros(3, 7), torch.zeros(3, 7)))
    assert torch.stack(drawn).flatten().unique().numel() == 4 * 21


@pytest.mark.parametrize("latents", [1, 3, 8], ids=lambda n: f"{n} latents")
@pytest.mark.parametrize("sizes", [(3, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_with_one_seed_draw_what_one_process_draws(backend, sizes, latents, dtype):
    """Any number of ranks, batches of any sizes: to the bit, and so are the gradients."""
    total = sum(sizes)
    mu, logvar = torch.randn(2, total, latents).to(dtype)
    z, kl, dmu, dlogvar = sampled(mu, logvar, seed=9)
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        parts.append(sampled(mu[rows], logvar[rows], seed=9, offset=start * latents))
        start += size
    for whole, pieces in zip((z, kl, dmu, dlogvar), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def sampled(mu, logvar, **noise):
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = fastvae.reparameterize_kl(mu, logvar, **noise)
    return z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), (mu, logvar))


def test_a_models_seed_and_offset_are_those_of_the_noise():
    model = VAE(VAEConfig(image_size=(4, 5), latent_dim=3, backbone="mlp", hidden=8)).double()
    x = torch.rand(5, 1, 4, 5)
    whole = model(x, seed=2)
    parts = [model(x[:2], seed=2), model(x[2:], seed=2, offset=2 * 3)]
    for name in whole._fields:
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
