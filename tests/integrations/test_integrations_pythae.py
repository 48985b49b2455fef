"""pythae's models with and without fastvae."""

import sys

import pytest
import torch

from fastvae.integrations import patch_pythae

pytestmark = pytest.mark.usefixtures("models")
IMAGES = (5, 1, 4, 6)
OPTIONS = {"VAE": {}, "BetaVAE": {"beta": 2.5}, "DisentangledBetaVAE": {"beta": 2.5, "C": 3.0, "warmup_epoch": 4}}


@pytest.fixture(scope="session")
def models():
    pytest.importorskip("pythae", reason="pythae, of the extra [test], is not installed")
    import pythae.models

    return pythae.models


@pytest.fixture(params=["mse", "bce"])
def reconstruction_loss(request):
    return request.param


@pytest.fixture(params=list(OPTIONS))
def model(request, models, reconstruction_loss):
    name = request.param
    config = getattr(models, f"{name}Config")
    sizes = {"input_dim": IMAGES[1:], "latent_dim": 3, "reconstruction_loss": reconstruction_loss}
    torch.manual_seed(0)
    return getattr(models, name)(config(**sizes, **OPTIONS[name]))


def training_step(model, images, epoch):
    """Outputs and the parameters' gradients, from the same noise each time."""
    model.zero_grad()
    torch.manual_seed(1)
    output = model({"data": images}, epoch=epoch)
    output.loss.backward()
    terms = {name: output[name].detach() for name in ("loss", "recon_loss", "reg_loss", "z", "recon_x")}
    return terms, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("epoch", [0, 2, 9])
def test_training_steps_are_pythaes_own(backend, model, epoch):
    images = torch.rand(IMAGES)
    expected = training_step(model, images, epoch)
    with patch_pythae():
        actual = training_step(model, images, epoch)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert expected[0]["reg_loss"] > 0


def inputs(dtype=torch.float64):
    torch.manual_seed(2)
    recon = torch.rand(IMAGES[0], 24)  # flat, as a decoder of pythae may leave it
    target, mu, log_var = torch.rand(IMAGES), 2 * torch.randn(5, 3), torch.randn(5, 3)
    return [recon.to(dtype).requires_grad_(), target.to(dtype), *(t.to(dtype).requires_grad_() for t in (mu, log_var))]


def terms_and_gradients(model, recon, target, mu, log_var):
    epoch = (2,) if type(model).__name__ == "DisentangledBetaVAE" else ()
    terms = model.loss_function(recon, target, mu, log_var, None, *epoch)
    wanted = [(recon, mu, log_var), (recon,), (mu, log_var)]
    return tuple(terms), [
        torch.autograd.grad(term, of, retain_graph=True) for term, of in zip(terms, wanted, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_term_and_its_gradients(backend, model, dtype):
    tensors = inputs(dtype)
    expected = terms_and_gradients(model, *tensors)
    with patch_pythae():
        actual = terms_and_gradients(model, *tensors)
    torch.testing.assert_close(actual, expected)


def test_below_and_above_the_capacity(models):
    config = models.DisentangledBetaVAEConfig(input_dim=IMAGES[1:], latent_dim=3, **OPTIONS["DisentangledBetaVAE"])
    model = models.DisentangledBetaVAE(config)
    recon, target, *_ = inputs()
    mu = torch.tensor([[0.1, 0.0, 0.0], [3.0, 0.0, 0.0]] * 2 + [[0.0] * 3]).double().requires_grad_()
    loss = lambda: model.loss_function(recon, target, mu, torch.zeros_like(mu), None, 4)[0]  # noqa: E731
    expected = torch.autograd.grad(loss(), mu)
    with patch_pythae():
        actual = torch.autograd.grad(loss(), mu)
    torch.testing.assert_close(actual, expected)
    assert expected[0][0, 0] < 0 < expected[0][1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_losses_are_float32(backend, models, dtype):
    model = models.VAE(models.VAEConfig(input_dim=IMAGES[1:], latent_dim=3))
    recon, target, mu, log_var = inputs(dtype)
    mu, log_var = (t.detach() * 0.01 for t in (mu, log_var))
    true = model.loss_function(*(t.detach().double() for t in (recon, target, mu, log_var)), None)
    theirs = model.loss_function(recon, target, mu, log_var, None)
    with patch_pythae():
        ours = model.loss_function(recon, target, mu, log_var, None)
    torch.testing.assert_close(tuple(ours), tuple(t.float() for t in true))
    assert abs(float(theirs[2]) - float(true[2])) > 0.05 * float(true[2])


def test_bce_under_autocast(backend, models):
    """On a GPU torch's raises there."""
    model = models.VAE(models.VAEConfig(input_dim=IMAGES[1:], latent_dim=3, reconstruction_loss="bce"))
    with patch_pythae(), torch.autocast("cpu", torch.bfloat16):
        output = model({"data": torch.rand(IMAGES)})
        output.loss.backward()
    assert output.recon_x.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bytes_are_numbers_to_255(models):
    model = models.VAE(models.VAEConfig(input_dim=IMAGES[1:], latent_dim=3))
    recon, _, mu, log_var = inputs(torch.float32)
    target = torch.arange(120, dtype=torch.uint8).reshape(IMAGES)
    expected = model.loss_function(recon, target, mu, log_var, None)
    with patch_pythae():
        torch.testing.assert_close(tuple(model.loss_function(recon, target, mu, log_var, None)), expected)


def test_an_unknown_reconstruction_loss_is_named(models):
    model = models.VAE(models.VAEConfig(input_dim=IMAGES[1:], latent_dim=3))
    model.model_config.reconstruction_loss = "l1"
    with patch_pythae(), pytest.raises(ValueError, match="reconstruction_loss must be one of 'mse', 'bce'; got 'l1'"):
        model({"data": torch.rand(IMAGES)})


def test_subclasses_inherit_it_and_other_losses_stay(models):
    class Inheriting(models.BetaVAE):
        pass

    with patch_pythae():
        assert Inheriting.loss_function.__module__ == "fastvae.integrations.pythae"
        for other in (models.BetaTCVAE, models.FactorVAE, models.IWAE, models.VAMP, models.INFOVAE_MMD):
            assert other.loss_function.__module__.startswith("pythae.")


def test_undo_restores_the_classes(models):
    classes = [getattr(models, name) for name in OPTIONS]
    before = [dict(vars(c)) for c in classes]
    patch = patch_pythae()
    with pytest.raises(RuntimeError, match="may be in effect once"):
        patch_pythae()
    assert all(vars(c)["loss_function"] is not b["loss_function"] for c, b in zip(classes, before, strict=True))
    patch.undo()
    patch.undo()
    assert [dict(vars(c)) for c in classes] == before


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythae", None)
    with pytest.raises(ImportError, match="pip install pythae"):
        patch_pythae()
