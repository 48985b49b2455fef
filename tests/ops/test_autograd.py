"""Everything that autograd can do with a graph besides a plain backward pass: right each time, or an error."""

import gc
import re
import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad

import fastvae
from fastvae.likelihoods import Gaussian
from tests.helpers import oracle

F64 = torch.float64
IMAGE, LATENT = (4, 3, 5), (4, 6)


def leaves(dtype=torch.float32):
    """recon, target, mu, logvar."""
    recon, target = (torch.rand(IMAGE, dtype=dtype, requires_grad=grad) for grad in (True, False))
    return recon, target, *(torch.randn(LATENT, dtype=dtype, requires_grad=True) for _ in range(2))


def step(recon, target, mu, logvar):
    """A training step with an identity for a decoder: sampling and loss in one number."""
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    return fastvae.vae_loss(recon, target, kl=kl, recon_weight=0.5).loss + z.pow(3).sum()


def true_step(recon, target, mu, logvar):
    z = oracle.sample(mu, logvar, fastvae.philox_normal(LATENT, seed=1))
    terms = 0.5 * oracle.squared_error(recon, target).sum() + oracle.kl(mu, logvar).sum()
    return terms / len(recon) + z.pow(3).sum()


def true_gradients(inputs):
    """Of the step, by recon, mu and logvar."""
    recon, target, mu, logvar = map(oracle.leaf, inputs)
    found = torch.autograd.grad(true_step(recon, target, mu, logvar), (recon, mu, logvar))
    return [gradient.to(inputs[0].dtype) for gradient in found]


def differentiable(inputs):
    return inputs[0], *inputs[2:]


def assert_right(found, inputs, factor=1.0):
    torch.testing.assert_close(list(found), [factor * g for g in true_gradients(inputs)], rtol=1e-5, atol=1e-6)


def attempt(call):
    """(result, None), or (None, the text of a RuntimeError)."""
    try:
        return call(), None
    except RuntimeError as error:
        return None, str(error)


def negated_by_torch_later(t):
    return torch.complex(torch.zeros_like(t), -t).conj().imag


STRIDES = {
    "one number for all": lambda t: t.flatten()[0].expand(t.shape),
    "one row for all": lambda t: t[:1].expand_as(t),
    "every other": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "reversed dimensions": lambda t: t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))),
    "negated later": negated_by_torch_later,
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_upstream_gradients_of_any_strides(backend, view):
    recon, target, mu, logvar = leaves(F64)
    asked = (recon, mu, logvar)
    z, sampled_kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    terms = fastvae.vae_loss(recon, target, mu, logvar, weight=torch.rand(4, dtype=F64), reduction="none")
    outputs = (z, sampled_kl, *terms)
    upstream = [view(torch.randn(t.shape, dtype=F64)) for t in outputs]
    found = torch.autograd.grad(outputs, asked, upstream, retain_graph=True)
    expected = torch.autograd.grad(outputs, asked, [t.clone().resolve_neg().contiguous() for t in upstream])
    torch.testing.assert_close(found, expected)


CHANGED = {
    "recon": lambda t: t["recon"],
    "target": lambda t: t["target"],
    "mu": lambda t: t["mu"],
    "logvar": lambda t: t["logvar"],
    "prior": lambda t: t["prior"][0],
    "mask": lambda t: t["mask"],
    "weight": lambda t: t["weight"],
    "extra": lambda t: t["extra"],
    "scale": lambda t: t["scale"],
    "beta": lambda t: t["beta"],
    "recon_weight": lambda t: t["recon_weight"],
    "seed": lambda t: t["seed"],
}


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
@pytest.mark.parametrize("changed", CHANGED)
def test_what_changes_between_the_passes_never_gives_a_wrong_gradient(backend, changed, create_graph):
    """Right, or autograd's error; textbook code has no other outcome."""
    recon, target, mu, logvar = leaves(F64)
    t = {"recon": recon, "target": target, "mu": mu, "logvar": logvar, "mask": torch.rand(IMAGE) > 0.3}
    t |= {"prior": tuple(torch.randn(2, *LATENT, dtype=F64)), "scale": torch.randn(IMAGE, dtype=F64)}
    t |= {name: torch.rand(4, dtype=F64) for name in ("weight", "extra")}
    t |= {name: torch.rand((), dtype=F64) for name in ("beta", "recon_weight")} | {"seed": torch.tensor(3)}

    def outputs():
        options = {name: t[name] for name in ("prior", "mask", "weight", "extra", "beta", "recon_weight")}
        options["likelihood"] = Gaussian(t["scale"])
        loss = fastvae.vae_loss(t["recon"], t["target"], t["mu"], t["logvar"], **options).loss
        return loss + fastvae.reparameterize(t["mu"], t["logvar"], seed=t["seed"]).pow(3).sum()

    expected = torch.autograd.grad(outputs(), (recon, mu, logvar))
    value = outputs()
    with torch.no_grad():
        tensor = CHANGED[changed](t)
        tensor.logical_not_() if changed == "mask" else tensor.add_(1)
    found, refusal = attempt(lambda: torch.autograd.grad(value, (recon, mu, logvar), create_graph=create_graph))
    if refusal:
        assert "modified by an inplace operation" in refusal
    else:
        torch.testing.assert_close(found, expected)


