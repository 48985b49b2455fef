"""The plans of calls: the same results and errors whether or not a plan is cached."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import functional
from fastvae.likelihoods import L2, Gaussian, Huber
from fastvae.ops import reparam_kl
from fastvae.ops._elbo_plan import plan
from fastvae.regularizers import FreeBits

RECON, TARGET, MU, LOGVAR, KL = torch.rand(2, 3), torch.rand(2, 3), torch.randn(2, 4), torch.randn(2, 4), torch.rand(2)


@pytest.fixture(autouse=True)
def _no_plans():
    plan.cache_clear()
    reparam_kl.plan.cache_clear()


CALLS = {
    "mu and logvar": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, LOGVAR, **weights),
    "kl": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, **weights),
    "kl and mu": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, kl=KL, kl_reduction="mean", **weights),
    "wider mu": lambda **weights: fastvae.vae_loss(
        RECON, TARGET, torch.cat([MU, MU], 1), kl=KL, kl_reduction="mean", **weights
    ),
    "bytes": lambda **weights: fastvae.vae_loss(RECON, (255 * TARGET).to(torch.uint8), kl=KL, **weights),
    "rows": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, reduction="none", **weights),
    "sum": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, reduction="sum", **weights),
    "mean": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, recon_reduction="mean", **weights),
    "l1": lambda **weights: fastvae.vae_loss(RECON, TARGET, kl=KL, likelihood="l1", **weights),
    "clamp": lambda **weights: fastvae.vae_loss(RECON, TARGET, MU, LOGVAR, logvar_clamp=(-0.1, 0.1), **weights),
    "double": lambda **weights: fastvae.vae_loss(RECON.double(), TARGET, MU, LOGVAR, **weights),
}
WEIGHTS = [{}, {"beta": 0.5}, {"beta": torch.tensor(2.0)}, {"beta": 3, "recon_weight": 0.25}]


def test_a_cached_plan_computes_alike():
    alone = {}
    for name, call in CALLS.items():
        for i, weights in enumerate(WEIGHTS):
            plan.cache_clear()
            alone[name, i] = call(**weights)
    plan.cache_clear()
    for (name, i), expected in alone.items():
        terms = CALLS[name](**WEIGHTS[i])
        torch.testing.assert_close(tuple(terms), tuple(expected), rtol=0, atol=0)
        assert type(terms) is functional.VAELossTerms
    # a plan for each call, with beta a number or a tensor
    assert plan.cache_info().misses == 2 * len(CALLS)


@pytest.mark.parametrize(
    ("spelling", "other"),
    [
        ({"likelihood": "l2"}, {"likelihood": L2()}),
        ({"likelihood": "huber"}, {"likelihood": Huber(1)}),
        ({"likelihood": Gaussian(0.5)}, {"likelihood": Gaussian(0.5)}),
        ({"beta": 1.0}, {"beta": 1}),
        ({"free_bits": FreeBits(1, "sample")}, {"free_bits": FreeBits(1.0, "sample")}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_equal_spellings_share_a_plan(spelling, other):
    first = fastvae.vae_loss(RECON, TARGET, kl=KL, **spelling)
    second = fastvae.vae_loss(RECON, TARGET, kl=KL, **other)
    assert plan.cache_info()[:2] == (1, 1)
    torch.testing.assert_close(tuple(first), tuple(second), rtol=0, atol=0)


def test_another_value_is_another_plan():
    """The scale of a likelihood may be replaced between two calls."""
    likelihood = Gaussian(0.5)
    first = fastvae.vae_loss(RECON, TARGET, kl=KL, likelihood=likelihood)
    likelihood.log_scale = 1.5
    second = fastvae.vae_loss(RECON, TARGET, kl=KL, likelihood=likelihood)
    assert first.recon != second.recon


def test_the_cache_has_a_bound():
    assert plan.cache_info().maxsize is not None
    assert reparam_kl.plan.cache_info().maxsize is not None


def test_threads_share_plans():
    def calls(start):
        return [
            fastvae.vae_loss(RECON.repeat(n, 1), TARGET.repeat(n, 1), kl=KL.repeat(n)).loss
            for n in range(start, start + 40)
        ]

    expected = calls(1)
    plan.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(calls, [1] * 8):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"recon": RECON.to_sparse()}, "recon must be a dense tensor"),
        ({"kl": KL.to("meta")}, "must be on one device"),
        ({"recon": RECON > 0}, "recon must be one of"),
        ({"reduction": "total"}, "reduction must be one of"),
        ({"beta": True}, "beta must be a float"),
        ({"recon_weight": torch.ones(11)}, "recon_weight must have shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_come_after_a_call_that_was_right(other, message):
    call = {"recon": RECON, "target": TARGET, "kl": KL, "reduction": "batchmean", "beta": 1.0, "recon_weight": 1.0}
    for _ in range(2):
        fastvae.vae_loss(**call)
        with pytest.raises((ValueError, TypeError), match=message):
            fastvae.vae_loss(**{**call, **other})


def laid_out_otherwise(tensor):
    """The same numbers, with the strides of the transposed."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0)], ids=["contiguous first", "transposed first"])
