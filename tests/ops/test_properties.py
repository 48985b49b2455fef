"""Random shapes, strides, dtypes and options, all at once: values and gradients against the float64 truth.

A failure prints the smallest problem that Hypothesis found, and a line that reproduces it.
"""

import math
import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastvae
from fastvae.likelihoods import L1, L2, BernoulliProbs, Gaussian, Huber, LogCosh, Scaled, SmoothL1
from fastvae.regularizers import Capacity, FreeBits
from tests.helpers import loss_truth, oracle
from tests.helpers.loss_truth import LOG_2PI
from tests.helpers.oracle import DTYPES

F64 = torch.float64
FALLBACK, KERNELS = 1400, 100  # examples of a test; interpreted kernels take their time
SAMPLING_FALLBACK, SAMPLING_KERNELS = 500, 60


RANDOM = os.environ.get("RANDOM_EXAMPLES") == "1"  # other examples each time: by hand, not in CI


def examples(n):
    return settings(
        max_examples=n,
        derandomize=not RANDOM,
        print_blob=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )


# --- tensors

shapes_of_a_sample = st.lists(st.integers(1, 6), max_size=4).map(tuple).filter(lambda s: math.prod(s) <= 300)
dtypes = st.sampled_from(DTYPES)


def reversed_dimensions(t):
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))


# the same numbers in other places, but for the last two, which repeat some
LAYOUTS = {
    "contiguous": lambda t: t,
    "reversed dimensions": reversed_dimensions,
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 2 else t,
    "every other": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "rows apart": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "one row for all": lambda t: t[:1].expand_as(t),
    "one number for a row": lambda t: t[(slice(None), *[slice(1)] * (t.ndim - 1))].expand_as(t),
}
layouts = st.sampled_from(list(LAYOUTS))


@dataclass(frozen=True)
class Place:
    """How a tensor lies in memory."""

    dtype: torch.dtype
    layout: str
    wants_gradient: bool = True

    def put(self, values):
        tensor = LAYOUTS[self.layout]((values * 255).byte() if self.dtype == torch.uint8 else values.to(self.dtype))
        return tensor.detach().requires_grad_(self.wants_gradient and self.dtype != torch.uint8)


places = st.builds(Place, dtypes, layouts, st.booleans())
NUMBERS = {"1": 1.0, "number": 0.7}
weights = st.sampled_from([*NUMBERS, "tensor", "learned"])


def assert_close(actual, expected, exact, *, size=0.0, roundings=1):
    """Equal but for a few roundings in float32 (float64 if `exact`), and those to a 16-bit dtype."""
    actual, expected = actual.detach(), expected.detach()
    tolerance = (1e-12 if exact else 4e-6) * (expected.abs() + size)
    if actual.dtype in (torch.bfloat16, torch.float16):
        limits = torch.finfo(actual.dtype)
        tolerance = tolerance + roundings * (
            limits.eps / 2 * (expected.abs() + (size if roundings > 1 else 0)) + limits.smallest_normal * limits.eps
        )
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert (error <= tolerance).all(), f"off by {float((error - tolerance).max()):.3g} more than is allowed"


def loss_dtype(tensors):
    return F64 if any(t.dtype == F64 for t in tensors) else torch.float32


# --- the loss

