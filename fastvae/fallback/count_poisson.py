"""The likelihoods of counts without a dispersion."""

import torch
from torch import Tensor

from .count_rows import Batch, Piece
from .count_terms import LOST, OfNonzeros
from .stirling import HALF_LOG_2PI, s_exact, s_of_inverse


class Poisson(OfNonzeros):
    """mu - x of each element, and x log(x / mu) + 1/2 log(2 pi x) + S(x) of nonzero counts."""

    def dense(self, piece: Piece, places: Tensor) -> None:
        batch = self.batch
        difference = torch.sub(piece.mu, piece.counts, out=batch.scratch("a")[: len(piece.mu)])
        if batch.grads.logits is not None or batch.grads.log_library is not None:
            gradient = batch.scratch("b")[: len(piece.mu)].copy_(difference)
            batch.write_gradients(piece, gradient)
        low, high = difference.aminmax() if difference.numel() else (torch.zeros(()),) * 2
        if not self.exact and bool((low < -LOST) | (high > LOST)):
            at = difference.view(-1).index_select(0, places)
            lost = places[at.abs() > LOST]
            difference.view(-1).index_fill_(0, lost, 0.0)
            self.lost.append(lost + piece.first * batch.n_columns)
        torch.sum(difference, 1, out=batch.nll[piece.first : piece.last])

    def terms(
        self, start: int, end: int, counts: Tensor, mu: Tensor, lost: Tensor | None, rows: tuple[int, int]
    ) -> Tensor:
        if lost is not None:
            counts, mu = counts.double(), mu.double()
        ratio = self.log_quotients(start, end, counts, mu, (counts - mu) / mu, counts)
        exact = self.exact or bool(counts.amin() < 1)
        s = s_exact(counts) if exact else s_of_inverse(counts.reciprocal())
        terms = ratio.mul_(counts).add_(counts.log().mul_(0.5)).add_(s.add_(HALF_LOG_2PI))
        if lost is not None:
            at = self.positions(start, end, lost)
            terms[at] += mu[at] - counts[at]
        return terms.to(self.batch.dtype)


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
