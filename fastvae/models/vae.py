"""The variational autoencoder."""

from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from fastvae import functional

from . import saving
from .config import VAEConfig
from .interpolation import InterpolationMode, interpolate_latents
from .nets import build_decoder, build_encoder


class VAEOutput(NamedTuple):
    """What a training step needs: `vae_loss(recon, x, kl=kl)` has all of it."""

    recon: Tensor
    """[B, C, H, W]: the decoder's mean; about [0, 1], not clamped."""
    z: Tensor
    """[B, latent_dim]: one sample of the posterior."""
    mu: Tensor
    """[B, latent_dim]: posterior mean."""
    logvar: Tensor
    """[B, latent_dim]: log of the posterior variance."""
    kl: Tensor
    """[B]: KL from the posterior to N(0, I), in nats."""


class VAE(nn.Module):
    """Variational autoencoder with a Gaussian posterior, a standard normal prior and a Gaussian decoder.

        z = mu(x) + exp(logvar(x) / 2) * noise,  x' = decode(z)

    Wherever it takes images: [B, C, H, W] of the config's shape, floats in [0, 1] or uint8 (value / 255).

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, arXiv:1312.6114.
    """

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else VAEConfig()
        self.encoder = build_encoder(self.config)
        self.decoder = build_decoder(self.config)

    def forward(
        self, x: Tensor, *, generator: torch.Generator | None = None, seed: int | Tensor | None = None, offset: int = 0
    ) -> VAEOutput:
        """Encode, sample and decode, in training and in evaluation alike.

        Args:
            x: Images.
            generator: Source of the noise; with `seed` None too, torch's default one.
            seed: Makes the noise a function of (seed, element), the same on every device.
            offset: With `seed`: index of the batch's first latent element in the noise.

        Raises:
            ValueError: images of another shape than the config's.
            TypeError: neither floating point nor uint8.
        """
        mu, logvar = self.encode(x)
        z, kl = functional.reparameterize_kl(mu, logvar, generator=generator, seed=seed, offset=offset)
        return VAEOutput(self.decode(z), z, mu, logvar, kl)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each [B, latent_dim]."""
        mu, logvar = self.encoder(self._as_input(x)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] from latents [B, latent_dim]; not clamped."""
        images: Tensor = self.decoder(z)
        return images

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """`n` new images [n, C, H, W], clamped to [0, 1].

        Args:
            n: How many.
            seed: The same seed draws the same latents on every device; None: torch's default generator.
        """
        parameter = self._parameter()
        shape = (n, self.config.latent_dim)
        if seed is None:
            z = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
        else:
            z = functional.philox_normal(shape, seed=seed, dtype=parameter.dtype, device=parameter.device)
        return self.decode(z).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Images decoded from the posterior's mean, [B, C, H, W], clamped to [0, 1]; no noise."""
        return self.decode(self.encode(x)[0]).clamp(0, 1)

    @torch.no_grad()
    def interpolate(self, x_a: Tensor, x_b: Tensor, steps: int = 9, mode: InterpolationMode = "spherical") -> Tensor:
        """Images on the way from `x_a` to `x_b`, between the means of their posteriors.

        Args:
            x_a: Images to start from.
            x_b: As many images to end at.
            steps: Images in a row, reconstructions of both ends included; at least 2.
            mode: "spherical" (along the sphere on which a Gaussian's samples lie) or "linear".

        Returns:
            [B, steps, C, H, W], clamped to [0, 1].
        """
        z = interpolate_latents(self.encode(x_a)[0], self.encode(x_b)[0], steps, mode)
        return self.decode(z.flatten(0, 1)).clamp(0, 1).reshape(len(z), steps, *self.config.image_shape)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json; each replaces its predecessor as a whole or not at all."""
        saving.save(Path(directory), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Load what `save_pretrained` wrote; dtypes as saved, on `device` (default: the CPU), in training mode.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            ValueError: a damaged file, an unknown config key, or weights that do not fit the config.
        """
        config, state = saving.load(Path(directory), device if device is not None else "cpu")
        with torch.device("meta"):  # draws nothing from the generator: every weight comes from the file
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the weights in {directory} do not fit its config: {error}") from error
        return model

    def _as_input(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"images must be [B, C, H, W] with (C, H, W) = {self.config.image_shape}, as the model's config says; "
                f"got shape {tuple(x.shape)}. Resize them, or build a VAE for that size."
            )
        if x.dtype == torch.uint8:
            return x.to(self._parameter().dtype) / 255
        if not x.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1] or uint8; got {x.dtype}. Pass x / 255.")
        return x.to(self._parameter().dtype)

    def _parameter(self) -> nn.Parameter:
        """Any parameter: its dtype and device are the model's."""
        return next(self.parameters())
