"""The reconstruction term of scvi-tools' SCVI, computed by fastvae while it trains."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..likelihood_counts import CountLikelihood, NegativeBinomial, Poisson
from ..ops.counts import count_nll
from ._patch import Patch, Replacement, imported

Module = Any  # scvi.module.VAE, which is not imported here


def patch_scvi() -> Patch:
    """Let fastvae compute the likelihood of the counts, with its gradients, while `scvi.model.SCVI` trains.

        -log p(x | z) of gene_likelihood "nb", "zinb", "poisson" with dispersion "gene", "gene-cell", "gene-batch"

    Call it before `scvi.model.SCVI(...).train()`. `scvi.module.VAE.generative` is replaced. In training mode it
    returns, in place of the distribution of the counts, an object whose `log_prob(x).sum(-1)` takes one pass over the
    counts; anything else that is asked of it comes from scvi's own distribution. Outside of training nothing changes:
    validation, latent representations, normalized expression and what is saved are scvi's own.

    scvi's own code also serves other dispersions and likelihoods, subclasses of its VAE, embedded batches, several
    samples of z at once, transform_batch, and minified data.

    The loss is not the same to the last digit: scvi adds 1e-8 to mean and dispersion, and takes differences of lgamma
    in float32, which lose their digits for dispersions from 1e4 on.

    Returns:
        Patch: `undo()`, or the end of its `with` block, puts scvi's function back.

    Raises:
        ImportError: scvi-tools is not installed.
        RuntimeError: it is patched already.

    Source: scvi.module.VAE of scvi-tools 1.4.2; Lopez et al., Nature Methods 2018.
    """
    vae, decoder = imported("scvi.module").VAE, imported("scvi.nn").DecoderSCVI
    own = vae.generative

    @wraps(own)  # scvi looks at its signature
    def generative(self: Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _generative(self, vae, decoder, own, *args, **kwargs)

    return Patch("patch_scvi", [Replacement(vae, "generative", generative)])


def _generative(
    self: Module,
    vae: Any,
    decoder: Any,
    own: Callable[..., dict[str, Any]],
    z: Tensor,
    library: Tensor,
    batch_index: Tensor,
    cont_covs: Tensor | None = None,
    cat_covs: Tensor | None = None,
    size_factor: Tensor | None = None,
    y: Tensor | None = None,
    transform_batch: Any = None,
) -> dict[str, Any]:
    """As scvi.module.VAE.generative, which is `own`."""
    arguments = z, library, batch_index, cont_covs, cat_covs, size_factor, y, transform_batch
    served = (
        type(self) is vae
        and type(self.decoder) is decoder
        and self.training
        and torch.is_grad_enabled()
        and z.ndim == 2
        and transform_batch is None
        and self.minified_data_type is None
        and self.batch_representation == "one-hot"
        and self.gene_likelihood in ("nb", "zinb", "poisson")
        and self.dispersion in ("gene", "gene-cell", "gene-batch")
    )
    if not served:
        return own(self, *arguments)
    networks = self.decoder
    categories = () if cat_covs is None else torch.split(cat_covs, 1, dim=1)
    hidden = networks.px_decoder(z if cont_covs is None else torch.cat([z, cont_covs], -1), batch_index, *categories, y)
    linear, activation = networks.px_scale_decoder
    likelihood = _likelihood(self, hidden, batch_index, size_factor if self.use_size_factor_key else library)
    likelihood.head = "softmax" if isinstance(activation, torch.nn.Softmax) else "softplus"
    normal = torch.distributions.Normal
    prior = normal(torch.zeros_like(z), torch.ones_like(z))
    of_library = None
    if not self.use_observed_lib_size:
        means, variances = self._compute_local_library_params(batch_index)
        of_library = normal(means, variances.sqrt())
    counts = Counts(linear(hidden), likelihood, lambda: own(self, *arguments)["px"])
    return {"px": counts, "pl": of_library, "pz": prior}


def _likelihood(self: Module, hidden: Tensor, batch_index: Tensor, log_library: Any) -> CountLikelihood:
    if self.gene_likelihood == "poisson":
        return Poisson(log_library=log_library)
    zero_logits = self.decoder.px_dropout_decoder(hidden) if self.gene_likelihood == "zinb" else None
    index = None
    if self.dispersion == "gene-cell":
        log_theta = self.decoder.px_r_decoder(hidden)
    elif self.dispersion == "gene-batch":
        log_theta, index = self.px_r.T, batch_index.reshape(-1).long()
    else:
        log_theta = self.px_r
    return NegativeBinomial(log_theta, log_library=log_library, zero_logits=zero_logits, index=index)


class Counts:
    """In place of scvi's distribution of the counts: `log_prob(x).sum(-1)` is what its loss takes of it."""

    def __init__(self, logits: Tensor, likelihood: CountLikelihood, own: Callable[[], Any]) -> None:
        self._logits, self._likelihood, self._own = logits, likelihood, own

    def log_prob(self, x: Tensor) -> Tensor:
        """[B, 1]: the sum over genes."""
        tensors, options = self._likelihood.inputs(self._logits, x, None, None)
        batch = len(x)

        def row_factors(dtype: torch.dtype) -> Tensor:  # scvi takes the mean over the batch
            return torch.full((batch,), 1 / batch, dtype=dtype, device=x.device)

        return -count_nll(tensors, options, row_factors)[:, None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._own(), name)
