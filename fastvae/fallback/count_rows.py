"""A batch of counts in pieces of rows: means, counts and gradients of a piece, and the list of nonzero counts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae_kernels.count_types import CountGrads, CountOptions, CountTensors

from .hugepages import advise_huge_pages

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class Nonzeros(NamedTuple):
    """The nonzero counts of a batch, row by row."""

    places: Tensor  # in the flattened batch
    offsets: Tensor  # of the first of each row, and the end
    ends: list[int]  # the same
    values: Tensor  # in the dtype of arithmetic


def places_of(chosen: Tensor) -> Tensor:
    """Where a bool tensor is true, in its flattened form. NumPy finds them in a fifth of torch.nonzero's time."""
    return torch.from_numpy(np.flatnonzero(chosen.numpy()))


class Piece(NamedTuple):
    """Some rows."""

    first: int
    last: int
    logits: Tensor  # in the dtype of arithmetic, -inf where the mask selects nothing
    counts: Tensor  # in the dtype of arithmetic, 0 where the mask selects nothing
    outside: Tensor | None  # where the mask selects nothing
    mu: Tensor


class Batch:
    """The inputs, and what has been computed of them."""

    def __init__(
        self,
        tensors: CountTensors,
        options: CountOptions,
        dtype: torch.dtype,
        rows: int,
        row_factors: Tensor | None,
        grads: CountGrads,
    ) -> None:
        self.logits: Tensor = tensors.logits
        self.counts: Tensor = tensors.counts
        self.mask: Tensor | None = tensors.mask
        self.tensors, self.options, self.dtype, self.rows, self.grads = tensors, options, dtype, rows, grads
        self.n_rows, self.n_columns = self.logits.shape
        self.factors = None if row_factors is None else row_factors.to(dtype)
        self.nll = torch.zeros(self.n_rows, dtype=dtype)
        self.log_library = None if tensors.log_library is None else tensors.log_library.to(dtype)
        self.library = None if self.log_library is None else self.log_library.exp()[:, None]
        self._scratch: dict[str, Tensor] = {}
        self.invalid = False  # some count is negative, NaN or infinite
        for gradient in grads:
            if gradient is not None:
                advise_huge_pages(gradient)

    def scratch(self, name: str) -> Tensor:
        """Memory for a piece, the same for all pieces of this batch."""
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.logits[: self.rows], dtype=self.dtype)
        return self._scratch[name]

    def nonzeros(self) -> Nonzeros:
        counts, mask, n = self.counts, self.mask, self.n_columns
        if counts.layout == torch.strided:
            chosen = counts.bool() if mask is None else counts.bool() & mask
            index = places_of(chosen)
            signed = _SIGNED.get(counts.dtype, counts.dtype)  # torch selects no elements of the others
            values = counts.view(-1).view(signed).index_select(0, index).view(counts.dtype).to(self.dtype)
        else:
            lengths = counts.crow_indices().diff()
            rows = torch.arange(self.n_rows, dtype=torch.int64).repeat_interleave(lengths)
            index = counts.col_indices() + rows * n
            values = counts.values().to(self.dtype)
            keep = values != 0
            if mask is not None:
                keep = keep & mask.view(-1)[index]
            if not bool(keep.all()):
                index, values = index[keep], values[keep]
            if bool((index.diff() <= 0).any()):  # columns of a row need not be in order
                index, order = index.sort()
                values = values[order]
        offsets = torch.searchsorted(index, torch.arange(self.n_rows + 1, dtype=torch.int64) * n)
        if values.numel() and not self._valid(values):
            self.invalid = True
            values = torch.where((values > 0) & (values < torch.inf), values, torch.nan)
        return Nonzeros(index, offsets, offsets.tolist(), values)

    @staticmethod
    def _valid(counts: Tensor) -> bool:
        low, high = counts.aminmax()
        return bool((low >= 0) & (high < torch.inf))

    def pieces(self, nonzeros: Nonzeros | None) -> Iterator[Piece]:
        """All rows. Each piece's memory is used again by the next one."""
        for first in range(0, self.n_rows, self.rows):
            last = min(first + self.rows, self.n_rows)
            mask = self.mask
            outside = None if mask is None else ~mask[first:last]
            logits = self.logits[first:last]
            if logits.dtype != self.dtype or outside is not None:
                logits = self.scratch("logits")[: last - first].copy_(logits)
                if outside is not None:
                    logits.masked_fill_(outside, -torch.inf)
            counts = self._counts(first, last, nonzeros, outside)
            mu = self._mean(logits, first, last)
            if outside is not None:
                mu.masked_fill_(outside, 0.0)
            yield Piece(first, last, logits, counts, outside, mu)

    def _counts(self, first: int, last: int, nonzeros: Nonzeros | None, outside: Tensor | None) -> Tensor:
        counts = self.counts
        if counts.layout != torch.strided:
            assert nonzeros is not None
            start, end = nonzeros.ends[first], nonzeros.ends[last]
            dense = self.scratch("counts")[: last - first].zero_()
            places = nonzeros.places[start:end] - first * self.n_columns
            dense.view(-1).index_copy_(0, places, nonzeros.values[start:end])
            return dense
        counts = counts[first:last]
        if counts.dtype != self.dtype or outside is not None:
            counts = self.scratch("counts")[: last - first].copy_(counts)
            if outside is not None:
                counts.masked_fill_(outside, 0.0)
        if self.invalid or (nonzeros is None and counts.numel() and not self._valid(counts)):
            return torch.where((counts >= 0) & (counts < torch.inf), counts, torch.nan)
        return counts

    def _mean(self, logits: Tensor, first: int, last: int) -> Tensor:
        mu = self.scratch("mu")[: last - first]
        if self.options.head == "softmax":
            torch.softmax(logits, 1, out=mu)
        elif self.options.head == "softplus":
            torch.ops.aten.softplus.out(logits, 1, 40, out=mu)
        elif self.log_library is not None:  # the library may balance what exp alone overflows at
            return torch.add(logits, self.log_library[first:last, None], out=mu).exp_()
        else:
            torch.exp(logits, out=mu)
        return mu if self.library is None else mu.mul_(self.library[first:last])

    def log_means(self, nonzeros: Nonzeros, start: int, end: int, chosen: Tensor) -> Tensor:
        """log mu of some of the nonzero counts from `start` to `end`, where mu itself is too small to represent."""
        index = nonzeros.places[start:end][chosen]
        rows = index.div(self.n_columns, rounding_mode="floor")
        result = self.logits.view(-1)[index].to(self.dtype)
        if self.options.head == "softmax":
            mask = self.mask
            used = rows.unique_consecutive()  # type: ignore[no-untyped-call]
            logits = self.logits[used].to(self.dtype)
            if mask is not None:
                logits = logits.masked_fill(~mask[used], -torch.inf)
            normalizer = logits.new_empty(self.n_rows).index_copy_(0, used, logits.logsumexp(1))
            result = result - normalizer[rows]
        return result if self.log_library is None else result + self.log_library[rows]

    def write_gradients(self, piece: Piece, by_log_mu: Tensor) -> None:
        """Of logits and library, given d nll / d log mu, which is overwritten."""
        total = by_log_mu.sum(1, keepdim=True)
        rows = slice(piece.first, piece.last)
        assert self.factors is not None
        factors = self.factors[rows, None]
        if self.grads.log_library is not None:
            self.grads.log_library[rows] = (total * factors).view(-1)
        if self.grads.logits is None:
            return
        out = self.grads.logits[rows]
        into = out if out.dtype == self.dtype else by_log_mu
        by_log_mu.mul_(factors)
        match self.options.head:
            case "softmax":
                share = total * factors
                if self.library is not None:
                    library = self.library[rows]
                    share = torch.where(library > 0, share / library, 0.0)
                torch.addcmul(by_log_mu, piece.mu, share, value=-1, out=into)
            case "exp":
                into.copy_(by_log_mu)
            case "softplus":  # d log softplus(y) / dy, which is 1 where softplus(y) is exp(y)
                slope = torch.sigmoid(piece.logits) / torch.nn.functional.softplus(piece.logits, threshold=40)
                slope.masked_fill_(piece.logits < (-40 if self.dtype == torch.float64 else -17), 1.0)
                torch.mul(by_log_mu, slope, out=into)
        if into is not out:
            out.copy_(into)
