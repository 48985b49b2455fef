"""Bad input: an error that says what is required, what came and what to do, before anything is computed."""

import math

import pytest
import torch

import fastvae
from fastvae.likelihoods import L2, Gaussian, Huber, LogCosh, Scaled, SmoothL1
from fastvae.regularizers import Capacity, FreeBits, balance
from fastvae.schedules import Linear

IMAGE, LATENT = torch.ones(2, 3), torch.ones(2, 4)


def sample(mu=LATENT, logvar=LATENT, **options):
    return fastvae.reparameterize_kl(mu, logvar, **options)


def loss(recon=IMAGE, target=IMAGE, mu=LATENT, logvar=LATENT, **options):
    return fastvae.vae_loss(recon, target, mu, logvar, **options)


def leaf():
    return torch.ones(2, 3, requires_grad=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loss(weight=torch.ones(3)), ValueError, r"weight must have shape \[B\] = \(2,\).*got \(3,\)"),
        (lambda: loss(extra=torch.ones(3, 1)), ValueError, r"extra must have shape \[B\].*got \(3, 1\)"),
        (lambda: loss(weight=2.0), TypeError, "weight must be a torch.Tensor; got float"),
        (lambda: loss(mask=torch.ones(2, 3)), TypeError, "mask must be a bool tensor; got float32"),
        (lambda: loss(mask=torch.ones(3, 3) > 0), ValueError, r"mask must broadcast to recon's shape \(2, 3\)"),
        (lambda: loss(prior=LATENT), TypeError, r"prior must be None or a pair of tensors \(mu, logvar\)"),
        (lambda: loss(prior=(LATENT, 0.0)), TypeError, "prior's logvar must be a tensor.*got float"),
        (lambda: loss(prior=(LATENT, torch.ones(5))), ValueError, r"prior's logvar must broadcast.*got \(5,\)"),
        (lambda: loss(free_bits=0.5), TypeError, r"FreeBits; got float. For example FreeBits\(0.5\)"),
        (lambda: loss(capacity=25.0), TypeError, "Capacity; got float"),
        (lambda: loss(free_bits=FreeBits(0.1, "dim_batch"), reduction="none"), ValueError, "no value per sample"),
        (lambda: loss(capacity=Capacity(0.1, "batch"), reduction="none"), ValueError, "no value per sample"),
        (
            lambda: loss(capacity=Capacity(1.0), free_bits=FreeBits(1.0, "dim_batch")),
            ValueError,
            "no meaning after free bits of the batch",
        ),
        (lambda: loss(likelihood=L2(mask_normalize=True), reduction="sum"), ValueError, "mask_normalize divides by"),
        (lambda: loss(likelihood=Gaussian(torch.ones(7))), ValueError, "likelihood's scale must broadcast to recon's"),
        (
            lambda: loss(logvar=None, kl=torch.ones(2), free_bits=FreeBits(0.1)),
            ValueError,
            "free_bits cannot act on kl=",
        ),
        (lambda: loss(logvar=None, kl=torch.ones(2), prior=(LATENT, LATENT)), ValueError, "prior cannot act on kl="),
        (lambda: FreeBits(-1.0), ValueError, "nats must be 0 or more"),
        (lambda: FreeBits(1.0, "dims"), ValueError, "mode must be one of.*Did you mean 'dim'"),
        (lambda: Capacity(1.0, "all"), ValueError, "mode must be one of 'sample', 'batch'"),
        (lambda: Huber(0.0), ValueError, "delta must be positive"),
        (lambda: SmoothL1(-1.0), ValueError, "beta must be positive"),
        (lambda: LogCosh(math.inf), ValueError, "alpha must be positive and finite"),
        (lambda: Huber("1"), TypeError, "delta must be a number; got str"),
        (lambda: Gaussian("best"), ValueError, "logvar must be a float, 'optimal' or a tensor; got 'best'"),
        (lambda: Scaled("l1", "optimal"), ValueError, "log_scale must be a float or a tensor"),
        (lambda: Scaled(Gaussian(), 0.0), TypeError, "base must be a name or an elementwise likelihood; got Gaussian"),
        (lambda: balance(LATENT, LATENT, (LATENT, LATENT), 1.5), ValueError, "weight must be between 0 and 1"),
        (lambda: fastvae.VAELoss.preset("pythia"), ValueError, "Did you mean 'pythae'"),
        (lambda: sample(mu=[1.0]), TypeError, "mu must be a torch.Tensor; got list"),
        (lambda: sample(mu=LATENT.int()), TypeError, r"mu must be one of float64.*got int32.*\.float\(\)"),
        (lambda: sample(logvar=torch.ones(2, 5)), ValueError, r"one shape; got \(2, 4\) and \(2, 5\)"),
        (lambda: sample(mu=torch.tensor(1.0), logvar=torch.tensor(1.0)), ValueError, r"batch dimension.*reshape\(1\)"),
        (lambda: sample(mu=LATENT.to_sparse()), ValueError, "dense tensor; got layout torch.sparse_coo"),
        (lambda: sample(logvar=LATENT.to("meta")), ValueError, "one device; got cpu and meta"),
        (lambda: sample(seed=1.5), TypeError, "seed must be an int or a one-element int64 tensor; got float"),
        (lambda: sample(seed=True), TypeError, "seed must be an int"),
        (lambda: sample(seed=torch.ones(2, dtype=torch.int64)), ValueError, r"one int64.*shape \(2,\)"),
        (lambda: sample(seed=torch.ones(1)), ValueError, "one int64.*got float32"),
        (lambda: sample(seed=1, generator=torch.Generator()), ValueError, "generator and seed exclude each other"),
        (lambda: sample(generator=7), TypeError, "generator must be a torch.Generator; got int"),
        (lambda: sample(offset=4), ValueError, "offset=4 without seed"),
        (lambda: sample(seed=1, offset=-1), ValueError, r"offset must lie in \[0, 2\^62\); got -1"),
        (lambda: sample(seed=1, offset=0.5), TypeError, "offset must be an int"),
        (lambda: sample(logvar_clamp=(2, 1)), ValueError, r"lo < hi; got \(2, 1\)"),
        (lambda: sample(logvar_clamp=5), ValueError, "logvar_clamp must be None or"),
        (lambda: loss(recon=IMAGE.long()), TypeError, "recon must be one of .* got int64"),
        (lambda: loss(target=IMAGE.short()), TypeError, "target must be one of .*uint8; got int16"),
        (lambda: loss(target=torch.ones(2, 1)), ValueError, "Nothing is broadcast"),
        (lambda: loss(mu=None), ValueError, "needs mu and logvar, or kl="),
        (lambda: loss(mu=torch.ones(3, 4), logvar=torch.ones(3, 4)), ValueError, "one batch size; got 2 and 3"),
        (lambda: loss(reduction="avg"), ValueError, "reduction must be one of .*'batchmean'.*got 'avg'"),
        (lambda: loss(reduction="batch_mean"), ValueError, "Did you mean 'batchmean'?"),
        (lambda: loss(kl_reduction="none"), ValueError, 'must both be "none" or neither'),
        (lambda: loss(likelihood="l3"), ValueError, "likelihood must be one of 'l2', .*; got 'l3'"),
        (lambda: loss(beta="1"), TypeError, "beta must be a float or a 0-dimensional tensor; got str"),
        (lambda: loss(beta=torch.ones(1)), ValueError, r"beta must be .* got shape \(1,\)"),
        (lambda: loss(beta="linear"), TypeError, r"fastvae.schedules.Linear\(0.0, 1.0, steps\).*\.value to a function"),
        (lambda: fastvae.VAELoss(beta="cyclic"), TypeError, r"VAELoss\(beta=fastvae.schedules.Cyclical\("),
        (lambda: fastvae.VAELoss(beta=Linear), TypeError, "got the class Linear, not an object of it"),
        (lambda: fastvae.VAELoss(recon_weight="1"), TypeError, "got str.$"),
        (lambda: loss(likelihood="MSE"), ValueError, "got 'MSE'. Did you mean 'l2'?"),
        (lambda: loss(likelihood="bce"), ValueError, "'bernoulli' for logits, or 'bernoulli_probs' for probabilities"),
        (lambda: fastvae.VAELoss(likelihood="gaussian"), ValueError, r"mean fastvae.likelihoods.Gaussian\(logvar\)"),
        (lambda: loss(likelihood="laplace"), ValueError, r"fastvae.likelihoods.Scaled\('l1', log_scale\)"),
        (lambda: loss(likelihood=fastvae.likelihoods.L2), TypeError, "got the class L2, not an object of it"),
        (lambda: loss(recon_weight=torch.tensor(1)), ValueError, "recon_weight must be .* got int64"),
        (lambda: loss(kl=torch.ones(2)), ValueError, "Drop logvar: kl= replaces it"),
        (lambda: loss(logvar=None, kl=torch.ones(3)), ValueError, r"\[B\] = \(2,\).*got \(3,\)"),
        (lambda: loss(logvar=None, kl=torch.ones(2), logvar_clamp=(-1, 1)), ValueError, "cannot act on kl="),
        (
            lambda: loss(mu=None, logvar=None, kl=torch.ones(2), kl_reduction="mean", recon_reduction="mean"),
            ValueError,
            "Pass mu too",
        ),
        (lambda: fastvae.gaussian_kl(LATENT, LATENT, reduction="x"), ValueError, "reduction must be one of"),
        (lambda: fastvae.reconstruction_loss(IMAGE, IMAGE, likelihood=3), TypeError, "a name, an object.*got int"),
        (lambda: fastvae.philox_normal(3, seed="a"), TypeError, "seed must be an int"),
        (lambda: fastvae.philox_normal(3, seed=1, dtype=torch.int32), TypeError, "the noise must be one of"),
        (lambda: fastvae.VAELoss(reduction="x"), ValueError, "reduction must be one of"),
        (lambda: fastvae.VAELoss(beta=None), TypeError, "beta must be a float"),
        (lambda: fastvae.VAELoss(logvar_clamp=(1, 0)), ValueError, "lo < hi"),
        (lambda: fastvae.VAELoss(accumulate=0), ValueError, "accumulate must be an int of at least 1; got 0"),
        (lambda: loss(recon=leaf(), inplace=True), ValueError, "must not be a leaf"),
        (lambda: loss(recon=leaf()[:, :1].expand(2, 3), inplace=True), ValueError, "fill its memory"),
        (lambda: loss(recon=leaf() * 1, inplace=True, one_pass=False), ValueError, "needs one_pass=True"),
        (lambda: loss(recon=leaf() * 1, inplace=True, recon_weight=0.0), ValueError, "float other than 0"),
        (lambda: loss(recon=leaf().half(), inplace=True), ValueError, "not float16"),
    ],
)
def test_bad_input_is_named(call, error, message):
    loss()  # a call that was checked excuses no other
    with pytest.raises(error, match=message):
        call()
