"""The residual autoencoder: diffusers' numbers and files, any size, checkpointing, memory formats, export."""

import json

import pytest
import torch

import fastvae
from fastvae.models import VAE, VAEConfig

SMALL = {"backbone": "autoencoder_kl", "channels": 3, "width": 8, "width_multipliers": (1, 2, 2, 4), "blocks": 1}


def small_vae(image_size=(16, 24), **sizes) -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(image_size=image_size, **(SMALL | sizes)))


def step(vae, x):
    """A training step's output and the gradients of all parameters."""
    vae.zero_grad()
    out = vae(x, seed=1)
    fastvae.vae_loss(out.recon, x, kl=out.kl, beta=0.5).loss.backward()
    return out, {name: p.grad.clone() for name, p in vae.named_parameters()}


# diffusers


THEIRS = {
    "Stable Diffusion": {},
    "Flux": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "scaling_factor": 0.3611},
    "no attention": {"mid_block_add_attention": False},
    "grey": {"in_channels": 1, "out_channels": 1, "block_out_channels": (12, 18), "norm_num_groups": 3},
}


def theirs(**options):
    diffusers = pytest.importorskip("diffusers", reason="the weights are those of diffusers")
    torch.manual_seed(0)
    widths = options.get("block_out_channels", (8, 16, 16, 24))
    defaults = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    model = diffusers.AutoencoderKL(**(defaults | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no bias is 0, no scale is 1
    return model


def ours(model, **options) -> VAE:
    return VAE.from_diffusers_state_dict(dict(model.config), model.state_dict(), **options)


@torch.no_grad()
def assert_same_model(vae, model):
    x = torch.rand(2, *vae.config.image_shape)
    posterior, expected = vae.posterior(x), model.encode(2 * x - 1).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-5, rtol=1e-5)
    z = torch.randn(2, *vae.config.latent_shape)
    torch.testing.assert_close(vae.decode(z), model.decode(z).sample / 2 + 0.5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", THEIRS)
def test_weights_of_diffusers_give_the_same_numbers_and_come_back(kind):
    model = theirs(**THEIRS[kind])
    vae = ours(model)
    assert vae.config.image_size == (32, 32)
    assert_same_model(vae, model)
    state, expected = vae.to_diffusers_state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_another_image_size_than_it_was_trained_on():
    model = theirs()
    vae = ours(model, image_size=(16, 40))
    assert vae.config.latent_shape == (4, 2, 5)
    assert_same_model(vae, model)


@pytest.mark.parametrize("kind", THEIRS)
def test_files_go_both_ways(tmp_path, kind):
    model = theirs(**THEIRS[kind])
    model.save_pretrained(tmp_path / "theirs")
    vae = VAE.from_diffusers(tmp_path / "theirs")
    assert_same_model(vae, model)
    vae.save_diffusers(tmp_path / "ours", scaling_factor=0.5, shift_factor=0.1)
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert_same_model(vae, again)
    assert VAE.from_diffusers(tmp_path / "ours").config == vae.config
    expected = dict(model.config) | {"scaling_factor": 0.5, "shift_factor": 0.1}
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in expected.items() if k[0] != "_"
    }


def test_a_model_trained_here_loads_in_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="it loads the files")
    vae = small_vae((16, 24))
    vae.save_diffusers(tmp_path, scaling_factor=1.0)
    assert VAE.from_diffusers(tmp_path).config.image_size == (16, 24)
    assert_same_model(vae, diffusers.AutoencoderKL.from_pretrained(tmp_path).eval())


def test_attention_under_its_former_names():
    model = theirs()
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(model.state_dict())
    for name in list(state):
        for new, old in former.items():
            if f".{new}." in name:
                state[name.replace(new, old)] = state.pop(name)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    assert_same_model(VAE.from_diffusers_state_dict(dict(model.config), state), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_fn": "gelu"}, "needs act_fn = 'silu' of diffusers; got 'gelu'"),
        ({"out_channels": 1}, "needs out_channels = 3"),
        ({"use_post_quant_conv": False}, "needs use_post_quant_conv = True"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "needs down_block_types = "),
        ({"_class_name": "AutoencoderDC"}, "needs _class_name = 'AutoencoderKL'"),
        ({"norm_num_groups": 5}, "groups must divide width, 8; got 5"),
        ({"block_out_channels": 8}, "block_out_channels must be a list of whole numbers from 1; got 8"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels must be a list"),
        ({"block_out_channels": [0, 0]}, "block_out_channels must be a list"),
        ({"sample_size": [8]}, r"sample_size must be a whole number, or height and width; got \[8\]"),
        ({"sample_size": "large"}, "sample_size must be a whole number"),
    ],
)
def test_unknown_options_of_diffusers_are_named(options, message):
    config = {"block_out_channels": [8, 16], "norm_num_groups": 4} | options
    with pytest.raises(ValueError, match=message):
        VAE.from_diffusers_state_dict(config, {})


