"""Mixed precision as training code has it: autocast, and gradients scaled so that float16 holds them."""

from itertools import pairwise

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian
from fastvae.models import VAE, VAEConfig
from fastvae.regularizers import Capacity, FreeBits
from tests.helpers.oracle import assert_near

both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

IMAGE = (1, 6, 7)
OPTIONS = {
    "none": lambda: {},
    "bernoulli": lambda: {"likelihood": "bernoulli"},
    "bernoulli_probs": lambda: {"likelihood": "bernoulli_probs"},
    "huber, weight": lambda: {"likelihood": "huber", "weight": torch.rand(3)},
    "learned scale, extra": lambda: {"likelihood": Gaussian(torch.tensor(0.3)), "extra": torch.rand(3)},
    "scale per element": lambda: {"likelihood": Gaussian(torch.randn(3, *IMAGE))},
    "optimal scale": lambda: {"likelihood": Gaussian("optimal")},
    "prior, free bits": lambda: {"prior": (torch.randn(5), torch.randn(5)), "free_bits": FreeBits(0.1)},
    "free bits of the batch": lambda: {"free_bits": FreeBits(0.1, "dim_batch")},
    "capacity, beta": lambda: {"capacity": Capacity(1.0), "beta": torch.tensor(0.5)},
}


def small_vae():
    return VAE(VAEConfig(image_size=IMAGE[1:], latent_dim=5, backbone="mlp", hidden=16))


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
@pytest.mark.parametrize("name", OPTIONS)
@both_dtypes
def test_autocast_changes_no_bit_of_sampling_and_loss(backend, dtype, name, create_graph):
    """Arithmetic is float32 by contract, whatever autocast would do to the operations that it is made of."""
    options = OPTIONS[name]()
    recon = torch.rand(3, *IMAGE).to(dtype).requires_grad_()
    mu, logvar = (torch.randn(3, 5).to(dtype).requires_grad_() for _ in range(2))
    target = torch.rand(3, *IMAGE)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
            terms = fastvae.vae_loss(recon, target, mu, logvar, **options)
            of_kl = fastvae.vae_loss(recon, target, kl=kl).loss
            loss = terms.loss + of_kl + z.float().sum()
            gradients = torch.autograd.grad(loss, (recon, mu, logvar), create_graph=create_graph)
        results.append((z, kl, *terms, of_kl, *gradients))
    assert {t.dtype for t in results[1][1:6]} == {torch.float32}
    assert {t.dtype for t in results[1][6:]} == {dtype}
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype
        assert torch.equal(plain, cast)


@both_dtypes
def test_a_clamp_between_two_16_bit_numbers(backend, dtype):
    """The bounds are float32 in the forward pass and in the backward pass: what is clamped gets no gradient."""
    bounds = (-0.3, 0.3)  # the nearest numbers lie outside, in both dtypes
    logvar = torch.tensor([[-0.3, 0.0, 0.3]]).to(dtype).requires_grad_()
    mu = torch.zeros(1, 3, dtype=dtype)
    for value in (
        fastvae.gaussian_kl(mu, logvar, logvar_clamp=bounds),
        fastvae.reparameterize(mu, logvar, seed=1, logvar_clamp=bounds).sum(),
    ):
        (gradient,) = torch.autograd.grad(value, logvar)
        assert gradient[0, 0] == 0
        assert gradient[0, 2] == 0


@pytest.mark.parametrize("free_bits", [None, FreeBits(0.1), FreeBits(0.1, "dim_batch")], ids=str)
@pytest.mark.parametrize("wide", ["images", "latents"])
def test_all_terms_have_one_dtype(backend, wide, free_bits):
    """float64 if any input is, float32 otherwise."""
    recon, target = torch.rand(2, 3, *IMAGE, dtype=torch.float64 if wide == "images" else torch.bfloat16)
    mu, logvar = torch.randn(2, 3, 5, dtype=torch.float64 if wide == "latents" else torch.float32)
    terms = fastvae.vae_loss(recon, target, mu, logvar, free_bits=free_bits)
    assert {term.dtype for term in terms} == {torch.float64}


