"""Encoder and decoder networks: images [B, C, H, W] to moments, mu and logvar side by side, and latents to images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autoencoder_kl
from .config import VAEConfig
from .recompute import call

COARSEST = 8  # pixels: halving goes on until neither side is longer
MAX_WIDENING = 8  # of the channels, against the first stage


class Layers(nn.Sequential):
    """Layers in a row, recomputed from their input in the backward pass if `recompute`."""

    def __init__(self, *layers: nn.Module, recompute: bool) -> None:
        super().__init__(*layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        return call(super().forward, x, recompute=self.recompute)


def build_encoder(config: VAEConfig) -> nn.Module:
    """[B, C, H, W] to mu and logvar side by side: [B, 2 * latent_dim], or [B, 2 * latent_channels, h, w]."""
    if config.backbone == "autoencoder_kl":
        return autoencoder_kl.Encoder(config)
    return Layers(*_encoder_layers(config), recompute=config.checkpointing)


def build_decoder(config: VAEConfig) -> nn.Module:
    """[B, *latent_shape] to [B, C, H, W]: the mean of a Gaussian, so neither end of the range is out of reach."""
    if config.backbone == "autoencoder_kl":
        return autoencoder_kl.Decoder(config)
    return Layers(*_decoder_layers(config), recompute=config.checkpointing)


def _encoder_layers(config: VAEConfig) -> list[nn.Module]:
    if config.backbone == "mlp":
        hidden = nn.Linear(math.prod(config.image_shape), config.hidden)
        return [nn.Flatten(), hidden, nn.ReLU(), nn.Linear(config.hidden, 2 * config.latent_dim)]
    sizes, widths = stages(config)
    layers: list[nn.Module] = [_patches(config.channels, widths[0], sizes[0]), *_stage(config, widths, 0)]
    for i in range(1, len(widths)):
        layers += [nn.Conv2d(widths[i - 1], widths[i], kernel_size=3, stride=2, padding=1), *_stage(config, widths, i)]
    if config.residual:
        layers += _normalized_silu(widths, len(widths) - 1)
    n_features = widths[-1] * math.prod(sizes[-1])
    return [*layers, nn.Flatten(), nn.Linear(n_features, 2 * config.latent_dim)]


def _decoder_layers(config: VAEConfig) -> list[nn.Module]:
    if config.backbone == "mlp":
        hidden = nn.Linear(config.latent_dim, config.hidden)
        pixels = nn.Linear(config.hidden, math.prod(config.image_shape))
        return [hidden, nn.ReLU(), pixels, nn.Unflatten(1, config.image_shape)]
    sizes, widths = stages(config)
    n_features = widths[-1] * math.prod(sizes[-1])
    top = len(widths) - 1
    layers: list[nn.Module] = [nn.Linear(config.latent_dim, n_features), nn.Unflatten(1, (widths[-1], *sizes[-1]))]
    layers += _stage(config, widths, top)
    for i in range(top, 0, -1):
        layers += [_double(config, widths[i], widths[i - 1], sizes[i], kernel=4), *_stage(config, widths, i - 1)]
    if config.residual:
        layers += _normalized_silu(widths, 0)
    return [*layers, _double(config, widths[0], config.channels, sizes[0], kernel=2)]


def stages(config: VAEConfig) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes before and after each halving (odd ones round up), and the channels after each; at least one halving."""
    sizes = [config.image_size]
    while len(sizes) == 1 or max(sizes[-1]) > COARSEST:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    widths = [config.width * min(2**i, MAX_WIDENING) for i in range(len(sizes) - 1)]
    return sizes, widths


class Residual(nn.Sequential):
    """x + f(x), where f is a 3 x 3 and a 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        norm = nn.GroupNorm(1, width)
        super().__init__(norm, nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + change


class Double(nn.Conv2d):
    """A 3 x 3 convolution whose output channels become 2 x 2 pixels; cropped to exactly `size`.

    The four pixels start with the same weights, so that training starts without a checkerboard.

    Source: Aitken et al., Checkerboard artifact free sub-pixel convolution, arXiv:1707.02937, section 4.
    """

    def __init__(self, width_in: int, width_out: int, size: tuple[int, int]) -> None:
        super().__init__(width_in, 4 * width_out, kernel_size=3, padding=1)
        self.size = size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in self.parameters():
            parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        return F.pixel_shuffle(super().forward(x), 2)[:, :, height % 2 :, width % 2 :]


def _stage(config: VAEConfig, widths: list[int], stage: int) -> list[nn.Module]:
    """Layers between two changes of the resolution."""
    return [Residual(widths[stage])] if config.residual else _normalized_silu(widths, stage)


def _normalized_silu(widths: list[int], stage: int) -> list[nn.Module]:
    # no normalisation next to the pixels: with one stage it could see a single value, which it would set to 0
    return [nn.GroupNorm(1, widths[stage]), nn.SiLU()] if stage > 0 else [nn.SiLU()]


# an odd side is padded by one pixel in front, and cut there on the way back, so that both ways agree on ceil(size / 2)


def _patches(channels: int, width: int, size: tuple[int, int]) -> nn.Conv2d:
    """2 x 2 patches, so that no feature map has the full resolution."""
    odd = (size[0] % 2, size[1] % 2)
    return nn.Conv2d(channels, width, kernel_size=2, stride=2, padding=odd)


def _double(config: VAEConfig, width_in: int, width_out: int, size: tuple[int, int], *, kernel: int) -> nn.Module:
    """Twice the resolution, to exactly `size`; `kernel` is that of a model without residual blocks."""
    if config.residual:
        return Double(width_in, width_out, size)
    odd = (size[0] % 2, size[1] % 2)
    padding = (kernel // 2 - 1 + odd[0], kernel // 2 - 1 + odd[1])
    return nn.ConvTranspose2d(width_in, width_out, kernel, stride=2, padding=padding, output_padding=odd)