@pytest.mark.parametrize("which", range(4))
def test_strides_make_another_call(backend, which, layouts):
    """What the kernels remember holds for one layout of memory."""
    tensors = [RECON, TARGET, MU, LOGVAR]
    expected = None
    for other in layouts:
        given = [laid_out_otherwise(t) if other and i == which else t.clone() for i, t in enumerate(tensors)]
        recon, target, mu, logvar = (t.requires_grad_() for t in given)
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=3)
        target = target.detach()
        loss = fastvae.vae_loss(recon, target, kl=kl).loss + fastvae.vae_loss(recon, target, mu, logvar).loss
        found = loss, z, *torch.autograd.grad((loss, z), [recon, mu, logvar], (torch.tensor(2.0), torch.ones(2, 4)))
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        expected = found


@pytest.mark.parametrize("hooked", ["forward", "backward"])
def test_saved_tensors_may_come_back_with_other_strides(backend, hooked):
    """Whether the first or the second call of a kind has the hook."""
    recon, mu, logvar = (t.clone().requires_grad_() for t in (RECON, MU, LOGVAR))
    found = []
    for hook in (hooked == "forward", hooked == "backward"):
        unpack = laid_out_otherwise if hook else (lambda tensor: tensor)
        saving = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach(), lambda t, unpack=unpack: unpack(t) if t.ndim == 2 else t
        )
        with saving:
            z, kl = fastvae.reparameterize_kl(mu, logvar, seed=3)
            loss = fastvae.vae_loss(recon, TARGET, kl=kl, one_pass=False).loss
        found.append(torch.autograd.grad((loss, z), [recon, mu, logvar], (torch.ones(()), torch.ones(2, 4))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


SAMPLES = {
    "plain": {},
    "clamped": {"logvar_clamp": (-0.1, 0.1)},
    "seeded": {"seed": 5},
    "from the middle of a counter": {"seed": 5, "offset": 6},
    "from the start of one": {"seed": 5, "offset": 8},
    "seeded by a tensor": {"seed": torch.tensor([7])},
}


def test_samples_with_a_cached_plan_are_drawn_alike(backend):
    alone = {}
    for name, options in SAMPLES.items():
        for draw in (fastvae.reparameterize, fastvae.reparameterize_kl):
            reparam_kl.plan.cache_clear()
            torch.manual_seed(1)
            alone[name, draw] = draw(MU, LOGVAR, **options)
    reparam_kl.plan.cache_clear()
    for (name, draw), expected in alone.items():
        torch.manual_seed(1)
        torch.testing.assert_close(draw(MU, LOGVAR, **SAMPLES[name]), expected, rtol=0, atol=0)
    assert reparam_kl.plan.cache_info().misses == 4  # clamped or not, with the KL or without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 3}, "without seed"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude each other"),
        ({"logvar_clamp": (1, 0)}, "logvar_clamp"),
        ({"logvar": LOGVAR[:1]}, "must have one shape"),
        ({"logvar": LOGVAR.to("meta")}, "must be on one device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_come_after_a_sample_that_was_right(options, message):
    for _ in range(2):
        fastvae.reparameterize_kl(MU, LOGVAR)
        with pytest.raises((ValueError, TypeError), match=message):
            fastvae.reparameterize_kl(**{"mu": MU, "logvar": LOGVAR, **options})


def test_dispatch_modes_see_what_is_computed():
    """Whatever is cached: sampling is an op of its own, a loss is the reference formula."""
    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    for _ in range(2):
        fastvae.vae_loss(RECON, TARGET, kl=KL)
        fastvae.reparameterize(MU, LOGVAR, seed=1)
        with Seen():
            fastvae.vae_loss(RECON, TARGET, kl=KL)
            fastvae.reparameterize(MU, LOGVAR, seed=1)
    assert {"aten.sub.Tensor", "fastvae.reparam_kl.default"} <= names
