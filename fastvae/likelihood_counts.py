"""Likelihoods of counts: what they hold, what they take for a batch, and how it is checked."""

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from fastvae_kernels.count_types import CountOptions, CountTensors, Family, Head, Theta

from . import _checks
from ._modules import KeepsPrecision

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


class CountLikelihood(KeepsPrecision):
    """A likelihood of counts given the logits of a decoder. `arguments` name what it takes beside them."""

    arguments: ClassVar[tuple[str, ...]] = ()
    head: Head = "softmax"

    def __init__(self, mask_normalize: bool, unknown: Mapping[str, object], **held: Tensor | None) -> None:
        super().__init__()
        for name in unknown:
            if name in ("target_scale", "target_shift"):
                raise ValueError(
                    f"{name} has no meaning for counts, which are taken as they are: an integer target is not divided "
                    "by 255. Leave it out."
                )
            raise TypeError(f"{type(self).__name__} has no argument {name!r}.")
        self.mask_normalize = mask_normalize
        for name, tensor in held.items():
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{name} must be a torch.Tensor; got {type(tensor).__name__}. Convert it with torch.as_tensor."
                )
            # a Parameter is trained and saved with the loss, a constant tensor moves with it
            if tensor is not None and not tensor.requires_grad:
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, tensor)

    def extra_repr(self) -> str:
        given = [name for name in self.arguments if getattr(self, name) is not None]
        shapes = [f"{name}={list(getattr(self, name).shape)}" for name in given]
        return ", ".join([*shapes, f"head={self.head!r}"] if self.arguments else shapes)

    def inputs(
        self, recon: Tensor, target: Tensor, mask: Tensor | None, arguments: Mapping[str, Tensor | None] | None
    ) -> tuple[CountTensors, CountOptions]:
        """The inputs of the op, laid out as [B, G] by differentiable operations, and its options.

        Args:
            arguments: Values for this batch; they take precedence over those that the likelihood holds.

        Raises:
            ValueError, TypeError: what does not fit recon, or is not an argument of this likelihood.
        """
        _checks.float_tensor("recon", recon)
        if recon.ndim < 2:
            _checks.fail(f"recon must be [B, G] or [B, ...], the logits of counts; got shape {tuple(recon.shape)}.")
        given = {name: getattr(self, name) for name in self.arguments}
        for name, value in (arguments or {}).items():
            _checks.choice("a name in likelihood_args", name, self.arguments or ("nothing",))
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name} in likelihood_args must be a torch.Tensor; got {type(value).__name__}.")
            given[name] = value
        for name, value in given.items():
            if value is not None:
                _checks.same_device(name, value, "recon", recon)
                if name != "index":
                    _is_floating_point(name, value)
        theta, log_theta = _dispersion(given, recon) if "log_theta" in self.arguments else (None, None)
        zero_logits = given.get("zero_logits")
        if zero_logits is not None:
            zero_logits = _rows(_checks.expanded("zero_logits", zero_logits, "recon", recon))
        tensors = CountTensors(
            logits=_rows(recon),
            counts=checked_counts(target, recon),
            log_theta=log_theta,
            log_library=_library(given.get("log_library"), recon),
            zero_logits=zero_logits,
            index=given.get("index"),
            mask=None if mask is None else _rows(mask),
        )
        return tensors, CountOptions(self._family(zero_logits), self.head, theta)

    def _family(self, zero_logits: Tensor | None) -> Family:
        raise NotImplementedError


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).contiguous()


