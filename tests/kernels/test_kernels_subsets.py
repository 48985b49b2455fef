"""Kernels leave out what no gradient needs: every subset of gradients that a user can ask for has to compile."""

from contextlib import suppress
from itertools import product

import pytest
import torch

import fastvae
from fastvae.likelihoods import Scaled
from fastvae.regularizers import FreeBits
from tests.helpers.aot import DryRun

pytestmark = pytest.mark.compiled
TARGETS = ["sm_90", "gfx942"]
MODES = [None, "dim", "dim_mask", "dim_batch"]
IMAGE, LATENT = (3, 7), (3, 5)


class Translated(Exception):
    """A kernel became Triton's intermediate representation, which is the part of compilation that knows of subsets."""


class Translation(DryRun):
    """A dry run that stops where the intermediate representation is made, each one once."""

    def _run(self, *args, **kwargs):
        with suppress(Translated):
            return super()._run(*args, **kwargs)


@pytest.fixture(params=TARGETS)
def translate(request, monkeypatch):
    import triton
    from triton.compiler.compiler import ASTSource

    make_ir, seen = ASTSource.make_ir, set()

    def stop(source, *args, **kwargs):
        if source.hash() not in seen:
            seen.add(source.hash())
            make_ir(source, *args, **kwargs)
        raise Translated

    monkeypatch.setattr(ASTSource, "make_ir", stop)
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    with fastvae.use_backend("triton"), Translation(request.param):
        yield
    assert seen


def leaves(shape, wanted):
    return [torch.zeros(shape, requires_grad=want) for want in wanted]


def subsets(n):
    return [wanted for wanted in product((False, True), repeat=n) if any(wanted)]


def differentiate(terms, n_outputs=3):
    """By every subset of the outputs, where nothing but the loss is usual."""
    for used in subsets(n_outputs):
        chosen = [term.sum() for term, use in zip(terms, used, strict=True) if use and term.requires_grad]
        if chosen:
            sum(chosen).backward(retain_graph=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("learned_prior", [False, True])
def test_latents(translate, learned_prior, mode):
    mask = torch.ones(IMAGE, dtype=torch.bool)
    for wanted in subsets(4 if learned_prior else 2):
        mu, logvar, *prior = leaves(LATENT, wanted)
        terms = fastvae.vae_loss(
            torch.zeros(IMAGE),
            torch.zeros(IMAGE),
            *(mu, logvar),
            prior=tuple(prior) or None,
            free_bits=mode and FreeBits(0.5, mode),
            mask=mask,
        )
        differentiate(terms)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", ["plain", "scale of each element", "weights"])
def test_images(translate, options, masked):
    mask = torch.ones(IMAGE, dtype=torch.bool) if masked else None
    for wanted in subsets(3 if options == "scale of each element" else 2):
        recon, target, *scale = leaves(IMAGE, wanted)
        likelihood = Scaled("l1", *scale) if scale else "l1"
        weight = torch.ones(IMAGE[:1]) if options == "weights" else None
        terms = fastvae.vae_loss(
            recon, target, kl=torch.zeros(3, requires_grad=True), likelihood=likelihood, mask=mask, weight=weight
        )
        differentiate(terms)


@pytest.mark.parametrize("clamp", [None, (-30.0, 20.0)])
def test_samples(translate, clamp):
    for wanted in subsets(2):
        differentiate(fastvae.reparameterize_kl(*leaves(LATENT, wanted), seed=0, logvar_clamp=clamp), 2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_of_the_mean_alone_compiles_to_the_end(target, monkeypatch):
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    mu, logvar = leaves(LATENT, (True, False))
    with fastvae.use_backend("triton"), DryRun(target) as dry:
        loss = fastvae.vae_loss(*leaves(IMAGE, (False, False)), mu, logvar, free_bits=FreeBits(0.5)).loss
        loss.backward()
    assert len(dry.launches) == 3
