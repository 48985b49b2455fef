import numpy as np
import pytest
import torch

import fastvae
from fastvae.statistics import latent_stats
from tests.helpers import oracle
from tests.helpers.oracle import DTYPES, assert_near

# one sample, several ranges of samples that are merged (the last one cut off), long and short samples
SHAPES = [
    (5,),
    (5000,),
    (2, 1),
    (3, 7),
    (257, 20),
    (1100, 3, 5),
    (2, 1025),
    (2, 4, 3, 3),
    (2, 2, 3, 2, 3),
]


def gaussian(shape, dtype, scale=1.0):
    return tuple(torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype) for _ in range(2))


def check_against_oracle(mu, logvar, stats, bounds=None):
    true_mu, true_logvar = mu.double(), logvar.double()
    clamped = oracle.clamp(true_logvar, bounds)
    kl_terms = 0.5 * (true_mu**2 + torch.expm1(clamped).abs() + clamped.abs())
    assert_near(stats.kl, oracle.kl(true_mu, true_logvar, bounds).mean(0), kl_terms.mean(0), ulps=8)
    assert_near(stats.mean, true_mu.mean(0), true_mu.abs().mean(0))
    distance = true_mu - true_mu[:1]  # two samples may be near each other
    distance = distance - distance.mean(0)
    variance = distance.square().sum(0) / (len(mu) - 1)  # torch.var is off by 16 ulp
    assert_near(stats.variance, variance, variance, ulps=16)
    assert stats.active == (variance >= 0.01).sum()
    assert stats.nonfinite == 0
    assert stats.clamped == (clamped != true_logvar).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_statistic_of_every_shape(backend, shape, dtype):
    mu, logvar = gaussian(shape, dtype)
    stats = latent_stats(mu, logvar)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [(s.shape, s.dtype) for s in stats] == [(shape[1:], expected)] * 3 + [((), torch.int64)] * 3
    check_against_oracle(mu, logvar, stats)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float64)], ids=str)
def test_mixed_dtypes(backend, dtypes):
    mu, logvar = gaussian((300, 6), torch.float64)
    mu, logvar = mu.to(dtypes[0]), logvar.to(dtypes[1])
    stats = latent_stats(mu, logvar)
    assert stats.mean.dtype == dtypes[1]
    check_against_oracle(mu, logvar, stats)