def test_outputs_may_be_changed_in_place(backend):
    """`loss /= k`, `kl *= beta`: what backward needs is not in them, and they share memory with nothing."""
    inputs = leaves()
    recon, target, mu, logvar = inputs
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    z.mul_(2)
    kl.mul_(2)
    terms = fastvae.vae_loss(recon, target, kl=kl / 2, recon_weight=0.5)
    terms.recon.zero_()
    terms.kl.zero_()
    loss = terms.loss
    loss /= 2
    assert_right(torch.autograd.grad(2 * loss + (z / 2).pow(3).sum(), differentiable(inputs)), inputs)


def test_no_output_is_its_input(backend):
    recon, target, _, _ = leaves()
    kl = torch.rand(4)
    with torch.no_grad():
        fastvae.vae_loss(recon, target, kl=kl, reduction="none").kl.zero_()
    assert kl.all()


def test_gradients_of_several_losses_add_up(backend):
    """The buffer that the forward pass wrote becomes .grad: what is added to it later belongs to nobody else."""
    inputs = leaves()
    asked = differentiable(inputs)
    first = step(*inputs)
    (step(*inputs) + step(*inputs)).backward()
    assert_right([x.grad for x in asked], inputs, 2)
    first.backward(retain_graph=True)
    assert_right([x.grad for x in asked], inputs, 3)
    first.backward()
    assert_right([x.grad for x in asked], inputs, 4)


def test_a_graph_serves_once_unless_it_is_retained(backend):
    loss = step(*leaves())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_create_graph_does_not_use_the_graph_up(backend):
    inputs = leaves()
    asked = differentiable(inputs)
    loss = step(*inputs)
    for create_graph in (True, False, True, False):
        found = torch.autograd.grad(loss, asked, create_graph=create_graph, retain_graph=True)
        assert_right((g.detach() for g in found), inputs)
        assert all(g.requires_grad == create_graph for g in found)


@pytest.mark.parametrize("run_backward", [False, True])
def test_memory_comes_back_without_the_garbage_collector(backend, run_backward):
    """A reference cycle between a node and its tensors would keep a batch of images until the collector runs."""
    recon, target, mu, logvar = leaves()
    decoded = recon * 1
    loss = step(decoded, target, mu, logvar)
    watched = [weakref.ref(t) for t in (decoded, loss)]
    gc.disable()
    try:
        if run_backward:
            loss.backward()
        del loss, decoded
        assert [w() for w in watched] == [None, None]
    finally:
        gc.enable()


