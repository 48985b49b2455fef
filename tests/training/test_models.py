import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae.models import VAE, VAEConfig
from fastvae.models.interpolation import interpolate_latents

# one pixel, below and above the coarsest map, odd on one or both sides, a line, several halvings
IMAGE_SIZES = [(1, 1), (5, 7), (8, 9), (29, 31), (1, 40), (28, 28), (64, 33)]
BACKBONES = ["conv", "mlp"]


def small_vae(image_size=(9, 12), channels=1, backbone="conv", **sizes) -> VAE:
    torch.manual_seed(0)
    sizes = {"latent_dim": 3, "width": 4, "hidden": 16} | sizes
    return VAE(VAEConfig(image_size=image_size, channels=channels, backbone=backbone, **sizes))


def same_state(a: VAE, b: VAE) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", IMAGE_SIZES, ids=str)
def test_every_size_comes_back_and_every_parameter_learns(image_size, channels, backbone):
    vae = small_vae(image_size, channels, backbone)
    x = torch.rand(2, channels, *image_size)
    out = vae(x, seed=1)
    assert out.recon.shape == x.shape
    assert out.z.shape == out.mu.shape == out.logvar.shape == (2, 3)
    assert out.kl.shape == (2,)
    fastvae.vae_loss(out.recon, x, kl=out.kl).loss.backward()
    still = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert vae.sample(2).shape == x.shape


def test_every_pixel_reaches_the_latents():
    vae = small_vae((5, 7))
    x = torch.rand(1, 1, 5, 7, requires_grad=True)
    vae.encode(x)[0].square().sum().backward()
    assert x.grad.ne(0).all()


def test_forward_samples_the_posterior_in_training_and_evaluation():
    vae = small_vae()
    x = torch.rand(4, 1, 9, 12)
    for mode in (True, False):
        vae.train(mode)
        out = vae(x, seed=7, offset=12)
        z, kl = fastvae.reparameterize_kl(*vae.encode(x), seed=7, offset=12)
        assert torch.equal(out.z, z)
        assert torch.equal(out.kl, kl)
        assert torch.equal(out.recon, vae.decode(z))
    assert not torch.equal(vae(x).z, vae(x).z)


def test_bytes_are_read_as_fractions_of_255():
    vae = small_vae()
    x = torch.randint(0, 256, (2, 1, 9, 12), dtype=torch.uint8)
    assert torch.equal(vae.encode(x)[0], vae.encode(x.float() / 255)[0])


