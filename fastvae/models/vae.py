"""The variational autoencoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastvae import DiagonalGaussian, _numbers, functional

from . import diffusers_format, saving
from .config import VAEConfig
from .interpolation import InterpolationMode, interpolate_latents
from .nets import build_decoder, build_encoder

LATENT_DIFFUSION_CLAMP = (-30.0, 20.0)  # of the log variance


class VAEOutput(NamedTuple):
    """What a training step needs: `vae_loss(recon, x, kl=kl)` has all of it."""

    recon: Tensor
    """[B, C, H, W]: the decoder's mean; about [0, 1], not clamped."""
    z: Tensor
    """[B, *latent_shape]: one sample of the posterior."""
    mu: Tensor
    """[B, *latent_shape]: posterior mean."""
    logvar: Tensor
    """[B, *latent_shape]: log of the posterior variance."""
    kl: Tensor
    """[B]: KL from the posterior to N(0, I), in nats."""


# without it an exported model can be run, but not saved
torch.utils._pytree._register_namedtuple(VAEOutput, serialized_type_name="fastvae.models.VAEOutput")


class VAE(nn.Module):
    """Variational autoencoder with a Gaussian posterior, a standard normal prior and a Gaussian decoder.

        z = mu(x) + exp(logvar(x) / 2) * noise,  x' = decode(z)

    Wherever it takes images: [B, C, H, W] of the config's shape, floats in [0, 1] or uint8 (value / 255). Latents are
    [B, *latent_shape]: (latent_dim,), or (latent_channels, h, w) with the backbone "autoencoder_kl".

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
        posterior = self.posterior(x)
        z, kl = posterior.rsample_kl(generator, seed=seed, offset=offset)
        return VAEOutput(self.decode(z), z, posterior.mean, posterior.logvar, kl)

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """Posterior of the latents; "autoencoder_kl": its log variance clamped to (-30, 20), as latent diffusion's."""
        clamp = LATENT_DIFFUSION_CLAMP if self.config.backbone == "autoencoder_kl" else None
        return DiagonalGaussian.from_moments(self.encoder(self._as_input(x)), logvar_clamp=clamp)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each [B, *latent_shape]."""
        posterior = self.posterior(x)
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] from latents [B, *latent_shape]; not clamped."""
        images: Tensor = self.decoder(z)
        return images

    @torch.no_grad()
    def sample(self, n: int, *, seed: int | None = None, temperature: float = 1.0) -> Tensor:
        """`n` new images [n, C, H, W], clamped to [0, 1].

        Args:
            n: How many.
            seed: The same seed draws the same latents on every device; None: torch's default generator.
            temperature: Factor on the latents, which are standard normal otherwise: below 1, images are more typical
                and less varied; 0 decodes the mean of the prior.

        Raises:
            ValueError: a temperature that is negative or not finite. TypeError: one that is not a number.
        """
        temperature = _numbers.not_negative("temperature", temperature)
        parameter = self._parameter()
        shape = (n, *self.config.latent_shape)
        if seed is None:
            z = torch.randn(shape, dtype=parameter.dtype, device=parameter.device)
        else:
            z = functional.philox_normal(shape, seed=seed, dtype=parameter.dtype, device=parameter.device)
        return self.decode(z * temperature).clamp(0, 1)

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
        a, b = (self.encode(x)[0].flatten(1) for x in (x_a, x_b))
        z = interpolate_latents(a, b, steps, mode)
        images = self.decode(z.reshape(-1, *self.config.latent_shape)).clamp(0, 1)
        return images.reshape(len(z), steps, *self.config.image_shape)

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
        return cls._without_weights(config)._with(state, f"the weights in {directory} do not fit its config")

    def save_diffusers(
        self, directory: str | Path, *, scaling_factor: float, shift_factor: float | None = None
    ) -> None:
        """Write what diffusers' `AutoencoderKL.from_pretrained` loads.

        Args:
            directory: Gets config.json and diffusion_pytorch_model.safetensors.
            scaling_factor: What a diffusion model multiplies latents by: 1 / their standard deviation over the data, or
                that of the model that this one was loaded from (0.18215 for Stable Diffusion 1).
            shift_factor: What a diffusion model takes off them before; None: nothing.

        Raises:
            ValueError: another backbone than "autoencoder_kl".
        """
        factors = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
        config = diffusers_format.config_to_diffusers(self.config) | factors
        diffusers_format.save(Path(directory), config, self.to_diffusers_state_dict())

    def to_diffusers_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of diffusers' `AutoencoderKL`; they share memory with the model's.

        Raises:
            ValueError: another backbone than "autoencoder_kl".
        """
        diffusers_format.require_autoencoder_kl(self.config)
        return diffusers_format.state_to_diffusers(self.state_dict())

    @classmethod
    def from_diffusers(
        cls,
        directory: str | Path,
        *,
        image_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load an `AutoencoderKL` that diffusers saved, into the backbone "autoencoder_kl".

        This class has images in [0, 1], diffusers in [-1, 1]: `vae.posterior(x)` is that of `2 * x - 1`, and
        `vae.decode(z)` is `decode(z).sample / 2 + 1 / 2`. Latents are as they come: scaling_factor and shift_factor are
        for diffusion models, and not applied here.

        Args:
            directory: Holds config.json and diffusion_pytorch_model.safetensors; of a pipeline, its folder "vae".
            image_size: (height, width) of the images to come, whatever it was trained on; None: its sample_size. The
                latents of other sizes than multiples of 8 differ from diffusers', which cuts such images.
            device: Default: the CPU.

        Raises:
            FileNotFoundError: the directory or one of its files is missing; pickled weights are not read.
            ValueError: a damaged file, an option of diffusers that is not known here, or weights that do not fit.
        """
        config, state = diffusers_format.load(Path(directory), device if device is not None else "cpu")
        return cls.from_diffusers_state_dict(config, state, image_size=image_size)

    @classmethod
    def from_diffusers_state_dict(
        cls, config: Mapping[str, Any], state: Mapping[str, Tensor], *, image_size: tuple[int, int] | None = None
    ) -> Self:
        """As `from_diffusers`, from `config` and `state_dict()` of an `AutoencoderKL`; shares its memory.

        Raises:
            ValueError: an option of diffusers that is not known here, or weights that do not fit.
        """
        model = cls._without_weights(diffusers_format.config_from_diffusers(config, image_size))
        weights = diffusers_format.state_from_diffusers(state, model.state_dict())
        return model._with(weights, "the weights do not fit diffusers' config")

    @classmethod
    def _without_weights(cls, config: VAEConfig) -> Self:
        with torch.device("meta"):  # draws nothing from the generator
            return cls(config)

    def _with(self, weights: dict[str, Tensor], misfit: str) -> Self:
        try:
            self.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{misfit}: {error}") from error
        return self

    def _as_input(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"images must be [B, C, H, W] with (C, H, W) = {self.config.image_shape}, as the model's config says; "
                f"got shape {tuple(x.shape)}. Resize them, or build a VAE for that size."
            )
        if x.dtype == torch.uint8:
            return x.to(self._parameter().dtype).div_(255)
        if not x.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1] or uint8; got {x.dtype}. Pass x / 255.")
        return x.to(self._parameter().dtype)

    def _parameter(self) -> nn.Parameter:
        """Any parameter: its dtype and device are the model's."""
        return next(self.parameters())