class TestHooks:
    def test_see_replace_and_keep_gradients(self, backend):
        inputs = leaves()
        recon, _, mu, logvar = inputs
        seen = {}
        for name, x in (("recon", recon), ("mu", mu), ("logvar", logvar)):
            x.register_hook(lambda gradient, name=name: seen.setdefault(name, gradient))
            x.register_hook(lambda gradient: 2 * gradient)
        decoded = recon * 1
        decoded.retain_grad()
        loss = step(decoded, *inputs[1:])
        loss.backward(retain_graph=True)
        assert_right([x.grad for x in (recon, mu, logvar)], inputs, 2)
        assert_right([seen[name] for name in ("recon", "mu", "logvar")], inputs)
        loss.backward()
        assert_right([x.grad for x in (recon, mu, logvar)], inputs, 4)
        assert_right([seen[name] for name in ("recon", "mu", "logvar")], inputs)  # what a hook kept stays as it was
        assert_right([decoded.grad / 2, mu.grad / 4, logvar.grad / 4], inputs)

    def test_may_scale_what_comes_from_above(self, backend):
        recon, target, mu, logvar = leaves()
        terms = fastvae.vae_loss(recon, target, mu, logvar)
        terms.loss.grad_fn.register_prehook(
            lambda upstream: tuple(g if g is None else g.mul(torch.tensor(3.0)) for g in upstream)
        )
        terms.loss.backward()
        torch.testing.assert_close(recon.grad, 3 * 2 / 4 * (recon - target).detach())
        torch.testing.assert_close(mu.grad, 3 / 4 * mu.detach())

    def test_step_while_the_backward_pass_runs(self, backend):
        """An optimizer in the backward pass frees each gradient as soon as it is used."""
        inputs = leaves()
        before = [x.detach().clone() for x in differentiable(inputs)]
        expected = true_gradients(inputs)

        def descend(x):
            x.data.sub_(x.grad)
            x.grad = None

        for x in differentiable(inputs):
            x.register_post_accumulate_grad_hook(descend)
        step(*inputs).backward()
        found = [old - x.detach() for old, x in zip(before, differentiable(inputs), strict=True)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestAnomalyMode:
    @pytest.fixture(autouse=True)
    def _anomaly_mode(self):
        with torch.autograd.set_detect_anomaly(True):
            yield

    def test_finds_nothing_in_a_sound_step(self, backend):
        inputs = leaves()
        step(*inputs).backward()
        assert_right([x.grad for x in differentiable(inputs)], inputs)

    @pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
    def test_names_the_node_of_a_nan(self, backend):
        recon, target, mu, logvar = leaves()
        with torch.no_grad():
            recon[0, 0, 0] = logvar[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match=r"ElboFunction.* returned nan values in its 0th output"):
            fastvae.reconstruction_loss(recon, target).backward()
        with pytest.raises(RuntimeError, match=r"ReparamKLFunction.* returned nan values in its 1th output"):
            fastvae.reparameterize_kl(mu, logvar, seed=1)[0].sum().backward()


def offload(t):
    return t.detach().numpy().copy()


PACKED = {
    "the same tensor": (lambda t: t, lambda t: t),
    "a new tensor": (torch.clone, torch.clone),
    "another device": (offload, torch.from_numpy),
    "another dtype": (lambda t: t.double(), lambda t: t.float()),
    "other strides": (lambda t: torch.stack([t, t], dim=-1), lambda t: t[..., 0]),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("pack", "unpack"), PACKED.values(), ids=PACKED)
def test_saved_tensor_hooks(backend, pack, unpack, inplace):
    inputs = leaves()
    recon, target, mu, logvar = inputs
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
        loss = fastvae.vae_loss(recon * 1, target, kl=kl, recon_weight=0.5, inplace=inplace).loss + z.pow(3).sum()
    for factor in (3.0,) if inplace else (1.0, 3.0):
        found = torch.autograd.grad(factor * loss, differentiable(inputs), retain_graph=True)
        assert_right(found, inputs, factor)


def test_offloaded_to_the_cpu(backend):
    inputs = leaves()
    with torch.autograd.graph.save_on_cpu():
        loss = step(*inputs)
    found = torch.autograd.grad(loss, differentiable(inputs))
    assert_right(found, inputs)


@pytest.mark.parametrize("one_pass", [True, False])
def test_offloading_gets_hold_of_every_image_that_is_kept(backend, one_pass):
    recon, target, mu, logvar = leaves()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None):
        fastvae.vae_loss(recon, target, mu, logvar, one_pass=one_pass)
    assert kept.count(recon.shape) == (3 if one_pass else 2)
    assert kept.count(mu.shape) == 2


def decoded(mu, logvar, weight):
    """A linear decoder of the posterior's upper edge."""
    return ((mu + (0.5 * logvar).exp()) @ weight).reshape(IMAGE)


def whole_step(mu, logvar, weight, target):
    """As a training step has them, the inputs of the loss depend on each other."""
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    loss = fastvae.vae_loss(decoded(mu, logvar, weight), target, mu, logvar, prior=(2 * mu, mu)).loss
    return loss + z.pow(3).sum() + kl.square().sum()