LAYOUTS = {
    "transposed": lambda x: x.movedim(0, -1),
    "channels_last": lambda x: x[:, :, None].contiguous(memory_format=torch.channels_last),
    "every other sample and channel": lambda x: x[::2, :, 1::2],
    "one sample expanded": lambda x: x[:1].expand(70, -1, -1),
    "six dimensions": lambda x: x.reshape(30, 10, 2, 2, 2, 3).permute(0, 5, 3, 1, 4, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimensions_come_in_their_own_order(backend, layout):
    mu, logvar = (LAYOUTS[layout](x) for x in gaussian((300, 4, 6), torch.float32))
    stats = latent_stats(mu, logvar.contiguous())
    assert stats.kl.shape == mu.shape[1:]
    assert stats.kl.is_contiguous()
    check_against_oracle(mu, logvar, stats)


@pytest.mark.parametrize("bounds", [(-0.5, 0.75), (-30.0, 20.0), (-0.1, 0.1)], ids=str)
def test_clamped_logvar_is_counted(backend, bounds):
    mu, logvar = gaussian((300, 40), torch.float32, scale=2.0)
    check_against_oracle(mu, logvar, latent_stats(mu, logvar, logvar_clamp=bounds), bounds)


def test_a_clamp_away_from_zero_adds_nothing_beyond_the_edge(backend):
    """Lanes outside hold logvar = 0, which this clamp moves."""
    mu, logvar = gaussian((3, 5), torch.float32)
    check_against_oracle(mu, logvar, latent_stats(mu, logvar, logvar_clamp=(1.0, 2.0)), (1.0, 2.0))


@pytest.mark.parametrize("shape", [(4, 5), (600, 5)], ids=str)
def test_numbers_that_are_not_finite_are_counted_and_stay_in_their_dimension(backend, shape):
    mu, logvar = gaussian(shape, torch.float32)
    inf, nan = float("inf"), float("nan")
    mu[0, 0], mu[-1, 1], mu[2, 2] = nan, inf, -inf
    logvar[0, 0], logvar[1, 3], logvar[2, 3] = nan, inf, -inf
    with np.errstate(all="ignore"):  # the interpreter's numpy
        stats = latent_stats(mu, logvar, logvar_clamp=(-5.0, 5.0))
    assert stats.nonfinite == 6
    assert stats.clamped == 2  # a NaN is on no side of a bound
    assert stats.active == 2
    torch.testing.assert_close(stats.mean[:3], torch.tensor([nan, inf, -inf]), equal_nan=True)
    assert stats.variance.isnan().tolist() == [True, True, True, False, False]
    assert stats.kl.isfinite().tolist() == [False, False, False, True, True]
    finite = slice(3, 5)
    check_against_oracle(
        mu[:, finite], logvar[:, finite].clamp(-5, 5), latent_stats(mu[:, finite], logvar[:, finite].clamp(-5, 5))
    )


@pytest.mark.parametrize("place", [0, 299, 300, 599], ids=str)
def test_an_infinite_logvar_is_counted_though_its_clamp_hides_it(backend, place):
    mu, logvar = gaussian((600, 5), torch.float32)
    logvar[place, 2] = float("inf")
    with np.errstate(all="ignore"):
        stats = latent_stats(mu, logvar, logvar_clamp=(-9.0, 9.0))
    assert (stats.nonfinite, stats.clamped) == (1, 1)
    assert stats.kl.isfinite().all()


def test_sums_that_overflow_are_of_finite_numbers(backend):
    mu = torch.full((600, 5), 3e38)
    with np.errstate(all="ignore"):
        stats = latent_stats(mu, torch.zeros_like(mu))
    assert stats.nonfinite == 0


@pytest.mark.parametrize("batch", [0, 1])
def test_statistics_without_meaning_are_nan_as_in_torch(backend, batch):
    mu, logvar = gaussian((batch, 4), torch.float32)
    stats = latent_stats(mu, logvar)
    if batch:
        assert torch.equal(stats.mean, mu[0])
        assert_near(stats.kl, oracle.kl(mu.double(), logvar.double())[0], 1.0)
    else:
        assert stats.mean.isnan().all()
        assert stats.kl.isnan().all()
    assert stats.variance.shape == (4,)
    assert stats.variance.isnan().all()
    assert [int(count) for count in stats[3:]] == [0, 0, 0]


def test_samples_without_dimensions(backend):
    stats = latent_stats(torch.zeros(3, 0), torch.zeros(3, 0))
    assert [s.shape for s in stats[:3]] == [(0,)] * 3
    assert [int(count) for count in stats[3:]] == [0, 0, 0]


LARGE_MEANS = {
    "noise around 1000": lambda: 1000 + 0.01 * torch.randn(3000, 4),
    "noise of a few ulp": lambda: 1000 + 0.0005 * torch.randn(3000, 4),
    "drift": lambda: torch.linspace(-1000, 1000, 3000)[:, None] + torch.randn(3000, 4),
    "first sample far off": lambda: torch.cat([torch.full((1, 4), 1e4), torch.randn(2999, 4)]),
    "first range far off": lambda: torch.cat([torch.full((1024, 4), 1e3), torch.randn(2000, 4)]),
}


@pytest.mark.parametrize("data", LARGE_MEANS)
def test_the_variance_does_not_cancel(backend, data, monkeypatch):
    monkeypatch.setattr("fastvae.fallback.latent_stats._PIECE", 1000)  # several pieces
    mu = LARGE_MEANS[data]()
    stats = latent_stats(mu, torch.zeros_like(mu))
    true = mu.double()
    torch.testing.assert_close(stats.variance.double(), true.var(0), rtol=1e-5, atol=0)
    assert_near(stats.mean, true.mean(0), true.abs().mean(0), ulps=16)


def test_a_constant_has_no_variance(backend):
    mu = (100 * torch.randn(40)).expand(701, 40)
    stats = latent_stats(mu, torch.zeros_like(mu))
    assert (stats.variance >= 0).all()
    assert (stats.variance <= (1e-7 * mu[0]) ** 2).all()
    assert stats.active == 0


def test_a_dimension_is_active_from_a_variance_of_one_hundredth(backend):
    half_distance = torch.tensor([0.0706, 0.0708, 5.0, 0.0], dtype=torch.float64)  # 2 d^2 = 0.00997, 0.01003
    mu = torch.stack([half_distance, -half_distance])
    assert latent_stats(mu, mu).active == 2


def test_the_kl_does_not_cancel_near_the_prior(backend):
    mu = torch.full((300, 4), 0.01, dtype=torch.float16)
    truth = oracle.kl(mu.double(), mu.double()).mean(0)
    torch.testing.assert_close(latent_stats(mu, mu).kl.double(), truth, rtol=1e-5, atol=0)


def test_it_is_the_loss_by_dimension_and_has_no_gradient(backend):
    mu, logvar = (x.requires_grad_() for x in gaussian((60, 3, 5), torch.float32))
    stats = latent_stats(mu, logvar, logvar_clamp=(-1.0, 1.0))
    assert not any(s.requires_grad for s in stats)
    torch.testing.assert_close(stats.kl.sum(), fastvae.gaussian_kl(mu, logvar, logvar_clamp=(-1.0, 1.0)).detach())


def test_no_value_is_read_on_the_host():
    mu = torch.empty(7, 3, device="meta")  # which has none
    with fastvae.use_backend("torch"):
        assert latent_stats(mu, mu, logvar_clamp=(-1.0, 1.0)).active.shape == ()


def test_compiled_as_one_graph():
    mu, logvar = gaussian((50, 6), torch.float32)
    compiled = torch.compile(latent_stats, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(mu, logvar), latent_stats(mu, logvar), strict=True):
        torch.testing.assert_close(actual, expected)


def test_wrong_arguments_are_named(backend):
    mu = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="mu and logvar must have one shape"):
        latent_stats(mu, mu[:, :2])
    with pytest.raises(TypeError, match="logvar must be one of"):
        latent_stats(mu, mu.long())
    with pytest.raises(ValueError, match="logvar_clamp must be"):
        latent_stats(mu, mu, logvar_clamp=(1.0, -1.0))
