"""The compiled kernels, executed as PTX on the CPU: every case of the compiled gates against the float64 oracle.

16-bit results are the float32 result rounded once: within half an ulp of the truth, and what float32 loses.
"""

import inspect
import sys
from dataclasses import replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

import fastvae
from tests.helpers import loss_truth, oracle
from tests.helpers.executed import executed
from tests.helpers.kernel_cases import LIKELIHOODS, OPTIONS, Case, elements_per_program
from tests.helpers.oracle import assert_near
from tests.kernels.test_kernels_compiled import BF16, F32, F64, MATRIX, U8
from tests.kernels.test_philox import true_normals, true_philox
from tests.ops import test_latent_stats

fastvae_kernels = pytest.importorskip("fastvae_kernels", reason="the kernels need Triton")
_tile = pytest.importorskip("fastvae_kernels._tile", reason="the kernels need Triton")

pytestmark = pytest.mark.compiled
SMALL = [(case, target) for case, target in MATRIX if target in ("sm_80", "sm_90") and case.n_elements < 10**6]

TRUE_OPTIONS = {  # of the float64 planes that an option was made of: arguments of loss_truth.vae_loss
    **{name: lambda name=name: {"error": name} for name in LIKELIHOODS},
    "shifted": lambda: {"target_scale": 2 / 255, "target_shift": -1.0},
    "gaussian": lambda logvar: {"log_scale": logvar, "share": 0.5},
    **dict.fromkeys(("scaled_l1", "scaled_sample"), lambda log_scale: {"error": "l1", "log_scale": log_scale}),
    "mask": lambda mask: {"mask": mask},
    "weight": lambda weight: {"weight": weight},
    "extra_map": lambda extra: {"extra": extra},
    **dict.fromkeys(("recon_weight", "recon_weight_map"), lambda weight: {"recon_weight": weight}),
    "beta": lambda beta: {"beta": beta},
    "target": dict,
    "prior": lambda mu, logvar: {"prior": (mu, logvar)},
    **{mode: lambda mode=mode: {"free_bits": (0.1, mode)} for mode in ("dim", "dim_mask", "dim_batch")},
}