def _is_floating_point(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be a floating point tensor; got {tensor.dtype}. Convert it with .float().")


def checked_counts(target: Any, recon: Tensor) -> Tensor:
    """The target as [B, G].

    Raises:
        ValueError, TypeError: its dtype, layout, shape or device does not fit.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor; got {type(target).__name__}. Convert it with torch.as_tensor.")
    if target.dtype not in (*_checks.FLOATS, *_INTEGERS):
        raise TypeError(f"target must be counts, floating point or integers; got {target.dtype}. Convert it.")
    _checks.same_shape("recon", recon, "target", target)
    _checks.same_device("recon", recon, "target", target)
    if target.layout == torch.sparse_csr and target.ndim == 2:
        return target
    if target.layout != torch.strided:
        _checks.fail(
            f"target must be a dense tensor or a CSR tensor of two dimensions; got {target.layout} with {target.ndim} "
            "dimensions. Pass target.to_dense() or target.to_sparse_csr()."
        )
    return _rows(target)


def _library(log_library: Tensor | None, recon: Tensor) -> Tensor | None:
    if log_library is None:
        return None
    batch = recon.shape[0]
    if log_library.shape not in ((batch,), (batch, 1)):
        _checks.fail(
            f"log_library must have shape [B] = ({batch},) or [B, 1], the log of each row's total; got "
            f"{tuple(log_library.shape)}. Reduce or reshape it."
        )
    return log_library.reshape(batch).contiguous()


def _dispersion(given: dict[str, Any], recon: Tensor) -> tuple[Theta, Tensor]:
    """How rows take log_theta, and log_theta as [G], [B, G] or [K, G]."""
    log_theta, index, genes = given["log_theta"], given["index"], recon.shape[1:]
    if log_theta is None:
        _checks.fail(
            "NegativeBinomial needs log_theta, the log of the dispersion; got None. Hold it in the likelihood or pass "
            'likelihood_args={"log_theta": ...}.'
        )
    if index is not None:
        if index.dtype != torch.int64 or index.shape != recon.shape[:1]:
            _checks.fail(
                f"index must be int64 of shape [B] = ({recon.shape[0]},), the row of log_theta for each sample; got "
                f"{index.dtype} of shape {tuple(index.shape)}. Convert it, for example with .long().flatten()."
            )
        if log_theta.ndim != recon.ndim or log_theta.shape[1:] != genes:
            _checks.fail(
                f"log_theta must have shape [K, ...] = (K, {', '.join(map(str, genes))}) with index; got "
                f"{tuple(log_theta.shape)}. Leave out index for a dispersion that all rows share."
            )
        return "batch", _rows(log_theta)
    if log_theta.ndim == recon.ndim and log_theta.shape[0] == recon.shape[0] != 1:
        return "cell", _rows(_checks.expanded("log_theta", log_theta, "recon", recon))
    if log_theta.ndim == recon.ndim and log_theta.shape[0] == 1:
        log_theta = log_theta[0]
    try:
        return "gene", log_theta.expand(genes).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(
            f"log_theta must have the shape of one sample, {tuple(genes)}, or of recon, {tuple(recon.shape)}, or be "
            f"[K, ...] with index; got {tuple(log_theta.shape)}."
        ) from None


def _head(head: str) -> Head:
    _checks.choice("head", head, get_args(Head))
    return head  # type: ignore[return-value]


class NegativeBinomial(CountLikelihood):
    """Negative binomial counts of mean mu and dispersion theta = exp(log_theta), variance mu + mu^2 / theta: nats.

        -log p(x) = theta log(1 + mu / theta) + x log(1 + theta / mu)
                    + lgamma(theta) + lgamma(x + 1) - lgamma(theta + x)

    `recon` are logits [B, G] or [B, ...], and mu = exp(log_library) * softmax(recon), where the softmax runs over all
    of a sample. With zero_logits it is zero-inflated: a count is 0 with probability pi = sigmoid(zero_logits), else
    from the negative binomial. The target are counts, floating point or of any integer dtype, dense or
    torch.sparse_csr. Counts need not be whole numbers. One that is negative, NaN or infinite makes its row NaN.

    Each argument can be passed to the loss as likelihood_args={name: tensor} instead, which takes precedence. Tensors
    that require gradients get them. An nn.Parameter is a parameter of the loss.

    Args:
        log_theta: [G], that is recon.shape[1:], for each gene; [B, G] for each element; or [K, G] with index. May be
            None if the loss is called with it.
        log_library: [B] or [B, 1]; None for 0.
        zero_logits: What broadcasts to recon's shape; None: not zero-inflated.
        index: [B], int64, from 0 to K - 1: the row of log_theta that a sample takes, such as its batch label.
        head: "softmax"; "softplus": mu = exp(log_library) * softplus(recon); "exp": mu = exp(log_library + recon).
        mask_normalize: As in every likelihood. Under a mask, the softmax runs over the selected elements.

    Raises:
        ValueError: unknown head; target_scale or target_shift. TypeError: not a tensor.

    Source: Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 2018.
    """

    arguments = ("log_theta", "log_library", "zero_logits", "index")

    def __init__(
        self,
        log_theta: Tensor | None,
        *,
        log_library: Tensor | None = None,
        zero_logits: Tensor | None = None,
        index: Tensor | None = None,
        head: str = "softmax",
        mask_normalize: bool = False,
        **unknown: Any,
    ) -> None:
        held = {"log_theta": log_theta, "log_library": log_library, "zero_logits": zero_logits, "index": index}
        super().__init__(mask_normalize, unknown, **held)
        self.head = _head(head)

    def _family(self, zero_logits: Tensor | None) -> Family:
        return "nb" if zero_logits is None else "zinb"


class Poisson(CountLikelihood):
    """Poisson counts of mean mu: -log p(x) = mu - x log(mu) + lgamma(x + 1), in nats.

    Args:
        log_library, head, mask_normalize: As in `NegativeBinomial`, as are recon, target and likelihood_args.

    Raises:
        ValueError: unknown head; target_scale or target_shift. TypeError: not a tensor.
    """

    arguments = ("log_library",)

    def __init__(
        self,
        *,
        log_library: Tensor | None = None,
        head: str = "softmax",
        mask_normalize: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__(mask_normalize, unknown, log_library=log_library)
        self.head = _head(head)

    def _family(self, zero_logits: Tensor | None) -> Family:
        return "poisson"


class Multinomial(CountLikelihood):
    """Multinomial counts: -sum of x log(softmax(recon)) over a sample, in nats without the multinomial coefficient.

    The coefficient, lgamma(sum of x + 1) - sum of lgamma(x + 1), does not depend on the model. `iwae_loss` counts it.

    Args:
        mask_normalize: As in `NegativeBinomial`, as are recon and target.

    Raises:
        ValueError: target_scale or target_shift.

    Source: Liang et al., Variational Autoencoders for Collaborative Filtering, arXiv:1802.05814, eq. 2.
    """

    def __init__(self, *, mask_normalize: bool = False, **unknown: Any) -> None:
        super().__init__(mask_normalize, unknown)

    def _family(self, zero_logits: Tensor | None) -> Family:
        return "multinomial"