def test_sample_is_a_function_of_the_seed():
    vae = small_vae()
    with torch.no_grad():
        vae.decoder[-1].weight.mul_(100)  # so that clamping has something to do
    images = vae.sample(5, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(images, vae.sample(5, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(images, vae.sample(5, seed=4))
    assert images.min() == 0
    assert images.max() == 1
    assert not images.requires_grad
    with torch.no_grad():
        assert torch.equal(images, vae.decode(fastvae.philox_normal((5, 3), seed=3)).clamp(0, 1))

    torch.manual_seed(1)
    first = vae.sample(5)
    torch.manual_seed(1)
    assert torch.equal(first, vae.sample(5))
    assert not torch.equal(first, vae.sample(5))


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("temperature", [0, 0.7, 2.0])
def test_temperature_multiplies_the_latents_of_samples(seed, temperature):
    vae = small_vae().double()
    torch.manual_seed(1)
    images = vae.sample(5, seed=seed, temperature=temperature)
    torch.manual_seed(1)
    z = torch.randn(5, 3, dtype=torch.float64)
    if seed is not None:
        z = fastvae.philox_normal((5, 3), seed=seed, dtype=torch.float64)
    torch.testing.assert_close(images, vae.decode(temperature * z).detach().clamp(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_named(temperature):
    with pytest.raises(ValueError, match=f"temperature must be 0 or more, and finite; got {temperature}"):
        small_vae().sample(1, temperature=temperature)
    with pytest.raises(TypeError, match="temperature must be a number; got str"):
        small_vae().sample(1, temperature="hot")


def test_reconstruct_decodes_the_mean():
    vae = small_vae()
    x = torch.rand(3, 1, 9, 12)
    recon = vae.reconstruct(x)
    assert torch.equal(recon, vae.decode(vae.encode(x)[0]).detach().clamp(0, 1))
    assert not recon.requires_grad


@pytest.mark.parametrize("mode", ["spherical", "linear"])
def test_interpolation_joins_the_reconstructions(mode):
    vae = small_vae(channels=3)
    a, b = torch.rand(2, 4, 3, 9, 12)
    path = vae.interpolate(a, b, steps=5, mode=mode)
    assert path.shape == (4, 5, 3, 9, 12)
    torch.testing.assert_close(path[:, 0], vae.reconstruct(a))
    torch.testing.assert_close(path[:, -1], vae.reconstruct(b))
    assert not path.requires_grad


@pytest.mark.parametrize("mode", ["spherical", "linear"])
def test_latent_paths_hit_both_ends_exactly(mode):
    a, b = torch.randn(2, 6, 17)
    z = interpolate_latents(a, b, 7, mode)
    assert torch.equal(z[:, 0], a)
    assert torch.equal(z[:, -1], b)
    z_back = interpolate_latents(b, a, 7, mode)
    torch.testing.assert_close(z.flip(1), z_back)


def test_spherical_path_walks_the_circle_at_one_speed():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angles = torch.linspace(0, torch.pi / 2, 5)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(interpolate_latents(a, b, 5, "spherical")[0], circle)
    straight = torch.stack([1 - torch.linspace(0, 1, 5), torch.linspace(0, 1, 5)], dim=1)
    torch.testing.assert_close(interpolate_latents(a, b, 5, "linear")[0], straight)


@pytest.mark.parametrize(
    ("a", "b"),
    [([0.0, 0.0], [3.0, 4.0]), ([0.0, 0.0], [0.0, 0.0]), ([1.0, 2.0], [2.0, 4.0]), ([1.0, 2.0], [-1.0, -2.0])],
    ids=["zero", "both zero", "parallel", "opposite"],
)
def test_spherical_path_is_straight_where_no_angle_is_defined(a, b):
    a, b = torch.tensor([a]), torch.tensor([b])
    torch.testing.assert_close(interpolate_latents(a, b, 5, "spherical"), interpolate_latents(a, b, 5, "linear"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_model_comes_back_bit_for_bit(tmp_path, backbone):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    vae = small_vae((5, 7), 3, backbone)
    vae.save_pretrained(tmp_path / "new" / "model")
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    loaded = VAE.from_pretrained(tmp_path / "new" / "model")
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.config == vae.config
    assert same_state(loaded, vae)
    assert all(p.requires_grad for p in loaded.parameters())
    torch.optim.SGD(loaded.parameters(), 0.1).zero_grad()
    x = torch.rand(2, 3, 5, 7)
    loaded(x).recon.sum().backward()


def test_saved_dtype_is_kept(tmp_path):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    vae = small_vae().double()
    vae.save_pretrained(tmp_path)
    assert same_state(VAE.from_pretrained(tmp_path), vae)
    assert VAE.from_pretrained(tmp_path).sample(1, seed=0).dtype == torch.float64


@pytest.mark.parametrize("failing_write", [1, 2])
def test_interrupted_save_leaves_a_loadable_model(tmp_path, monkeypatch, failing_write):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    old, new = small_vae(), small_vae()
    with torch.no_grad():
        new.decoder[-1].bias.add_(1)
    old.save_pretrained(tmp_path)

    replaced = []

    def replace_until_the_crash(source: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == failing_write:
            raise OSError("disk full")
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_until_the_crash)
        with pytest.raises(OSError, match="disk full"):
            new.save_pretrained(tmp_path)
    assert len(replaced) == failing_write
    assert same_state(VAE.from_pretrained(tmp_path), old)  # the weights are written last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_files_of_two_models_are_not_loaded(tmp_path):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    small_vae((9, 12)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    small_vae((10, 12)).save_pretrained(tmp_path)  # the same shapes of weights
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"belong to different models.*\[10, 12\]"):
        VAE.from_pretrained(tmp_path)


def damage(directory: Path, what: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    match what:
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-4])
        case "not safetensors":
            weights.write_bytes(b"")
        case "not json":
            config.write_text("{")
        case "json list":
            config.write_text("[]")
        case "unknown key":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"depth": 3}))
        case "bad value":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"width": "4"}))
        case "other weights":
            from safetensors.torch import save_file

            save_file(small_vae(latent_dim=4).state_dict(), weights)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no weights", FileNotFoundError, "lacks model.safetensors"),
        ("no config", FileNotFoundError, "lacks config.json"),
        ("truncated", ValueError, "model.safetensors is damaged"),
        ("not safetensors", ValueError, "model.safetensors is damaged"),
        ("not json", ValueError, "config.json is not valid JSON"),
        ("json list", ValueError, "must hold a JSON object"),
        ("unknown key", ValueError, "unknown key depth"),
        ("bad value", ValueError, r"config.json: width must be a whole number from 1; got '4'"),
        ("other weights", ValueError, "do not fit its config"),
    ],
)
def test_damaged_directory_is_named(tmp_path, what, error, message):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    small_vae().save_pretrained(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(error, match=message):
        VAE.from_pretrained(tmp_path)


def test_missing_directory_is_named(tmp_path):
    pytest.importorskip("safetensors", reason="models are saved with safetensors")
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        VAE.from_pretrained(tmp_path / "nowhere")


def test_model_pickles_copies_and_changes_dtype():
    vae = small_vae()
    assert same_state(pickle.loads(pickle.dumps(vae)), vae)
    assert same_state(copy.deepcopy(vae), vae)
    images = torch.randint(0, 256, (2, 1, 9, 12), dtype=torch.uint8)
    assert vae.bfloat16()(images).recon.dtype == torch.bfloat16


def test_autocast_trains():
    vae = small_vae((28, 28))
    x = torch.rand(2, 1, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x)
        loss = fastvae.vae_loss(out.recon, x, kl=out.kl).loss
    loss.backward()
    assert out.recon.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_learns(backbone):
    vae = small_vae((16, 16), backbone=backbone, width=8, latent_dim=4)
    x = torch.zeros(64, 1, 16, 16)
    x[0::4, :, :8] = x[1::4, :, 8:] = x[2::4, :, :, :8] = x[3::4, :, :, 8:] = 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    losses = []
    for step in range(80):
        out = vae(x, seed=step)
        loss = fastvae.vae_loss(out.recon, x, kl=out.kl).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # the per-pixel mean, the best that ignores the image, leaves this much
    baseline = (x - x.mean(dim=0)).square().sum().item() / 64
    assert losses[-1] < 0.5 * baseline < losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (28,)}, "image_size must be"),
        ({"image_size": (0, 28)}, "image_size must be"),
        ({"image_size": 28}, "image_size must be"),
        ({"channels": 0}, "channels must be a whole number from 1; got 0"),
        ({"latent_dim": 2.5}, "latent_dim must be"),
        ({"width": True}, "width must be"),
        ({"hidden": -1}, "hidden must be"),
        ({"backbone": "vit"}, "backbone must be one of conv, mlp, autoencoder_kl; got 'vit'"),
    ],
)
def test_bad_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**fields)


