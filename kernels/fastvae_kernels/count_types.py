"""The tuples that the op for counts and its backends exchange, and what the two backends have to provide.

A backend is a module, `fastvae.fallback.counts` or `fastvae_kernels.counts`, with three functions:

    plan_counts(metas: CountTensors, options: CountOptions, wanted: CountGrads) -> plan

`metas` are the `TensorMeta` of the inputs, and `wanted` holds a bool in the place of each gradient. The plan is cached
for inputs of the same metas.

    counts_fwd(plan, tensors: CountTensors, row_factors: Tensor | None, grads: CountGrads) -> (nll, state)

`nll`, [B], is the negative log-likelihood of each row, in the dtype of arithmetic (float64 if a floating point input
is, else float32). If `row_factors`, [B], are given, the gradients of sum over b of row_factors[b] * nll[b] are written
into the buffers in `grads`; those that are None are not wanted. If `row_factors` is None, only `nll` is computed.
`state` is anything that `counts_bwd` needs again, such as parts of the gradient of log_theta; it may be None.

    counts_bwd(plan, tensors, state, row_factors, row_coefficients: Tensor, grads: CountGrads) -> None

On entry, `grads` are the buffers as `counts_fwd` left them for `row_factors`, or uninitialized if `row_factors` is
None. On return, they hold the gradients of sum over b of row_coefficients[b] * nll[b]. Rows whose coefficient is within
`4 eps` of their factor keep what they hold. For others, float32 and float64 gradients may be multiplied by the
quotient; log_theta's, which is a sum over rows, is computed again unless all quotients are equal.

No function waits for a device. Counts that are negative, NaN or infinite make the value and all gradients of their row
NaN, and so the gradient of log_theta that the element contributes to. Elements that the mask does not select have no
influence, whatever any tensor holds there: they are left out of the softmax, and their gradients are 0; the value of a
row without selected elements is 0.

With x a count, y its logit and t = exp(log_theta), the value of an element is

    mu           exp(log_library) * (softmax(y) over the row, softplus(y) or exp(y)); log_library is 0 if not given
    nb           t log(1 + mu / t) + x log(1 + t / mu) + lgamma(t) + lgamma(x + 1) - lgamma(t + x)
    zinb         softplus(d) + nb, and of zeros - softplus(d + nb) more, d the zero logit: sigmoid(d) is the probability
                 of an additional zero
    poisson      mu - x log(mu) + lgamma(x + 1)
    multinomial  -x log(softmax(y))
"""

from typing import Any, Literal, NamedTuple

Family = Literal["nb", "zinb", "poisson", "multinomial"]
Head = Literal["softmax", "softplus", "exp"]
Theta = Literal["gene", "cell", "batch"]


class CountOptions(NamedTuple):
    """What is constant in a likelihood of counts."""

    family: Family
    head: Head = "softmax"  # "softmax" for the multinomial
    theta: Theta | None = None  # log_theta is [G], [B, G] or [K, G]; None if the family has none


class CountTensors(NamedTuple):
    """Inputs, or their metas. All are contiguous and on one device; None: not given.

    Floating point ones may be float64, float32, bfloat16 or float16, each of its own.
    """

    logits: Any  # [B, G]
    counts: Any  # [B, G], floating point or any integer dtype; on a CPU also a CSR tensor
    log_theta: Any = None  # [G], [B, G] or [K, G], see `CountOptions.theta`
    log_library: Any = None  # [B]
    zero_logits: Any = None  # [B, G]
    index: Any = None  # [B], int64: the row of log_theta that a row of counts takes
    mask: Any = None  # [B, G], bool


class CountGrads(NamedTuple):
    """Gradient buffers, contiguous, each in the shape and dtype of its input; None: not wanted."""

    logits: Any = None
    log_theta: Any = None
    log_library: Any = None
    zero_logits: Any = None
