"""The residual autoencoder of latent diffusion: images [B, C, H, W] to moments [B, 2 * latent_channels, h, w] and back.

A stage is a row of ResNet blocks; between two stages the resolution halves (or doubles). The coarsest one is followed
(or preceded) by self-attention over all positions.

Source: Rombach et al., High-resolution image synthesis with latent diffusion models, arXiv:2112.10752, appendix D.1.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .recompute import call

EPSILON = 1e-6  # of the normalisation, as in the published weights


class Encoder(nn.Module):
    """[B, C, H, W] in [0, 1] to mean and log variance side by side, [B, 2 * latent_channels, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.recompute = config.checkpointing
        widths, moments = config.stage_widths, 2 * config.latent_channels
        self.conv_in = _conv3(config.channels, widths[0])
        self.stages = nn.Sequential()
        for i, width in enumerate(widths):
            resample = Halve(width) if i < len(widths) - 1 else nn.Identity()
            self.stages.append(Stage(config, widths[max(i - 1, 0)], width, config.blocks, resample))
        self.middle = _middle(config, widths[-1])
        self.norm = _norm(config, widths[-1])
        self.conv_out = _conv3(widths[-1], moments)
        self.quant = nn.Conv2d(moments, moments, kernel_size=1) if config.quant_convs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.stages(self.conv_in(2 * x - 1)))
        return call(self._head, x, recompute=self.recompute)

    def _head(self, x: Tensor) -> Tensor:
        moments: Tensor = self.quant(self.conv_out(F.silu(self.norm(x))))
        return moments


class Decoder(nn.Module):
    """[B, latent_channels, h, w] to [B, C, H, W], about [0, 1]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.recompute = config.checkpointing
        widths, sizes, latents = config.stage_widths[::-1], config.stage_sizes[::-1], config.latent_channels
        self.quant = nn.Conv2d(latents, latents, kernel_size=1) if config.quant_convs else nn.Identity()
        self.conv_in = _conv3(latents, widths[0])
        self.middle = _middle(config, widths[0])
        self.stages = nn.Sequential()
        for i, width in enumerate(widths):
            resample = Double(width, sizes[i + 1]) if i < len(widths) - 1 else nn.Identity()
            self.stages.append(Stage(config, widths[max(i - 1, 0)], width, config.blocks + 1, resample))
        self.norm = _norm(config, widths[-1])
        self.conv_out = _conv3(widths[-1], config.channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stages(self.middle(self.conv_in(self.quant(z))))
        return call(self._head, x, recompute=self.recompute)

    def _head(self, x: Tensor) -> Tensor:
        images: Tensor = 0.5 * self.conv_out(F.silu(self.norm(x))) + 0.5
        return images


class Blocks(nn.Sequential):
    """Modules in a row, each recomputed in the backward pass if `recompute`."""

    def __init__(self, *blocks: nn.Module, recompute: bool) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = call(block, x, recompute=self.recompute)
        return x


class Stage(nn.Module):
    """ResNet blocks at one resolution, then `resample` to the next."""

    def __init__(self, config: VAEConfig, width_in: int, width: int, n_blocks: int, resample: nn.Module) -> None:
        super().__init__()
        blocks = (ResNetBlock(config, width if i else width_in, width) for i in range(n_blocks))
        self.blocks = Blocks(*blocks, recompute=config.checkpointing)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        resampled: Tensor = self.resample(self.blocks(x))
        return resampled


class ResNetBlock(nn.Module):
    """x + f(x), f two convolutions, each after normalisation and SiLU."""

    def __init__(self, config: VAEConfig, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, width_in)
        self.conv1 = _conv3(width_in, width)
        self.norm2 = _norm(config, width)
        self.conv2 = _conv3(width, width)
        self.shortcut = nn.Conv2d(width_in, width, kernel_size=1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv1(F.silu(self.norm1(x)))
        change = self.conv2(F.silu(self.norm2(change)))
        result: Tensor = self.shortcut(x) + change
        return result


class SelfAttention(nn.Module):
    """x + attention among all positions of the normalised x, one head."""

    def __init__(self, config: VAEConfig, width: int) -> None:
        super().__init__()
        self.norm = _norm(config, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.norm(x).flatten(2).mT.unsqueeze(1)  # [B, 1 head, h * w, width]
        query, key, value = self.query(positions), self.key(positions), self.value(positions)
        change = self.out(F.scaled_dot_product_attention(query, key, value))
        result: Tensor = x + change.squeeze(1).mT.unflatten(2, x.shape[2:])
        return result


# an odd side is padded by one pixel in front, and cut there on the way back, so that both ways agree on ceil(size / 2)


class Halve(nn.Conv2d):
    """Strided convolution; even sides are padded behind only, as the published weights expect it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


class Double(nn.Conv2d):
    """Every pixel four times, then a convolution; to exactly `size`."""

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__(width, width, kernel_size=3, padding=1)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, height % 2 :, width % 2 :])


def _middle(config: VAEConfig, width: int) -> Blocks:
    attention = SelfAttention(config, width) if config.mid_attention else nn.Identity()
    return Blocks(
        ResNetBlock(config, width, width), attention, ResNetBlock(config, width, width), recompute=config.checkpointing
    )


def _norm(config: VAEConfig, width: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, width, eps=EPSILON)


def _conv3(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel_size=3, padding=1)