GAUSSIAN = {"share": 0.5}
LIKELIHOODS = {
    "l2": (lambda s, **o: L2(**o), lambda s: {}),
    "l2 of logits": (lambda s, **o: L2(True, **o), lambda s: {"error": "l2_of_logits"}),
    "l1": (lambda s, **o: L1(**o), lambda s: {"error": "l1"}),
    "huber": (lambda s, **o: Huber(0.3, **o), lambda s: {"error": "huber", "parameter": 0.3}),
    "smooth_l1": (lambda s, **o: SmoothL1(0.3, **o), lambda s: {"error": "smooth_l1", "parameter": 0.3}),
    "log_cosh": (lambda s, **o: LogCosh(3.0, **o), lambda s: {"error": "log_cosh", "parameter": 3.0}),
    "bernoulli": (lambda s, **o: fastvae.likelihoods.Bernoulli(**o), lambda s: {"error": "bernoulli"}),
    "bernoulli_probs": (lambda s, **o: BernoulliProbs(**o), lambda s: {"error": "bernoulli_probs"}),
    "gaussian": (lambda s, **o: Gaussian(0.7, **o), lambda s: GAUSSIAN | {"log_scale": 0.7}),
    "gaussian with a scale": (lambda s, **o: Gaussian(s, **o), lambda s: GAUSSIAN | {"log_scale": s}),
    "gaussian, full, clipped": (
        lambda s, **o: Gaussian(s, full=True, softclip=0.2, **o),
        lambda s: GAUSSIAN | {"log_scale": s, "softclip": 0.2, "constant": 0.5 * LOG_2PI},
    ),
    "gaussian, optimal": (lambda s, **o: Gaussian("optimal", **o), lambda s: GAUSSIAN | {"log_scale": "optimal"}),
    "scaled l1": (lambda s, **o: Scaled(L1(**o), s), lambda s: {"error": "l1", "log_scale": s}),
    "scaled smooth_l1": (
        lambda s, **o: Scaled(SmoothL1(0.3, **o), s),
        lambda s: {"error": "smooth_l1", "parameter": 0.3, "log_scale": s},
    ),
}
WITH_A_SCALE = ("gaussian with a scale", "gaussian, full, clipped", "scaled l1", "scaled smooth_l1")
SCALES = ("number", "sample", "element")
REDUCTIONS = ("batchmean", "sum", "mean", "none")


@dataclass(frozen=True)
class Problem:
    """All that a call of `vae_loss` is made of."""

    batch: int
    image: tuple[int, ...]
    latent: tuple[int, ...]
    recon: Place
    target: Place
    mu: Place
    logvar: Place
    measured: bool  # kl= in place of mu and logvar
    likelihood: str
    scale: str
    mask: str | None
    mask_normalize: bool
    target_scale: float
    recon_reduction: str
    kl_reduction: str
    beta: str
    recon_weight: str
    clamp: bool
    prior: str | None
    free_bits: str | None
    capacity: str | None
    weight: bool
    extra: bool
    one_pass: bool
    inplace: bool
    create_graph: bool
    upstream: str
    seed: int


@st.composite
def problems(draw):
    reduction, other = draw(st.sampled_from(REDUCTIONS)), draw(st.sampled_from(REDUCTIONS[:3]))
    likelihood = draw(st.sampled_from(list(LIKELIHOODS)))
    measured = draw(st.integers(0, 3)) == 0
    mask = draw(st.sampled_from([None, None, "element", "row"]))
    modes = {"sample"} if measured else {"dim", "dim_mask", "sample"}
    modes |= {"dim_batch"} if reduction != "none" and not measured else set()
    free_bits = draw(st.sampled_from([None, *sorted(modes)]))
    limits = {"sample"} if free_bits != "dim_batch" else set()
    limits |= {"batch"} if reduction != "none" else set()
    kl_reduction = draw(st.sampled_from([reduction, reduction if reduction == "none" else other]))
    recon, target = draw(places), draw(st.one_of(places, st.builds(Place, st.just(torch.uint8), layouts)))
    recon_weight = draw(weights)
    # where the gradient may take recon's memory and is not rounded twice in it
    may_overwrite = (
        recon_weight in NUMBERS and recon.dtype in (torch.float32, F64) and likelihood != "gaussian, optimal"
    )
    may_overwrite &= target.dtype == torch.uint8 or not target.wants_gradient
    inplace = may_overwrite and draw(st.booleans())
    return Problem(
        batch=draw(st.integers(1, 5)),
        image=draw(shapes_of_a_sample),
        latent=draw(shapes_of_a_sample),
        recon=recon,
        target=target,
        mu=draw(places),
        logvar=draw(places),
        measured=measured,
        likelihood=likelihood,
        scale=draw(st.sampled_from(SCALES)) if likelihood in WITH_A_SCALE else "",
        mask=mask,
        mask_normalize=mask is not None and reduction in ("batchmean", "mean") and draw(st.booleans()),
        target_scale=draw(st.sampled_from([1 / 255, 0.5 / 255])),
        recon_reduction=reduction,
        kl_reduction=kl_reduction,
        beta=draw(weights),
        recon_weight=recon_weight,
        clamp=not measured and draw(st.booleans()),
        prior=None if measured else draw(st.sampled_from([None, "whole", "broadcast"])),
        free_bits=free_bits,
        capacity=draw(st.sampled_from([None, *sorted(limits)])),
        weight=draw(st.booleans()),
        extra=likelihood != "gaussian, optimal" and draw(st.booleans()),  # the best scale is that of the error alone
        one_pass=inplace or draw(st.booleans()),
        inplace=inplace,
        create_graph=not inplace and draw(st.booleans()),
        upstream=draw(st.sampled_from(["1 of the loss", "3 of the loss", "random of all", "random of recon and kl"])),
        seed=draw(st.integers(0, 2**31)),
    )


