"""Config and weights of diffusers' `AutoencoderKL`, read and written without diffusers.

Source: diffusers.AutoencoderKL of diffusers 0.42.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import saving
from .config import VAEConfig

CLASS = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STAGES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

# from our names of weights to diffusers', in this order
RENAMED = {
    r"^encoder\.quant\.": "quant_conv.",
    r"^decoder\.quant\.": "post_quant_conv.",
    r"^encoder\.stages\.": "encoder.down_blocks.",
    r"^decoder\.stages\.": "decoder.up_blocks.",
    r"(down|up)(_blocks\.\d+)\.resample\.": r"\1\2.\1samplers.0.conv.",
    r"\.blocks\.": ".resnets.",
    r"\.shortcut\.": ".conv_shortcut.",
    r"^(encoder|decoder)\.norm\.": r"\1.conv_norm_out.",
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.middle\.1\.(q|k|v)[a-z]+\.": r".mid_block.attentions.0.to_\1.",
    r"\.middle\.1\.out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
}
# attention's weights in files written before diffusers 0.18
FORMER = {
    r"(\.attentions\.0)\.(q|k|v)(uery|ey|alue)\.": r"\1.to_\2.",
    r"(\.attentions\.0)\.proj_attn\.": r"\1.to_out.0.",
}


def require_autoencoder_kl(config: VAEConfig) -> None:
    """Raise ValueError for a model that diffusers has not."""
    if config.backbone != "autoencoder_kl":
        raise ValueError(
            f'only the backbone "autoencoder_kl" has a counterpart in diffusers; this model\'s is {config.backbone!r}. '
            "Save it with save_pretrained."
        )


def config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """What diffusers builds the same model from, in JSON values.

    Raises:
        ValueError: another backbone than "autoencoder_kl".
    """
    require_autoencoder_kl(config)
    height, width = config.image_size
    return {
        "_class_name": CLASS,
        "in_channels": config.channels,
        "out_channels": config.channels,
        **{name: [kind] * len(config.stage_widths) for name, kind in STAGES.items()},
        "block_out_channels": list(config.stage_widths),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": height if height == width else [height, width],
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "mid_block_add_attention": config.mid_attention,
    }


def config_from_diffusers(config: Mapping[str, Any], image_size: tuple[int, int] | None) -> VAEConfig:
    """The same model here, for images of `image_size`; None: of the config's sample_size.

    Raises:
        ValueError: an option that this backbone has not.
    """
    channels = config.get("in_channels", 3)
    widths = config.get("block_out_channels", (64,))
    if not (isinstance(widths, list | tuple) and widths and all(isinstance(w, int) and w >= 1 for w in widths)):
        raise ValueError(f"block_out_channels must be a list of whole numbers from 1; got {widths!r}.")
    quant_convs = config.get("use_quant_conv", True)
    required = {"_class_name": CLASS, "act_fn": "silu", "out_channels": channels, "use_post_quant_conv": quant_convs}
    required |= {name: [kind] * len(widths) for name, kind in STAGES.items()}
    for name, value in required.items():
        given = config.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ValueError(f'the backbone "autoencoder_kl" needs {name} = {value!r} of diffusers; got {given!r}.')
    size = config.get("sample_size", 32)
    sizes = image_size or ([size, size] if isinstance(size, int) else size)
    if not (isinstance(sizes, list | tuple) and len(sizes) == 2):
        raise ValueError(f"sample_size must be a whole number, or height and width; got {size!r}.")
    height, width = sizes
    narrowest = math.gcd(*widths)
    return VAEConfig(
        image_size=(height, width),
        channels=channels,
        backbone="autoencoder_kl",
        width=narrowest,
        width_multipliers=tuple(stage // narrowest for stage in widths),
        blocks=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        groups=config.get("norm_num_groups", 32),
        quant_convs=quant_convs,
        mid_attention=config.get("mid_block_add_attention", True),
    )


def state_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under diffusers' names."""
    return {_renamed(name, RENAMED): tensor for name, tensor in state.items()}


def state_from_diffusers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The weights under ours, which `names` lists; those that belong to none keep the name they have."""
    ours = {_renamed(name, RENAMED): name for name in names}
    theirs = {_renamed(name, FORMER): tensor for name, tensor in state.items()}
    return {ours.get(name, name): tensor for name, tensor in theirs.items()}


def save(directory: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write both files, each replaced as a whole."""
    saving.write_files(directory, WEIGHTS, state, config, {})


def load(directory: Path, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a damaged file.
    """
    config, state, _ = saving.read_files(directory, WEIGHTS, device, writer="diffusers' AutoencoderKL.save_pretrained")
    return config, state


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name
