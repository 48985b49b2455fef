"""The posterior as an object: a drop-in for the one of diffusers."""

from typing import Any, Self

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp

from . import _checks, functional, reference, sampling
from ._dtypes import compute_dtype


class DiagonalGaussian:
    """N(mu, diag(exp(logvar))) over all dimensions but the batch.

    Args:
        mu: Mean, [B, ...]; float64, float32, bfloat16 or float16; any strides.
        logvar: Log of the variance; shape and device of `mu`.

    Attributes:
        mean, logvar, std, var: [B, ...]; logvar after the clamp of `from_moments`; std = var = 0 if deterministic.

    Raises:
        ValueError: shapes or devices differ. TypeError: not floating point.
    """

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        _checks.gaussian(mu, logvar)
        self.mean = mu
        self._logvar = logvar
        self._clamp: Clamp | None = None
        self._packed: tuple[Tensor, int] | None = None
        self.deterministic = False

    @classmethod
    def from_moments(
        cls,
        packed: Tensor,
        dim: int = 1,
        logvar_clamp: Clamp | None = (-30.0, 20.0),
        deterministic: bool = False,
    ) -> Self:
        """From mean and logvar side by side along `dim`, as an encoder's last layer writes them.

        Args:
            packed: [B, ..., 2 C, ...] with 2 C at `dim`: the first half is the mean.
            dim: Where the halves lie; not the batch's dimension 0.
            logvar_clamp: None, or (lo, hi); diffusers clamps to (-30, 20).
            deterministic: A point mass at the mean: samples are the mean, the KL is 0 ([B], on packed's device).

        Raises:
            ValueError: `dim` is the batch's, out of range, or of odd size. TypeError: not floating point.
        """
        dim = _checks.halves(packed, dim)
        posterior = cls(*packed.chunk(2, dim))
        posterior._packed = (packed, dim)
        posterior._clamp = _checks.logvar_clamp(logvar_clamp)
        posterior.deterministic = deterministic
        return posterior

    @property
    def logvar(self) -> Tensor:
        return reference.clamp(self._logvar, self._clamp)

    @property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, *, seed: int | Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """Draw a latent, differentiable in mean and logvar; arguments as `reparameterize`."""
        return self._draw(generator, seed, offset, None, with_kl=False)[0]

    def rsample_kl(
        self,
        generator: torch.Generator | None = None,
        *,
        prior: "DiagonalGaussian | tuple[Tensor, Tensor] | None" = None,
        seed: int | Tensor | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw a latent and measure the KL from a prior in one pass: (z, [B] in nats).

        prior: N(0, I) if None; another posterior, or its (mean, logvar), which gets gradients. Infinite KL if it is
        deterministic and this is not.

        After `from_moments` the gradient is one packed tensor, written in place of its halves: no concatenation.
        Arguments as `reparameterize_kl`.
        """
        if isinstance(prior, DiagonalGaussian):
            if prior.deterministic or self.deterministic:
                return self.sample(generator, seed=seed, offset=offset), self.kl(prior)
            prior = prior.mean, prior.logvar
        z, kl = self._draw(generator, seed, offset, prior, with_kl=True)
        assert kl is not None
        return z, kl

    def _draw(
        self,
        generator: torch.Generator | None,
        seed: int | Tensor | None,
        offset: int,
        prior: tuple[Tensor, Tensor] | None,
        *,
        with_kl: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if self.deterministic:
            return self.mean, self.kl() if with_kl else None
        options: Any = {"with_kl": with_kl, "packed": self._packed, "prior": prior}
        return sampling.sample(self.mean, self._logvar, generator, seed, offset, self._clamp, **options)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other), [B] in nats; other: N(0, I) if None.

            sum of (logvar_o - logvar + (var + (mean - mean_o)^2) / var_o - 1) / 2

        Infinite if only `other` is deterministic.

        Raises:
            ValueError: shapes or devices differ.
        """
        if self.deterministic:
            dtype = compute_dtype(self.mean, self._logvar)
            return self.mean.new_zeros(self.mean.shape[0], dtype=dtype)
        if other is None:
            return functional.gaussian_kl(self.mean, self._logvar, reduction="none", logvar_clamp=self._clamp)
        _checks.same_shape("self", self.mean, "other", other.mean)
        _checks.same_device("self", self.mean, "other", other.mean)
        if other.deterministic:  # nothing with a width fits into a point
            return self.kl() + torch.inf
        prior = (other.mean, other.logvar)
        return functional.gaussian_kl(self.mean, self._logvar, prior=prior, reduction="none", logvar_clamp=self._clamp)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood of a sample, [B] in nats.

        sum of (log 2 pi + logvar + (sample - mean)^2 / var) / 2
        """
        if self.deterministic:
            return self.kl()
        _checks.same_shape("sample", sample, "the mean", self.mean)
        dtype = compute_dtype(self.mean, self._logvar, sample)
        logvar = self.logvar.to(dtype)
        distance = (sample.to(dtype) - self.mean.to(dtype)).square() * torch.exp(-logvar)
        return reference.per_sample(0.5 * (1.8378770664093453 + logvar + distance))  # log(2 pi)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean
