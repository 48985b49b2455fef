"""diffusers' posterior with and without fastvae, and one of its autoencoders."""

import copy
import pickle
import sys

import pytest
import torch

import fastvae
from fastvae.integrations import patch_diffusers
from fastvae.integrations.diffusers import _cached_kl
from tests.helpers import oracle

pytestmark = pytest.mark.usefixtures("diffusers")
SHAPE = (3, 8, 5, 6)  # of the moments: 4 latent channels


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers, of the extra [test], is not installed")


@pytest.fixture(scope="session")
def distribution(diffusers):
    """The class, whichever methods it has at the moment."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution


@pytest.fixture
def patched(diffusers):
    with patch_diffusers() as patch:
        yield patch


def moments(shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def generators(kind):
    """The same source of noise, made anew."""
    torch.manual_seed(5)
    return {
        "default": lambda: None,
        "one": lambda: torch.Generator().manual_seed(6),
        "list of one": lambda: [torch.Generator().manual_seed(6)],
        "list": lambda: [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])],
    }[kind]()


KINDS = ["default", "one", "list of one", "list"]


def compare(function, *inputs, exact=False):
    """Values and gradients of function(*inputs) are the same with and without fastvae."""
    expected = function(*inputs)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    with patch_diffusers():
        actual = function(*inputs)
        gradients = torch.autograd.grad(actual, inputs, upstream)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, **({"rtol": 0, "atol": 0} if exact else {}))
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_diffusers_own(backend, distribution, kind, dtype):
    packed = moments(dtype=dtype)
    with torch.no_grad():
        packed[0, 4:] *= 40  # some of it beyond the clamp
    compare(lambda packed: distribution(packed).sample(generators(kind)), packed)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_noise_is_diffusers_own_to_the_bit(backend, distribution, dtype):
    standard = torch.zeros(SHAPE, dtype=dtype)
    torch.manual_seed(2)
    expected = distribution(standard).sample(), torch.rand(1)
    torch.manual_seed(2)
    with patch_diffusers():
        actual = distribution(standard).sample(), torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kl_and_nll_are_diffusers_own(backend, distribution, dtype):
    packed, other, latent = moments(dtype=dtype), moments(dtype=dtype), moments((3, 4, 5, 6), dtype)
    compare(lambda packed: distribution(packed).kl(), packed)
    compare(lambda packed, other: distribution(packed).kl(distribution(other)), packed, other)
    compare(lambda packed, latent: distribution(packed).nll(latent), packed, latent)


@pytest.mark.parametrize("dims", [(1, 2, 3), [2, 3], (3, 1), (-1,), (0, 1, 2, 3)], ids=str)
def test_nll_over_dims(distribution, dims):
    compare(lambda packed, latent: distribution(packed).nll(latent, dims), moments(), moments((3, 4, 5, 6)))


def test_sample_and_kl_together(backend, distribution):
    def both(packed):
        torch.manual_seed(4)
        posterior = distribution(packed)
        z = posterior.sample()
        return torch.cat([z.flatten(), posterior.kl()])

    compare(both, moments())


@pytest.fixture
def patched_per_sample(diffusers):
    with patch_diffusers(kl_shape="batch") as patch:
        yield patch


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 8, 3, 4, 5)], ids=["audio", "video"])
def test_kl_and_nll_have_one_value_a_sample_at_any_rank(backend, distribution, patched_per_sample, shape):
    packed = moments(shape)
    exact = oracle.leaf(packed)
    mu, logvar = exact.chunk(2, 1)
    posterior = distribution(packed)
    torch.testing.assert_close(posterior.kl(), oracle.per_sample(oracle.kl(mu, logvar)).float())
    latent = torch.randn_like(packed[:, :4])
    true = -oracle.per_sample(torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(latent.double()))
    torch.testing.assert_close(posterior.nll(latent), true.float())
    posterior.sample()
    measured = posterior.kl()
    assert measured.shape == shape[:1]
    measured.sum().backward()
    oracle.per_sample(oracle.kl(mu, logvar)).sum().backward()
    torch.testing.assert_close(packed.grad, exact.grad.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 3, 4, 5), (2, 8, 3, 4, 5, 2)], ids=["video", "6-D"])
def test_kl_and_nll_of_videos_keep_diffusers_shape(backend, distribution, shape, dtype):
    packed, other, z = moments(shape, dtype), moments(shape, dtype), moments((2, 4, *shape[2:]), dtype)
    compare(lambda packed: distribution(packed).kl(), packed)
    compare(lambda packed, other: distribution(packed).kl(distribution(other)), packed, other)
    compare(lambda packed, z: distribution(packed).nll(z), packed, z)

    def after_a_sample(packed):
        torch.manual_seed(4)
        posterior = distribution(packed)
        return posterior.sample().sum() + posterior.kl()

    compare(after_a_sample, packed)
    with patch_diffusers():
        assert distribution(packed).kl().shape == (2, *shape[4:])
        point = distribution(packed, deterministic=True)
        assert torch.equal(point.kl(), torch.zeros(2, *shape[4:], dtype=dtype))
        assert distribution(packed).kl(point).isposinf().all()


def test_kl_of_videos_in_a_compiled_region(distribution):
    packed = moments((2, 8, 3, 4, 5))
    torch.compiler.reset()
    expected = distribution(packed).kl()
    with patch_diffusers():
        compiled = torch.compile(lambda packed: distribution(packed).kl(), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(packed), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["kl alone", "after a sample"])
def test_16_bit_kl_neither_cancels_nor_overflows(backend, distribution, dtype, sampled):
    near = torch.full((1, 256, 4, 4), 0.01, dtype=dtype)
    far = torch.cat([torch.zeros(1, 4, 4, 4), torch.full((1, 4, 4, 4), 15.0)], 1).to(dtype)
    for packed in (near, far):
        true = float(oracle.kl(*packed.double().chunk(2, 1)).sum())
        theirs = float(distribution(packed).kl())
        with patch_diffusers():
            posterior = distribution(packed.clone().requires_grad_())
            if sampled:
                posterior.sample()
            ours = posterior.kl().detach()
        assert ours.dtype == torch.float32
        assert float(ours) == pytest.approx(true, rel=1e-5)
        assert not (packed is near or dtype == torch.float16) or theirs != pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_samples_are_rounded_once(backend, distribution, patched, dtype):
    packed = moments(dtype=dtype)
    torch.manual_seed(1)
    z = distribution(packed).sample()
    torch.manual_seed(1)
    noise = torch.randn(z.shape, dtype=dtype)
    exact = oracle.leaf(packed)
    mu, logvar = exact.chunk(2, 1)
    true = oracle.sample(mu, logvar, noise)
    spread = (true - mu).detach().abs()
    oracle.assert_near(z, true, mu.detach().abs() + spread)
    upstream = torch.randn_like(z)
    z.backward(upstream)
    true.backward(upstream.double())
    oracle.assert_near(packed.grad, exact.grad, exact.grad.abs())


def test_one_pass_and_one_packed_gradient(backend, distribution, patched):
    posterior = distribution(moments())
    z, kl = posterior.sample(), posterior.kl()
    assert kl.grad_fn is z.grad_fn
    (parent,) = [node for node, _ in z.grad_fn.next_functions if node]
    assert type(parent).__name__ == "AccumulateGrad"  # no chunk and no clamp in between


def test_kl_is_that_of_the_moments_as_they_are(distribution, patched):
    packed = moments()
    posterior = distribution(packed)
    posterior.sample()
    before = posterior.kl()
    with torch.no_grad():
        assert posterior.kl().grad_fn is None
        assert torch.equal(posterior.kl(), before)
        posterior.parameters = moments()
        assert torch.equal(posterior.kl(), distribution(posterior.parameters).kl())
        posterior.parameters = packed
        packed.mul_(2)
        assert torch.equal(posterior.kl(), distribution(packed).kl())


def test_no_kl_is_measured_where_no_gradient_is_wanted(distribution, patched):
    trained, frozen = distribution(moments()), distribution(moments().detach())
    with torch.no_grad():
        trained.sample()
    frozen.sample()
    assert trained not in _cached_kl
    assert frozen not in _cached_kl
    trained.sample()
    assert trained in _cached_kl


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_a_sample_may_be_changed_in_place(distribution, noise):
    packed = moments()
    with patch_diffusers(noise):
        distribution(packed).sample().mul_(0.5).sum().backward()
        torch.testing.assert_close(packed.grad[:, :4], torch.full((3, 4, 5, 6), 0.5))
        point = distribution(packed.detach().clone(), deterministic=True)
        point.sample().zero_()
        assert torch.equal(point.sample(), packed[:, :4])


def test_deterministic_is_a_point_mass(distribution):
    packed, torch_state = moments(), torch.Generator().manual_seed(0)
    expected = distribution(packed, deterministic=True).sample(torch_state), torch.rand(1, generator=torch_state)
    torch_state.manual_seed(0)
    with patch_diffusers():
        posterior = distribution(packed, deterministic=True)
        actual = posterior.sample(torch_state), torch.rand(1, generator=torch_state)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        for zeros in (posterior.kl(), posterior.nll(expected[0]), posterior.kl(distribution(packed))):
            assert zeros.tolist() == [0.0, 0.0, 0.0]
        assert torch.equal(posterior.nll(expected[0], (2, 3)), torch.zeros(3, 4))
        assert not posterior.std.any()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attributes_are_diffusers_own(distribution, dtype, deterministic):
    packed = moments(dtype=dtype)
    with torch.no_grad():
        packed[0, 4:] *= 40
    theirs = distribution(packed, deterministic)
    with patch_diffusers():
        ours = distribution(packed, deterministic=deterministic)
        assert vars(ours).keys() == {"parameters", "deterministic"}
        for name in ("mean", "logvar", "std", "var"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert getattr(ours, name) is getattr(ours, name)
        assert ours.parameters is packed
        assert ours.deterministic is deterministic
        assert torch.equal(ours.mode(), theirs.mean)
        assert not hasattr(ours, "other")


def test_gradients_reach_the_attributes(distribution):
    compare(lambda packed: distribution(packed).std + distribution(packed).var.sqrt(), moments())
    with patch_diffusers() as patch, torch.no_grad():
        read, unread = distribution(moments()), distribution(moments())
        assert read.mean.shape == read.std.shape
        patch.undo()
    assert read.mean.requires_grad
    assert read.std.requires_grad
    assert unread.logvar.requires_grad


def test_posteriors_outlive_the_patch_and_precede_it(distribution):
    packed = moments()
    before = distribution(packed)
    with patch_diffusers():
        inside = distribution(packed)
        assert before.kl().shape == (3,)
        video = distribution(moments((2, 8, 3, 4, 5)))
    for posterior in (before, inside):
        torch.manual_seed(1)
        z = posterior.sample()
        torch.manual_seed(1)
        assert torch.equal(z, distribution(packed).sample())
        assert torch.equal(posterior.kl(), distribution(packed).kl())
    assert video.kl().shape == (2, 5)  # diffusers' own again


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_whole_where_nothing_is_patched(distribution, twin):
    packed = moments().detach()
    with patch_diffusers():
        posterior = distribution(packed)
        posterior.sample()
        copied = twin(posterior)
    assert vars(copied).keys() == vars(distribution(packed)).keys()
    assert torch.equal(copied.kl(), distribution(packed).kl())


def test_subclasses(distribution, patched_per_sample):
    class Named(distribution):
        pass

    class Wider(distribution):
        def __init__(self, parameters):
            super().__init__(parameters)
            self.std = 2 * self.std

    class Apart(distribution):
        def __init__(self):
            self.mean = 1

    assert copy.copy(Apart()).mean == 1
    packed = moments((2, 8, 3, 4, 5))
    assert Named(packed).kl().shape == (2,)
    torch.manual_seed(1)
    z = Wider(packed).sample()
    torch.manual_seed(1)
    torch.testing.assert_close(z - packed[:, :4], 2 * (Named(packed).sample() - packed[:, :4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_philox_noise_is_the_same_on_both_backends(distribution, kind, dtype):
    packed = moments(dtype=dtype)
    drawn = []
    for backend in ("torch", "triton"):
        with fastvae.use_backend(backend), patch_diffusers(noise="philox"):
            posterior = distribution(packed)
            z = posterior.sample(generators(kind))
            gradient = torch.autograd.grad(z.float().square().sum() + posterior.kl().sum(), packed)
            drawn.append((z, posterior.kl(), *gradient))
            with torch.no_grad():
                assert torch.equal(posterior.sample(generators(kind)), z)
            assert not torch.equal(posterior.sample(), z)
    torch.testing.assert_close(*drawn)
    torch.testing.assert_close(drawn[0][1], fastvae.DiagonalGaussian.from_moments(packed).kl())


def test_philox_follows_the_generators_seed(distribution):
    packed = torch.zeros(SHAPE)
    with patch_diffusers(noise="philox"):
        posterior = distribution(packed)
        z = posterior.sample(torch.Generator().manual_seed(3))
        rows = posterior.sample([torch.Generator().manual_seed(3) for _ in range(3)])
        narrow = moments(dtype=torch.bfloat16)
        together = distribution(narrow).sample(generators("list"))
        one_by_one = [distribution(n).sample(g) for n, g in zip(narrow.split(1), generators("list"), strict=True)]
        with pytest.raises(ValueError, match="one a sample, 3; got 2"):
            posterior.sample([torch.Generator(), torch.Generator()])
        point = distribution(packed, deterministic=True)
        assert torch.equal(point.sample(), packed[:, :4])
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(z, fastvae.philox_normal(z.shape, seed=seed))
    torch.testing.assert_close(rows, z[:1].expand_as(z))
    assert torch.equal(together, torch.cat(one_by_one))


@pytest.fixture(scope="session")
def autoencoder(diffusers):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def test_training_step_of_an_autoencoder(backend, autoencoder):
    images = torch.rand(2, 3, 16, 16)

    def step():
        autoencoder.zero_grad()
        torch.manual_seed(7)
        posterior = autoencoder.encode(images).latent_dist
        recon = autoencoder.decode(posterior.sample()).sample
        loss = (recon - images).square().sum() / 2 + posterior.kl().mean()
        whole = autoencoder(images, sample_posterior=True, generator=torch.Generator().manual_seed(8)).sample
        (loss + whole.sum()).backward()
        return loss, whole, [p.grad.clone() for p in autoencoder.parameters()]

    expected = step()
    with patch_diffusers():
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_compiles_without_a_graph_break(distribution, noise):
    torch.compiler.reset()  # what it compiled before, it compiled of other methods

    @torch.compile(fullgraph=True, backend="aot_eager")
    def kl_and_sample(packed):
        posterior = distribution(packed)
        return posterior.kl().sum(), posterior.sample()

    packed = moments((2, 8, 3, 4, 5))
    with patch_diffusers(noise):
        kl, z = kl_and_sample(packed)
        torch.testing.assert_close(kl, distribution(packed).kl().sum())
    assert z.shape == (2, 4, 3, 4, 5)
    torch.testing.assert_close(torch.autograd.grad(kl, packed)[0][:, :4], packed[:, :4])


def test_undo_restores_the_class(distribution):
    before = dict(vars(distribution))
    assert "__getattr__" not in before
    patch = patch_diffusers()
    with pytest.raises(RuntimeError, match="may be in effect once"):
        patch_diffusers()
    assert vars(distribution)["kl"] is not before["kl"]
    patch.undo()
    patch.undo()
    assert dict(vars(distribution)) == before


def test_an_invalid_posterior_does_not_keep_the_patch(distribution):
    before = dict(vars(distribution))
    packed = moments()
    with patch_diffusers():
        invalid = [distribution(torch.zeros(shape, dtype=dtype)) for shape, dtype in INVALID]
        valid = distribution(packed)
    assert dict(vars(distribution)) == before
    assert torch.equal(valid.mean, distribution(packed).mean)
    with patch_diffusers():
        pass
    assert not any(hasattr(posterior, "mean") for posterior in invalid)


INVALID = [((2, 3, 4, 4), torch.float32), ((2, 4, 4, 4), torch.int64), ((), torch.float32)]


def test_unknown_kl_shape_is_named():
    with pytest.raises(ValueError, match="kl_shape must be one of 'diffusers', 'batch'; got 'video'"):
        patch_diffusers(kl_shape="video")


def test_unknown_noise_is_named():
    with pytest.raises(ValueError, match=r"'torch', 'philox'; got 'phylox'\. Did you mean 'philox'"):
        patch_diffusers("phylox")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        patch_diffusers()
