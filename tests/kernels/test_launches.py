"""How many launches a loss costs on the kernels, small torch ops included: no option leaves the fused path.

Launches are recorded instead of made, and torch's operators are counted by the profiler: neither reroutes the
call, as a dispatch mode would.
"""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastvae
from fastvae.likelihoods import L1, L2, NAMED, Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits

pytestmark = pytest.mark.compiled

B, D, L = 6, (3, 5), 4
# operators that make a tensor or a view without touching its elements
NO_LAUNCH = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::detach",
    "aten::alias",
    "aten::view",
    "aten::reshape",
    "aten::expand",
    "aten::as_strided",
    "aten::unbind",
    "aten::select",
    "aten::slice",
    "aten::resolve_neg",
    "aten::resolve_conj",
    "aten::view_as",
    "aten::_reshape_alias",
    "aten::unsqueeze",
    "aten::lift_fresh",
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Names of the kernels that would be launched."""
    import triton

    recorded = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr("fastvae._backend._triton_obstacle", lambda *device: None)
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *args, **options: recorded.append(kernel.__name__))
    with fastvae.use_backend("triton"):
        yield recorded


def scalar(value=0.5, grad=True):
    return torch.tensor(value, requires_grad=grad)


def per_sample(grad=True):
    return torch.rand(B).requires_grad_(grad)


PLAIN = {
    **{name: lambda name=name: {"likelihood": name} for name in NAMED},
    "l2 of logits": lambda: {"likelihood": L2(from_logits=True)},
    "fixed scale": lambda: {"likelihood": Gaussian(0.3, full=True)},
    "scale of elements": lambda: {"likelihood": Gaussian(torch.rand(B, *D, requires_grad=True))},
    "mask": lambda: {"mask": torch.rand(B, *D) > 0.5},
    "clamp": lambda: {"logvar_clamp": (-1.0, 1.0)},
    "extra map": lambda: {"extra": torch.rand(B, *D)},
    "prior": lambda: {"prior": (torch.rand(B, L, requires_grad=True), torch.rand(B, L, requires_grad=True))},
    "beta of a tensor": lambda: {"beta": scalar(grad=False)},
    "free bits dim": lambda: {"free_bits": FreeBits(0.1, "dim")},
    "free bits dim_mask": lambda: {"free_bits": FreeBits(0.1, "dim_mask")},
    "none": lambda: {"reduction": "none"},
    "in two passes": lambda: {"one_pass": False},
}
OF_SAMPLES = {
    "weight": lambda: {"weight": per_sample(grad=False)},
    "weight, learned": lambda: {"weight": per_sample()},
    "extra": lambda: {"extra": per_sample()},
    "recon_weight of samples": lambda: {"recon_weight": per_sample()},
    "recon_weight map": lambda: {"recon_weight": torch.rand(B, *D)},
    "beta of samples": lambda: {"beta": per_sample()},
    "scale, learned": lambda: {"likelihood": Gaussian(scalar(), full=True)},
    "scale, softly clipped": lambda: {"likelihood": Gaussian(scalar(), softclip=-6.0)},
    "scale of samples": lambda: {"likelihood": Scaled("l1", per_sample())},
    "capacity": lambda: {"capacity": Capacity(1.0, "sample")},
    "capacity of the batch": lambda: {"capacity": Capacity(scalar(grad=False), "batch")},
    "free bits sample": lambda: {"free_bits": FreeBits(0.1, "sample")},
    "mask's constant": lambda: {"mask": torch.rand(B, *D) > 0.5, "likelihood": Gaussian(full=True)},
    "mask_normalize": lambda: {"mask": torch.rand(B, *D) > 0.5, "likelihood": L1(mask_normalize=True)},
    "beta, learned": lambda: {"beta": scalar()},
    "several": lambda: {
        "weight": per_sample(),
        "extra": per_sample(),
        "likelihood": Scaled("l1", scalar()),
        "free_bits": FreeBits(0.1, "dim"),
        "capacity": Capacity(1.0, "sample"),
        "beta": scalar(),
    },
    "none, weight": lambda: {"weight": per_sample(), "reduction": "none"},
}


def operators(profiler):
    names = Counter(event.name for event in profiler.events())
    return {name: n for name, n in names.items() if name.startswith("aten::") and name not in NO_LAUNCH}


@pytest.mark.parametrize(
    ("make", "most_forward", "most_backward"),
    [pytest.param(make, 2, 1, id=name) for name, make in PLAIN.items()]
    + [pytest.param(make, 3, 2, id=name) for name, make in OF_SAMPLES.items()],
)
@pytest.mark.parametrize("kl_given", [False, True])
def test_launches_of_a_step(launches, make, most_forward, most_backward, kl_given):
    options = make()
    recon, target = torch.rand(B, *D, requires_grad=True), torch.rand(B, *D)
    mu, logvar, kl = (torch.rand(shape, requires_grad=True) for shape in ((B, L), (B, L), (B,)))
    if kl_given and ("prior" in options or "logvar_clamp" in options or "dim" in str(options.get("free_bits"))):
        pytest.skip("acts on the elements of mu and logvar")
    latents = {"kl": kl} if kl_given else {"mu": mu, "logvar": logvar}

    def forward():
        return fastvae.vae_loss(recon, target, **latents, **options).loss

    upstream = torch.ones_like(forward())
    torch.autograd.grad(forward(), [recon], upstream)  # plans are made
    launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as of_forward:
        loss = forward()
    n_forward = len(launches)
    with profile(activities=[ProfilerActivity.CPU]) as of_backward:
        loss.backward(upstream)
    small = operators(of_forward), operators(of_backward)
    assert n_forward + sum(small[0].values()) <= most_forward, (launches, small[0])
    assert len(launches) - n_forward + sum(small[1].values()) <= most_backward, (launches, small[1])
    assert recon.grad is not None