def test_weights_that_do_not_fit_are_named(tmp_path):
    vae = small_vae()
    config = {"block_out_channels": [8, 16, 16, 32], "norm_num_groups": 2, "layers_per_block": 1}
    state = vae.to_diffusers_state_dict()
    state["extra.weight"] = state.pop("quant_conv.weight")
    with pytest.raises(ValueError, match=r"(?s)do not fit diffusers' config.*encoder.quant.weight.*extra.weight"):
        VAE.from_diffusers_state_dict(config, state)
    with pytest.raises(ValueError, match=r"only the backbone .autoencoder_kl. .* this model's is 'mlp'"):
        VAE(VAEConfig(backbone="mlp")).to_diffusers_state_dict()
    with pytest.raises(ValueError, match="this model's is 'mlp'"):
        VAE(VAEConfig(backbone="mlp")).save_diffusers(tmp_path / "new", scaling_factor=1.0)
    assert not (tmp_path / "new").exists()


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"lacks diffusion_pytorch_model.safetensors\. Pass .*save_pretrained"):
        VAE.from_diffusers(tmp_path)


# the backbone


@pytest.mark.parametrize("image_size", [(1, 1), (5, 7), (9, 16), (29, 31), (1, 40), (28, 28)], ids=str)
def test_any_size_comes_back(image_size):
    vae = small_vae(image_size)
    x = torch.rand(2, 3, *image_size, requires_grad=True)
    out = vae(x)
    latents = (2, 4, *(-(-side // 8) for side in image_size))
    assert out.recon.shape == vae.sample(2).shape == x.shape
    assert out.z.shape == out.mu.shape == out.logvar.shape == latents
    assert out.kl.shape == (2,)
    vae.encode(x)[0].square().sum().backward()
    assert x.grad.ne(0).all()  # every pixel counts


@pytest.mark.parametrize("image_size", [(13, 24), (16, 24)], ids=str)
def test_every_parameter_learns(image_size):
    _, gradients = step(small_vae(image_size), torch.rand(2, 3, *image_size))
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


@pytest.mark.parametrize("side", [15, 16])
def test_odd_sides_are_cut_where_they_were_padded(side):
    """What a latent sees and what it draws lie as they do at even sides, where the weights of diffusers fix it."""
    vae = small_vae((side, side), width_multipliers=(1, 1))
    halve, double = vae.encoder.stages[0].resample, vae.decoder.stages[0].resample
    x, z = torch.zeros(1, 8, side, side, requires_grad=True), torch.zeros(1, 8, 8, 8, requires_grad=True)
    halve(x)[0, 0, 4, 4].backward()
    seen = x.grad.abs().sum((0, 1, 3)).nonzero()
    drawn = [row for row in range(side) if torch.autograd.grad(double(z)[0, 0, row].sum(), z)[0][0, :, 4].any()]
    assert (seen.min() - drawn[0], seen.max() - drawn[-1]) == (1, 0)


def test_the_posterior_is_sampled_where_the_encoder_wrote_it():
    vae = small_vae()
    x = torch.rand(2, 3, 16, 24)
    out = vae(x, seed=3)
    z, kl = vae.posterior(x).rsample_kl(seed=3)
    assert torch.equal(out.z, z)
    assert torch.equal(out.kl, kl)
    torch.testing.assert_close(out.kl, fastvae.gaussian_kl(out.mu, out.logvar, reduction="none"))
    # no halves in between, whose gradients would have to be put together
    producers = [node.name() for node, _ in out.z.grad_fn.next_functions if node is not None]
    assert producers == ["ConvolutionBackward0"]


def test_logvar_is_clamped_as_in_latent_diffusion():
    vae = small_vae()
    with torch.no_grad():
        vae.encoder.quant.bias[4:6] += 1000
        vae.encoder.quant.bias[6:] -= 1000
    out = vae(torch.rand(1, 3, 16, 24))
    assert out.logvar[:, :2].eq(20).all()
    assert out.logvar[:, 2:].eq(-30).all()
    assert out.kl.isfinite().all()


def test_interpolation_of_latent_maps():
    vae = small_vae()
    a, b = torch.rand(2, 3, 3, 16, 24)
    path = vae.interpolate(a, b, steps=4)
    assert path.shape == (3, 4, 3, 16, 24)
    torch.testing.assert_close(path[:, 0], vae.reconstruct(a))
    torch.testing.assert_close(path[:, -1], vae.reconstruct(b))


def test_saved_model_comes_back_bit_for_bit(tmp_path):
    vae = small_vae((13, 24), mid_attention=False, quant_convs=False, groups=4, latent_channels=16, checkpointing=True)
    vae.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    assert loaded.config == vae.config
    assert json.loads(json.dumps(vae.config.to_dict())) == vae.config.to_dict()
    x = torch.rand(1, 3, 13, 24)
    assert torch.equal(loaded.reconstruct(x), vae.reconstruct(x))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be a whole number from 1; got 0"),
        ({"blocks": 1.5}, "blocks must be"),
        ({"width_multipliers": ()}, r"width_multipliers must be one .*; got \(\)"),
        ({"width_multipliers": [1, 2]}, "width_multipliers must be"),
        ({"width_multipliers": (1, 0)}, "width_multipliers must be"),
        ({"groups": 3}, "groups must divide width, 8; got 3"),
        ({"groups": 0}, "groups must divide"),
        ({"checkpointing": 1}, "checkpointing must be True or False; got 1"),
    ],
)
def test_bad_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**(SMALL | fields))