class Tensors:
    """What a problem's numbers are: `given` as fastvae gets them, `true` in float64."""

    def __init__(self, p):
        generator = torch.Generator().manual_seed(p.seed)

        def uniform(*shape):
            return torch.rand(shape, dtype=F64, generator=generator)

        def normal(*shape):
            return torch.randn(shape, dtype=F64, generator=generator)

        image, latent = (p.batch, *p.image), (p.batch, *p.latent)
        logits = p.likelihood in ("l2 of logits", "bernoulli")
        self.given = {
            "recon": p.recon.put(4 * normal(*image) if logits else 0.02 + 0.96 * uniform(*image)),
            "target": p.target.put(uniform(*image)),
            "mu": p.mu.put(normal(*latent)),
        }
        if p.measured:
            self.given["kl"] = p.logvar.put(4 * uniform(p.batch))
        else:
            self.given["logvar"] = p.logvar.put(normal(*latent))
        option = torch.float32 if self.dtype == torch.float32 else F64
        sizes = {"weight": (p.batch,), "extra": (p.batch,)}
        sizes = {name: size for name, size in sizes.items() if getattr(p, name)}
        sizes |= {name: () for name in ("beta", "recon_weight") if getattr(p, name) in ("tensor", "learned")}
        if p.scale:
            sizes["scale"] = {"number": (), "sample": (p.batch,), "element": image}[p.scale]
        if p.prior:
            shape = latent if p.prior == "whole" else latent[1:]
            sizes |= {"prior_mu": shape, "prior_logvar": shape}
        for name, size in sizes.items():
            learned = getattr(p, name, "learned") != "tensor"
            self.given[name] = (0.5 + uniform(*size)).to(option).requires_grad_(learned)
        self.true = {
            name: oracle.leaf(t).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in self.given.items()
        }
        self.mask = None
        if p.mask:
            self.mask = uniform(*(image if p.mask == "element" else (p.batch, *[1] * len(p.image)))) > 0.4
            self.mask.view(-1)[0] = True

    @property
    def counted(self):
        """Those whose numbers matter: next to kl=, mu only tells the number of latents."""
        return [t for name, t in self.given.items() if name != "mu" or "kl" not in self.given]

    @property
    def dtype(self):
        return loss_dtype(self.counted)

    @property
    def exact(self):
        return all(t.dtype == F64 for t in self.counted)


CLAMP, FREE_NATS, CAPACITY = (-0.375, 0.25), {"dim": 0.3, "dim_mask": 0.3, "dim_batch": 0.3, "sample": 2.0}, 1.7


