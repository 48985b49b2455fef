"""What only a GPU can show: compiled kernels, streams, graphs, no waiting for the device.

The parity tests run there too, with their tensors on the GPU: see `benchmarks/gpu.py`.
"""

import pytest
import torch

import fastvae
from fastvae.models import VAE, VAEConfig
from tests.helpers import oracle
from tests.helpers.oracle import DTYPES, assert_near
from tests.ops.test_elbo import Case, random_like
from tests.ops.test_reparam_kl import check_against_oracle, gaussian

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def on_gpu(make, *args, **kwargs):
    """What `make` makes, on the GPU. Only here: code under test has to find the device by itself."""
    with torch.device(DEVICE):
        return make(*args, **kwargs)


def test_the_kernels_are_chosen():
    assert fastvae._backend.backend_of(torch.empty(1, device=DEVICE)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (130, 20), (33, 4, 31, 33), (3, 70001)], ids=str)
def test_sampling(shape, dtype):
    mu, logvar = on_gpu(gaussian, shape, dtype)
    z, kl = fastvae.reparameterize_kl(mu, logvar, seed=7)
    check = (mu, logvar, z, kl, fastvae.philox_normal(shape, seed=7, device=DEVICE))
    on_gpu(check_against_oracle, *check)
    assert torch.equal(fastvae.reparameterize(mu, logvar, seed=7), z)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "none"])
