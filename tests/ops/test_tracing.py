"""torch.jit.trace and torch.fx record a module that holds the loss; torch.jit.script says that it cannot."""

import pytest
import torch
from torch import nn

import fastvae
from fastvae.likelihoods import L1, Gaussian, Scaled
from fastvae.regularizers import Capacity, FreeBits

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of the checks of shapes
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


class Model(nn.Module):
    def __init__(self, *, sampled=False, given=None, **options):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)
        self.loss = fastvae.VAELoss(**options)
        self.sampled, self.given = sampled, given or (lambda x: {})

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        if not self.sampled:
            return self.loss(self.decoder(mu), x, mu, logvar, **self.given(x))
        z, kl = fastvae.reparameterize_kl(mu, logvar, seed=3)
        return self.loss(self.decoder(z), x, kl=kl)


OPTIONS = {
    "plain": {},
    "sampled": {"sampled": True},
    "terms": {"return_terms": True},
    "mean": {"reduction": "mean", "beta": torch.tensor(0.5)},
    "none": {"reduction": "none"},
    "gaussian": {"likelihood": Gaussian(0.3, full=True)},
    "optimal": {"likelihood": Gaussian("optimal")},
    "learned": {"likelihood": Scaled("l1", nn.Parameter(torch.tensor(0.3)))},
    "regularised": {"free_bits": FreeBits(0.1, "dim_batch"), "capacity": Capacity(0.1, "batch")},
    "free bits": {"free_bits": FreeBits(0.1), "accumulate": 2},
    "per sample": {"given": lambda x: {"weight": x[:, 0], "extra": x[:, 1], "mask": x > 0.3}},
    "by the mask": {"given": lambda x: {"mask": x > 0.3}, "likelihood": L1(mask_normalize=True)},
}


def gradients(model, loss):
    loss = loss[0] if isinstance(loss, tuple) else loss
    return torch.autograd.grad(loss.sum(), list(model.parameters()))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trace_is_the_module_at_any_batch_size(backend, name):
    model = Model(**OPTIONS[name])
    traced = torch.jit.trace(model, (torch.rand(3, 6),))
    for batch in (3, 5):
        x = torch.rand(batch, 6)
        found, expected = traced(x), model(x)
        torch.testing.assert_close(tuple(found), tuple(expected)) if isinstance(found, tuple) else (
            torch.testing.assert_close(found, expected)
        )
        torch.testing.assert_close(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("sampled", "per sample", "by the mask")])
def test_a_graph_of_fx_has_the_loss_as_one_node(backend, name):
    model = Model(**OPTIONS[name])
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["encoder", "decoder", "loss"]
    for batch in (3, 5):
        x = torch.rand(batch, 6)
        found, expected = graph(x), model(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert type(found) is type(expected)


def test_scripting_says_what_to_do_instead():
    for model in (Model(), fastvae.VAELoss()):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a VAELoss.*torch.compile"):
            torch.jit.script(model)
