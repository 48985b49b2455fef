"""Errors of images and their gradients, in passes over cache-sized pieces.

On a CPU the cost of a loss is the memory it walks over, fresh pages above all. So the error is taken piece by piece,
summed while it is in the cache, and its gradient written on the way.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .._options import ErrorOptions
from .._strides import is_dense
from .gaussian import rows, sum_by_sample
from .likelihoods import PAIRS
from .pages import advise_large_pages

_PIECE = 1 << 18  # elements: a float32 piece and its squares fit the second-level cache, 1 us a call is noise beside it

_MOST_THREADS = 16  # that get as much each: pieces are temporary memory, too

_ROW = 256

Coefficient = float | Tensor


class Images(NamedTuple):
    """Tensors of one shape: what is read, and buffers for what is asked for."""

    recon: Tensor
    target: Tensor
    log_scale: Tensor | None = None
    mask: Tensor | None = None
    drecon: Tensor | None = None
    dtarget: Tensor | None = None
    dlog_scale: Tensor | None = None
    coefficient: Tensor | None = None  # of the gradients, where each sample has its own

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.recon, self.target, self.log_scale)


def sum_errors(images: Images, coefficient: Coefficient, options: ErrorOptions, *, per_sample: bool) -> Tensor:
    """Sum of the errors, 0-d or [B]; their gradients times `coefficient` are written in the same pass."""
    dtype = images.dtype
    images, coefficient = _with_rows(images, coefficient)
    if images.drecon is not None and images.drecon.data_ptr() != images.recon.data_ptr():
        advise_large_pages(images.drecon)
    if _is_plain(images, options):
        sums = _sum_squares(images, coefficient, options, per_sample=per_sample)
    else:
        sums = []
        for piece in _pieces(images, per_sample=per_sample):
            errors = _errors(piece, options, dtype)
            sums.append(sum_by_sample(errors) if per_sample else errors.sum())
            _write_gradients(piece, coefficient, options, dtype)
    if len(sums) == 1:
        return sums[0]
    if per_sample:
        return torch.cat(sums) if sums else images.recon.new_zeros(images.recon.shape[0], dtype=dtype)
    return torch.stack(sums).sum() if sums else images.recon.new_zeros((), dtype=dtype)


def _sum_squares(images: Images, coefficient: Coefficient, options: ErrorOptions, *, per_sample: bool) -> list[Tensor]:
    """What `sum_errors` does, for squared errors alone: their sums, to be joined."""
    dtype = images.dtype
    in_place = images.drecon is not None and images.drecon.dtype == dtype
    # pieces differ with the number of threads, and so must not show in the sum: norms of short rows are joined first
    by_rows = not per_sample and images.recon.numel() > _PIECE
    sums: list[Tensor] = []
    buffers: list[Tensor] = []  # for the difference, unless the gradient's own memory serves, and for the target
    for piece in _pieces(images, per_sample=per_sample):
        if not buffers or buffers[0].shape != piece.recon.shape:
            buffers = [] if in_place else [torch.empty_like(piece.recon, dtype=dtype)]
            if piece.target.dtype != dtype:
                buffers.append(torch.empty_like(piece.recon, dtype=dtype))
        difference = _subtract(piece, options, piece.drecon if in_place else buffers[0], buffers[-1:])
        if per_sample:
            sums.append(sum_by_sample(difference.square()))
        else:
            sums.append(_norms(difference) if by_rows else _sum_of_squares(difference))
        if piece.drecon is not None:
            difference.mul_(coefficient * 2) if piece.coefficient is None else difference.mul_(piece.coefficient).mul_(
                2
            )
            if not in_place:
                piece.drecon.copy_(difference)
    return [torch.cat(sums).square_().sum()] if by_rows else sums


def write_gradients(images: Images, coefficient: Coefficient, options: ErrorOptions) -> None:
    """Write the gradients that have a buffer, times `coefficient`: one number, or [B]."""
    dtype = images.dtype
    images, coefficient = _with_rows(images, coefficient)
    for piece in _pieces(images, per_sample=False):
        _write_gradients(piece, coefficient, options, dtype)


def _with_rows(images: Images, coefficient: Coefficient) -> tuple[Images, Coefficient]:
    """A coefficient of each sample walks along as one more tensor."""
    if not isinstance(coefficient, Tensor) or coefficient.ndim == 0:
        return images, coefficient
    return images._replace(coefficient=rows(coefficient, images.recon).expand(images.recon.shape)), 1.0


def _is_plain(images: Images, options: ErrorOptions) -> bool:
    """The squared error alone, which has the shortest way."""
    return options.name == "l2" and images.log_scale is None and images.mask is None


def _pieces(images: Images, *, per_sample: bool) -> Iterator[Images]:
    """Equal parts, about _PIECE elements for each thread; whole samples if `per_sample`."""
    recon, n = images.recon, images.recon.numel()
    if n == 0:
        return
    if n <= _PIECE:
        yield images
        return
    size = _PIECE * min(torch.get_num_threads(), _MOST_THREADS)
    given = [t for t in images if t is not None]
    if not per_sample and is_dense(recon) and all(t.stride() == recon.stride() for t in given):
        images = Images(*(None if t is None else t.as_strided((n,), (1,)) for t in images))  # type: ignore[arg-type]
        step, stop = size, n
    else:
        step, stop = max(1, size * recon.shape[0] // n), recon.shape[0]
    for start in range(0, stop, step):
        yield Images(*(None if t is None else t[start : start + step] for t in images))  # type: ignore[arg-type]


def _subtract(piece: Images, options: ErrorOptions, out: Tensor | None, spare: list[Tensor]) -> Tensor:
    """out = recon - target, in the dtype of `out`, whatever theirs are; `spare` takes a target of another dtype."""
    recon, target = piece.recon, piece.target
    assert out is not None
    if target.dtype != out.dtype:
        target = spare[0].copy_(target)
    if recon.dtype != out.dtype:
        recon = out.copy_(recon)
    if piece.target.dtype != torch.uint8:
        return torch.sub(recon, target, out=out)
    torch.sub(recon, target, alpha=options.target_scale, out=out)
    return out.sub_(options.target_shift) if options.target_shift else out


def _sum_of_squares(values: Tensor) -> Tensor:
    """By the norms of short rows where there are whole ones: one pass and no squares to store.

    A norm adds up in sequence; over 256 elements that costs 4e-7 at worst, over all of them 1e-3. The sum of the rows
    is torch's cascaded one.
    """
    if values.is_contiguous() and values.numel() % _ROW == 0:
        norms: Tensor = torch.linalg.vector_norm(values.view(-1, _ROW), dim=1)
        return norms.square_().sum()
    return values.square().sum()


def _norms(values: Tensor) -> Tensor:
    """Of short rows in storage order, and of the rest."""
    flat = values.as_strided((values.numel(),), (1,)) if is_dense(values) else values.reshape(-1)
    whole = flat.numel() - flat.numel() % _ROW
    norms: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)
    return norms if whole == flat.numel() else torch.cat([norms, torch.linalg.vector_norm(flat[whole:]).view(1)])


def _values(piece: Images, options: ErrorOptions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """recon and target in the dtype of arithmetic."""
    target = piece.target.to(dtype)
    if piece.target.dtype == torch.uint8:
        target = target.mul_(options.target_scale).add_(options.target_shift)
    return piece.recon.to(dtype), target


def _errors(piece: Images, options: ErrorOptions, dtype: torch.dtype) -> Tensor:
    errors = PAIRS[options.name].error(*_values(piece, options, dtype), options.parameter)
    if piece.log_scale is not None:
        log_scale = piece.log_scale.to(dtype)
        errors.mul_(torch.neg(log_scale).exp_()).add_(log_scale)
    return errors if piece.mask is None else errors.masked_fill_(~piece.mask, 0)


def _write_gradients(piece: Images, coefficient: Coefficient, options: ErrorOptions, dtype: torch.dtype) -> None:
    def write(buffer: Tensor | None, gradient: Tensor) -> None:
        if buffer is not None:
            gradient = gradient * (coefficient if piece.coefficient is None else piece.coefficient)
            buffer.copy_(gradient if piece.mask is None else gradient.masked_fill_(~piece.mask, 0))

    recon, target = _values(piece, options, dtype)
    pair = PAIRS[options.name]
    shrink = None if piece.log_scale is None else torch.neg(piece.log_scale.to(dtype)).exp_()
    # first, because drecon may take recon's memory
    if piece.dlog_scale is not None and shrink is not None:
        write(piece.dlog_scale, 1 - pair.error(recon, target, options.parameter) * shrink)
    if piece.drecon is not None or piece.dtarget is not None:
        by_recon, by_target = pair.gradient(recon, target, options.parameter)
        by_target = by_recon.neg() if by_target is None else by_target
        write(piece.drecon, by_recon if shrink is None else by_recon * shrink)
        write(piece.dtarget, by_target if shrink is None else by_target * shrink)
