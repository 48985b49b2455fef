"""What a tensor's strides allow."""

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions, each place once."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def readable(tensor: Tensor) -> Tensor:
    """What kernels read in place: up to five dimensions, whatever their strides, and no negation that torch put off."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.ndim <= 5 else tensor.contiguous()