def test_bad_arguments_are_named():
    vae = small_vae()
    x = torch.rand(2, 1, 9, 12)
    with pytest.raises(ValueError, match=r"\(1, 9, 12\), as the model's config says; got shape \(2, 1, 12, 9\)"):
        vae(x.mT)
    with pytest.raises(ValueError, match=r"got shape \(1, 9, 12\)"):
        vae.reconstruct(x[0])
    with pytest.raises(TypeError, match=r"got torch.int64"):
        vae.encode(x.long())
    with pytest.raises(ValueError, match="steps must be at least 2"):
        vae.interpolate(x, x, steps=1)
    with pytest.raises(ValueError, match="mode must be one of spherical, linear; got 'cubic'"):
        vae.interpolate(x, x, mode="cubic")


class FormerNet(torch.nn.Module):
    """The convolutional net of models saved before there was `residual`, for images of 20 x 9 pixels."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.encoder = nn.Sequential(
            *(
                nn.Conv2d(1, 4, 2, 2, padding=(0, 1)),
                nn.SiLU(),
                nn.Conv2d(4, 8, 3, 2, 1),
                nn.GroupNorm(1, 8),
                nn.SiLU(),
            ),
            *(nn.Flatten(), nn.Linear(8 * 5 * 3, 6)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(3, 8 * 5 * 3), nn.Unflatten(1, (8, 5, 3)), nn.GroupNorm(1, 8), nn.SiLU()),
            *(nn.ConvTranspose2d(8, 4, 4, 2, padding=(1, 2), output_padding=(0, 1)), nn.SiLU()),
            *(nn.ConvTranspose2d(4, 1, 2, 2, padding=(0, 1), output_padding=(0, 1)),),
        )


def test_a_model_of_a_former_version_loads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="models are saved with safetensors")
    torch.manual_seed(0)
    former = FormerNet()
    values = VAEConfig(image_size=(20, 9), latent_dim=3, width=4).to_dict()
    del values["residual"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    metadata = {"config": json.dumps(values)}
    safetensors.save_file(former.state_dict(), tmp_path / "model.safetensors", metadata)
    vae = VAE.from_pretrained(tmp_path)
    assert not vae.config.residual
    x, z = torch.rand(2, 1, 20, 9), torch.randn(2, 3)
    assert torch.equal(vae.encoder(x), former.encoder(x))
    assert torch.equal(vae.decode(z), former.decoder(z))
    vae.save_pretrained(tmp_path / "again")
    assert same_state(VAE.from_pretrained(tmp_path / "again"), vae)


def test_images_of_a_new_model_have_no_checkerboard():
    """Away from the edges, the decoder's four pixels of each position are one: no energy at the Nyquist frequency."""
    vae = small_vae((32, 32), width=8)
    with torch.no_grad():
        images = vae.decode(torch.randn(4, 3))
    blocks = images.unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))