def found_terms(p, tensors):
    t = tensors.given
    build, _ = LIKELIHOODS[p.likelihood]
    likelihood = build(t.get("scale"), target_scale=p.target_scale, mask_normalize=p.mask_normalize)
    recon = t["recon"].clone() if p.inplace else t["recon"]  # no leaf may be overwritten
    return fastvae.vae_loss(
        *(recon, t["target"], t["mu"], t.get("logvar")),
        kl=t.get("kl"),
        beta=t.get("beta", NUMBERS.get(p.beta)),
        recon_weight=t.get("recon_weight", NUMBERS.get(p.recon_weight)),
        likelihood=likelihood,
        recon_reduction=p.recon_reduction,
        kl_reduction=p.kl_reduction,
        logvar_clamp=CLAMP if p.clamp else None,
        free_bits=FreeBits(FREE_NATS[p.free_bits], p.free_bits) if p.free_bits else None,
        capacity=Capacity(CAPACITY, p.capacity) if p.capacity else None,
        prior=(t["prior_mu"], t["prior_logvar"]) if p.prior else None,
        weight=t.get("weight"),
        extra=t.get("extra"),
        mask=tensors.mask,
        one_pass=p.one_pass,
        inplace=p.inplace,
    )


def true_terms(p, tensors):
    t = tensors.true
    recon_weight = t.get("recon_weight", NUMBERS.get(p.recon_weight))

    def by(reduction):
        return loss_truth.vae_loss(
            *(t["recon"], t["target"], t["mu"], t.get("logvar")),
            kl=t.get("kl"),
            beta=t.get("beta", NUMBERS.get(p.beta)),
            recon_weight=recon_weight,
            reduction=reduction,
            logvar_clamp=CLAMP if p.clamp else None,
            free_bits=(FREE_NATS[p.free_bits], p.free_bits) if p.free_bits else None,
            capacity=(CAPACITY, p.capacity) if p.capacity else None,
            prior=(t["prior_mu"], t["prior_logvar"]) if p.prior else None,
            weight=t.get("weight"),
            extra=t.get("extra"),
            mask=tensors.mask,
            mask_normalize=p.mask_normalize,
            target_scale=p.target_scale,
            **LIKELIHOODS[p.likelihood][1](t.get("scale")),
        )

    loss, recon, kl = by(p.recon_reduction)
    if p.kl_reduction != p.recon_reduction:
        other_loss, other_recon, kl = by(p.kl_reduction)
        loss = recon_weight * recon + (other_loss - recon_weight * other_recon)
    return loss, recon, kl


def far_from_a_kink(p, tensors):
    """Where a slope jumps, float32 may stand on the other side of the corner."""
    t = {name: x.detach() for name, x in tensors.true.items()}
    if not p.free_bits and not p.capacity:
        return True
    weight = t.get("weight", torch.ones(p.batch, dtype=F64))
    if p.measured:
        k = by_sample = t["kl"]
    else:
        prior = (t["prior_mu"], t["prior_logvar"]) if p.prior else None
        k = loss_truth.kl_elements(t["mu"], t["logvar"], prior, CLAMP if p.clamp else None)
        by_sample = oracle.per_sample(k)
    places = {
        "dim": k,
        "dim_mask": k,
        "dim_batch": (k * weight.reshape(-1, *[1] * (k.ndim - 1))).mean(0),
        "sample": by_sample,
        None: torch.ones(()),
    }
    free_bits = (FREE_NATS[p.free_bits], p.free_bits) if p.free_bits else None
    nats = loss_truth.regularised_nats(k, weight, free_bits, None)
    free = (places[p.free_bits] - FREE_NATS.get(p.free_bits, 0.0)).abs().min() > 1e-4
    unweighed = loss_truth.regularised_nats(k, torch.ones_like(weight), free_bits, None)
    reached = {"sample": unweighed, "batch": nats.mean(), None: torch.zeros(())}[p.capacity]
    return bool(free) and bool((reached - CAPACITY).abs().min() > 1e-4)


