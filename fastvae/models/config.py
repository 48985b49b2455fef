"""What a VAE is built from."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Backbone = Literal["conv", "mlp"]


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a `VAE`.

    Args:
        image_size: (height, width) of an image, in pixels; any, from (1, 1).
        channels: Channels of an image: 1 for grey, 3 for RGB.
        latent_dim: Dimensions of the latent space.
        backbone: "conv", convolutions that halve the image, or "mlp", one hidden layer each way.
        width: conv: channels after the first halving; they double with each further one, up to eight times `width`.
        hidden: mlp: units of the hidden layer.

    Raises:
        ValueError: a size that is not a positive whole number, or an unknown backbone.
    """

    image_size: tuple[int, int] = (28, 28)
    channels: int = 1
    latent_dim: int = 32
    backbone: Backbone = "conv"
    width: int = 32
    hidden: int = 400

    def __post_init__(self) -> None:
        size = self.image_size
        if not (isinstance(size, tuple) and len(size) == 2 and all(map(_positive, size))):
            raise ValueError(
                f"image_size must be (height, width), whole numbers from 1; got {size!r}. Pass (28, 28), say."
            )
        for name in ("channels", "latent_dim", "width", "hidden"):
            value = getattr(self, name)
            if not _positive(value):
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}. Pass {_DEFAULTS[name]}, say.")
        if self.backbone not in get_args(Backbone):
            raise ValueError(f"backbone must be one of {', '.join(get_args(Backbone))}; got {self.backbone!r}.")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.channels, *self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self) | {"image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; a field that `values` lacks has its default.

        Raises:
            ValueError: a key that is not a field, or a value that is not allowed.
        """
        unknown = sorted(set(values) - set(_DEFAULTS))
        if unknown:
            raise ValueError(
                f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)} in a VAEConfig; known: "
                f"{', '.join(_DEFAULTS)}. Was it written by a newer version of fastvae?"
            )
        size = values.get("image_size", _DEFAULTS["image_size"])
        return cls(**(values | {"image_size": tuple(size) if isinstance(size, list) else size}))


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(VAEConfig)}


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
