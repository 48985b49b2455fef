"""The loss as a module: one line changed in existing training code."""

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn, Self

from torch import Tensor, nn
from torch.fx import Proxy

from fastvae_kernels.types import Clamp

from . import _checks, _numbers, likelihoods
from ._dtypes import compute_dtype, in_dtype
from ._modules import KeepsPrecision
from .functional import Prior, VAELossTerms, vae_loss
from .likelihoods import Likelihood
from .presets import preset_options
from .regularizers import Capacity, FreeBits
from .schedules import Schedule


class VAELoss(KeepsPrecision):
    """The loss of a variational autoencoder, `recon_weight * recon + beta * kl`; `vae_loss` with its options held.

    With no argument it is the textbook VAE: summed squared error plus KL, in nats per sample, mean over the batch.

    Args:
        beta: Weight of the KL term: a number of at least 0, a 0-d tensor (kept as a buffer, so it moves with the module
            and is saved; a cast of the module to 16 bits leaves its dtype) or a schedule of `fastvae.schedules` (a
            submodule; call its `step()` after each training step).
        likelihood: A name or an object of `fastvae.likelihoods`; a learned scale is a parameter of the loss, so hand
            `loss.parameters()` to the optimizer.
        reduction: "batchmean", "sum", "mean" or "none".
        return_terms: Return VAELossTerms(loss, recon, kl) instead of the loss alone.
        recon_weight: As in `vae_loss`; a tensor, such as a weight of each channel, is kept as a buffer.
        recon_reduction, kl_reduction, logvar_clamp, free_bits, one_pass, inplace: As in `vae_loss`.
        capacity: As in `vae_loss`; its nats may be a schedule.
        accumulate: Micro-batches whose gradients add up before a step: the loss, not its terms, is divided by it,
            within the forward pass, so the upstream gradient stays 1. A last micro-batch of b samples instead of B
            weighs as much as the others; `weight=torch.full([b], b / B)` makes each sample weigh the same.

    torch.compile and torch.jit.trace record the plain formula, the latter for any batch size; in a graph of torch.fx a
    call is one node.

    Raises:
        ValueError, TypeError: an option without meaning, at construction; inputs that do not fit, at the call.
        RuntimeError: torch.jit.script, which cannot compile it.

    Example:
        >>> criterion = fastvae.VAELoss(beta=1.0)
        >>> loss = criterion(recon, x, mu, logvar)
        >>> loss.backward()
    """

    beta: float | Tensor | Schedule
    recon_weight: float | Tensor
    capacity_nats: float | Tensor | Schedule

    def __init__(
        self,
        beta: float | Tensor | Schedule = 1.0,
        likelihood: str | Likelihood = "l2",
        reduction: str = "batchmean",
        *,
        return_terms: bool = False,
        recon_reduction: str | None = None,
        kl_reduction: str | None = None,
        recon_weight: float | Tensor = 1.0,
        logvar_clamp: Clamp | None = None,
        free_bits: FreeBits | None = None,
        capacity: Capacity | None = None,
        accumulate: int = 1,
        one_pass: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        resolved = likelihoods.resolve(likelihood)
        reductions = _checks.reductions(reduction, recon_reduction, kl_reduction)
        if isinstance(resolved, likelihoods.CountLikelihood):
            _checks.count_options(None, inplace)
        _checks.regularizers(free_bits, FreeBits, capacity, Capacity)
        _checks.defined(free_bits, None if capacity is None else capacity.mode, resolved.mask_normalize, reductions)
        self._hold("beta", beta)
        self._hold("recon_weight", recon_weight)
        self.likelihood = likelihood  # as it was given: a name stays one
        self.reduction = reduction
        self.return_terms = return_terms
        self.recon_reduction = recon_reduction
        self.kl_reduction = kl_reduction
        self.logvar_clamp = _checks.logvar_clamp(logvar_clamp)
        self.free_bits = free_bits
        self._capacity_mode = None if capacity is None else capacity.mode
        if capacity is not None:
            self._hold("capacity_nats", capacity.nats)
        self.accumulate = _numbers.integer("accumulate", accumulate, least=1)
        self.one_pass = one_pass
        self.inplace = inplace

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The loss of another project, to the number; `fastvae.presets` has the list and the formulas.

        Args:
            name: For example "pythae".
            overrides: Arguments of `VAELoss` that replace the preset's.

        Raises:
            ValueError: unknown name.
        """
        return cls(**{**preset_options(name), **overrides})

    @property
    def capacity(self) -> Capacity | None:
        return None if self._capacity_mode is None else Capacity(_value(self.capacity_nats), self._capacity_mode)

    def _hold(self, name: str, value: float | Tensor | Schedule) -> None:
        """As a buffer or a submodule where it has a device."""
        number: float | Tensor | Schedule = value
        if isinstance(value, Schedule):
            _checks.weight(f"{name}'s smallest value", min(value.start, value.end))
        elif isinstance(value, Tensor) and value.ndim and name != "capacity_nats":
            _checks.float_tensor(name, value)
        else:
            number = _checks.weight(name, value)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value if isinstance(value, Tensor) else number)

    def forward(
        self,
        recon: Tensor,
        target: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        beta: float | Tensor | None = None,
        recon_weight: float | Tensor | None = None,
        prior: Prior | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        kl_mask: Tensor | None = None,
        extra: Tensor | None = None,
        likelihood_args: Mapping[str, Tensor | None] | None = None,
    ) -> Tensor | VAELossTerms:
        """The scalar to call `.backward()` on, or `VAELossTerms`; arguments as in `vae_loss`.

        `beta` and `recon_weight` override the module's for this call.
        """
        first: Any = recon
        if isinstance(first, Proxy):  # torch.fx records a call as one node, like that of a module of torch.nn
            given = {
                "kl": kl,
                "beta": beta,
                "recon_weight": recon_weight,
                "prior": prior,
                "weight": weight,
                "mask": mask,
                "kl_mask": kl_mask,
                "extra": extra,
                "likelihood_args": likelihood_args,
            }
            tracer: Any = first.tracer
            node: Tensor = tracer.create_proxy(
                "call_module", tracer.path_of_module(self), (recon, target, mu, logvar), given
            )
            return node
        terms = vae_loss(
            recon,
            target,
            mu,
            logvar,
            kl=kl,
            beta=_divided("beta", _value(self.beta) if beta is None else beta, self.accumulate),
            likelihood=self.likelihood,
            reduction=self.reduction,
            recon_reduction=self.recon_reduction,
            kl_reduction=self.kl_reduction,
            recon_weight=_divided(
                "recon_weight", self.recon_weight if recon_weight is None else recon_weight, self.accumulate
            ),
            logvar_clamp=self.logvar_clamp,
            free_bits=self.free_bits,
            capacity=self.capacity,
            prior=prior,
            weight=weight,
            mask=mask,
            kl_mask=kl_mask,
            extra=extra,
            one_pass=self.one_pass,
            inplace=self.inplace,
            likelihood_args=likelihood_args,
        )
        return terms if self.return_terms else terms.loss

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "torch.jit.script cannot compile a VAELoss, whose options decide in Python what is computed. Use "
            "torch.compile or torch.jit.trace, or leave the loss out of the module that is scripted."
        )

    def extra_repr(self) -> str:
        always = ("beta", "likelihood", "reduction")
        options = inspect.signature(type(self).__init__).parameters.values()
        shown = [(option.name, getattr(self, option.name), option.default) for option in list(options)[1:]]
        return ", ".join(
            f"{name}={value!r}"
            for name, value, default in shown
            if not isinstance(value, nn.Module) and (name in always or _differs(value, default))
        )


def _differs(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or bool(value != default))


def _value(number: float | Tensor | Schedule) -> float | Tensor:
    return number.value if isinstance(number, Schedule) else number


def _divided(name: str, weight: float | Tensor, by: int) -> float | Tensor:
    if by == 1:
        return weight
    if not isinstance(weight, Tensor):
        weight = _checks.weight(name, weight)
    return in_dtype(weight, compute_dtype(weight)) / by
