"""The negative binomial likelihood and its zero-inflated form."""

import torch
from torch import Tensor

from .count_rows import Batch, Piece, places_of
from .count_terms import LOST, NEAR_ZERO, OfNonzeros, exceeds, log_ratio
from .stirling import HALF_LOG_2PI, p_exact, p_of_inverse, s_exact, s_of_inverse


class NegativeBinomial(OfNonzeros):
    """With q = (mu - x) / (theta + x), L = log(1 + q) and T = (mu - x) / (theta + mu), each element has

        value theta L, d/dlog(mu) theta T, d/dlog(theta) theta (L - T)

    and a nonzero count besides, with r = -theta q / mu,

        value x log(1 + r) + 1/2 log(2 pi x (theta + x) / theta) + S(x) + S(theta) - S(theta + x)
        d/dlog(theta) theta (P(theta + x) - P(theta))
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.kind = batch.options.theta
        self.index: Tensor = batch.tensors.index
        log_theta: Tensor = batch.tensors.log_theta.double()
        if (mask := batch.mask) is not None:  # where it selects nothing, log_theta may be NaN
            log_theta = log_theta.masked_fill(~self._used(mask), 0.0)
        self.table = log_theta.exp()
        self.theta = self.table.to(batch.dtype)
        wanted = batch.grads.log_theta
        self.by_theta = None if wanted is None else torch.zeros(self.table.shape, dtype=batch.dtype)
        if self.kind != "cell":  # few, so exact, and once
            wide = [t.view(-1) for t in (self.table, *self._constants(self.table))]
            self.by_dtype = {torch.float64: wide, batch.dtype: [t.to(batch.dtype) for t in wide]}

    def _used(self, mask: Tensor) -> Tensor:
        """Which elements of log_theta a mask leaves."""
        if self.kind == "cell":
            return mask
        if self.kind == "gene":
            return mask.any(0)
        used = torch.zeros(self.batch.tensors.log_theta.shape, dtype=torch.int32)
        return used.index_add_(0, self.index, mask.int()) > 0

    def _constants(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """What a nonzero count adds that depends on theta alone, in float64."""
        return s_exact(theta) - 0.5 * theta.log() + HALF_LOG_2PI, p_exact(theta)

    def _theta_of(self, piece: Piece) -> Tensor:
        if self.kind == "cell":
            return self.theta[piece.first : piece.last]
        if self.kind == "batch":
            return self.theta.index_select(0, self.index[piece.first : piece.last])
        return self.theta

    def dense(self, piece: Piece, places: Tensor) -> None:
        batch, n = self.batch, len(piece.mu)
        mu, counts, theta = piece.mu, piece.counts, self._theta_of(piece)
        log, slope, other = (batch.scratch(name)[:n] for name in "abc")
        torch.add(counts, theta, out=other)
        torch.sub(mu, counts, out=slope)
        torch.div(slope, other, out=log)
        low = None
        if log.numel() and float(log.amin()) < NEAR_ZERO:  # of nonzero counts alone
            low = places[log.view(-1).index_select(0, places) < NEAR_ZERO]
            denominator = other.view(-1).index_select(0, low)
        log.log1p_()
        slope.div_(torch.add(mu, theta, out=other))
        if low is not None:
            log.view(-1).index_copy_(0, low, other.view(-1).index_select(0, low).div_(denominator).log_())
        by_log_mu = torch.mul(slope, theta, out=other)
        lost = None if self.exact else self._lost(piece, slope, by_log_mu, theta)
        keep = self.weigh(piece, places, log, theta, lost)
        if batch.factors is None:
            return
        by_theta = log.sub_(slope)
        if lost is not None:
            by_theta.view(-1).index_copy_(0, *lost)
        if keep is not None:
            by_theta.mul_(keep)
            by_log_mu.mul_(keep)
        self._add_by_theta(piece, by_theta)
        batch.write_gradients(piece, by_log_mu)

    def _lost(self, piece: Piece, slope: Tensor, by_log_mu: Tensor, theta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Places in the piece where L - T, or the value of a count, cancels, and L - T there."""
        if not exceeds(by_log_mu, LOST):
            return None
        places = places_of((by_log_mu.abs() > LOST) & (slope > -1) & (slope < 0.5))
        mu, counts, t = (
            x.expand(piece.mu.shape).reshape(-1).index_select(0, places).double()
            for x in (piece.mu, piece.counts, theta)
        )
        difference = torch.log1p((mu - counts) / (t + counts)) - (mu - counts) / (t + mu)
        self.lost.append(places[counts > 0] + piece.first * self.batch.n_columns)
        return places, difference.to(slope.dtype)

    def weigh(
        self, piece: Piece, places: Tensor, log: Tensor, theta: Tensor, lost: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """Add the piece's values to those of its rows. Returns a factor of its gradients."""
        if lost is not None:  # values of counts are added with their other terms
            at = lost[0]
            log = log.clone()
            log.view(-1).index_fill_(0, at[piece.counts.reshape(-1)[at] > 0], 0.0)
        into = self.batch.nll[piece.first : piece.last]
        if theta.ndim == 1:
            torch.mv(log, theta, out=into)
        else:
            torch.linalg.vecdot(log, theta, out=into)
        return None

    def _add_by_theta(self, piece: Piece, by_theta: Tensor) -> None:
        if self.by_theta is None:
            return
        rows, factors = slice(piece.first, piece.last), self.batch.factors
        assert factors is not None
        if self.kind == "gene":
            self.by_theta.addmv_(by_theta.T, factors[rows])
        elif self.kind == "cell":
            torch.mul(by_theta, factors[rows, None], out=self.by_theta[rows])
        else:
            self.by_theta.index_add_(0, self.index[rows], by_theta.mul_(factors[rows, None]))

    def terms(
        self, start: int, end: int, counts: Tensor, mu: Tensor, lost: Tensor | None, rows: tuple[int, int]
    ) -> Tensor:
        where = self._places_of_theta(start, end, rows)
        exact = self.exact or bool(counts.amin() < 1)
        theta, constant, p_theta = self._at(where, counts.dtype)
        z = counts + theta
        w = z.reciprocal()
        r = torch.sub(counts, mu).mul_(theta).mul_(w).div_(mu)
        over = torch.add(mu, theta).mul_(w).mul_(counts)
        ratio = self.log_quotients(start, end, r, over, mu)
        terms = _of_counts(counts, z, w, ratio, constant, exact)
        if lost is not None:
            at = self.positions(start, end, lost)
            few, means = counts[at].double(), mu[at].double()
            theta, constant, _ = self._at(where[at], torch.float64)
            total = few + theta
            ratio = log_ratio(theta * (few - means) / (total * means), (means + theta) * few / total, means)
            found = _of_counts(few, total, 1 / total, ratio, constant, exact)
            terms[at] = found.add_(theta * torch.log1p((means - few) / total)).to(terms.dtype)
        if self.by_theta is not None:
            assert self.batch.factors is not None
            lengths = self.nonzeros.offsets[rows[0] : rows[1] + 1].diff()
            factors = self.batch.factors[rows[0] : rows[1]].repeat_interleave(lengths)
            by_theta = (p_exact(z) if exact else p_of_inverse(w)).sub_(p_theta).to(factors.dtype).mul_(factors)
            self.by_theta.view(-1).index_add_(0, where, by_theta)
        return terms

    def _at(self, where: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """theta, S(theta) and what goes with it, and P(theta), at places of the flattened log_theta."""
        if self.kind != "cell":
            return tuple(t.index_select(0, where) for t in self.by_dtype[dtype])
        theta = self.table.view(-1).index_select(0, where)
        return tuple(t.to(dtype) for t in (theta, *self._constants(theta)))

    def _places_of_theta(self, start: int, end: int, rows: tuple[int, int]) -> Tensor:
        """In the flattened log_theta."""
        places, n = self.nonzeros.places[start:end], self.batch.n_columns
        if self.kind == "cell":
            return places
        columns: Tensor = places % n
        if self.kind == "gene":
            return columns
        lengths = self.nonzeros.offsets[rows[0] : rows[1] + 1].diff()
        index = self.index[rows[0] : rows[1]]
        moved: Tensor = columns + index.repeat_interleave(lengths) * n
        return moved

    def finish(self) -> None:
        if self.by_theta is not None:
            self.batch.grads.log_theta.copy_(self.by_theta.mul_(self.theta))


def _of_counts(counts: Tensor, z: Tensor, w: Tensor, ratio: Tensor, constant: Tensor, exact: bool) -> Tensor:
    terms = ratio.mul_(counts).add_(torch.mul(counts, z).log_(), alpha=0.5).add_(constant)
    if exact:
        return terms.add_(s_exact(counts)).sub_(s_exact(z))
    return terms.add_(s_of_inverse(counts.reciprocal())).sub_(s_of_inverse(w))


class ZeroInflated(NegativeBinomial):
    """With d the zero logit and h = d + theta L, a zero has the value softplus(d) + theta L - softplus(h), the factor
    sigmoid(-h) in its other gradients, and d/dd = sigmoid(d) - sigmoid(h); a nonzero count softplus(d) more.
    """

    def weigh(
        self, piece: Piece, places: Tensor, log: Tensor, theta: Tensor, lost: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        batch, n = self.batch, len(piece.mu)
        rows = slice(piece.first, piece.last)
        zero_logits: Tensor = batch.tensors.zero_logits[rows]
        d = zero_logits
        if d.dtype != batch.dtype or piece.outside is not None:
            d = batch.scratch("d")[:n].copy_(d)
            if piece.outside is not None:
                d.masked_fill_(piece.outside, 0.0)
        keep, not_inflated, value, other = (batch.scratch(name)[:n] for name in "efgh")
        nb = torch.mul(log, theta, out=value)
        torch.add(d, nb, out=keep).neg_().sigmoid_().view(-1).index_fill_(0, places, 1.0)
        negative = torch.neg(d, out=other)
        torch.sigmoid(negative, out=not_inflated)
        if batch.grads.zero_logits is not None:
            assert batch.factors is not None
            by_d = torch.sub(keep, not_inflated, out=batch.scratch("i")[:n])
            batch.grads.zero_logits[rows].copy_(by_d.mul_(batch.factors[rows, None]))
        # -softplus(h) is min(-h, 0) + log(sigmoid(|h|)), and theta L + min(-h, 0) is min(theta L, -d)
        large = d.numel() and float(d.amax()) > 80.0
        inflated = torch.nn.functional.softplus(d) if large else None
        negative.view(-1).index_fill_(0, places, torch.inf)
        if lost is not None:  # values of counts are added with their other terms
            at = lost[0]
            nb.view(-1).index_fill_(0, at[piece.counts.reshape(-1)[at] > 0], 0.0)
        torch.minimum(nb, negative, out=value)
        sigmoid = torch.maximum(keep, torch.sub(1.0, keep, out=other), out=other)
        if inflated is None:
            value.add_(sigmoid.div_(not_inflated).log_())
        else:
            value.add_(sigmoid.log_()).add_(inflated)
        torch.sum(value, 1, out=batch.nll[rows])
        return keep
