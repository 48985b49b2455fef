import pytest
import torch

import fastvae
from tests.helpers import oracle
from tests.helpers.oracle import DTYPES, assert_near

# a float32 tile is 1024 elements, a 16-bit one 2048: below, on and above their edges, many rows, one element, no row
SHAPES = [
    (5,),
    (1, 1),
    (3, 7),
    (130, 20),
    (2, 1023),
    (2, 1024),
    (1, 2049),
    (2, 3, 5),
    (2, 4, 3, 3),
    (2, 2, 3, 2, 3),
    (0, 4),
]


def gaussian(shape, dtype, scale=1.0):
    mu, logvar = (torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype).requires_grad_() for _ in range(2))
    return mu, logvar


def check_against_oracle(mu, logvar, z, kl, noise, bounds=None):
    """Values, then gradients under random upstream gradients of both outputs."""
    true_mu, true_logvar = oracle.leaf(mu), oracle.leaf(logvar)
    true_z = oracle.sample(true_mu, true_logvar, noise, bounds)
    kl_elements = oracle.kl(true_mu, true_logvar, bounds)
    clamped = oracle.clamp(true_logvar, bounds).detach()
    scaled_noise = (true_z - true_mu).detach().abs()
    assert_near(z, true_z.detach(), true_mu.detach().abs() + scaled_noise)
    kl_terms = oracle.per_sample(0.5 * (true_mu.detach() ** 2 + torch.expm1(clamped).abs() + clamped.abs()))
    assert kl.dtype == (torch.float64 if mu.dtype == torch.float64 else torch.float32)
    assert_near(kl, oracle.per_sample(kl_elements).detach(), kl_terms, ulps=8)  # 1e-6 of the sum of the terms

    dz, dkl = torch.randn_like(z), torch.randn_like(kl)
    torch.autograd.backward([z, kl], [dz, dkl])
    torch.autograd.backward([true_z, oracle.per_sample(kl_elements)], [dz.double(), dkl.double()])
    rows = dkl.double().reshape(-1, *[1] * (mu.ndim - 1)).abs()
    assert (mu.grad.dtype, logvar.grad.dtype) == (mu.dtype, logvar.dtype)
    assert_near(mu.grad, true_mu.grad, dz.double().abs() + rows * true_mu.detach().abs())
    assert_near(logvar.grad, true_logvar.grad, 0.5 * (dz.double().abs() * scaled_noise + rows * (clamped.exp() + 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_with_a_seed(backend, shape, dtype):
    mu, logvar = gaussian(shape, dtype)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=7)
    assert z.shape == mu.shape
    assert z.dtype == dtype
    assert kl.shape == shape[:1]
    check_against_oracle(mu, logvar, z, kl, fastvae.philox_normal(shape, seed=7))


@pytest.mark.parametrize("bounds", [(-0.5, 0.75), (-30.0, 20.0), (-0.5, 20.0), (-30.0, 0.75)], ids=str)
def test_clamped_logvar(backend, bounds):
    mu, logvar = gaussian((4, 300), torch.float32, scale=2.0)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1, logvar_clamp=bounds)
    check_against_oracle(mu, logvar, z, kl, fastvae.philox_normal(mu.shape, seed=1), bounds)


def test_clamp_passes_the_gradient_at_its_bounds_and_keeps_nan(backend):
    logvar = torch.tensor([[-1.0, 1.0, 2.0, float("nan")]], requires_grad=True)
    mu = torch.zeros(1, 4)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1, logvar_clamp=(-1.0, 1.0))
    assert z.isnan().tolist() == [[False, False, False, True]]
    kl.sum().backward()
    torch.testing.assert_close(logvar.grad[0, :3], 0.5 * torch.expm1(torch.tensor([-1.0, 1.0, 0.0])))
    assert logvar.grad[0, 3].isnan()


