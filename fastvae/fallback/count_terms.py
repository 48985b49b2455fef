"""What likelihoods of counts share: terms of all elements, piece by piece, and of lists of nonzero counts."""

import torch
from torch import Tensor

from .count_rows import Batch, Piece

_GROUP = 1 << 16  # nonzero counts whose terms are computed at once, at least
LOST = 16.0  # a term of this size that cancels makes an error of 2e-6 in float32
NEAR_ZERO = -0.9  # q from which on 1 + q has too few digits left
_SMALL_MEAN = 1e-30  # of which a logarithm, or a quotient by it, is not to be trusted


def exceeds(tensor: Tensor, limit: float) -> bool:
    """Whether some element is larger, in absolute value."""
    if not tensor.numel():
        return False
    low, high = tensor.aminmax()
    return float(low) < -limit or float(high) > limit


def log_ratio(q: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """log(1 + q), given 1 + q as a quotient too: 1 + q alone loses the digits of one near 0."""
    near = torch.log1p(q)
    if q.numel() and float(q.amin()) < NEAR_ZERO:
        return torch.where(q < NEAR_ZERO, (numerator / denominator).log_(), near)
    return near


class OfNonzeros:
    """A likelihood whose pieces are followed by the terms of their nonzero counts, many pieces at once."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.nonzeros = batch, batch.nonzeros()
        self.exact = batch.dtype == torch.float64
        self.lost: list[Tensor] = []  # places of counts whose dense term was left out, because it cancels

    def run(self) -> None:
        batch, nonzeros = self.batch, self.nonzeros
        ends = nonzeros.ends
        mu, first = torch.empty(0, dtype=batch.dtype), 0
        for piece in batch.pieces(nonzeros):
            start, end = ends[piece.first], ends[piece.last]
            if piece.first == first:  # of a new group, which ends with the piece that makes it large enough
                most = next((e for e in ends[piece.last :: batch.rows] if e - start >= _GROUP), ends[-1])
                mu = torch.empty(most - start, dtype=batch.dtype)
            places = nonzeros.places[start:end] - piece.first * batch.n_columns
            offset = ends[first]
            torch.index_select(piece.mu.view(-1), 0, places, out=mu[start - offset : end - offset])
            self.dense(piece, places)
            if end - offset >= _GROUP or piece.last == batch.n_rows:
                if end > offset:
                    self._group(first, piece.last, mu[: end - offset])
                first = piece.last
        self.finish()

    def _group(self, first: int, last: int, mu: Tensor) -> None:
        """The terms of the nonzero counts of some rows."""
        nonzeros = self.nonzeros
        start, end = nonzeros.ends[first], nonzeros.ends[last]
        lost = torch.cat(self.lost) if self.lost else None
        self.lost = []
        terms = self.terms(start, end, nonzeros.values[start:end], mu, lost, (first, last))
        offsets = nonzeros.offsets[first : last + 1] - start
        self.batch.nll[first:last] += torch.segment_reduce(terms, "sum", offsets=offsets, unsafe=True)

    def log_quotients(self, start: int, end: int, q: Tensor, over: Tensor, mu: Tensor) -> Tensor:
        """log(1 + q), q = over / mu - 1, of the list from `start` to `end`, where mu may be too small to divide by."""
        result = log_ratio(q, over, mu)
        small = mu < _SMALL_MEAN
        if bool(small.any()):
            result[small] = over[small].log() - self.batch.log_means(self.nonzeros, start, end, small)
        return result

    def positions(self, start: int, end: int, lost: Tensor) -> Tensor:
        """Where in the list from `start` to `end` the counts of these places are."""
        return torch.searchsorted(self.nonzeros.places[start:end], lost)

    def dense(self, piece: Piece, places: Tensor) -> None:
        raise NotImplementedError

    def terms(
        self, start: int, end: int, counts: Tensor, mu: Tensor, lost: Tensor | None, rows: tuple[int, int]
    ) -> Tensor:
        raise NotImplementedError

    def finish(self) -> None:
        pass
