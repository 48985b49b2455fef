"""Every object survives copying, pickling, and saving as a file that is loaded without running code."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastvae
from fastvae import likelihoods, schedules
from fastvae.likelihoods import L1, L2, Bernoulli, BernoulliProbs, Gaussian, Huber, LogCosh, Scaled, SmoothL1
from fastvae.models import VAE, VAEConfig
from fastvae.noise_state import NoiseState
from fastvae.presets import PRESETS
from fastvae.regularizers import Capacity, FreeBits


def filed(thing, *, weights_only):
    """What torch.save wrote and torch.load read."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


TWINS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: filed(thing, weights_only=False),
}
any_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


def parameter(value=0.3):
    return nn.Parameter(torch.tensor(value))


LOSSES = {
    "no argument": lambda: fastvae.VAELoss(),
    "numbers": lambda: fastvae.VAELoss(0.3, "huber", "sum", recon_weight=2.0, kl_reduction="mean", accumulate=3),
    "flags": lambda: fastvae.VAELoss(one_pass=False, return_terms=True, logvar_clamp=(-1.0, 1.0)),
    "tensor beta": lambda: fastvae.VAELoss(torch.tensor(0.3), recon_weight=torch.tensor(2.0)),
    "learned beta": lambda: fastvae.VAELoss(parameter()),
    "scheduled beta": lambda: fastvae.VAELoss(schedules.Cyclical(0.1, 1.0, 10, cycles=2, shape="cosine")),
    "free bits": lambda: fastvae.VAELoss(free_bits=FreeBits(0.2, "dim_batch")),
    "capacity": lambda: fastvae.VAELoss(capacity=Capacity(0.7, "batch")),
    "scheduled capacity": lambda: fastvae.VAELoss(capacity=Capacity(schedules.Sigmoid(0.1, 9.0, 10))),
    "tensor capacity": lambda: fastvae.VAELoss(capacity=Capacity(torch.tensor(0.7))),
    "fixed scale": lambda: fastvae.VAELoss(likelihood=Gaussian(0.3, full=True, softclip=-3.0)),
    "learned scale": lambda: fastvae.VAELoss(likelihood=Gaussian(parameter())),
    "constant scale": lambda: fastvae.VAELoss(likelihood=Scaled(SmoothL1(0.3), torch.rand(6))),
    "optimal scale": lambda: fastvae.VAELoss(likelihood=Gaussian("optimal")),
    "elementwise": lambda: fastvae.VAELoss(likelihood=LogCosh(2.0, target_scale=0.5)),
    **{f"preset {name}": lambda name=name: fastvae.VAELoss.preset(name) for name in PRESETS},
}
any_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch():
    recon, target = torch.rand(4, 6).clamp(0.01, 0.99), torch.rand(4, 6)
    return recon.requires_grad_(), target, *(torch.randn(4, 3, requires_grad=True) for _ in range(2))


def number(terms):
    return terms.loss if isinstance(terms, tuple) else terms