def test_a_clamp_of_float32_beside_float64_is_float64s(backend):
    """0.1 in float32 is above 0.1: it was clamped, and so has no gradient."""
    mu, logvar = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 0.1, requires_grad=True)
    for kl in (
        fastvae.reparameterize_kl(mu, logvar, seed=1, logvar_clamp=(-1.0, 0.1))[1],
        fastvae.gaussian_kl(mu, logvar, logvar_clamp=(-1.0, 0.1)),
    ):
        assert torch.autograd.grad(kl.sum(), logvar)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kl_does_not_cancel_near_the_prior(backend, dtype):
    mu = torch.full((1, 128), 0.01, dtype=dtype)
    truth = float(oracle.kl(mu.double(), mu.double()).sum())
    assert 0.0095 < truth < 0.0097
    for kl in (fastvae.reparameterize_kl(mu, mu, seed=0)[1], fastvae.gaussian_kl(mu, mu)):
        assert abs(float(kl) - truth) < 1e-5 * truth  # the textbook form in float16 gives -0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finite_over_the_whole_clamp_range(backend, dtype):
    logvar = torch.linspace(-60, 40, 401).to(dtype).reshape(1, -1).requires_grad_()
    mu = torch.zeros_like(logvar).requires_grad_()
    _, kl = fastvae.reparameterize_kl(mu, logvar, seed=0, logvar_clamp=(-30.0, 20.0))
    kl.sum().backward()
    assert kl.isfinite().all()
    assert kl > 1e9
    low = logvar.detach() <= 11  # beyond, exp(logvar) itself is past float16
    assert logvar.grad[low].isfinite().all()


def test_sampling_alone_knows_nothing_of_the_kl(backend):
    """At logvar = 100 exp(logvar) overflows float32 and sigma does not: the gradient of z is finite."""
    mu, logvar = torch.zeros(1, 4, requires_grad=True), torch.full((1, 4), 100.0, requires_grad=True)
    z = fastvae.reparameterize(mu, logvar, seed=1)
    z.sum().backward()
    torch.testing.assert_close(logvar.grad, 0.5 * z.detach())
    assert z.isfinite().all()


def test_noise_without_a_seed_is_what_the_textbook_draws():
    mu, logvar = gaussian((6, 50), torch.float32)
    with fastvae.use_backend("torch"):
        torch.manual_seed(3)
        z, kl = fastvae.reparameterize_kl(mu, logvar)
        torch.manual_seed(3)
        noise = torch.randn_like(mu)
        check_against_oracle(mu, logvar, z, kl, noise)
        by_generator = fastvae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        assert torch.equal(by_generator, fastvae.reparameterize(mu, logvar))


def test_the_default_generator_and_a_generator_steer_the_noise(backend):
    mu = logvar = torch.zeros(4, 100)
    torch.manual_seed(3)
    first, second = fastvae.reparameterize(mu, logvar), fastvae.reparameterize(mu, logvar)
    torch.manual_seed(3)
    assert torch.equal(first, fastvae.reparameterize(mu, logvar))
    assert not torch.equal(first, second)
    drawn = [fastvae.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 - 1, 2**64 - 1])
def test_an_int_and_a_tensor_seed_agree(backend, seed):
    mu = logvar = torch.zeros(2, 9)
    as_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    assert torch.equal(
        fastvae.reparameterize(mu, logvar, seed=seed), fastvae.reparameterize(mu, logvar, seed=as_tensor)
    )


@pytest.mark.parametrize("split", [1, 2, 3])
def test_offset_continues_the_stream(backend, split):
    """What a rank or a micro-batch draws for its rows is what one process draws for all of them; 7 latents, so that the
    parts begin anywhere within the four normals of a counter."""
    mu, logvar = gaussian((4, 7), torch.float32)
    whole, kl = fastvae.reparameterize_kl(mu, logvar, seed=9)
    first, first_kl = fastvae.reparameterize_kl(mu[:split], logvar[:split], seed=9)
    rest, rest_kl = fastvae.reparameterize_kl(mu[split:], logvar[split:], seed=9, offset=7 * split)
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([first_kl, rest_kl]), kl)  # a sample's KL does not depend on its batch, to the bit


def test_both_backends_draw_the_same_noise_for_a_seed():
    mu, logvar = gaussian((3, 1000), torch.float32)
    drawn = []
    for backend in ("torch", "triton"):
        with fastvae.use_backend(backend):
            drawn.append(fastvae.reparameterize(mu, logvar, seed=5).detach())
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["mu", "logvar"])
@pytest.mark.parametrize("outputs", [("z",), ("kl",), ("z", "kl")], ids="+".join)
def test_any_subset_of_inputs_and_outputs(backend, wanted, outputs):
    inputs = gaussian((3, 40), torch.float64)
    for x, want in zip(inputs, wanted, strict=True):
        x.requires_grad_(want)
    z, kl = fastvae.reparameterize_kl(*inputs, seed=2)
    loss = sum({"z": z.square().sum(), "kl": 3 * kl.sum()}[name] for name in outputs)
    loss.backward()
    true = [oracle.leaf(x) for x in inputs]
    true_z = oracle.sample(*true, fastvae.philox_normal((3, 40), seed=2))
    sum({"z": true_z.square().sum(), "kl": 3 * oracle.kl(*true).sum()}[name] for name in outputs).backward()
    for x, truth, want in zip(inputs, true, wanted, strict=True):
        if want:
            torch.testing.assert_close(x.grad, truth.grad if truth.grad is not None else torch.zeros_like(x))
        else:
            assert x.grad is None


