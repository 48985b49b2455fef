"""What a graph needs of a training step, proven without a GPU: no value is read on the host, few kernels are launched.

Launches of the kernels are recorded instead of made, so that the step takes the way that it takes on a GPU.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile

import fastvae
from fastvae.models import VAE, VAEConfig
from tests.kernels.test_launches import NO_LAUNCH
from tests.ops.test_capture_step import StandIn, warm

pytestmark = pytest.mark.compiled

VIEWS = {"aten::t", "aten::transpose", "aten::permute", "aten::chunk", "aten::split", "aten::narrow", "aten::flatten"}
VIEWS |= {
    "aten::unflatten",
    "aten::broadcast_tensors",
    "aten::resize_",
    "aten::as_strided_",
    "aten::detach_",
    "aten::set_",
}
VIEWS |= {"aten::result_type", "aten::item", "aten::_local_scalar_dense", "aten::to", "aten::clone", "aten::zeros_like"}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    import triton

    recorded = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, **options: recorded.append(kernel.__name__))
    monkeypatch.setattr("fastvae._graphs.has_graphs", lambda device: True)
    monkeypatch.setattr("fastvae._graphs.Graph", StandIn)
    with fastvae.use_backend("triton"):
        yield recorded


@pytest.mark.parametrize("backbone", ["mlp", "conv"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 1.0, "lr_schedule": warm, "accumulate": 2, "ema": True},
    ],
    ids=["plain", "everything"],
)
def test_nothing_waits_for_a_value(monkeypatch, launches, backbone, options):
    """A meta tensor has no value: reading one, or copying it to the host, raises."""
    adam = sys.modules["torch.optim.adam"]  # torch.optim hides it behind a function of this name
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda **options: ["meta"])
    model = VAE(VAEConfig(backbone=backbone)).to("meta")
    beta = fastvae.schedules.Linear(0.0, 1.0, steps=10).to("meta")
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    noise = fastvae.NoiseState(0).to("meta")
    if options.get("ema"):
        options = {**options, "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))}
    images = torch.empty(8, 1, 28, 28, device="meta")
    step = fastvae.capture_step(
        model, fastvae.VAELoss(beta=beta, return_terms=True), optimizer, images, noise=noise, **options
    )
    assert step.captured
    assert optimizer.param_groups[0]["lr"].device.type == "meta"
    launches.clear()
    terms = step(images)
    assert terms.loss.device.type == "meta"
    assert len(launches) == 5 * options.get("accumulate", 1) + 1  # sampling and loss, and the next seed


def kernels(step, launches):
    """Kernels of one step, after a first one that makes the optimizer's state."""
    step()
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    operators = [e for e in profiler.events() if e.name.startswith("aten::")]
    return sum(_is_launched(e) for e in operators) + len(launches)


def _is_launched(event):
    """Whether this operator itself is a kernel; one over lists of tensors is, whatever it comes to on a CPU."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::_foreach") or parent.name.startswith("aten::_fused"):
            return False
        parent = parent.cpu_parent
    if event.name.startswith("aten::_foreach") or event.name.startswith("aten::_fused"):
        return True
    children = [child for child in event.cpu_children if child.name.startswith("aten::")]
    return event.name not in NO_LAUNCH | VIEWS and not [c for c in children if c.name not in NO_LAUNCH | VIEWS]


@pytest.mark.parametrize(("backbone", "most"), [("mlp", 0.5), ("conv", 0.75)])
def test_a_captured_step_launches_fewer_kernels(launches, backbone, most):
    """One copy and one graph from the host; inside of the graph, what remains are mostly the network's own kernels."""
    model, images = VAE(VAEConfig(backbone=backbone)), torch.rand(16, 1, 28, 28)
    theirs = torch.optim.Adam(model.parameters(), foreach=True)

    def textbook():
        mu, logvar = model.encoder(images).chunk(2, 1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss = (F.mse_loss(model.decoder(z), images, reduction="sum") + kl) / len(images)
        theirs.zero_grad()
        loss.backward()
        theirs.step()

    ours = torch.optim.AdamW(model.parameters(), fused=True)
    step = fastvae.capture_step(model, fastvae.VAELoss(), ours, images, noise=fastvae.NoiseState(0))
    step.undo()  # so that the profiler sees what the graph holds
    assert kernels(lambda: step(images), launches) <= most * kernels(textbook, launches)
