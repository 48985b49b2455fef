"""Sums of buffers, whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

from .._strides import is_dense
from .gaussian import sum_by_sample

ROW = 256

UNSPLIT = 1 << 14  # elements that torch.sum adds up in one thread


def sum_of_squares(values: Tensor) -> Tensor:
    """By the norms of short rows where there are whole ones: one pass and no squares to store.

    A norm adds up in sequence; over 256 elements that costs 4e-7 at worst, over all of them 1e-3. The sum of the rows
    is torch's cascaded one.
    """
    if values.is_contiguous() and values.numel() % ROW == 0:
        return norms(values).square_().sum()
    return values.square().sum()


def norms(values: Tensor) -> Tensor:
    """Of short rows in storage order, and of the rest."""
    short_rows, rest = _split(values)
    whole: Tensor = torch.linalg.vector_norm(short_rows, dim=1)
    return whole if rest is None else torch.cat([whole, torch.linalg.vector_norm(rest).view(1)])


def row_sums(values: Tensor) -> Tensor:
    """Of short rows in storage order, and of the rest."""
    short_rows, rest = _split(values)
    return short_rows.sum(1) if rest is None else torch.cat([short_rows.sum(1), rest.sum().view(1)])


def _split(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whole rows of `ROW` elements, and what remains."""
    n = values.numel()
    whole = n - n % ROW
    if whole == n and values.is_contiguous():  # one view instead of three slices
        return values.view(-1, ROW), None
    flat = values.as_strided((n,), (1,)) if is_dense(values) else values.reshape(-1)
    return flat[:whole].view(-1, ROW), flat[whole:] if whole < n else None


def sample_sums(buffer: Tensor) -> Tensor:
    return buffer.clone() if buffer.ndim == 1 else sum_by_sample(buffer)


def total(parts: list[Tensor]) -> Tensor:
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    while values.numel() > UNSPLIT:
        values = row_sums(values)
    return values.sum()