def true_whole_step(mu, logvar, weight, target):
    z = oracle.sample(mu, logvar, fastvae.philox_normal(LATENT, seed=1))
    r = logvar - mu
    kl_of_prior = 0.5 * ((2 * mu - mu) ** 2 / mu.exp() + r.exp() - 1 - r)
    loss = (oracle.squared_error(decoded(mu, logvar, weight), target).sum() + kl_of_prior.sum()) / 4
    return loss + z.pow(3).sum() + oracle.per_sample(oracle.kl(mu, logvar)).square().sum()


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
def test_inputs_that_depend_on_each_other(backend, create_graph):
    """The gradient of each input is by itself alone: what reaches mu through recon comes by recon's own gradient."""
    mu = torch.randn(LATENT, dtype=F64, requires_grad=True)
    weight, target = torch.randn(6, 15, dtype=F64, requires_grad=True), torch.rand(IMAGE, dtype=F64)
    found, expected = (
        torch.autograd.grad(function(mu, 0.5 * mu, weight, target), (mu, weight), create_graph=create_graph)
        for function in (whole_step, true_whole_step)
    )
    torch.testing.assert_close(found, expected)
    if create_graph:  # a gradient penalty
        found, expected = (
            torch.autograd.grad(sum(g.square().sum() for g in gs), (mu, weight)) for gs in (found, expected)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
@pytest.mark.parametrize("wanted", ["recon", "mu", "beta"])
def test_terms_that_want_no_gradient(backend, wanted, create_graph):
    """Upstream gradients of all three terms, of which some depend on nothing that asks for a gradient."""
    recon, target, mu, logvar = (x.detach() for x in leaves(F64))
    inputs = {"recon": recon, "mu": mu, "beta": torch.tensor(0.5, dtype=F64)}
    asked = inputs[wanted].requires_grad_()
    terms = fastvae.vae_loss(recon, target, mu, logvar, beta=inputs["beta"])
    (found,) = torch.autograd.grad(terms, asked, [torch.ones((), dtype=F64)] * 3, create_graph=create_graph)
    expected = {"recon": 2 * 2 / 4 * (recon - target), "mu": 1.5 / 4 * mu, "beta": terms.kl}[wanted]
    torch.testing.assert_close(found.detach(), expected.detach())


def test_inplace_next_to_a_scale_of_each_element(backend):
    """The gradient by the scale needs the error, which recon's gradient overwrites."""
    recon, target, _, _ = leaves(F64)
    scale = torch.rand(IMAGE, dtype=F64, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        terms = fastvae.vae_loss(recon * 1, target, kl=torch.zeros(4), likelihood=Gaussian(scale), inplace=inplace)
        gradients.append(torch.autograd.grad(terms.loss, (recon, scale)))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_16_bit_scale_next_to_float32_images_is_rounded_once(backend, dtype):
    """What the forward pass wrote of it cannot be multiplied by 3."""
    recon, target, _, _ = leaves()
    scale = torch.rand(IMAGE).to(dtype).requires_grad_()
    loss = fastvae.vae_loss(recon, target, kl=torch.zeros(4), likelihood=Gaussian(scale)).loss
    (found,) = torch.autograd.grad(3 * loss, scale)
    error = oracle.squared_error(recon.detach().double(), target)
    value = 3 * 0.5 * (1 - error * (-scale.detach().double()).exp()) / 4
    oracle.assert_near(found, value, 1 + value.abs())


@pytest.mark.parametrize("create_graph", [False, True], ids=["plain", "create_graph"])
def test_one_tensor_in_two_places(backend, create_graph):
    x = torch.randn(LATENT, dtype=F64, requires_grad=True)
    value = fastvae.gaussian_kl(x, x, reduction="sum")
    (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph)
    torch.testing.assert_close(gradient, x + 0.5 * torch.expm1(x))


def test_second_derivatives_of_packed_moments(backend):
    packed = torch.randn(2, 4, dtype=F64, requires_grad=True)

    def function(packed):
        return fastvae.DiagonalGaussian.from_moments(packed, logvar_clamp=(-1.0, 1.0)).rsample_kl(seed=4)

    assert torch.autograd.gradcheck(function, packed, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, packed, fast_mode=True)


def test_third_derivatives(backend):
    mu, logvar = (torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=1)
    for value, expected in (
        (kl, 0.5 * logvar.exp()),
        (z, (z - mu) / 8),
        (fastvae.gaussian_kl(mu, logvar, reduction="sum"), 0.5 * logvar.exp()),
    ):
        derivative = value.sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), logvar, create_graph=True)
        torch.testing.assert_close(derivative, expected)


