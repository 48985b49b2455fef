"""The loss as a module: one line changed in existing training code."""

import torch
from torch import Tensor, nn

from . import _checks
from ._options import Clamp
from .functional import VAELossTerms, vae_loss


class VAELoss(nn.Module):
    """The loss of a variational autoencoder, `recon_weight * recon + beta * kl`; `vae_loss` with its options held.

    With no argument it is the textbook VAE: summed squared error plus KL, in nats per sample, mean over the batch.

    Args:
        beta: Weight of the KL term: a float or a 0-d tensor (kept as a buffer, so it moves with the module and is
            saved).
        likelihood: "l2".
        reduction: "batchmean", "sum", "mean" or "none".
        return_terms: Return VAELossTerms(loss, recon, kl) instead of the loss alone.
        recon_reduction, kl_reduction, recon_weight, logvar_clamp, one_pass, inplace: As in `vae_loss`.
        accumulate: Micro-batches whose gradients add up before a step: the loss, not its terms, is divided by it,
            within the forward pass, so the upstream gradient stays 1.

    Raises:
        ValueError, TypeError: an option without meaning, at construction; inputs that do not fit, at the call.

    Example:
        >>> criterion = fastvae.VAELoss(beta=1.0)
        >>> loss = criterion(recon, x, mu, logvar)
        >>> loss.backward()
    """

    beta: float | Tensor
    recon_weight: float | Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        likelihood: str = "l2",
        reduction: str = "batchmean",
        *,
        return_terms: bool = False,
        recon_reduction: str | None = None,
        kl_reduction: str | None = None,
        recon_weight: float | Tensor = 1.0,
        logvar_clamp: Clamp | None = None,
        accumulate: int = 1,
        one_pass: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _checks.choice("likelihood", likelihood, _checks.LIKELIHOODS)
        _checks.reductions(reduction, recon_reduction, kl_reduction)
        for name, value in (("beta", beta), ("recon_weight", recon_weight)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
            _checks.weight(name, value, torch.empty(0) if not isinstance(value, Tensor) else value)
        self.likelihood = likelihood
        self.reduction = reduction
        self.return_terms = return_terms
        self.recon_reduction = recon_reduction
        self.kl_reduction = kl_reduction
        self.logvar_clamp = _checks.logvar_clamp(logvar_clamp)
        self.accumulate = _checks.at_least_one("accumulate", accumulate)
        self.one_pass = one_pass
        self.inplace = inplace

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        beta: float | Tensor | None = None,
    ) -> Tensor | VAELossTerms:
        """The scalar to call `.backward()` on, or `VAELossTerms`; `beta` overrides the module's for this call."""
        terms = vae_loss(
            recon,
            target,
            mu,
            logvar,
            kl=kl,
            beta=(self.beta if beta is None else beta) / self.accumulate,
            likelihood=self.likelihood,
            reduction=self.reduction,
            recon_reduction=self.recon_reduction,
            kl_reduction=self.kl_reduction,
            recon_weight=self.recon_weight / self.accumulate,
            logvar_clamp=self.logvar_clamp,
            one_pass=self.one_pass,
            inplace=self.inplace,
        )
        return terms if self.return_terms else terms.loss

    def extra_repr(self) -> str:
        return f"beta={self.beta}, likelihood={self.likelihood!r}, reduction={self.reduction!r}"