@pytest.mark.parametrize("loss_inside", [True, False])
@both_dtypes
def test_training_step(backend, dtype, loss_inside):
    """A 16-bit decoder's output against float32 images: loss in float32, its gradient in 16 bits, rounded once."""
    model, x = small_vae(), torch.rand(4, *IMAGE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            out = model(x, seed=step)
            if loss_inside:
                loss = fastvae.VAELoss()(out.recon, x, kl=out.kl)
        if not loss_inside:
            loss = fastvae.VAELoss()(out.recon, x, kl=out.kl)
        out.recon.retain_grad()
        loss.backward()
        optimizer.step()
        assert (out.recon.dtype, out.recon.grad.dtype, out.z.dtype) == (dtype, dtype, dtype)
        assert (out.kl.dtype, loss.dtype) == (torch.float32, torch.float32)
        expected = 2 / 4 * (out.recon.detach().double() - x.double())
        assert_near(out.recon.grad, expected, expected.abs())
        error = (out.recon.detach().double() - x.double()).square().sum() / 4 + out.kl.detach().double().sum() / 4
        assert_near(loss.detach(), error, error, ulps=8)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


class TestGradScaler:
    def train(self, model, x, scaler, steps):
        """Skipped or not, for each step; the scale before it."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        criterion = fastvae.VAELoss(return_terms=True)
        history = []
        for step in range(steps):
            before = [p.detach().clone() for p in model.parameters()]
            scale = scaler.get_scale()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                out = model(x, seed=step)
                terms = criterion(out.recon, x, kl=out.kl)
            assert all(term.isfinite() for term in terms)
            scaler.scale(terms.loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = any(p.ne(old).any() for p, old in zip(model.parameters(), before, strict=True))
            history.append((scale, not moved))
        return history

    def test_an_overflowing_step_is_skipped_and_the_next_scale_is_half(self, backend):
        """At 2^18 the gradient of a pixel that is half off, 2 * 0.5 / 4, is past what float16 holds."""
        model, x = small_vae(), torch.rand(4, *IMAGE)
        history = self.train(model, x, torch.amp.GradScaler("cpu", init_scale=2.0**18), 8)
        assert history[0] == (2.0**18, True)
        assert not history[-1][1]
        for (scale, skipped), (following, _) in pairwise(history):
            assert following == (scale / 2 if skipped else scale)
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("scale", [1.0, 2.0**10])
    def test_unscaled_gradients_are_those_of_a_step_without_a_scaler(self, backend, scale):
        """A power of two scales exactly, so nothing but underflow can tell them apart."""
        model, x = small_vae(), torch.rand(4, *IMAGE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        gradients = []
        for _ in range(2):
            optimizer.zero_grad()
            out = model(x, seed=1)
            loss = fastvae.VAELoss()(out.recon.to(torch.float16), x, kl=out.kl)
            if gradients:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            else:
                loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    def test_a_float16_gradient_below_its_smallest_number_survives(self, backend):
        """Unscaled, 2 (x' - x) / B of 2^-26 is 0 in float16: the forward pass may not write it there."""
        recon = torch.full((2, 3), 0.25, dtype=torch.float16, requires_grad=True)
        target = torch.full((2, 3), 0.25 - 2.0**-26)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scaler.scale(fastvae.reconstruction_loss(recon, target)).backward()
        assert (recon.grad == 2.0**-10).all()

    def test_a_step_that_is_not_finite_is_skipped(self, backend):
        model, x = small_vae(), torch.rand(4, *IMAGE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = [p.detach().clone() for p in model.parameters()]
        x[1, 0, 0, 0] = torch.nan
        out = model(x.nan_to_num(), seed=1)
        scaler.scale(fastvae.VAELoss()(out.recon, x, kl=out.kl)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