def test_expanded_upstream_gradients(backend):
    mu, logvar = gaussian((3, 8), torch.float32)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=2)
    (z.sum() + kl.sum()).backward()  # stride-0 gradients
    torch.testing.assert_close(mu.grad, 1 + mu.detach())


def test_retained_graph_gives_equal_gradients(backend):
    mu, logvar = gaussian((3, 8), torch.float32)
    z, kl = fastvae.reparameterize_kl(mu, logvar)
    loss = z.square().sum() + kl.sum()
    first = torch.autograd.grad(loss, (mu, logvar), retain_graph=True)
    second = torch.autograd.grad(loss, (mu, logvar))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives(backend):
    mu, logvar = gaussian((2, 5), torch.float64)
    function = lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, seed=4, logvar_clamp=(-1.5, 1.5))  # noqa: E731
    assert torch.autograd.gradcheck(function, (mu, logvar))
    assert torch.autograd.gradgradcheck(function, (mu, logvar))


def test_mixed_dtypes_promote_as_the_textbook(backend):
    mu = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    logvar = torch.randn(3, 6, requires_grad=True)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    assert (z.dtype, kl.dtype) == (torch.float32, torch.float32)
    check_against_oracle(mu, logvar, z, kl, fastvae.philox_normal((3, 6), seed=1))


def test_empty_latents_have_no_kl(backend):
    z, kl = fastvae.reparameterize_kl(torch.zeros(3, 0), torch.zeros(3, 0), seed=1)
    assert z.shape == (3, 0)
    assert kl.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("noise_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_noise_is_the_noise(backend, dtype, noise_dtype):
    mu, logvar = gaussian((3, 2, 40), dtype, scale=2.0)
    noise = torch.randn(40, 2, 3).to(noise_dtype).permute(2, 1, 0).requires_grad_()
    z, kl = fastvae.reparameterize_kl(mu, logvar, noise=noise, logvar_clamp=(-1.0, 0.75))
    assert z.dtype == dtype
    assert torch.equal(fastvae.reparameterize(mu, logvar, noise=noise, logvar_clamp=(-1.0, 0.75)), z)
    check_against_oracle(mu, logvar, z, kl, noise.detach(), (-1.0, 0.75))
    assert noise.grad is None


def test_given_noise_draws_nothing_and_may_be_overwritten(backend):
    mu, logvar = gaussian((3, 5), torch.float32)
    noise = torch.randn(3, 5)
    z, kl = fastvae.reparameterize_kl(mu, logvar, noise=noise)
    state = torch.get_rng_state()
    again, kl_again = fastvae.reparameterize_kl(mu, logvar, noise=noise)
    assert torch.equal(torch.get_rng_state(), state)
    noise.zero_()
    for expected, actual in zip(
        torch.autograd.grad(z.sum() + kl.sum(), (mu, logvar)),
        torch.autograd.grad(again.sum() + kl_again.sum(), (mu, logvar)),
        strict=True,
    ):
        assert torch.equal(expected, actual)


def test_given_noise_has_second_derivatives_and_no_gradient(backend):
    mu, logvar = gaussian((3, 5), torch.float64)
    noise = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda mu, logvar: fastvae.reparameterize_kl(mu, logvar, noise=noise), (mu, logvar)
    )
    z = fastvae.reparameterize(mu.detach(), logvar.detach(), noise=noise.requires_grad_())
    assert not z.requires_grad


@pytest.mark.parametrize("function", [fastvae.reparameterize, fastvae.reparameterize_kl])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 1}, ValueError, "noise and seed exclude each other"),
        ({"generator": torch.Generator()}, ValueError, "noise and generator exclude each other"),
        ({"offset": 3}, ValueError, "offset=3 without seed"),
        ({"noise": torch.zeros(5)}, ValueError, r"noise and mu must have one shape; got \(5,\) and \(3, 5\)"),
        ({"noise": torch.zeros(3, 5, device="meta")}, ValueError, "noise and mu must be on one device"),
        ({"noise": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "noise must be one of .*got int64"),
        ({"noise": 0.5}, TypeError, "noise must be a torch.Tensor; got float"),
    ],
)
def test_noise_that_does_not_fit_is_named(backend, function, options, error, message):
    mu = torch.zeros(3, 5)
    with pytest.raises(error, match=message):
        function(mu, mu, **{"noise": torch.zeros(3, 5)} | options)