def test_inputs_without_influence_get_none_or_zeros(backend):
    """mu only tells the number of latents here."""
    recon, target, mu, _ = leaves()
    kl = torch.rand(4, requires_grad=True)
    terms = fastvae.vae_loss(recon, target, mu, kl=kl, reduction="mean")
    drecon, dmu, dkl = torch.autograd.grad(terms.loss, (recon, mu, kl), allow_unused=True, retain_graph=True)
    assert dmu is None
    torch.testing.assert_close(dkl, torch.full((4,), 1 / 24))
    dkl, drecon = torch.autograd.grad(terms.recon, (kl, recon), materialize_grads=True, retain_graph=True)
    assert not dkl.any()
    torch.testing.assert_close(drecon, 2 / 60 * (recon - target).detach())
    with pytest.raises(RuntimeError, match="to not have been used"):
        torch.autograd.grad(terms.loss, mu)


class TestThreads:
    def test_backward_in_another_thread(self, backend):
        """It does not know what `use_backend` chose, and must not ask."""
        inputs = leaves()
        loss = step(*inputs)
        found = []

        def run():
            found.extend(torch.autograd.grad(loss, differentiable(inputs), create_graph=True))
            loss.backward()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert_right((g.detach() for g in found), inputs)
        assert_right([x.grad for x in differentiable(inputs)], inputs)

    def test_steps_side_by_side(self):
        """Threads that train on their own, as data-parallel replicas do, share nothing. (The interpreter does.)"""
        problems = [leaves() for _ in range(4)]

        def run(inputs):
            with fastvae.use_backend("torch"):
                for _ in range(3):
                    step(*inputs).backward()

        threads = [threading.Thread(target=run, args=(inputs,)) for inputs in problems]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for inputs in problems:
            assert_right([x.grad for x in differentiable(inputs)], inputs, 3)


