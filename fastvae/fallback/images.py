"""Errors of images and their gradients, in passes over cache-sized pieces.

On a CPU memory traffic dominates the cost of a loss, page faults above all. So errors are computed piece by piece and
summed while they are in the cache, and the gradient is written in the same pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae_kernels.types import ErrorOptions, compute_dtype

from .._dtypes import in_dtype
from .._elementwise import ERRORS
from .._likelihood_base import Piece
from .._strides import is_dense
from .gaussian import rows
from .hugepages import advise_huge_pages
from .sums import ROW, UNSPLIT, norms, row_sums, sample_sums, sum_of_squares, total

_PIECE = 1 << 18  # elements: a float32 piece and its squares fit the second-level cache

_BUFFERED_PIECE = 1 << 17  # where several buffers of this size take part

_MOST_THREADS = 16  # threads that enlarge a piece: pieces are temporary memory

Coefficient = float | Tensor


class Images(NamedTuple):
    """Tensors of one shape: inputs, and buffers for the gradients that are computed."""

    recon: Tensor
    target: Tensor
    log_scale: Tensor | None = None
    extra: Tensor | None = None
    mask: Tensor | None = None
    drecon: Tensor | None = None
    dtarget: Tensor | None = None
    dlog_scale: Tensor | None = None
    dextra: Tensor | None = None
    weight: Tensor | None = None  # of each element, of the gradients too
    coefficient: Tensor | None = None  # of the gradients, where each sample has its own
    unweighed: Tensor | None = None  # added to the product of both

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.recon, self.target, self.log_scale, self.extra, self.weight)


def sum_errors(images: Images, coefficient: Coefficient, options: ErrorOptions, *, per_sample: bool) -> Tensor:
    """Sum of the errors, 0-d or [B]; their gradients times `coefficient` are written in the same pass."""
    dtype, plain = images.dtype, _is_plain(images, options)
    images, coefficient = _with_rows(images, coefficient * 2 if plain else coefficient)
    if images.drecon is not None and images.drecon.data_ptr() != images.recon.data_ptr():
        advise_huge_pages(images.drecon)
    if plain:
        sums = _sum_squares(images, dtype, coefficient, options, per_sample=per_sample)
    else:
        filler = _Filler(images, coefficient, options)
        add_up = sample_sums if per_sample else row_sums if images.recon.numel() > UNSPLIT else torch.sum
        sums = [add_up(filler.fill(piece)) for piece in _pieces(images, _BUFFERED_PIECE, per_sample=per_sample)]
        if sums and not per_sample:
            return total(sums)
    if len(sums) == 1:
        return sums[0]
    if per_sample:
        return torch.cat(sums) if sums else images.recon.new_zeros(images.recon.shape[0], dtype=dtype)
    return torch.stack(sums).sum() if sums else images.recon.new_zeros((), dtype=dtype)


def _sum_squares(
    images: Images, dtype: torch.dtype, coefficient: Coefficient, options: ErrorOptions, *, per_sample: bool
) -> list[Tensor]:
    """What `sum_errors` does, for squared errors d^2 alone: sums to be joined; the coefficient is that of d^2 / 2."""
    in_place = images.drecon is not None and images.drecon.dtype == dtype
    # pieces differ with the number of threads, and so must not show in the sum: norms of short rows are joined first
    by_rows = not per_sample and images.recon.numel() > _PIECE
    sums: list[Tensor] = []
    buffers: list[Tensor] = []  # for the difference, unless the gradient's own memory serves, and for the target
    for piece in _pieces(images, _PIECE, per_sample=per_sample):
        if not buffers or buffers[0].shape != piece.recon.shape:
            buffers = [] if in_place else [torch.empty_like(piece.recon, dtype=dtype)]
            if piece.target.dtype != dtype:
                buffers.append(torch.empty_like(piece.recon, dtype=dtype))
        difference = _subtract(piece, options, piece.drecon if in_place else buffers[0], buffers[-1:])
        if per_sample:
            sums.append(sample_sums(torch.square(difference)))
        else:
            sums.append(norms(difference) if by_rows else sum_of_squares(difference))
        if piece.drecon is not None:
            difference.mul_(coefficient if piece.coefficient is None else piece.coefficient)
            if not in_place:
                piece.drecon.copy_(difference)
    return [torch.cat(sums).square_().sum()] if by_rows else sums


def sum_weighed_errors(images: Images, coefficient: Coefficient, options: ErrorOptions) -> tuple[Tensor, Tensor]:
    """[B], sums of the errors and of the errors times weights; gradients as in `sum_errors`."""
    images, coefficient = _with_rows(images, coefficient)
    filler = _Filler(images, coefficient, options)
    sums: list[Tensor] = []
    weighed: list[Tensor] = []
    for piece in _pieces(images, _BUFFERED_PIECE, per_sample=True):
        errors = filler.fill(piece)
        sums.append(sample_sums(errors))
        weighed.append(sample_sums(filler.weigh(piece, errors)))
    if not sums:
        nothing = images.recon.new_zeros(images.recon.shape[0], dtype=images.dtype)
        return nothing, nothing
    return torch.cat(sums), torch.cat(weighed)


def write_gradients(
    images: Images, coefficient: Coefficient, options: ErrorOptions, unweighed: Coefficient = 0.0
) -> None:
    """Write the gradients that have a buffer, times `coefficient`: one number, or [B].

    Where elements have weights the factor is weight * coefficient + unweighed.
    """
    images, coefficient = _with_rows(images, coefficient)
    if images.weight is not None and (isinstance(unweighed, Tensor) or unweighed != 0):
        unweighed = torch.as_tensor(unweighed, dtype=images.dtype, device=images.recon.device)
        images = images._replace(unweighed=rows(unweighed, images.recon).expand(images.recon.shape))
    filler = _Filler(images, coefficient, options)
    for piece in _pieces(images, _BUFFERED_PIECE, per_sample=False):
        filler.write_gradients(piece)


def _with_rows(images: Images, coefficient: Coefficient) -> tuple[Images, Coefficient]:
    """A coefficient per sample becomes one more tensor of the pieces."""
    if not isinstance(coefficient, Tensor) or coefficient.ndim == 0:
        return images, coefficient
    return images._replace(coefficient=rows(coefficient, images.recon).expand(images.recon.shape)), 1.0


def _is_plain(images: Images, options: ErrorOptions) -> bool:
    """Whether the loss is the squared error alone, which takes fewer passes."""
    plain = images.log_scale is None and images.extra is None and images.mask is None and images.weight is None
    return plain and options.name == "l2"


def _pieces(images: Images, size: int, *, per_sample: bool) -> Iterator[Images]:
    """Equal parts, about `size` elements for each thread; whole samples if `per_sample`."""
    recon, n = images.recon, images.recon.numel()
    if n == 0:
        return
    if n <= size:
        yield images
        return
    n_pieces = -(-n // (size * min(torch.get_num_threads(), _MOST_THREADS)))
    given = [t for t in images if t is not None]
    if not per_sample and is_dense(recon) and all(t.stride() == recon.stride() for t in given):
        images = Images(*(None if t is None else t.as_strided((n,), (1,)) for t in images))  # type: ignore[arg-type]
        step, stop = -(-n // (n_pieces * ROW)) * ROW, n
    else:
        stop = recon.shape[0]
        step = -(-stop // n_pieces)
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


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class _Filler:
    """Computes errors and gradients piece by piece, in buffers that all pieces share."""

    def __init__(self, images: Images, coefficient: Coefficient, options: ErrorOptions) -> None:
        self.options = options
        self.dtype = images.dtype
        coefficient = in_dtype(coefficient, self.dtype)
        if not isinstance(coefficient, Tensor):
            coefficient = torch.scalar_tensor(coefficient, dtype=self.dtype, device=images.recon.device)
        self.coefficient = coefficient
        self._buffers: dict[str, Tensor] = {}

    def fill(self, piece: Images) -> Tensor:
        """Return the errors, in a buffer that the next piece overwrites; write the gradients."""
        errors = self._buffer("errors", piece.recon)
        self._fill(piece, errors)
        return errors

    def write_gradients(self, piece: Images) -> None:
        self._fill(piece, None if piece.dlog_scale is None else self._buffer("errors", piece.recon))

    def _fill(self, piece: Images, errors: Tensor | None) -> None:
        recon = piece.recon
        likelihood = ERRORS[self.options.name]
        coefficient = self.coefficient if piece.coefficient is None else piece.coefficient.to(self.dtype)
        if piece.weight is not None:
            weights = self._converted("weights", piece.weight)
            coefficient = torch.mul(weights, coefficient, out=self._buffer("weighed", recon))
            if piece.unweighed is not None:
                coefficient.add_(piece.unweighed)
        selected = None  # all bits set where the mask selects: to mask by them is fast, and gives 0 for NaN
        if piece.mask is not None:
            selected = self._buffer("selected", recon, _BITS[self.dtype]).copy_(piece.mask).neg_()
        weight = coefficient  # of the error's gradients
        if piece.log_scale is not None:
            log_scale = self._converted("log_scale", piece.log_scale)
            inverse_scale = torch.neg(log_scale, out=self._buffer("inverse_scale", recon)).exp_()
            weight = torch.mul(inverse_scale, coefficient, out=self._buffer("weight", recon))
        values = self._converted("recon", recon)
        gradient = None
        if piece.drecon is not None and piece.drecon.dtype == self.dtype:
            gradient = piece.drecon
        elif piece.drecon is not None and values is not recon and piece.dtarget is None:
            gradient = values  # a converted copy, which is not read again
        elif piece.drecon is not None or (piece.dtarget is not None and likelihood.of_difference):
            gradient = self._buffer("gradient", recon)
        part = Piece(
            recon=values,
            target=self._target(piece),
            parameter=self.options.parameter,
            coefficient=weight,
            errors=errors,
            gradient=gradient,
            scratch=lambda name: self._buffer(name, recon),
        )
        likelihood.fill(part)
        _write(piece.drecon, gradient, selected)
        if piece.dtarget is not None:
            by_target = gradient.neg() if likelihood.of_difference else likelihood.target_gradient(part).mul_(weight)  # type: ignore[union-attr]
            _write(piece.dtarget, by_target, selected)
        if piece.dextra is not None:
            _write(piece.dextra, part.scratch("a").copy_(weight).mul_(self.options.extra_scale), selected)
        if errors is None:
            return
        if piece.extra is not None:
            errors.add_(self._converted("extra", piece.extra), alpha=self.options.extra_scale)
        if piece.log_scale is not None:
            errors.mul_(inverse_scale)
            if piece.dlog_scale is not None:
                _write(piece.dlog_scale, torch.neg(errors, out=part.scratch("a")).add_(1).mul_(coefficient), selected)
            errors.add_(log_scale)
        if selected is not None:
            _select(errors, selected)

    def weigh(self, piece: Images, errors: Tensor) -> Tensor:
        """Errors times weights, in place."""
        assert piece.weight is not None
        errors.mul_(self._converted("weights", piece.weight))
        if piece.mask is not None:  # weights outside may be NaN
            _select(errors, self._buffer("selected", piece.recon, _BITS[self.dtype]))
        return errors

    def _target(self, piece: Images) -> Tensor:
        target = self._converted("target", piece.target)
        if piece.target.dtype == torch.uint8:
            target.mul_(self.options.target_scale)
            return target.add_(self.options.target_shift) if self.options.target_shift else target
        return target

    def _converted(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.dtype else self._buffer(name, tensor).copy_(tensor)

    def _buffer(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape:
            buffer = self._buffers[name] = torch.empty_like(like, dtype=dtype or self.dtype)
        return buffer


def _select(values: Tensor, selected: Tensor) -> Tensor:
    values.view(selected.dtype).bitwise_and_(selected)
    return values


def _write(buffer: Tensor | None, gradient: Tensor | None, selected: Tensor | None) -> None:
    if buffer is None or gradient is None:
        return
    if selected is not None:
        gradient = _select(gradient, selected)
    if gradient is not buffer:
        buffer.copy_(gradient)