@pytest.mark.parametrize("target_dtype", [None, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss(dtype, target_dtype, reduction):
    case = on_gpu(Case, (33, 3, 61, 67), (33, 130), dtype, target_dtype)
    terms = fastvae.vae_loss(*case.inputs, beta=0.25, recon_weight=1.5, reduction=reduction)
    truth = case.truth(reduction, 0.25, 1.5)
    for actual, true in zip(terms, truth, strict=True):
        assert_near(actual.detach(), true.detach(), true.detach().abs() + 130, ulps=8)
    upstream = random_like(terms)
    gradients = torch.autograd.grad(terms, [case.recon, case.mu, case.logvar], upstream)
    case.check_gradients(truth, upstream, gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 65536.0, 3.0])
def test_single_terms(dtype, factor):
    """One term a call; 1: backward leaves at once, 65536: it scales exactly, 3: in 16 bits it computes anew."""
    case = on_gpu(Case, (40, 5000), (40, 300), dtype)
    truth = case.truth("mean")
    upstream = torch.tensor(factor, dtype=truth.recon.dtype, device=DEVICE)
    recon = fastvae.reconstruction_loss(case.recon, case.target, reduction="mean")
    kl = fastvae.gaussian_kl(case.mu, case.logvar, reduction="mean")
    (drecon,) = torch.autograd.grad(recon, case.recon, upstream.to(recon.dtype))
    dmu, dlogvar = torch.autograd.grad(kl, (case.mu, case.logvar), upstream.to(kl.dtype))
    case.check_gradients(truth, (None, upstream, upstream), (drecon, dmu, dlogvar))


def test_same_noise_as_on_the_cpu():
    for offset in (0, 5, 2**33 + 2):
        arguments = {"seed": -3, "offset": offset}
        ours = fastvae.philox_normal(100_003, device=DEVICE, **arguments).cpu()
        torch.testing.assert_close(
            ours, fastvae.philox_normal(100_003, device="cpu", **arguments), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_250_runs(dtype):
    case = on_gpu(Case, (64, 3, 65, 63), (64, 1000), dtype)

    def run():
        z, kl = fastvae.reparameterize_kl(case.mu, case.logvar, seed=11)
        loss = fastvae.vae_loss(case.recon, case.target, kl=kl).loss + fastvae.gaussian_kl(case.mu, case.logvar)
        upstream = (torch.full_like(loss, 3.0), z.detach())
        return z, kl, loss, *torch.autograd.grad((loss, z), (case.recon, case.mu, case.logvar), upstream)

    first = run()
    for _ in range(249):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_graph_replay_draws_fresh_noise_and_equals_eager_calls():
    case = on_gpu(Case, (16, 3, 32, 32), (16, 257))
    one, dz = torch.ones((), device=DEVICE), torch.randn(16, 257, device=DEVICE)

    def step():
        z, kl = fastvae.reparameterize_kl(case.mu, case.logvar)
        loss = fastvae.vae_loss(case.recon, case.target, kl=kl).loss
        return z, loss, *torch.autograd.grad((loss, z), (case.recon, case.mu, case.logvar), (one, dz))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    torch.manual_seed(5)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([t.detach().clone() for t in outputs])
    torch.manual_seed(5)
    called = [step() for _ in range(3)]
    assert not torch.equal(replayed[0][0], replayed[1][0])
    for by_graph, by_call in zip(replayed, called, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(by_graph, by_call, strict=True))

    with torch.no_grad():  # new data in the same memory
        case.recon.zero_()
    graph.replay()
    torch.testing.assert_close(outputs[2], -2 * case.target / 16)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_graph_replays_with_a_noise_state_equal_eager_steps(name):
    """100 steps of noise that lives on the device, from the same state: bit for bit."""
    case = on_gpu(Case, (16, 3, 32, 32), (16, 257))
    one, dz = torch.ones((), device=DEVICE), torch.randn(16, 257, device=DEVICE)
    noise = fastvae.NoiseState(5).to(DEVICE)

    def step():
        z, kl = fastvae.reparameterize_kl(case.mu, case.logvar, seed=noise.seed)
        loss = fastvae.vae_loss(case.recon, case.target, kl=kl).loss
        outputs = z, loss, *torch.autograd.grad((loss, z), (case.recon, case.mu, case.logvar), (one, dz))
        noise.advance()
        return outputs

    def run(once):
        noise.load_state_dict(fastvae.NoiseState(5).state_dict())  # in place: the graph's own tensors
        return [[t.detach().clone() for t in once()] for _ in range(100)]

    with fastvae.use_backend(name):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()

        def replay():
            graph.replay()
            return captured

        replayed, called = run(replay), run(step)
    for by_graph, by_call in zip(replayed, called, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(by_graph, by_call, strict=True))
    assert len({float(z[0, 0]) for z, *_ in replayed}) > 90  # fresh noise at every step
    assert noise.step == 100


def test_on_a_stream_of_its_own():
    """A kernel on another stream would read what the sleeping stream has not yet written."""
    case = on_gpu(Case, (16, 3, 32, 32), (16, 257))
    expected = fastvae.vae_loss(*case.inputs)
    expected_z, _ = fastvae.reparameterize_kl(case.mu, case.logvar, seed=1)
    late = [torch.zeros_like(x) for x in case.inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, source in zip(late, case.inputs, strict=True):
            x.copy_(source.detach())
        recon, target, mu, logvar = late
        recon.requires_grad_()
        terms = fastvae.vae_loss(recon, target, mu, logvar)
        terms.loss.backward()
        z, _ = fastvae.reparameterize_kl(mu, logvar, seed=1)
    stream.synchronize()
    expected.loss.backward()
    assert torch.equal(terms.loss, expected.loss)
    assert torch.equal(recon.grad, case.recon.grad)
    assert torch.equal(z, expected_z)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    case = on_gpu(Case, (16, 3, 32, 32), (16, 257))
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in case.inputs]
    assert torch.cuda.current_device() == 0
    for inputs in (case.inputs, there):
        z, kl = fastvae.reparameterize_kl(inputs[2], inputs[3], seed=1)
        (fastvae.vae_loss(inputs[0], inputs[1], kl=kl).loss + z.sum()).backward()
        assert z.device == inputs[0].grad.device == inputs[0].device
    for here, far in zip(case.inputs, there, strict=True):
        if here.requires_grad:
            torch.testing.assert_close(far.grad.cpu(), here.grad.cpu(), rtol=1e-6, atol=1e-6)


def test_channels_last_gradients_keep_their_strides():
    case = on_gpu(Case, (8, 3, 33, 31), (8, 4, 5, 7), recon=lambda t: t.contiguous(memory_format=torch.channels_last))
    for target in (case.target, case.target.contiguous(memory_format=torch.channels_last)):
        loss = fastvae.vae_loss(case.recon, target, case.mu, case.logvar).loss
        (gradient,) = torch.autograd.grad(loss, case.recon)
        assert gradient.stride() == case.recon.stride()
        truth = 2 * (case.true_inputs[0] - case.true_inputs[1]).detach() / 8
        assert_near(gradient, truth, 0.25)


@pytest.fixture
def no_waiting():
    """Any call that makes the host wait for the device raises."""

    def start():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield start
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_host_never_waits(name, no_waiting):
    case = on_gpu(Case, (8, 3, 33, 31), (8, 257))
    seed = torch.tensor([3], device=DEVICE)
    beta = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    three = torch.tensor(3.0, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    recon, target, mu, logvar = case.inputs
    criterion = fastvae.VAELoss()

    def sampled(**noise):
        z, kl = fastvae.reparameterize_kl(mu, logvar, **noise)
        return z.square().mean() + fastvae.vae_loss(recon, target, kl=kl).loss

    calls = {
        "sampling": sampled,
        "sampling, seed": lambda: sampled(seed=3),
        "sampling, seed tensor": lambda: sampled(seed=seed),
        "sampling, generator": lambda: sampled(generator=generator),
        "sampling alone, clamped": lambda: fastvae.reparameterize(mu, logvar, logvar_clamp=(-1.0, 1.0)).sum(),
        "gaussian_kl": lambda: fastvae.gaussian_kl(mu, logvar),
        "reconstruction_loss": lambda: fastvae.reconstruction_loss(recon, target),
        "per sample": lambda: fastvae.vae_loss(*case.inputs, reduction="none").loss.mean(),
        "beta on the device": lambda: fastvae.vae_loss(*case.inputs, beta=beta).loss,
        "two passes": lambda: fastvae.vae_loss(*case.inputs, one_pass=False).loss,
        "module": lambda: criterion(*case.inputs),
    }
    wanted = [x for x in case.inputs if x.requires_grad]
    with fastvae.use_backend(name):
        for armed in (False, True):  # the first round compiles
            if armed:
                no_waiting()
            for what, call in calls.items():
                try:
                    for upstream in (None, three):
                        torch.autograd.grad(call(), wanted, upstream, allow_unused=True)
                    fastvae.philox_normal((3, 5), seed=seed)
                except RuntimeError as error:
                    pytest.fail(f"{what}: {error}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own imports
def test_compiled_step_gives_equal_gradients_twice():
    """In a compiled region nothing that is saved may be changed: a second backward pass would be silently wrong."""
    case = on_gpu(Case, (8, 3, 33, 31), (8, 257))
    with torch.no_grad():
        expected = fastvae.vae_loss(*case.inputs).loss
    loss = torch.compile(lambda *x: fastvae.vae_loss(*x).loss, fullgraph=True)(*case.inputs)
    torch.testing.assert_close(loss.detach(), expected)
    upstream = torch.tensor(3.0, device=DEVICE)
    wanted = (case.recon, case.mu, case.logvar)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, wanted, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first[0], 6 * (case.recon - case.target).detach() / 8)


def test_kl_does_not_cancel_near_the_prior():
    """Fast exponentials of a GPU must not cost what expm1 saves."""
    mu = torch.full((1, 128), 0.01, dtype=torch.float16, device=DEVICE)
    truth = float(oracle.kl(mu.double(), mu.double()).sum())
    assert abs(float(fastvae.gaussian_kl(mu, mu)) - truth) < 1e-5 * truth
    assert abs(float(fastvae.reparameterize_kl(mu, mu, seed=0)[1]) - truth) < 1e-5 * truth


def captured_training(seed, **options):
    """A step, captured if `options` do not say otherwise, and all that it trains."""
    torch.manual_seed(seed)
    model = VAE(VAEConfig(image_size=(28, 28), channels=1, backbone="mlp", hidden=64)).to(DEVICE)
    beta = fastvae.schedules.Linear(0.1, 1.0, steps=50).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    images = torch.rand(64, 1, 28, 28, device=DEVICE)
    step = fastvae.capture_step(
        model,
        fastvae.VAELoss(beta=beta, return_terms=True),
        optimizer,
        images,
        noise=fastvae.NoiseState(seed).to(DEVICE),
        clip_norm=1.0,
        lr_schedule=lambda step: 1e-3 * torch.exp(-0.01 * step),
        **options,
    )
    return step, model, images


def test_replays_equal_eager_steps_for_100_steps():
    (captured, model, images), (eager, other, _) = captured_training(0), captured_training(0)
    assert captured.captured, captured.reason
    eager.undo()
    for group in eager._optimizer.param_groups:  # the eager step computes with the same learning-rate tensor
        group["lr"] = torch.tensor(1e-3, dtype=torch.float64, device=DEVICE)
        group["capturable"] = True
    for i in range(100):
        batch = images.roll(i, 0)
        assert torch.equal(captured(batch).loss, eager(batch).loss), f"step {i}"
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert int(captured.steps) == 100
    assert int(captured.nonfinite) == 0


def test_two_captured_steps_side_by_side():
    (first, _, images), (second, _, _), (alone, _, _) = (captured_training(seed) for seed in (0, 1, 0))
    for i in range(20):
        expected = alone(images.roll(i, 0)).loss.clone()
        found = first(images.roll(i, 0)).loss.clone()
        second(images)
        assert torch.equal(found, expected)


def test_a_captured_step_allocates_nothing():
    step, _, images = captured_training(0)
    step(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        step(images)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