def sizes(p):
    """Of (loss, recon, kl): about the sum of what each is the sum of."""
    n_terms = math.prod(p.image) + 5 * math.prod(p.latent)
    recon, kl = ({"sum": p.batch * n_terms, "mean": 5.0}.get(r, n_terms) for r in (p.recon_reduction, p.kl_reduction))
    return recon + kl, recon, kl


def upstream_gradients(p, terms):
    """For each of (loss, recon, kl), or None."""
    generator = torch.Generator().manual_seed(p.seed)
    factor = 3.0 if p.upstream == "3 of the loss" else 1.0
    drawn = [torch.rand(term.shape, dtype=F64, generator=generator).to(term.dtype) + 0.5 for term in terms]
    return {
        "random of all": drawn,
        "random of recon and kl": [None, *drawn[1:]],
    }.get(p.upstream, [torch.full_like(terms[0], factor), None, None])


def check_loss(p):
    tensors = Tensors(p)
    assume(far_from_a_kink(p, tensors))
    found, true = found_terms(p, tensors), true_terms(p, tensors)
    for term, value, size in zip(found, true, sizes(p), strict=True):
        assert term.dtype == tensors.dtype
        assert_close(term, value, tensors.exact, size=size)

    upstream = [(i, g) for i, g in enumerate(upstream_gradients(p, found)) if g is not None and true[i].requires_grad]
    assert all(found[i].requires_grad for i, _ in upstream)
    leaves = [name for name, t in tensors.given.items() if t.requires_grad]
    if not upstream:
        return
    factors = [g for _, g in upstream]
    given = [tensors.given[name] for name in leaves]
    gradients = of([found[i] for i, _ in upstream], given, factors, create_graph=p.create_graph)
    expected = of(
        [true[i] for i, _ in upstream], [tensors.true[name] for name in leaves], [g.double() for g in factors]
    )
    for name, gradient, value in zip(leaves, gradients, expected, strict=True):
        assert (gradient is None) == (value is None), name
        if gradient is not None:
            assert gradient.dtype == tensors.given[name].dtype
            size = value.abs().max() + term_of(p, name)
            # a second derivative's graph rounds where it branches
            assert_close(gradient, value, tensors.exact, size=size, roundings=3 if p.create_graph else 1)


def term_of(p, name):
    """About the size of what a gradient is the sum of; an option's sum is as long as the loss."""
    if name in ("recon", "target"):
        reduction, n = p.recon_reduction, p.batch * math.prod(p.image)
    elif name in ("mu", "logvar", "kl"):
        reduction, n = p.kl_reduction, p.batch * math.prod(p.latent)
    else:
        return sizes(p)[0]
    return 4 / {"mean": n, "batchmean": p.batch}.get(reduction, 1)


def of(outputs, inputs, upstream, *, create_graph=False):
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, create_graph=create_graph)


@examples(FALLBACK)
@given(problems())
def test_loss_on_the_fallback(p):
    with fastvae.use_backend("torch"):
        check_loss(p)


def interpreted_right(*places):
    """The interpreter takes float64 for bfloat16 bits."""
    return not {torch.bfloat16, F64} <= {place.dtype for place in places}


@examples(KERNELS)
@given(problems())
def test_loss_on_the_kernels(p):
    assume(interpreted_right(p.recon, p.target, p.mu, p.logvar))
    with fastvae.use_backend("triton"):
        check_loss(p)


def test_extra_under_a_scale(backend):
    """(e + extra) exp(-s) + s, whatever constant e is multiplied by."""
    recon, target, s = torch.rand(3, 2, 6, dtype=F64)
    extra = torch.tensor([1.0, 2.0], dtype=F64)
    found = fastvae.reconstruction_loss(
        recon, target, likelihood=Scaled(SmoothL1(0.3), s), extra=extra, reduction="sum"
    )
    e = torch.nn.functional.smooth_l1_loss(recon, target, beta=0.3, reduction="none")
    torch.testing.assert_close(found, ((e + extra[:, None]) * (-s).exp() + s).sum())


