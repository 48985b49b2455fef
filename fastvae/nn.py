"""Layers of encoders and decoders."""

from typing import Any

from torch import Tensor, nn

from .norms import check_activation, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm` followed by SiLU, by `fastvae.group_norm_silu`: about half of the memory for the backward pass.

    A subclass of `nn.GroupNorm` with its arguments, parameters and state_dict, so it can replace the norm of a trained
    model, whose following `nn.SiLU` is then removed.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: As in `nn.GroupNorm`.
        activation: "silu" or None.

    Raises:
        ValueError: num_groups does not divide num_channels; unknown activation.

    Example:
        >>> norm = fastvae.nn.GroupNormSiLU(32, 128)
        >>> y = norm(x)  # [N, 128, ...], the dtype and layout of x
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = "silu",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        check_activation(activation)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes, dtypes and errors as `fastvae.group_norm_silu`."""
        return group_norm_silu(
            *(input, self.num_groups, self.weight, self.bias, self.eps), activation=self.activation, residual=residual
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
