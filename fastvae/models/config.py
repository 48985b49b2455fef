"""What a VAE is built from."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Backbone = Literal["conv", "mlp", "autoencoder_kl"]
MOST_GROUPS = 32
SMALLEST_GROUP = 4  # channels: a single one, in a map of one pixel, is normalised to nothing


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `VAE`.

    Args:
        image_size: (height, width) of an image, in pixels; any, from (1, 1).
        channels: Channels of an image: 1 for grey, 3 for RGB.
        latent_dim: conv, mlp: dimensions of the latent space.
        backbone: "conv", convolutions that halve the image; "mlp", one hidden layer each way; or "autoencoder_kl", the
            residual autoencoder of latent diffusion, whose latents are a map: `width=128` has the size of Stable
            Diffusion's, 84 million parameters.
        width: conv: channels after the first halving; they double with each further one, up to eight times `width`.
            autoencoder_kl: channels of the first stage.
        residual: conv: residual blocks at every resolution, and convolutions with PixelShuffle in the decoder. False:
            strided and transposed convolutions alone, as in the models of former versions; faster, but its images show
            a checkerboard.
        hidden: mlp: units of the hidden layer.
        latent_channels: autoencoder_kl: channels of the latent map; 4 to 16 are usual.
        width_multipliers: autoencoder_kl: channels of each stage over `width`. Each stage but the first sees half the
            resolution of the one before, so four make a latent map of an eighth of the image's sides.
        blocks: autoencoder_kl: ResNet blocks of a stage of the encoder; the decoder has one more.
        groups: autoencoder_kl: groups of each normalisation, a divisor of `width`. None: up to 32, so that each has
            four channels or more.
        mid_attention: autoencoder_kl: whether there is self-attention in the coarsest stage.
        quant_convs: autoencoder_kl: whether there are 1 x 1 convolutions on either side of the latents.
        checkpointing: Keep few activations and compute the others again in the backward pass: slower, less memory, the
            same numbers. autoencoder_kl: of each block; conv, mlp: of the encoder and of the decoder.

    Raises:
        ValueError: a size that is not a positive whole number, or an unknown backbone.
    """

    image_size: tuple[int, int] = (28, 28)
    channels: int = 1
    latent_dim: int = 32
    backbone: Backbone = "conv"
    width: int = 32
    residual: bool = True
    hidden: int = 400
    latent_channels: int = 4
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    groups: int | None = None
    mid_attention: bool = True
    quant_convs: bool = True
    checkpointing: bool = False

    def __post_init__(self) -> None:
        size = self.image_size
        if not (isinstance(size, tuple) and len(size) == 2 and all(map(_positive, size))):
            raise ValueError(
                f"image_size must be (height, width), whole numbers from 1; got {size!r}. Pass (28, 28), say."
            )
        for name in ("channels", "latent_dim", "width", "hidden", "latent_channels", "blocks"):
            value = getattr(self, name)
            if not _positive(value):
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}. Pass {_DEFAULTS[name]}, say.")
        for name in ("residual", "mid_attention", "quant_convs", "checkpointing"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False; got {value!r}.")
        multipliers = self.width_multipliers
        if not (isinstance(multipliers, tuple) and multipliers and all(map(_positive, multipliers))):
            raise ValueError(
                f"width_multipliers must be one whole number from 1 for each stage; got {multipliers!r}. "
                f"Pass {_DEFAULTS['width_multipliers']}, say."
            )
        if self.groups is not None and not (_positive(self.groups) and self.width % self.groups == 0):
            raise ValueError(f"groups must divide width, {self.width}; got {self.groups!r}. Pass None: as many as fit.")
        if self.backbone not in get_args(Backbone):
            raise ValueError(f"backbone must be one of {', '.join(get_args(Backbone))}; got {self.backbone!r}.")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.channels, *self.image_size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of a latent: (latent_dim,), or (latent_channels, h, w) of autoencoder_kl."""
        if self.backbone == "autoencoder_kl":
            return (self.latent_channels, *self.stage_sizes[-1])
        return (self.latent_dim,)

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """autoencoder_kl: channels of each stage, the finest first."""
        return tuple(self.width * multiplier for multiplier in self.width_multipliers)

    @property
    def stage_sizes(self) -> tuple[tuple[int, int], ...]:
        """autoencoder_kl: (height, width) in each stage, the finest first; half an odd side is rounded up."""
        height, width = self.image_size
        return tuple((-(-height // 2**i), -(-width // 2**i)) for i in range(len(self.width_multipliers)))

    @property
    def norm_groups(self) -> int:
        """autoencoder_kl: groups of each normalisation."""
        if self.groups is not None:
            return self.groups
        return math.gcd(MOST_GROUPS, max(self.width // SMALLEST_GROUP, 1), self.width)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        lists = {"image_size": list(self.image_size), "width_multipliers": list(self.width_multipliers)}
        return dataclasses.asdict(self) | lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`. A field that `values` lacks has its default, but `residual` is False: former versions,
        which did not write it, had no residual blocks.

        Raises:
            ValueError: a key that is not a field, or a value that is not allowed.
        """
        unknown = sorted(set(values) - set(_DEFAULTS))
        if unknown:
            raise ValueError(
                f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} in a VAEConfig; known: "
                f"{', '.join(_DEFAULTS)}. Was it written by a newer version of fastvae?"
            )
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**({"residual": False} | values | tuples))


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(VAEConfig)}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