# --- sampling


@dataclass(frozen=True)
class Draw:
    """All that a call of `reparameterize_kl` is made of."""

    shape: tuple[int, ...]
    mu: Place
    logvar: Place
    packed_along: int | None
    clamp: bool
    noise_seed: int
    offset: int
    as_tensor: bool
    seed: int


draws = st.builds(
    Draw,
    st.tuples(st.integers(0, 4), shapes_of_a_sample).map(lambda pair: (pair[0], *pair[1])),
    places,
    places,
    st.one_of(st.none(), st.integers(1, 4)),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.one_of(st.integers(0, 9), st.integers(0, 2**40)),
    st.booleans(),
    st.integers(0, 2**31),
)


def check_sampling(d):
    values = torch.randn(2, *d.shape, dtype=F64, generator=torch.Generator().manual_seed(d.seed))
    bounds = CLAMP if d.clamp else None
    seed = torch.tensor((d.noise_seed + 2**63) % 2**64 - 2**63) if d.as_tensor else d.noise_seed
    noise = {"seed": seed, "offset": d.offset}
    if d.packed_along is None or d.packed_along >= len(d.shape):
        leaves = mu, logvar = d.mu.put(values[0]), d.logvar.put(values[1])
        z, kl = fastvae.reparameterize_kl(mu, logvar, **noise, logvar_clamp=bounds)
    else:
        dim = d.packed_along
        packed = d.mu.put(torch.cat([*values], dim))
        leaves = (packed,)
        mu, logvar = packed.chunk(2, dim)
        z, kl = fastvae.DiagonalGaussian.from_moments(packed, dim, logvar_clamp=bounds).rsample_kl(**noise)
    true_leaves = [oracle.leaf(t).requires_grad_(t.requires_grad) for t in leaves]
    true_mu, true_logvar = true_leaves if len(leaves) == 2 else true_leaves[0].chunk(2, d.packed_along)
    normals = fastvae.philox_normal(d.shape, seed=seed, offset=d.offset)
    true_z = oracle.sample(true_mu, true_logvar, normals, bounds)
    true_kl = oracle.per_sample(oracle.kl(true_mu, true_logvar, bounds))

    exact = mu.dtype == logvar.dtype == F64
    assert z.dtype == torch.promote_types(mu.dtype, logvar.dtype)
    assert kl.dtype == loss_dtype([mu, logvar])
    # where a rounding of z is coarser than float32, it is the only one; the noise itself is right to 1e-6
    assert_close(z, true_z, False, size=1 + normals.abs().double())
    assert_close(kl, true_kl, exact, size=5.0 * math.prod(d.shape[1:]))
    asked = [(t, u) for t, u in zip(leaves, true_leaves, strict=True) if t.requires_grad]
    if not asked:
        return
    generator = torch.Generator().manual_seed(d.seed)
    dz = torch.randn(d.shape, dtype=F64, generator=generator).to(z.dtype)
    dkl = torch.randn(d.shape[:1], dtype=F64, generator=generator).to(kl.dtype)
    gradients = torch.autograd.grad((z, kl), [t for t, _ in asked], (dz, dkl))
    expected = torch.autograd.grad((true_z, true_kl), [t for _, t in asked], (dz.double(), dkl.double()))
    for (t, _), gradient, value in zip(asked, gradients, expected, strict=True):
        assert gradient.dtype == t.dtype
        assert_close(gradient, value, False, size=value.abs().max() + 1 if value.numel() else 0.0)


@examples(SAMPLING_FALLBACK)
@given(draws)
def test_sampling_on_the_fallback(d):
    with fastvae.use_backend("torch"):
        check_sampling(d)


@examples(SAMPLING_KERNELS)
@given(draws)
def test_sampling_on_the_kernels(d):
    assume(interpreted_right(d.mu, d.logvar))
    with fastvae.use_backend("triton"):
        check_sampling(d)