def assert_same(a, b):
    """The same state under the same names, and the same description."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
    assert repr(a) == repr(b)


def move_on(module):
    """To other numbers in every tensor, as training does."""
    scheduled = set()
    for child in module.modules():
        if isinstance(child, schedules.Schedule):
            child.step()
            scheduled.update(child.buffers())
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor not in scheduled:
                tensor.add_(1)


@any_twin
@any_loss
def test_twins_of_a_loss(batch, make, twin):
    criterion = make()
    move_on(criterion)
    other = twin(criterion)
    assert other is not criterion
    assert_same(other, criterion)
    inputs = [x for x in batch if x.requires_grad]
    results = [number(c(*batch)) for c in (criterion, other)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(result, inputs) for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    if twin is not copy.copy:
        move_on(other)
        assert torch.equal(number(criterion(*batch)), results[0])  # they share no tensor


@any_loss
def test_the_state_of_a_loss_as_a_file(batch, make):
    """Into a new object of the same arguments, without trusting the file."""
    criterion, resumed = make(), make()
    move_on(criterion)
    resumed.load_state_dict(filed(criterion.state_dict(), weights_only=True))
    assert_same(resumed, criterion)
    assert torch.equal(number(resumed(*batch)), number(criterion(*batch)))


LIKELIHOODS = {
    "l2": L2(True, target_scale=0.1, target_shift=0.2, mask_normalize=True),
    "l1": L1(),
    "huber": Huber(0.3),
    "smooth_l1": SmoothL1(0.3),
    "log_cosh": LogCosh(2.0),
    "bernoulli": Bernoulli(target_scale=0.5),
    "bernoulli_probs": BernoulliProbs(),
}


@any_twin
@pytest.mark.parametrize("thing", [*LIKELIHOODS.values(), FreeBits(0.2, "sample"), Capacity(0.7, "batch")], ids=str)
def test_twins_of_options(thing, twin):
    """Frozen, compared by value, good as keys."""
    other = twin(thing)
    assert other == thing
    assert hash(other) == hash(thing)
    assert type(other) is type(thing)


@any_twin
@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(parameter(), full=True, softclip=-2.0, from_logits=True, target_shift=0.1),
        lambda: Gaussian(torch.rand(4)),
        lambda: Gaussian("optimal", mask_normalize=True),
        lambda: Scaled(Huber(0.3), parameter()),
        lambda: Scaled("l1", 0.4),
    ],
    ids=["learned", "constant", "optimal", "scaled, learned", "scaled, number"],
)
def test_twins_of_likelihoods_with_a_scale(batch, make, twin):
    likelihood = make()
    other = twin(likelihood)
    assert_same(other, likelihood)
    recon, target, *_ = batch
    results = [fastvae.reconstruction_loss(recon, target, likelihood=x) for x in (likelihood, other)]
    assert torch.equal(*results)
    fresh = make()
    move_on(fresh)
    fresh.load_state_dict(filed(likelihood.state_dict(), weights_only=True))
    assert torch.equal(fastvae.reconstruction_loss(recon, target, likelihood=fresh), results[0])


def test_every_likelihood_is_here():
    kinds = {type(likelihoods.resolve(name)) for name in likelihoods.NAMED}
    assert kinds == {type(likelihood) for likelihood in LIKELIHOODS.values()}


def in_training():
    """All that a run's checkpoint holds, as one module."""
    return nn.ModuleDict(
        {
            "model": VAE(VAEConfig(image_size=(4, 5), latent_dim=3, backbone="mlp", hidden=8)),
            "criterion": fastvae.VAELoss(schedules.Linear(0.0, 1.0, 10), Gaussian(parameter())),
            "noise": NoiseState(7),
        }
    )


def train(run, optimizer, steps):
    torch.manual_seed(5)
    for x in torch.rand(steps, 4, 1, 4, 5):
        out = run["model"](x, seed=run["noise"].seed)
        optimizer.zero_grad()
        run["criterion"](out.recon, x, out.mu, out.logvar).backward()
        optimizer.step()
        run["criterion"].beta.step()
        run["noise"].advance()


def optimizer_of(run):
    return torch.optim.Adam(run.parameters(), lr=1e-2)


def test_a_run_goes_on_from_a_file():
    """Model, learned scale, scheduled beta, noise and optimizer: as if it had not been interrupted, bit for bit."""
    run = in_training()
    optimizer = optimizer_of(run)
    train(run, optimizer, 3)
    saved = filed({"run": run.state_dict(), "optimizer": optimizer.state_dict()}, weights_only=True)
    resumed = in_training()
    resumed_optimizer = optimizer_of(resumed)
    resumed.load_state_dict(saved["run"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for each, its_optimizer in ((run, optimizer), (resumed, resumed_optimizer)):
        train(each, its_optimizer, 3)
    assert_same(resumed, run)
    assert run["noise"].step == 6
    assert not torch.equal(run["model"].encoder[1].weight, in_training()["model"].encoder[1].weight)


@any_twin
@pytest.mark.parametrize("packed", [True, False])
def test_twins_of_a_posterior(backend, packed, twin):
    moments = torch.randn(3, 8, 2)
    posterior = (
        fastvae.DiagonalGaussian.from_moments(moments, logvar_clamp=(-0.5, 0.5))
        if packed
        else fastvae.DiagonalGaussian(*moments.chunk(2, 1))
    )
    other = twin(posterior)
    for a, b in zip(other.rsample_kl(seed=3), posterior.rsample_kl(seed=3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(other.logvar, posterior.logvar)
    assert torch.equal(other.kl(), posterior.kl())
    assert other.kl(posterior).abs().max() < 1e-6


@any_twin
def test_twins_of_results(batch, twin):
    recon, target, mu, logvar = (x.detach() for x in batch)
    terms = fastvae.vae_loss(recon, target, mu, logvar)
    stats = fastvae.latent_stats(mu, logvar)
    output = VAE(VAEConfig(image_size=(4, 5), latent_dim=3, backbone="mlp", hidden=8))(torch.rand(2, 1, 4, 5))
    for result in (terms, stats, type(output)(*(t.detach() for t in output))):
        other = twin(result)
        assert type(other) is type(result)
        assert all(torch.equal(a, b) for a, b in zip(other, result, strict=True))
