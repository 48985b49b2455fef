"""Group normalization with SiLU."""

from torch import Tensor

from . import _argument_checks as checks
from . import _numbers
from .ops.group_norm import Options, group_norm


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: str | None = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalization and SiLU as one operation, for training.

        s = x + residual                                        rounded to x's dtype; s = x without a residual
        u = (s - mean) / sqrt(var + eps) * weight + bias        mean, var: over a sample's group of channels
        y = u * sigmoid(u)                                      u without an activation

    The backward pass needs s and the mean and 1 / sqrt(var + eps) of each group, and nothing else is saved: of
    `F.silu(F.group_norm(x, ...))` autograd saves u too, which is as large as x. Statistics and sums are taken in
    float32, or in float64 for a float64 x, and y is rounded once.

    torch.compile, fake tensors, torch.func and second derivatives use the formula in plain PyTorch; tensors on a CPU
    use aten's group normalization, and tensors on a GPU kernels whose sums are split by sizes alone, without atomics.

    Args:
        x: [N, C, ...], at least three dimensions; float64, float32, bfloat16 or float16. Contiguous and channels_last
            (2d and 3d) tensors are read in place, others are copied.
        num_groups: Divides C.
        weight, bias: [C], any of these dtypes, on x's device; None stands for ones and zeros.
        eps: At least 0.
        activation: "silu" or None.
        residual: Shape and device of x; any of these dtypes. Its gradient is that of x.

    Returns:
        The shape and dtype of x; channels_last where x is, else contiguous.

    Raises:
        ValueError: shapes or devices do not fit; num_groups does not divide C; negative eps; unknown activation.
        TypeError: not a floating point tensor, or num_groups not an integer.

    Source: Wu and He, Group Normalization, arXiv:1803.08494; Elfwing et al., arXiv:1702.03118, for SiLU.
    """
    _check(x, num_groups, weight, bias, eps, activation, residual)
    return group_norm(x, residual, weight, bias, Options(int(num_groups), float(eps), activation == "silu"))


def _check(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    checks.float_tensor("x", x)
    if x.ndim < 3:
        checks.fail(
            f"x must have at least three dimensions, [N, C, ...]; got shape {tuple(x.shape)}. Use x[..., None]."
        )
    groups = _numbers.integer("num_groups", num_groups, least=1)
    if x.shape[1] == 0 or x.shape[1] % groups:
        checks.fail(
            f"num_groups must divide the number of channels, x.shape[1]; got {groups} groups of {x.shape[1]} channels. "
            "Pass a divisor of the number of channels."
        )
    for name, affine in (("weight", weight), ("bias", bias)):
        if affine is not None:
            checks.float_tensor(name, affine)
            checks.same_device(name, affine, "x", x)
            if affine.shape != x.shape[1:2]:
                checks.fail(
                    f"{name} must have one element per channel of x, shape ({x.shape[1]},); got {tuple(affine.shape)}."
                )
    _numbers.not_negative("eps", eps)
    check_activation(activation)
    if residual is not None:
        checks.float_tensor("residual", residual)
        checks.same_shape("x", x, "residual", residual)
        checks.same_device("x", x, "residual", residual)


def check_activation(activation: str | None) -> None:
    if activation is not None:
        checks.choice("activation", activation, ("silu",), {"swish": "'silu'", "none": "None", "identity": "None"})
