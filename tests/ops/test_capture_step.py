"""A captured training step equals the loop that one would write, replayed or run eagerly."""

import copy
import re

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastvae
from fastvae.models import VAE, VAEConfig

STEPS = 6


class StandIn:
    """In place of a CUDA graph: remembers what was captured, and a replay runs it again on the same tensors."""

    def __init__(self, device):
        self.replays = 0

    def warm_up(self, step, times):
        random = torch.get_rng_state()
        for _ in range(times):
            results = step()
        torch.set_rng_state(random)
        return results

    def capture(self, step):  # a GPU records the work and does none of it
        self.step = step

    def replay(self):
        self.replays += 1
        self.step()


@pytest.fixture
def graphs(monkeypatch):
    """CPUs have graphs, and optimizers stay as they are: capturable ones refuse CPU tensors."""
    monkeypatch.setattr("fastvae._graphs.has_graphs", lambda device: True)
    monkeypatch.setattr("fastvae._graphs.make_capturable", lambda optimizer, device: None)
    monkeypatch.setattr("fastvae._graphs.Graph", StandIn)


def warm(step):
    """lr of `step`, a tensor."""
    return 1e-3 * torch.minimum((step + 1) / 4, torch.ones(()))


class Training:
    """All that a run has, from one seed."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.options = options
        self.model = VAE(VAEConfig(image_size=(8, 8), channels=1, backbone="mlp", latent_dim=3, hidden=16))
        self.beta = fastvae.schedules.Linear(0.1, 1.0, steps=4)
        self.criterion = fastvae.VAELoss(beta=self.beta, return_terms=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.noise = fastvae.NoiseState(7)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if options.get("ema") else None
        self.images = torch.rand(STEPS, 12, 1, 8, 8)

    def capture(self):
        options = {**self.options, "ema": self.ema}
        return fastvae.capture_step(
            self.model, self.criterion, self.optimizer, self.images[0], noise=self.noise, **options
        )

    def by_hand(self, step, images):
        """One step as one would write it; returns the loss."""
        losses, parts, offset = [], self.options.get("accumulate", 1), 0
        self.optimizer.zero_grad()
        for part in images.chunk(parts):
            out = self.model(part, seed=self.noise.seed, offset=offset)
            offset += out.z.numel()
            terms = self.criterion(out.recon, part, kl=out.kl)
            (terms.loss / parts).backward()
            losses.append(terms.loss.detach())
        if "clip_norm" in self.options:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options["clip_norm"])
        if "lr_schedule" in self.options:
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.options["lr_schedule"](torch.tensor(step)))
        self.optimizer.step()
        self.beta.step()
        self.noise.advance()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return torch.stack(losses).mean(0)

    def state(self):
        tensors = [*self.model.state_dict().values(), *self.beta.state_dict().values()]
        tensors += [*self.noise.state_dict().values(), self.noise.seed]
        for state in self.optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
        return [t.clone() for t in tensors + ([] if self.ema is None else list(self.ema.state_dict().values()))]


OPTIONS = {
    "plain": {},
    "clipping": {"clip_norm": 0.5},
    "learning rates": {"lr_schedule": warm},
    "accumulation": {"accumulate": 3},
    "averaging": {"ema": True},
    "autocast": {"autocast": torch.bfloat16},
    "everything": {"clip_norm": 0.5, "lr_schedule": warm, "accumulate": 3, "ema": True, "warmup": 2},
}


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "autocast"])
@pytest.mark.parametrize("replayed", [False, True])
def test_steps_equal_those_of_a_loop(request, name, replayed):
    if replayed:
        request.getfixturevalue("graphs")
    loop, captured = Training(**OPTIONS[name]), Training(**OPTIONS[name])
    step = captured.capture()
    assert step.captured == replayed
    for i, images in enumerate(loop.images):
        terms = step(images)
        assert torch.equal(terms.loss, loop.by_hand(i, images))
        assert_equal(captured.state(), loop.state())
    assert int(step.steps) == STEPS
    assert int(step.nonfinite) == 0


@pytest.mark.usefixtures("graphs")
def test_replays_equal_eager_steps_under_autocast():
    eager, captured = Training(**OPTIONS["autocast"]), Training(**OPTIONS["autocast"])
    replayed = captured.capture()
    by_hand = eager.capture()
    by_hand.undo()
    for images in eager.images:
        assert torch.equal(replayed(images).loss, by_hand(images).loss)
    assert_equal(captured.state(), eager.state())


@pytest.mark.usefixtures("graphs")
def test_the_warm_up_leaves_no_trace():
    training = Training(**OPTIONS["everything"])
    random = torch.get_rng_state()
    step = training.capture()
    fresh = Training(**OPTIONS["everything"])
    moments = [t for state in training.optimizer.state.values() for t in state.values()]
    assert moments
    assert all(not t.any() for t in moments)
    assert_equal([*training.model.state_dict().values()], [*fresh.model.state_dict().values()])
    assert_equal([*training.ema.state_dict().values()], [*fresh.ema.state_dict().values()])
    assert_equal([*training.noise.buffers(), *training.beta.buffers()], [*fresh.noise.buffers(), *fresh.beta.buffers()])
    assert torch.equal(torch.get_rng_state(), random)
    assert int(step.steps) == 0


@pytest.mark.usefixtures("graphs")
def test_a_run_that_goes_on_keeps_its_optimizer():
    loop, first = Training(), Training()
    step = first.capture()
    for i, images in enumerate(loop.images[:3]):
        step(images)
        loop.by_hand(i, images)
    resumed = Training()
    for name in ("model", "optimizer", "noise", "beta"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(first, name).state_dict()))
    step = resumed.capture()
    for i, images in enumerate(loop.images[3:], 3):
        step(images)
        loop.by_hand(i, images)
    assert_equal(resumed.state(), loop.state())


@pytest.mark.usefixtures("graphs")
def test_results_are_static_and_other_shapes_run_eagerly():
    loop, captured = Training(), Training()
    step = captured.capture()
    first = step(loop.images[0])
    loop.by_hand(0, loop.images[0])
    smaller = step(loop.images[1][:5])
    loop.by_hand(1, loop.images[1][:5])
    assert smaller is not first
    assert re.search(r"takes \[12, 1, 8, 8\] of float32; got \[5, 1, 8, 8\].*drop_last", step.reason)
    assert step(loop.images[2]) is first
    loop.by_hand(2, loop.images[2])
    assert step.reason is None
    assert step._graph.replays == 2
    assert_equal(captured.state(), loop.state())


@pytest.mark.usefixtures("graphs")
def test_undo_gives_the_optimizer_back_and_goes_on_eagerly():
    loop, captured = Training(), Training()
    step = captured.capture()
    step(loop.images[0])
    step.undo()
    assert not step.captured
    assert captured.optimizer.param_groups[0]["lr"] == 1e-3
    assert not captured.optimizer.param_groups[0]["capturable"]
    step(loop.images[1])
    loop.by_hand(0, loop.images[0]), loop.by_hand(1, loop.images[1])
    assert_equal(captured.state(), loop.state())


def test_a_loss_that_is_not_finite_is_counted_on_the_device():
    training = Training()
    step = training.capture()
    step(torch.full_like(training.images[0], torch.nan))
    step(training.images[0])  # weights are NaN by now
    assert step.nonfinite.device == training.images.device
    assert int(step.nonfinite) == 2


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_function_instead_of_a_model(request, replayed, parts):
    if replayed:
        request.getfixturevalue("graphs")
    loop, captured = Training(), Training()

    def loss_of(training, images):
        out = training.model(images, seed=training.noise.seed)
        return fastvae.vae_loss(out.recon, images, kl=out.kl, beta=0.1).loss

    step = fastvae.capture_step(
        lambda images: loss_of(captured, images),
        None,
        captured.optimizer,
        captured.images[0],
        noise=captured.noise,
        accumulate=parts,
    )
    for images in loop.images:
        losses = []
        loop.optimizer.zero_grad()
        for part in images.chunk(parts):
            loss = loss_of(loop, part)
            (loss / parts).backward()
            loop.noise.advance()
            losses.append(loss.detach())
        loop.optimizer.step()
        assert torch.equal(step(images), torch.stack(losses).mean())


def test_why_it_runs_eagerly(monkeypatch):
    training = Training()
    assert "on 'cpu'" in training.capture().reason
    monkeypatch.setattr("fastvae._graphs.has_graphs", lambda device: True)

    def reason(optimizer=None, **options):
        optimizer = torch.optim.AdamW(training.model.parameters()) if optimizer is None else optimizer
        monkeypatch.setattr("fastvae.capture.CapturedStep._capture", lambda step, warmup: None)
        return fastvae.capture_step(training.model, training.criterion, optimizer, training.images[0], **options).reason

    parameters = list(training.model.parameters())
    assert reason() is None
    assert "GradScaler" in reason(autocast=torch.float16)
    assert "LBFGS has no option capturable" in reason(torch.optim.LBFGS(parameters))
    assert "take one step first" in reason(torch.optim.NAdam(parameters))
    assert "dampening" in reason(torch.optim.SGD(parameters, momentum=0.9, dampening=0.1))
    assert reason(torch.optim.SGD(parameters, momentum=0.9)) is None


MISTAKES = [
    ({"model": 3}, TypeError, "model must be a module or a function; got int"),
    ({"optimizer": None}, TypeError, "optimizer must be a torch.optim"),
    ({"noise": 7}, TypeError, "NoiseState; got int"),
    ({"ema": 0.9}, TypeError, "AveragedModel; got float"),
    ({"accumulate": 5}, ValueError, "accumulate must divide the batch; got 5 for a batch of 12"),
    ({"accumulate": 0}, ValueError, "accumulate"),
    ({"warmup": 0}, ValueError, "warmup"),
    ({"clip_norm": -1.0}, ValueError, "clip_norm"),
    ({"autocast": torch.float64}, ValueError, "autocast must be None, torch.bfloat16 or torch.float16"),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistakes_are_named(changes, error, message):
    training = Training()
    given = {
        "model": training.model,
        "criterion": training.criterion,
        "optimizer": training.optimizer,
        "example": training.images[0],
        **changes,
    }
    with pytest.raises(error, match=message):
        fastvae.capture_step(**given)


def test_ema_needs_a_model_and_a_multi_average():
    training = Training(ema=True)
    with pytest.raises(ValueError, match="got a function"):
        fastvae.capture_step(lambda x: x.sum(), None, training.optimizer, training.images[0], ema=training.ema)
    with pytest.raises(ValueError, match="multi_avg_fn"):
        fastvae.capture_step(
            training.model,
            training.criterion,
            training.optimizer,
            training.images[0],
            ema=AveragedModel(training.model),
        )
