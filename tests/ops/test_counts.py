"""Likelihoods of counts as a part of the loss, against torch.distributions in float64."""

import itertools
import warnings

import pytest
import torch

import fastvae
from fastvae.fallback import count_terms, counts
from fastvae.likelihoods import Multinomial, NegativeBinomial, Poisson
from fastvae.regularizers import Capacity, FreeBits
from tests.helpers import count_truth, oracle

B, G, K = 6, 40, 3


@pytest.fixture(params=[False, True], ids=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    """A batch that is computed at once, and one in pieces of two rows, three groups of nonzero counts."""
    if request.param:
        monkeypatch.setattr(counts, "PIECE", 2 * G)
        monkeypatch.setattr(count_terms, "_GROUP", 3 * G)


def batch(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x = torch.poisson(3 * normal(B, G).float().exp(), generator=generator)
    x[:, ::3] = 0
    return {
        "logits": normal(B, G),
        "counts": x,
        "log_theta": normal(G),
        "log_library": (x.sum(1) + 1).log().to(dtype),
        "zero_logits": normal(B, G),
    }


def leaves(inputs):
    return {
        name: t.clone().requires_grad_() if t.is_floating_point() and name != "counts" else t
        for name, t in inputs.items()
    }


def likelihood_of(family, tensors, head="softmax", **options):
    given = {name: tensors[name] for name in ("log_library", "index") if name in tensors}
    if family == "multinomial":
        return Multinomial(**options)
    if family == "poisson":
        return Poisson(log_library=given.get("log_library"), head=head, **options)
    zero_logits = tensors["zero_logits"] if family == "zinb" else None
    return NegativeBinomial(tensors["log_theta"], **given, zero_logits=zero_logits, head=head, **options)


def truth_of(family, inputs, head="softmax", mask=None):
    """Elements of the truth, and float64 leaves."""
    wide = {name: oracle.leaf(t) if name != "counts" else t.double() for name, t in inputs.items()}
    log_theta = wide["log_theta"]
    if "index" in inputs:
        log_theta = log_theta[inputs["index"]]
    arguments = {"log_theta": log_theta, "log_library": wide["log_library"], "zero_logits": wide["zero_logits"]}
    return count_truth.elements(family, wide["logits"], wide["counts"], **arguments, head=head, mask=mask), wide


USED = {
    "nb": ("logits", "log_theta", "log_library"),
    "zinb": ("logits", "log_theta", "log_library", "zero_logits"),
    "poisson": ("logits", "log_library"),
    "multinomial": ("logits",),
}


def assert_gradients(family, tensors, wide, tolerance=1e-5):
    for name in USED[family]:
        found, truth = tensors[name].grad.double(), wide[name].grad
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()), msg=name)


CASES = [(f, h) for f, h in itertools.product(USED, ("softmax", "softplus", "exp")) if (f, h)[0] != "multinomial"]
CASES += [("multinomial", "softmax")]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_value_and_gradients_by_row(family, head, pieces):
    inputs = batch()
    if head != "softmax":
        inputs["log_library"] = inputs["log_library"] - 3
    tensors = leaves(inputs)
    elements, wide = truth_of(family, inputs, head)
    weights = torch.linspace(-1, 2, B)
    nll = fastvae.reconstruction_loss(
        tensors["logits"], tensors["counts"], likelihood=likelihood_of(family, tensors, head), reduction="none"
    )
    (nll * weights).sum().backward()
    (elements.sum(1) * weights).sum().backward()
    torch.testing.assert_close(nll.double(), elements.sum(1), rtol=2e-6, atol=1e-4)
    assert_gradients(family, tensors, wide)


@pytest.mark.parametrize("kind", ["gene", "cell", "batch"])
@pytest.mark.parametrize("family", ["nb", "zinb"])
def test_dispersions(kind, family, pieces):
    inputs = batch()
    if kind == "cell":
        inputs["log_theta"] = torch.randn(B, G, generator=torch.Generator().manual_seed(1))
    if kind == "batch":
        inputs["log_theta"] = torch.randn(K, G, generator=torch.Generator().manual_seed(1))
        inputs["index"] = torch.tensor([0, 2, 2, 0, 2, 0])
    tensors = leaves(inputs)
    elements, wide = truth_of(family, inputs)
    likelihood = likelihood_of(family, tensors)
    fastvae.reconstruction_loss(tensors["logits"], tensors["counts"], likelihood=likelihood).backward()
    (elements.sum() / B).backward()
    assert_gradients(family, tensors, wide)


