"""Activation checkpointing: the recomputed forward pass draws the same noise, and the loss leaves nothing behind."""

import pytest
import torch
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae.models import VAE, VAEConfig

either_kind = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def posterior():
    return (torch.randn(3, 7, requires_grad=True) for _ in range(2))


SOURCES = {
    "seed": {"seed": 5, "offset": 3},
    "seed tensor": {"seed": torch.tensor(5)},
    "default generator": {},
}


@either_kind
@pytest.mark.parametrize("source", SOURCES)
def test_the_recomputation_draws_the_same_noise(backend, source, use_reentrant):
    """dz/dlogvar = (z - mu) / 2 tells the noise of the second time, z that of the first."""
    mu, logvar = posterior()
    z = checkpoint(
        lambda *x: fastvae.reparameterize_kl(*x, **SOURCES[source])[0], mu, logvar, use_reentrant=use_reentrant
    )
    torch.randn(1000)  # the generator has moved on by the time of the backward pass
    z.sum().backward()
    torch.testing.assert_close(logvar.grad, 0.5 * (z - mu).detach())
    assert z.ne(mu).all()


@either_kind
def test_the_default_generator_goes_on_as_if_nothing_had_been_recomputed(backend, use_reentrant):
    """preserve_rng_state=True: what is drawn after a step does not depend on checkpointing."""
    followers = []
    for checkpointed in (False, True):
        mu, logvar = posterior()
        torch.manual_seed(1)
        sample = fastvae.reparameterize
        z = checkpoint(sample, mu, logvar, use_reentrant=use_reentrant) if checkpointed else sample(mu, logvar)
        between = torch.randn(2)
        z.sum().backward()
        followers.append((between, torch.randn(2)))
    assert all(torch.equal(a, b) for a, b in zip(*followers, strict=True))


@either_kind
def test_without_the_generators_state_a_seed_still_gives_the_same_noise(backend, use_reentrant):
    mu, logvar = posterior()
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    z = checkpoint(lambda *x: fastvae.reparameterize(*x, seed=5), mu, logvar, **options)
    z.sum().backward()
    torch.testing.assert_close(logvar.grad, 0.5 * (z - mu).detach())


@either_kind
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("options", [{}, {"one_pass": False}, {"inplace": True}], ids=str)
def test_the_loss_within(backend, options, factor, use_reentrant):
    recon, target, kl = torch.rand(3, 50, requires_grad=True), torch.rand(3, 50), torch.rand(3, requires_grad=True)

    def loss(recon, kl):
        return fastvae.vae_loss(recon * 1, target, kl=kl, **options).loss

    value = checkpoint(loss, recon, kl, use_reentrant=use_reentrant)
    torch.testing.assert_close(value, loss(recon, kl))
    (factor * value).backward()
    torch.testing.assert_close(recon.grad, factor * 2 / 3 * (recon - target).detach())
    torch.testing.assert_close(kl.grad, torch.full((3,), factor / 3))


def test_a_retained_graph_is_recomputed_each_time(backend):
    recon, target = torch.rand(3, 50, requires_grad=True), torch.rand(3, 50)
    value = checkpoint(fastvae.reconstruction_loss, recon, target, use_reentrant=False)
    for factor in (1.0, 3.0, 1.0):
        (gradient,) = torch.autograd.grad(factor * value, recon, retain_graph=True)
        torch.testing.assert_close(gradient, factor * 2 / 3 * (recon - target).detach())


def held(call):
    """Bytes that are allocated while `call` runs and still held when it has returned, and its result."""
    with profile(profile_memory=True) as prof:
        result = call()
    return sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in prof.key_averages()), result


@either_kind
def test_the_loss_within_holds_no_image(backend, use_reentrant):
    """Between forward and backward: without a checkpoint the gradient that the forward pass wrote is there."""
    n = 50_000 if backend == "torch" else 2_000
    recon, target, kl = torch.rand(4, n, requires_grad=True), torch.rand(4, n), torch.rand(4)
    image = recon.numel() * recon.element_size()
    options = {"use_reentrant": use_reentrant, "preserve_rng_state": False}  # that state is 5 KB

    def loss(recon):
        return fastvae.vae_loss(recon, target, kl=kl, weight=torch.ones(4)).loss

    loss(recon)  # what is made once for all stays, with gradients and without
    with torch.no_grad():
        loss(recon)
    plain, _ = held(lambda: loss(recon))
    assert image <= plain < 1.05 * image
    inside, value = held(lambda: checkpoint(loss, recon, **options))
    assert inside < 0.05 * image
    after, _ = held(value.backward)
    assert 0.95 * image < after < 1.05 * image  # the gradient itself
    torch.testing.assert_close(recon.grad, 2 / 4 * (recon - target).detach())


@either_kind
def test_a_whole_model(backend, use_reentrant):
    """Encoder, sampling and decoder in one checkpoint, the loss in another: the gradients of the plain step."""
    model = VAE(VAEConfig(image_size=(4, 5), latent_dim=3, backbone="mlp", hidden=8))
    x = torch.rand(2, 1, 4, 5)
    criterion = fastvae.VAELoss(0.5)

    def forward(x, _):
        out = model(x)
        return out.recon, out.kl

    def loss(recon, kl):
        return criterion(recon, x, kl=kl)

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        model.zero_grad()
        if checkpointed:
            # an argument has to ask for a gradient, or the reentrant kind computes none
            terms = checkpoint(forward, x, torch.ones((), requires_grad=True), use_reentrant=use_reentrant)
            checkpoint(loss, *terms, use_reentrant=use_reentrant).backward()
        else:
            loss(*forward(x, None)).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)