def test_inference_mode(backend):
    inputs = leaves()
    expected = step(*inputs).detach()
    with torch.inference_mode():
        assert torch.equal(step(*inputs), expected)
        made_there = [x.clone() for x in inputs]
        assert torch.equal(step(*made_there), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        step(inputs[0], *made_there[1:])


# --- transforms that no custom function has by itself


def kl_of(mu, logvar):
    return fastvae.gaussian_kl(mu, logvar, reduction="none")


def per_row(function):
    return lambda *rows: function(*(row[None] for row in rows))


def true_kl_of(mu, logvar):
    return oracle.per_sample(oracle.kl(mu, logvar))


def sample_of(mu, logvar):
    return fastvae.reparameterize(mu, logvar, seed=1)


def true_sample_of(mu, logvar):
    return oracle.sample(mu, logvar, fastvae.philox_normal(mu.shape, seed=1))


def loss_of(recon, logvar):
    zeros = torch.zeros(recon.shape, dtype=F64)
    return fastvae.vae_loss(recon, zeros, zeros, logvar, reduction="none").loss


def true_loss_of(recon, logvar):
    return oracle.per_sample(recon.square() + oracle.kl(torch.zeros_like(logvar), logvar))


FUNCTIONS = {"kl": (kl_of, true_kl_of), "sample": (sample_of, true_sample_of), "loss": (loss_of, true_loss_of)}


def summed(function):
    return lambda *inputs: function(*inputs).sum()


def batched_gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    return torch.autograd.grad(function(*inputs).sum(), inputs, upstream, is_grads_batched=True)


def tangent(function, mu, logvar):
    with forward_ad.dual_level():
        outputs = function(forward_ad.make_dual(mu, torch.ones_like(mu)), logvar)
        return forward_ad.unpack_dual(outputs).tangent


TRANSFORMS = {
    "func.grad": lambda f, *x: torch.func.grad(summed(f))(*x),
    "func.vmap": lambda f, *x: torch.func.vmap(per_row(f))(*x),
    "func.jacrev": lambda f, *x: torch.func.jacrev(f)(*x),
    "func.jacfwd": lambda f, *x: torch.func.jacfwd(f)(*x),
    "func.jvp": lambda f, *x: torch.func.jvp(f, x, tuple(map(torch.ones_like, x))),
    "func.vjp": lambda f, *x: torch.func.vjp(f, *x)[1](torch.ones(f(*x).shape, dtype=F64)),
    "func.hessian": lambda f, *x: torch.func.hessian(summed(f))(*x),
    "per-sample gradients": lambda f, *x: torch.func.vmap(torch.func.grad(summed(per_row(f))))(*x),
    "jacobian": lambda f, *x: torch.autograd.functional.jacobian(f, x),
    "jacobian, vectorized": lambda f, *x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "hessian": lambda f, *x: torch.autograd.functional.hessian(summed(f), x),
    "hessian, vectorized": lambda f, *x: torch.autograd.functional.hessian(summed(f), x, vectorize=True),
    "batched gradients": batched_gradients,
    "forward mode": tangent,
}
ALWAYS_RIGHT = ("jacobian", "hessian")
WITHOUT_GRAD_MODE = ("func.vmap", "func.jacfwd", "func.jvp", "forward mode")
REFUSAL = re.compile("setup_context|jvp|Batch|vmap|TensorWrapper|forward AD")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode's own
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("transform", "grad_mode"),
    [(name, True) for name in TRANSFORMS] + [(name, False) for name in WITHOUT_GRAD_MODE],
    ids=lambda x: x if isinstance(x, str) else ("" if x else "no_grad"),
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_transform_is_right_or_refused(backend, name, transform, grad_mode):
    """What torch cannot do with a custom function it says; it must not compute something else."""
    inputs = torch.randn(2, 2, 2, dtype=F64)
    function, truth = FUNCTIONS[name]
    if transform in ("func.vmap", "per-sample gradients") and name == "sample":
        truth = per_row_truth
    with torch.set_grad_enabled(grad_mode):
        found, refusal = attempt(lambda: TRANSFORMS[transform](function, *inputs))
        if refusal:
            assert transform not in ALWAYS_RIGHT
            assert REFUSAL.search(refusal)
        else:
            torch.testing.assert_close(found, TRANSFORMS[transform](truth, *inputs))


def per_row_truth(mu, logvar):
    """Each row draws the first normals of the seed's stream: to vmap it is alone."""
    return oracle.sample(mu, logvar, fastvae.philox_normal(mu.shape[1:], seed=1).expand_as(mu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_both_results_are_rounded_once(backend, dtype):
    """Also with create_graph=True, where each result has its own way to mu and logvar."""
    generator = torch.Generator().manual_seed(1)
    mu, logvar, dz = (torch.randn(7, 9, generator=generator).to(dtype) for _ in range(3))
    inputs = mu.requires_grad_(), logvar.requires_grad_()
    z, kl = fastvae.reparameterize_kl(*inputs, seed=1)
    found = torch.autograd.grad((z, kl), inputs, (dz, torch.ones(7)), create_graph=True)
    noise = fastvae.philox_normal((7, 9), seed=1).double()
    sigma = (logvar.detach().double() / 2).exp()
    by_mu = dz.double() + mu.detach().double()
    by_logvar = dz.double() * sigma * noise / 2 + torch.expm1(logvar.detach().double()) / 2
    for gradient, value in zip(found, (by_mu, by_logvar), strict=True):
        oracle.assert_near(gradient, value, 1 + value.abs())


def test_the_gradient_of_a_16_bit_prior_is_rounded_once(backend):
    generator = torch.Generator().manual_seed(1)
    posterior, prior = torch.randn(2, 2, 7, 9, generator=generator).to(torch.float16)
    inputs = [t.clone().requires_grad_() for t in (*posterior, *prior)]
    (found,) = torch.autograd.grad(fastvae.gaussian_kl(*inputs[:2], prior=inputs[2:]), inputs[-1], create_graph=True)
    mu, logvar, mu_p, logvar_p = (t.detach().double() for t in inputs)
    value = -(((mu - mu_p) ** 2 + logvar.exp()) / logvar_p.exp() - 1) / 14
    oracle.assert_near(found, value, 1 + value.abs())