@pytest.mark.parametrize("family", USED)
@pytest.mark.parametrize(
    "form", ["csr", "csr unordered with zeros", torch.int32, torch.int64, torch.uint8, torch.uint16]
)
def test_forms_of_counts(family, form, pieces):
    """All give what float32 counts give, to the last digit."""
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    inputs = batch()
    inputs["counts"] = inputs["counts"].clamp(max=200)
    results = []
    for convert in (False, True):
        tensors = leaves(inputs)
        x = tensors["counts"]
        if convert and form == "csr":
            x = x.to_sparse_csr()
        elif convert and isinstance(form, str):
            order = torch.randperm(G, generator=torch.Generator().manual_seed(0))
            crow = torch.arange(B + 1) * G
            x = torch.sparse_csr_tensor(crow, order.repeat(B), x[:, order].reshape(-1), (B, G), check_invariants=False)
        elif convert:
            x = x.to(form)
        loss = fastvae.reconstruction_loss(tensors["logits"], x, likelihood=likelihood_of(family, tensors))
        loss.backward()
        results.append([loss.detach(), *(tensors[name].grad for name in USED[family])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", USED)
@pytest.mark.parametrize("head", ["softmax", "exp"])
def test_mask(family, head, pieces):
    """What is outside has no influence, whatever it holds; the softmax runs over the rest."""
    if family == "multinomial" and head != "softmax":
        pytest.skip("a multinomial has no other head")
    inputs = batch()
    inputs["log_library"] = inputs["log_library"] - (0 if head == "softmax" else 3)
    mask = torch.rand(B, G, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[2] = False
    mask[:, 5] = False
    elements, wide = truth_of(family, inputs, head, mask)
    (elements.sum() / mask.sum()).backward()
    for name in ("logits", "counts", "zero_logits"):
        inputs[name] = inputs[name].masked_fill(~mask, torch.nan)
    inputs["log_theta"][5] = torch.nan
    tensors = leaves(inputs)
    likelihood = likelihood_of(family, tensors, head, mask_normalize=True)
    loss = fastvae.reconstruction_loss(tensors["logits"], tensors["counts"], likelihood=likelihood, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss.double(), elements.sum() / mask.sum(), rtol=2e-6, atol=0)
    assert_gradients(family, tensors, wide)
    rows = fastvae.reconstruction_loss(
        tensors["logits"],
        tensors["counts"],
        likelihood=likelihood_of(family, tensors, head),
        mask=mask,
        reduction="none",
    )
    assert rows[2] == 0


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "mean"},
    {"reduction": "none"},
    {"beta": 0.5, "recon_weight": 0.25},
    {"beta": torch.tensor(0.5), "recon_weight": torch.tensor(3.0)},
    {"free_bits": FreeBits(0.3, "dim")},
    {"free_bits": FreeBits(2.0, "sample")},
    {"free_bits": FreeBits(0.3, "dim_batch")},
    {"capacity": Capacity(3.0, "batch")},
    {"capacity": Capacity(3.0, "sample")},
    {"kl_reduction": "mean"},
    {"weight": torch.linspace(0, 2, B)},
    {"kl_mask": torch.arange(5) < 3},
    {"logvar_clamp": (-0.5, 0.5)},
    {"one_pass": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("measured", [False, True], ids=["mu, logvar", "kl="])
def test_options_of_the_loss(options, measured):
    """Loss and KL are those of a squared error, but for the reconstruction term; gradients follow."""
    elementwise = {"free_bits": "dim", "kl_mask": "", "logvar_clamp": "", "kl_reduction": ""}
    if measured and (options.get("reduction") == "mean" or any(name in elementwise for name in options)):
        pytest.skip("acts on elements of the KL, which kl= has not")
    inputs = batch()
    tensors = leaves(inputs)
    mu, logvar = (torch.randn(B, 5, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    kl = fastvae.gaussian_kl(mu, logvar, reduction="none")
    latents = {"kl": kl.requires_grad_()} if measured else {"mu": mu.requires_grad_(), "logvar": logvar}
    terms = fastvae.vae_loss(
        tensors["logits"], tensors["counts"], **latents, likelihood=likelihood_of("zinb", tensors), **options
    )
    leaf = kl if measured else mu
    terms.loss.sum().backward()
    by_latents, leaf.grad = leaf.grad, None
    zero = torch.zeros(B, G)
    others = fastvae.vae_loss(zero, zero, **latents, **options)
    others.loss.sum().backward()
    torch.testing.assert_close(by_latents, leaf.grad)
    torch.testing.assert_close(terms.kl, others.kl)

    elements, wide = truth_of("zinb", inputs)
    truth = elements.sum(1) * options.get("weight", 1.0)
    reduction = options.get("reduction", "batchmean")
    divisor = {"sum": 1, "none": 1, "batchmean": B, "mean": B * G}[reduction]
    truth = (truth if reduction == "none" else truth.sum()) / divisor
    torch.testing.assert_close(terms.recon.double(), truth, rtol=2e-6, atol=1e-4)
    whole = options.get("recon_weight", 1.0) * truth + others.loss.detach().double()
    torch.testing.assert_close(terms.loss.double(), whole, rtol=2e-6, atol=1e-4)
    whole.sum().backward()
    assert_gradients("zinb", tensors, wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", USED)
@pytest.mark.parametrize("kind", ["gene", "cell"])
def test_storage(dtype, family, kind, pieces):
    """16-bit tensors are computed in float32: one rounding of each gradient."""
    inputs = batch(dtype)
    if kind == "cell":
        inputs["log_theta"] = inputs["log_theta"].expand(B, G) + inputs["zero_logits"] / 4
    tensors = leaves(inputs)
    elements, wide = truth_of(family, inputs)
    likelihood = likelihood_of(family, tensors)
    loss = fastvae.reconstruction_loss(tensors["logits"], tensors["counts"], likelihood=likelihood, reduction="sum")
    (loss * 0.3).backward()
    (elements.sum() * 0.3).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-9 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), elements.sum(), rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0)
    assert_gradients(family, tensors, wide, tolerance)


def test_upstream_gradients(pieces):
    """A second backward pass, upstream gradients that no forward pass foresaw, and those of both terms."""
    inputs = batch()
    for upstream in (1.0, 0.25, 0.3, -2.0, 0.0):
        tensors = leaves(inputs)
        loss = fastvae.reconstruction_loss(
            tensors["logits"],
            tensors["counts"],
            likelihood=likelihood_of("zinb", tensors),
            weight=torch.arange(B) + 0.5,
        )
        names = USED["zinb"]
        first = torch.autograd.grad(loss * upstream, [tensors[n] for n in names], retain_graph=True)
        kept = [g.clone() for g in first]
        for g in first:
            g.fill_(7.0)  # its new owner may do with it what it likes
        second = torch.autograd.grad(loss * upstream, [tensors[n] for n in names])
        elements, wide = truth_of("zinb", inputs)
        (elements.sum(1) @ (torch.arange(B).double() + 0.5) / B * upstream).backward()
        for gradients in (kept, second):
            for name, gradient in zip(names, gradients, strict=True):
                size = float(wide[name].grad.abs().max())
                torch.testing.assert_close(gradient.double(), wide[name].grad, rtol=1e-5, atol=1e-5 * size)


def test_gradient_of_some_inputs_and_none():
    inputs = batch()
    with torch.no_grad():
        silent = fastvae.reconstruction_loss(
            inputs["logits"], inputs["counts"], likelihood=likelihood_of("zinb", inputs)
        )
    for names in itertools.combinations(USED["zinb"], 2):
        tensors = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        likelihood = likelihood_of("zinb", tensors)
        loss = fastvae.reconstruction_loss(tensors["logits"], tensors["counts"], likelihood=likelihood)
        loss.backward()
        assert torch.equal(loss.detach(), silent)
        elements, wide = truth_of("zinb", inputs)
        (elements.sum() / B).backward()
        for name in names:
            size = float(wide[name].grad.abs().max())
            torch.testing.assert_close(tensors[name].grad.double(), wide[name].grad, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("family", USED)
def test_second_derivatives(family):
    inputs = {name: t[:, :5] if t.ndim == 2 else t for name, t in batch(torch.float64).items()}
    inputs["log_theta"] = inputs["log_theta"][:5]
    tensors = leaves(inputs)

    def loss(*values):
        given = {**tensors, **dict(zip(USED[family], values, strict=True))}
        likelihood = likelihood_of(family, given)
        return fastvae.reconstruction_loss(given["logits"], given["counts"], likelihood=likelihood, reduction="none")

    values = [tensors[name] for name in USED[family]]
    assert torch.autograd.gradcheck(loss, values)
    assert torch.autograd.gradgradcheck(loss, values)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("family", USED)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_no_count_makes_its_row_nan(bad, family, sparse, pieces):
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    inputs = batch()
    inputs["counts"][3, 4] = bad
    tensors = leaves(inputs)
    x = inputs["counts"].to_sparse_csr() if sparse else inputs["counts"]
    nll = fastvae.reconstruction_loss(tensors["logits"], x, likelihood=likelihood_of(family, tensors), reduction="none")
    nll.sum().backward()
    assert nll.isnan().tolist() == [row == 3 for row in range(B)]
    assert tensors["logits"].grad.isnan().any(1).tolist() == [row == 3 for row in range(B)]


def test_large_batches_of_images_shape():
    """[B, ...] is [B, G] with another shape."""
    inputs = batch()
    flat = fastvae.reconstruction_loss(inputs["logits"], inputs["counts"], likelihood=likelihood_of("nb", inputs))
    shaped = {name: t.reshape(B, 4, 10) if t.shape == (B, G) else t for name, t in inputs.items()}
    shaped["log_theta"] = shaped["log_theta"].reshape(4, 10)
    found = fastvae.reconstruction_loss(shaped["logits"], shaped["counts"], likelihood=likelihood_of("nb", shaped))
    assert torch.equal(flat, found)
    transposed = inputs["logits"].t().contiguous().t()
    assert torch.equal(
        flat, fastvae.reconstruction_loss(transposed, inputs["counts"], likelihood=likelihood_of("nb", inputs))
    )


def test_module_holds_and_call_overrides():
    inputs = batch()
    criterion = fastvae.VAELoss(
        likelihood=NegativeBinomial(torch.nn.Parameter(inputs["log_theta"].clone()), log_library=torch.zeros(B)),
        return_terms=True,
    )
    assert [name for name, _ in criterion.named_parameters()] == ["likelihood.log_theta"]
    assert "likelihood.log_library" in criterion.state_dict()
    kl = torch.zeros(B)
    held = criterion(inputs["logits"], inputs["counts"], kl=kl).recon
    given = criterion(
        inputs["logits"],
        inputs["counts"],
        kl=kl,
        likelihood_args={"log_library": inputs["log_library"][:, None], "zero_logits": inputs["zero_logits"]},
    ).recon
    elements, _ = truth_of("zinb", inputs)
    torch.testing.assert_close(given.double(), elements.sum() / B, rtol=2e-6, atol=0)
    assert not torch.equal(held, given)
    given.backward()
    assert criterion.likelihood.log_theta.grad is not None
    assert "NegativeBinomial(log_theta=[40], log_library=[6], head='softmax')" in repr(criterion)


def test_compiled_and_functional_transforms():
    inputs = batch()

    def loss(logits, x, log_theta, log_library, zero_logits):
        likelihood = NegativeBinomial(log_theta, log_library=log_library, zero_logits=zero_logits)
        return fastvae.reconstruction_loss(logits, x, likelihood=likelihood)

    values = [inputs[name] for name in ("logits", "counts", "log_theta", "log_library", "zero_logits")]
    elements, wide = truth_of("zinb", inputs)
    (elements.sum() / B).backward()
    compiled = torch.compile(loss, backend="eager")(*values)
    torch.testing.assert_close(compiled.double(), elements.sum() / B, rtol=2e-6, atol=0)
    gradient = torch.func.grad(loss)(*values)
    torch.testing.assert_close(gradient.double(), wide["logits"].grad, rtol=1e-5, atol=1e-6)


def test_held_by_a_compiled_module():
    inputs = batch()
    criterion = fastvae.VAELoss(likelihood=NegativeBinomial(torch.nn.Parameter(inputs["log_theta"])))
    arguments = {"log_library": inputs["log_library"]}
    eager = criterion(inputs["logits"], inputs["counts"], kl=torch.zeros(B), likelihood_args=arguments)
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    found = compiled(inputs["logits"], inputs["counts"], kl=torch.zeros(B), likelihood_args=arguments)
    torch.testing.assert_close(found, eager, rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", USED)
def test_empty(family):
    for shape in ((0, 3), (2, 0)):
        logits = torch.zeros(shape, requires_grad=True)
        tensors = {"log_theta": torch.zeros(shape[1]), "zero_logits": torch.zeros(shape)}
        nll = fastvae.reconstruction_loss(
            logits, torch.zeros(shape), likelihood=likelihood_of(family, tensors), reduction="none"
        )
        nll.sum().backward()
        assert nll.shape == shape[:1]
        assert not nll.any()


LOGITS, COUNTS, KL = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)
MISTAKES = [
    (lambda: NegativeBinomial(torch.zeros(3), target_scale=1.0), ValueError, "target_scale has no meaning"),
    (lambda: Poisson(target_shift=1.0), ValueError, "target_shift has no meaning"),
    (lambda: Multinomial(total=1.0), TypeError, "no argument 'total'"),
    (lambda: NegativeBinomial(0.5), TypeError, "log_theta must be a torch.Tensor"),
    (lambda: Poisson(head="relu"), ValueError, "head must be one of"),
    (lambda: fastvae.VAELoss(likelihood=Poisson(), inplace=True), ValueError, "inplace=True does not work"),
    (lambda: call(Poisson(), extra=torch.zeros(2)), ValueError, "extra has no meaning"),
    (lambda: call(Poisson(), inplace=True), ValueError, "inplace=True does not work"),
    (lambda: call("l2", likelihood_args={}), ValueError, "likelihood_args are for likelihoods of counts"),
    (lambda: call(Poisson(), likelihood_args={"log_theta": LOGITS}), ValueError, "must be one of 'log_library'"),
    (lambda: call(Poisson(log_library=torch.zeros(3))), ValueError, "log_library must have shape"),
    (lambda: call(NegativeBinomial(None)), ValueError, "needs log_theta"),
    (lambda: call(NegativeBinomial(torch.zeros(4))), ValueError, "log_theta must have the shape of one sample"),
    (
        lambda: call(NegativeBinomial(torch.zeros(3), index=torch.zeros(2).long())),
        ValueError,
        "log_theta must have shape",
    ),
    (lambda: call(NegativeBinomial(LOGITS, index=torch.zeros(2))), ValueError, "index must be int64"),
    (lambda: call(NegativeBinomial(torch.zeros(3), zero_logits=torch.zeros(2, 2))), ValueError, "zero_logits must"),
    (lambda: call(Poisson(), target=COUNTS.bool()), TypeError, "target must be counts"),
    (lambda: call(Poisson(), target=torch.ones(2, 4)), ValueError, "recon and target must have one shape"),
    (lambda: call(Poisson(), target=COUNTS.to_sparse()), ValueError, "dense tensor or a CSR tensor"),
    (lambda: call(Poisson(), recon=torch.zeros(2), target=torch.zeros(2)), ValueError, "recon must be"),
    (lambda: call(Poisson(), kl=None), ValueError, "the KL needs mu and logvar"),
    (lambda: call(Poisson(mask_normalize=True), reduction="sum"), ValueError, "mask_normalize divides"),
]


def call(likelihood, *, recon=LOGITS, target=COUNTS, kl=KL, **options):
    return fastvae.vae_loss(recon, target, kl=kl, likelihood=likelihood, **options)


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES, ids=[m for *_, m in MISTAKES])
def test_mistakes(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()


def test_check_inputs():
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    x = torch.tensor([[0.0, 3.0, -1.0], [0.5, torch.nan, torch.inf]])
    report = fastvae.check_inputs(LOGITS, x, likelihood=Poisson())
    assert report.nonfinite["target"] == 2
    assert report.out_of_range == {"recon": 0, "target": 1}
    assert report.suspicious == {"recon": 0, "target": 1}
    assert len(report.warnings) == 3
    assert fastvae.check_inputs(LOGITS, torch.full((2, 3), 200).int(), likelihood=Multinomial()).ok
    assert fastvae.check_inputs(LOGITS, COUNTS.to_sparse_csr(), likelihood=Poisson()).ok


def test_memory_of_the_graph():
    """Beside the inputs, the graph keeps the gradients alone."""
    tensors = leaves(batch())
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fastvae.reconstruction_loss(tensors["logits"], tensors["counts"], likelihood=likelihood_of("zinb", tensors))
    given = {t.data_ptr() for t in tensors.values()}
    new = [t for t in kept if t.data_ptr() not in given and t.numel() > B]
    assert sorted(tuple(t.shape) for t in new) == [(B, G), (B, G), (G,)]
