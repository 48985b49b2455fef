"""torch.compile, torch.export, fake tensors: no graph break, no surprise in gradients, few recompilations."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastvae
from fastvae.likelihoods import Gaussian, Huber, Scaled
from fastvae.regularizers import Capacity, FreeBits

# the compiler itself warns of what it uses
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Textbook(nn.Module):
    """A VAE as people write it, around fastvae's sampling and loss."""

    def __init__(self, **options):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 8), nn.Linear(4, 12)
        self.criterion = fastvae.VAELoss(**options)

    def forward(self, x, seed=None, beta=None):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=seed)
        return self.criterion(self.decoder(z), x, kl=kl, beta=beta)


def gradients(model, loss, upstream=1.0, **options):
    return torch.autograd.grad(loss, list(model.parameters()), torch.full_like(loss, upstream), **options)


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_training_step_is_one_graph(dynamic, seeded):
    model, x = Textbook(), torch.rand(6, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    seed = torch.tensor([7]) if seeded else None
    for batch in (6, 5):
        torch.manual_seed(3)
        loss = compiled(x[:batch], seed)
        found = gradients(model, loss)
        torch.manual_seed(3)
        expected = model(x[:batch], seed)
        # the same noise: of the seed, or what torch's default generator draws
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradients(model, expected))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    model, x, seed = Textbook(), torch.rand(6, 12), torch.tensor([7])
    loss = torch.compile(model, mode=mode, fullgraph=True)(x, seed)
    torch.testing.assert_close(loss, model(x, seed))
    torch.testing.assert_close(gradients(model, loss), gradients(model, model(x, seed)))


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_retained_graph_gives_the_same_gradients_twice(upstream):
    model, x, seed = Textbook(), torch.rand(6, 12), torch.tensor([7])
    # whatever the model, torch wants this to retain a compiled graph, and its cache overlooks it
    options = {"donated_buffer": False, "enable_autograd_cache": False}
    with torch._functorch.config.patch(options), torch._inductor.config.patch(fx_graph_cache=False):
        loss = torch.compile(model, backend="inductor", fullgraph=True)(x, seed)
        first = gradients(model, loss, upstream, retain_graph=True)
        second = gradients(model, loss, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first, gradients(model, model(x, seed), upstream))


def test_fresh_noise_at_every_call():
    model, x = Textbook(), torch.rand(6, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(x) != compiled(x)


def test_a_generator_gets_a_clear_error():
    mu = torch.zeros(2, 3)
    compiled = torch.compile(
        lambda mu: fastvae.reparameterize(mu, mu, generator=torch.default_generator), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="generator cannot be given while torch traces"):
        compiled(mu)


def test_given_noise():
    mu, logvar = (torch.randn(6, 4, requires_grad=True) for _ in range(2))
    noise = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    function = torch.compile(
        lambda noise: fastvae.reparameterize_kl(mu, logvar, noise=noise), backend="aot_eager", fullgraph=True
    )
    state = torch.get_rng_state()
    z, kl = function(noise)
    assert torch.equal(torch.get_rng_state(), state)
    found = torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar, noise), allow_unused=True)
    expected = fastvae.reparameterize_kl(mu, logvar, noise=noise)
    torch.testing.assert_close((z, kl), expected)
    torch.testing.assert_close(found[:2], torch.autograd.grad(expected[0].sum() + expected[1].sum(), (mu, logvar)))
    assert found[2] is None
    with pytest.raises(Exception, match="noise and seed exclude each other"):
        torch.compile(fastvae.reparameterize, backend="eager", fullgraph=True)(mu, logvar, noise=noise, seed=1)


def test_bad_input_is_named_in_a_compiled_region_too():
    compiled = torch.compile(lambda x: fastvae.vae_loss(x, x[:, :2], kl=x[:, 0]).loss, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="recon and target must have one shape"):
        compiled(torch.zeros(2, 3))


def test_int_seeds_of_generated_code():
    """The compiler makes a variable of a seed that changes: nothing computed with it may leave 64 bits."""
    mu, logvar = torch.rand(2, 3), torch.rand(2, 3)
    compiled = torch.compile(lambda seed: fastvae.reparameterize(mu, logvar, seed=seed), fullgraph=True)
    for seed in (3, 2**62, -(2**40)):
        torch.testing.assert_close(compiled(seed), fastvae.reparameterize(mu, logvar, seed=seed))


class TestRecompilations:
    """How often a changed number makes torch compile again."""

    def compilations(self, changes, **options):
        model, x = Textbook(**options), torch.rand(6, 12)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        losses = [compiled(x, **change) for change in changes]
        for loss, change in zip(losses, changes, strict=True):
            torch.testing.assert_close(loss, model(x, **change))
        return counter.frame_count

    def test_a_tensor_beta_and_a_seed_never(self):
        numbers = range(5)
        assert self.compilations([{"seed": torch.tensor([n]), "beta": torch.tensor(n / 2)} for n in numbers]) == 1

    def test_a_float_beta_once(self):
        assert self.compilations([{"seed": torch.tensor([1]), "beta": n / 2} for n in range(1, 7)]) <= 2

    def test_an_int_seed_once(self):
        assert self.compilations([{"seed": n} for n in range(2, 8)]) <= 2

    def test_a_schedule_never(self):
        schedule = fastvae.schedules.Linear(0.0, 1.0, 10)
        model, x = Textbook(beta=schedule), torch.rand(6, 12)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(4):
            torch.testing.assert_close(compiled(x, torch.tensor([1])), model(x, torch.tensor([1])))
            schedule.step()
        assert counter.frame_count == 1