@pytest.mark.parametrize(("width", "groups"), [(128, 32), (32, 8), (18, 2), (6, 1), (3, 1), (2, 1)])
def test_a_group_has_four_channels(width, groups):
    assert VAEConfig(**(SMALL | {"width": width})).norm_groups == groups


# memory


BACKBONES = ["conv", "mlp", "autoencoder_kl"]


def both_kinds(backbone):
    for checkpointing in (False, True):
        yield small_vae(backbone=backbone, latent_dim=3, hidden=16, checkpointing=checkpointing)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkpointing_changes_no_gradient(backbone):
    plain, checkpointed = both_kinds(backbone)
    x = torch.rand(2, 3, 16, 24)
    (out, gradients), (out_again, gradients_again) = step(plain, x), step(checkpointed, x)
    assert torch.equal(out.recon, out_again.recon)
    torch.testing.assert_close(gradients_again, gradients, atol=0, rtol=0)


def kept(vae, x) -> int:
    """Bytes that autograd keeps of a forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in vae.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vae(x, seed=1)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize(("backbone", "share"), [("conv", 0.3), ("mlp", 1.0), ("autoencoder_kl", 0.3)])
def test_checkpointing_keeps_little(backbone, share):
    plain, checkpointed = both_kinds(backbone)
    x = torch.rand(2, 3, 16, 24)
    assert kept(checkpointed, x) < share * kept(plain, x)


@pytest.mark.parametrize("image_size", [(16, 24), (13, 24)], ids=str)
def test_channels_last(image_size):
    vae = small_vae(image_size)
    x = torch.rand(2, 3, *image_size)
    out, gradients = step(vae, x)
    vae = vae.to(memory_format=torch.channels_last)
    out_last, gradients_last = step(vae, x.contiguous(memory_format=torch.channels_last))
    assert out_last.recon.is_contiguous(memory_format=torch.channels_last)
    assert out_last.z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(tuple(out_last), tuple(out), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients_last, gradients, atol=1e-3, rtol=1e-3, check_stride=False)


# graphs


def exported(vae, x, **kwargs):
    shapes = {"x": {0: torch.export.Dim("batch")}} | dict.fromkeys(kwargs)
    return torch.export.export(vae, (x,), kwargs, dynamic_shapes=shapes)


def vae_to_export(backbone, **options):
    return small_vae((9, 12), backbone=backbone, width_multipliers=(1, 2), latent_dim=3, hidden=16, **options)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_export_with_any_batch_size(tmp_path, backbone):
    vae = vae_to_export(backbone)
    seed = torch.tensor([7])
    program = exported(vae, torch.rand(2, 3, 9, 12), seed=seed)
    assert any(str(node.target).startswith("fastvae.") for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "vae.pt2")
    loaded = torch.export.load(tmp_path / "vae.pt2").module()
    for batch in (2, 5):
        x = torch.rand(batch, 3, 9, 12)
        out = loaded(x, seed=seed)
        torch.testing.assert_close(tuple(out), tuple(vae(x, seed=seed)))
        assert out.recon.shape == x.shape


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_exported_model_draws_new_noise_each_time(backbone):
    vae = vae_to_export(backbone, checkpointing=True)
    x = torch.rand(2, 3, 9, 12)
    model = exported(vae, x).module()
    first, second = model(x), model(x)
    assert not torch.equal(first.z, second.z)
    torch.testing.assert_close(first.kl, vae(x).kl)


def test_one_graph_when_compiled():
    """No break, checkpointing and odd sides included; the same gradients."""
    vae = small_vae((9, 12), width_multipliers=(1, 1), checkpointing=True)
    x = torch.rand(2, 3, 9, 12)
    out, gradients = step(vae, x)
    vae.forward = torch.compile(vae.forward, backend="eager", fullgraph=True)
    out_compiled, gradients_compiled = step(vae, x)
    torch.testing.assert_close(tuple(out_compiled), tuple(out))
    torch.testing.assert_close(gradients_compiled, gradients, atol=1e-4, rtol=1e-4)
