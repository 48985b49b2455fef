"""What a tensor's strides allow."""

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions, each place once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def few_dims(tensor: Tensor) -> Tensor:
    """Up to five dimensions are read in place, whatever their strides; a tensor of more is made contiguous."""
    return tensor if tensor.ndim <= 5 else tensor.contiguous()