OPTIONS = {
    "likelihood": lambda t: {"likelihood": Huber(0.3)},
    "bernoulli": lambda t: {"likelihood": "bernoulli"},
    "learned": lambda t: {"likelihood": Gaussian(t[0, 0])},
    "per element": lambda t: {"likelihood": Gaussian(t)},
    "optimal": lambda t: {"likelihood": Gaussian("optimal")},
    "scaled, weighed, extra": lambda t: {"likelihood": Scaled("l1", t[:, 0]), "weight": t[:, 1], "extra": t[:, 2]},
    "mask": lambda t: {"mask": t > 0.5},
    "prior, free bits": lambda t: {"prior": (t[:, :4], t[:, 4:8]), "free_bits": FreeBits(0.2)},
    "free bits of the batch": lambda t: {"free_bits": FreeBits(0.2, "dim_batch")},
    "capacity": lambda t: {"capacity": Capacity(2.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_in_a_compiled_region(name):
    recon, target, t = (torch.rand(3, 12, requires_grad=True) for _ in range(3))
    mu, logvar = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    inputs = (recon, target, mu, logvar, t)

    def loss(recon, target, mu, logvar, t):
        return fastvae.vae_loss(recon, target, mu, logvar, **OPTIONS[name](t)).loss

    actual = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    expected = loss(*inputs)
    torch.testing.assert_close(actual, expected)
    found = torch.autograd.grad(actual, inputs, allow_unused=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, allow_unused=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seeded", [True, False])
def test_export(strict, seeded):
    model, x = Textbook(), torch.rand(6, 12)
    seed = torch.tensor([7]) if seeded else None
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "seed": None, "beta": None}
    program = torch.export.export(model, (x, seed, None), dynamic_shapes=shapes, strict=strict)
    for rows in (6, 3):
        torch.manual_seed(1)
        loss = program.module()(x[:rows], seed, None)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, model(x[:rows], seed))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors(device):
    """Shapes, dtypes and devices without a GPU, without memory."""
    # a build without CUDA has no autograd for its tensors, not even fake ones
    with FakeTensorMode(), torch.set_grad_enabled(device != "cuda" or torch.cuda.is_available()):
        recon = torch.empty(4, 3, 8, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(4, 3, 8, 8, device=device, dtype=torch.uint8)
        mu, logvar = (torch.empty(4, 5, device=device, requires_grad=True) for _ in range(2))
        for seed in (None, 3, torch.zeros(1, dtype=torch.int64, device=device)):
            z, kl = fastvae.reparameterize_kl(mu, logvar, seed=seed)
            assert (z.shape, kl.shape, z.device.type) == ((4, 5), (4,), device)
        weight = torch.ones(4, device=device)
        terms = fastvae.vae_loss(recon, target, mu, logvar, free_bits=FreeBits(0.1), weight=weight)
        assert (terms.loss.dtype, terms.loss.device.type) == (torch.float32, device)
        if torch.is_grad_enabled():
            (terms.loss + z.sum()).backward()
            assert (recon.grad.dtype, recon.grad.shape) == (torch.bfloat16, recon.shape)
        with torch.no_grad():
            assert fastvae.gaussian_kl(mu, logvar, reduction="none").shape == (4,)
        assert fastvae.philox_normal((2, 3), seed=1, device=device).shape == (2, 3)


@pytest.mark.parametrize("bounds", [None, (-1.0, 1.0)], ids=str)
def test_meta_tensors(bounds):
    """As on any device but a CPU, the fallback asks for no value."""
    mu, logvar = (torch.empty(4, 5, device="meta", requires_grad=True) for _ in range(2))
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1, logvar_clamp=bounds)
    assert (z.shape, kl.shape) == ((4, 5), (4,))
    loss = fastvae.vae_loss(z, mu.detach(), mu, logvar, logvar_clamp=bounds).loss
    gradients = torch.autograd.grad([loss, kl], [mu, logvar], [torch.empty_like(loss), torch.empty_like(kl)])
    assert {t.device.type for t in (loss, *gradients)} == {"meta"}


OPERATORS = torch.ops.fastvae


SAMPLES = {
    "reparam_kl": lambda: (torch.randn(3, 4), torch.randn(3, 4), torch.tensor([3]), 4, None, None, True),
    "reparam_kl without KL": lambda: (torch.randn(3, 4), torch.randn(3, 4), torch.tensor([3]), 0, -1.0, 1.0, False),
    "reparam_kl_bwd": lambda: (*torch.randn(3, 3, 4), torch.randn(3), torch.tensor([3]), 2, None, None),
    "reparam_kl_bwd of the KL": lambda: (*torch.randn(2, 3, 4), None, torch.randn(3), torch.tensor([3]), 2, None, None),
    "philox_normal": lambda: (torch.tensor([3]), [3, 5], 2, torch.float32),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling_ops_are_well_defined(backend, name):
    arguments = SAMPLES[name]()
    opcheck(getattr(OPERATORS, name.split(maxsplit=1)[0]).default, arguments)
    if name == "reparam_kl":  # this one is differentiable itself
        opcheck(OPERATORS.reparam_kl.default, tuple(leaves(arguments)))


def leaves(arguments):
    for x in arguments:
        yield x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def test_ops_on_a_device_that_draws_its_own_noise(backend, monkeypatch):
    """What compiled regions do on GPUs: the op draws, and the graph holds it and nothing of Philox."""
    monkeypatch.setattr("fastvae.sampling.OPAQUE", {"cpu"})
    model, x = Textbook(), torch.rand(6, 12)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    first, second = compiled(x), compiled(x)
    assert first != second
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("reparam_kl" in target for target in targets) == 1
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(x, torch.tensor([7]))
    torch.testing.assert_close(gradients(model, loss), gradients(model, model(x, torch.tensor([7]))))
