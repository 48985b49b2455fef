"""The likelihoods of counts without a dispersion."""

import torch
from torch import Tensor

from .count_rows import Batch, Piece
from .count_terms import LOST, OfNonzeros, log_ratio
from .stirling import HALF_LOG_2PI, s_exact, s_of_inverse


class Poisson(OfNonzeros):
    """mu - x of each element, and x log(x / mu) + 1/2 log(2 pi x) + S(x) of nonzero counts."""

    def dense(self, piece: Piece, places: Tensor) -> None:
        batch = self.batch
        difference = torch.sub(piece.mu, piece.counts, out=batch.scratch("a")[: len(piece.mu)])
        values, low, high = (
            difference,
            *(difference.aminmax() if difference.numel() else (difference.new_zeros(()),) * 2),
        )
        if not self.exact and bool((low < -LOST) | (high > LOST)):
            at, mu = (t.view(-1).index_select(0, places) for t in (difference, piece.mu))
            lost = places[(at.abs() > LOST) & (at.abs() < mu)]
            if lost.numel():
                values = difference.clone()
                values.view(-1).index_fill_(0, lost, 0.0)
                self.lost.append(lost + piece.first * batch.n_columns)
        torch.sum(values, 1, out=batch.nll[piece.first : piece.last])
        if batch.factors is not None:
            batch.write_gradients(piece, difference)

    def terms(
        self, start: int, end: int, counts: Tensor, mu: Tensor, lost: Tensor | None, rows: tuple[int, int]
    ) -> Tensor:
        exact = self.exact or bool(counts.amin() < 1)
        ratio = self.log_quotients(start, end, torch.sub(counts, mu).div_(mu), counts, mu)
        terms = _of_counts(counts, ratio, exact)
        if lost is not None:
            at = self.positions(start, end, lost)
            few, means = counts[at].double(), mu[at].double()
            found = _of_counts(few, log_ratio((few - means) / means, few, means), exact)
            terms[at] = found.add_(means).sub_(few).to(terms.dtype)
        return terms


def _of_counts(counts: Tensor, ratio: Tensor, exact: bool) -> Tensor:
    s = s_exact(counts) if exact else s_of_inverse(counts.reciprocal())
    return ratio.mul_(counts).add_(counts.log(), alpha=0.5).add_(s).add_(HALF_LOG_2PI)


class Multinomial:
    """-sum of x log(softmax(y)) of each row, and its gradient (sum of x) softmax(y) - x."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.nonzeros = None if batch.counts.layout == torch.strided else batch.nonzeros()

    def run(self) -> None:
        batch = self.batch
        for piece in batch.pieces(self.nonzeros):
            rows = slice(piece.first, piece.last)
            if not piece.logits.numel():
                continue
            total = piece.counts.sum(1, keepdim=True)
            # both terms are positive: nothing cancels
            below = torch.sub(piece.logits, piece.logits.amax(1, keepdim=True), out=batch.scratch("a")[: len(total)])
            if piece.outside is not None:
                below.masked_fill_(piece.outside, 0.0)
            normalizer = torch.xlogy(total.view(-1), piece.mu.amax(1))  # 0 for a row without counts
            batch.nll[rows] = -normalizer - torch.linalg.vecdot(piece.counts, below)
            if batch.grads.logits is not None:
                assert batch.factors is not None
                factors, out = batch.factors[rows, None], batch.grads.logits[rows]
                gradient = torch.mul(piece.mu, total * factors, out=piece.mu)
                out.copy_(gradient.addcmul_(piece.counts, factors, value=-1))