@cache
def noise(shape):
    """The normals of seed 7 in float64."""
    count = shape[0] * shape[1]
    normals = [normal for i in range(-(-count // 4)) for normal in true_normals(true_philox([i, 0, 0, 0], [7, 0]))]
    return torch.tensor(normals[:count], dtype=torch.float64).reshape(shape)


def truth(case, drawn):
    """Inputs that require a gradient and outputs, in float64. drawn: the noise that a sample is made of."""
    call = case.call()
    doubles = {t: oracle.leaf(t) for t in (*call.arguments.values(), *call.planes) if isinstance(t, torch.Tensor)}
    given = {name: doubles.get(value, value) for name, value in call.arguments.items()}
    inputs = [doubles[t] for t in call.inputs]
    bounds = given.get("logvar_clamp")
    if "loss" in case.op:
        planes, options = list(call.planes), {}
        for option in case.options:
            made_of = TRUE_OPTIONS[option]
            count = len(OPTIONS[option].planes)
            options |= made_of(*(doubles[t] if t.is_floating_point() else t for t in planes[:count]))
            del planes[:count]
        target = call.arguments["target"]
        loss, _, _ = loss_truth.vae_loss(
            given["recon"],
            target if target.dtype == torch.uint8 else given["target"],
            given.get("mu"),
            given.get("logvar"),
            kl=given.get("kl"),
            logvar_clamp=bounds,
            **options,
        )
        return inputs, [loss]
    mu, logvar = given["mu"], given["logvar"]
    kl = oracle.kl(mu, logvar, bounds)
    if "prior" in case.options:
        kl = loss_truth.kl_elements(mu, logvar, tuple(doubles[t] for t in call.planes), bounds)
    if case.op == "kl":
        return inputs, [oracle.reduce(kl, "batchmean")]
    return inputs, [oracle.sample(mu, logvar, drawn, bounds), oracle.per_sample(kl)][: 1 + (case.op == "sample_kl")]


def check(case, target, **options):
    with executed(target, **options) as launches:
        step = case.forward()
        gradients = case.backward(step)
        drawn = fastvae.philox_normal(case.shape, seed=7) if case.op in ("sample", "sample_kl") else None
    assert launches
    if case.op == "noise":
        # within 1e-6 of the definition, then rounded to the storage dtype
        (found,) = step.outputs
        arithmetic = torch.promote_types(case.dtype, torch.float32)
        assert_near(found, noise(case.shape), 1e-6 / torch.finfo(arithmetic).eps, ulps=1)
        return launches
    if case.op == "stats":
        stats = fastvae.statistics.LatentStats(*step.outputs)
        arguments = case.call().arguments
        bounds = arguments.get("logvar_clamp")
        test_latent_stats.check_against_oracle(arguments["mu"], arguments["logvar"], stats, bounds)
        return launches
    inputs, outputs = truth(case, drawn)
    latents = case.latent_cols or case.shape[1]
    for found, value in zip(step.outputs, [value.detach() for value in outputs], strict=True):
        assert found.dtype == (
            case.dtype if found.shape == case.shape else torch.promote_types(case.dtype, torch.float32)
        )
        # a sum has about as many terms as there are latents, none larger than 1; z's are no larger than the largest z
        assert_near(found, value, value.abs() + (latents if found.ndim < 2 else value.abs().max()))
    expected = torch.autograd.grad(outputs, inputs, [torch.full_like(value, case.upstream) for value in outputs])
    for found, value, given in zip(gradients, expected, step.inputs, strict=True):
        assert found.dtype == given.dtype
        assert_near(found, value, value.abs() + value.abs().max())
    return launches


def check_upstreams(case, target, **options):
    """The gradient of the images that the forward pass wrote is taken as it is, scaled, or computed again."""
    upstreams = (1.0, 2.0, 3.0) if "loss" in case.op else (1.0,)
    return [check(replace(case, upstream=upstream), target, **options) for upstream in upstreams]


@pytest.mark.parametrize(("case", "target"), SMALL, ids=[f"{case}-{target}" for case, target in SMALL])
def test_every_case_of_the_gates(case, target):
    check_upstreams(case, target)


@pytest.mark.parametrize("skew", [-1.0, 1.0])
@pytest.mark.parametrize("case", [case for case, target in SMALL if target == "sm_90"], ids=str)
def test_approximations_at_their_worst(case, skew):
    """All of them too small, or too large, by what PTX allows."""
    check_upstreams(case, "sm_90", skew=skew)


@pytest.fixture
def few_programs(monkeypatch):
    """Limits of programs are 4, so that a program takes several tiles, as it does at sizes too large to execute."""
    kernels = [import_module(f"fastvae_kernels.{info.name}") for info in iter_modules(fastvae_kernels.__path__)]
    library = [module for name, module in sys.modules.items() if name.startswith("fastvae.")]
    functions = {f for module in (*kernels, *library) for f in vars(module).values() if inspect.isroutine(f)}
    caches = [function.cache_clear for function in functions if hasattr(function, "cache_clear")]
    limit = _tile.MAX_PROGRAMS
    for module in kernels:
        for name, value in list(vars(module).items()):
            if "MAX_" in name and "PROGRAMS" in name:
                monkeypatch.setattr(module, name, 4)
            elif inspect.isfunction(value):
                defaults = [4 if default == limit else default for default in value.__defaults__ or ()]
                monkeypatch.setattr(value, "__defaults__", tuple(defaults))
    [clear() for clear in caches]
    yield
    [clear() for clear in caches]


SEVERAL_TILES = [
    *(Case("loss", *dtypes, shape=(3, 16_500)) for dtypes in ((F32,), (BF16, U8), (F64,))),
    Case("loss", F32, shape=(1, 40_000), options=("mask",)),
    Case("whole_loss", BF16, U8, shape=(2, 16_500), latent_cols=9_000, options=("dim", "bernoulli")),
    Case("kl", F32, shape=(2, 9_001), clamp=True),
]


@pytest.mark.parametrize("case", SEVERAL_TILES, ids=str)
def test_programs_that_take_several_tiles(few_programs, case):
    for launches in check_upstreams(case, "sm_90"):
        assert any(
            launch.grid[0] * elements_per_program(launch.arguments) < case.n_elements
            for launch in launches
            if "fold" not in launch.name
        )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_seeds_of_a_noise_state(target):
    expected, state = fastvae.NoiseState(2**63 + 5), fastvae.NoiseState(2**63 + 5)
    with executed(target):
        for _ in range(3):
            state.advance()
    for _ in range(3):
        expected.advance()
    assert torch.equal(state.seed, expected.seed)
    assert torch.equal(state.step, expected.step)
