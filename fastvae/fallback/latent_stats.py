"""Statistics of latents by dimension in passes over cache-sized pieces, on any device."""

import math

import torch
from torch import Tensor

from fastvae_kernels.types import Clamp

from ..reference import compute_dtype
from .gaussian import clamped

_PIECE = 1 << 18  # elements: what is made of a float32 piece fits the second-level cache


def latent_stats(mu: Tensor, logvar: Tensor, logvar_clamp: Clamp | None, active_variance: float) -> tuple[Tensor, ...]:
    """(kl, mean, variance) of dimensions and how many are active, how many numbers not finite, how many logvar
    clamped.
    """
    dtype = compute_dtype(mu, logvar)
    n_rows = mu.shape[0]
    # a compiler fuses the temporaries that pieces keep small, and would unroll the loop over them
    piece_rows = n_rows if torch.compiler.is_compiling() else _PIECE // max(math.prod(mu.shape[1:]), 1)
    pieces = [torch.split(t, max(piece_rows, 1)) for t in (mu, logvar)]
    # squares of distances from near the mean: those of mu itself would cancel where the mean is large
    shift = pieces[0][0].to(dtype).mean(0).nan_to_num(0.0, 0.0, 0.0)
    totals: list[Tensor] = []
    for mu_piece, logvar_piece in zip(*pieces, strict=True):
        sums = _sums(mu_piece.to(dtype), logvar_piece.to(dtype), shift, logvar_clamp)
        totals = [total + more for total, more in zip(totals, sums, strict=True)] if totals else sums
    distance, squares, twice_kl, nonfinite, n_clamped = totals
    offset = distance / n_rows
    variance = (squares - distance * offset) / (n_rows - 1)  # 0 / 0 of one sample
    kl, mean, variance = (t.to(dtype) for t in (twice_kl / (2 * n_rows), shift + offset, variance))
    return kl, mean, variance, (variance >= active_variance).sum(), nonfinite, n_clamped


def _sums(mu: Tensor, logvar: Tensor, shift: Tensor, logvar_clamp: Clamp | None) -> list[Tensor]:
    """Over the samples: distances from the shift, their squares, twice the KLs; over all: nonfinite, clamped."""
    # pieces are added up in float64, which MPS does not have
    wide = mu.dtype if mu.device.type == "mps" else torch.float64
    distance = mu - shift
    # x - x is NaN where x is not finite: one pass, where isfinite makes four
    nonfinite = torch.count_nonzero(mu - mu) + torch.count_nonzero(logvar - logvar)
    outside = torch.zeros_like(nonfinite)
    if logvar_clamp is not None:
        low, high = logvar_clamp
        outside = torch.count_nonzero((logvar < low) | (logvar > high))
    logvar = clamped(logvar, logvar_clamp)
    twice_kl = torch.expm1(logvar).sub_(logvar).addcmul_(mu, mu)
    by_dimension = (distance, distance.square(), twice_kl)
    return [*(elements.sum(0).to(wide) for elements in by_dimension), nonfinite, outside]
