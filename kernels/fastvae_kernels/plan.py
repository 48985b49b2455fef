"""The launches of a loss, as far as shapes, strides, dtypes and options determine them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import fold_tile
from ._tile import ONE_TILE_EACH, Geometry, make_geometry, pack_f64, triton_dtype
from .images import Images
from .latents import Bounds, Latents, bounds_of
from .likelihoods import Likelihood, likelihood
from .samples import SampleOptions, sample_options
from .types import ElboNumbers, ElboOptions, ElboTensors, TensorMeta, compute_dtype, needs_sample_terms, recon_constant

MAX_IMAGE_PROGRAMS_BWD = 1 << 10  # few, so that returning at once costs next to nothing; each takes many tiles


class ElboPlan(NamedTuple):
    """The launches of both passes, for calls with equal signatures."""

    device: torch.device
    image: Geometry  # of the forward pass
    latent: Geometry
    image_programs: int
    latent_programs: int
    image_bwd: Geometry
    latent_bwd: Geometry
    image_programs_bwd: int
    latent_programs_bwd: int
    likelihood: Likelihood | None
    bounds: Bounds
    recon_partials: tuple[tuple[int, int], tuple[int, int]]  # shape and strides
    recon_dtype: torch.dtype
    counts_mask: bool
    weighs_elements: bool
    kl_partials: tuple[tuple[int, int], tuple[int, int]]
    kl_dtype: torch.dtype
    n_kl: int
    dkl_dtype: tl.dtype
    recon_scale: float
    factors: tuple[Any, ...]  # packed: recon_scale, recon_constant, kl_scale
    shape: tuple[int, ...]  # of the results
    dtype: torch.dtype
    fold_programs: int
    fold: tuple[int, ...]  # n_rows to KL_COLS
    has_number_tensors: bool
    sample_options: SampleOptions | None  # None: no option acts on samples, and the next three are not read
    recon_normalizer: Any  # packed
    mask_normalize: bool
    batch_capacity: bool


def plan_elbo(metas: ElboTensors, numbers: ElboNumbers, options: ElboOptions, writes_gradient: bool) -> ElboPlan:
    """Plan the launches of a loss.

    Args:
        metas: `TensorMeta` of each input.
        numbers: floats or `TensorMeta`.
        writes_gradient: The forward pass writes the gradient of recon.
    """
    by_sample = needs_sample_terms(metas, numbers, options)
    rows_are_samples = by_sample or options.per_sample
    gradients = ElboTensors(*(meta.like() if meta is not None and meta.requires_grad else None for meta in metas))
    written = gradients if writes_gradient else ElboTensors()
    image = make_geometry(_images(metas, written._replace(target=None, extra_map=None)), rows_are_samples)
    latent = make_geometry(_latents(metas, ElboTensors()), rows_are_samples)
    image_bwd = make_geometry(_images(metas, gradients), rows_are_samples, MAX_IMAGE_PROGRAMS_BWD)
    latent_bwd = make_geometry(_latents(metas, gradients), rows_are_samples, ONE_TILE_EACH)
    first = next(meta for meta in metas if meta is not None)
    batch = first.shape[0]
    n_rows = batch if rows_are_samples else 1
    n_kl = latent.n_rows * latent.n_col_programs if metas.kl is None else math.prod(metas.kl.shape)
    n_recon = image.n_rows * image.n_col_programs
    n_recon, n_kl = (n // n_rows if n_rows else 0 for n in (n_recon, n_kl))
    tiles = fold_tile(n_rows, n_recon), fold_tile(n_rows, n_kl)
    block_rows = min(rows for rows, _ in tiles)
    fold = (n_rows, n_recon, n_kl, block_rows, tiles[0][1], tiles[1][1])
    recon_scale = options.recon_normalizer * options.error_weight
    return ElboPlan(
        device=first.device,
        image=image,
        latent=latent,
        image_programs=image.programs,
        latent_programs=latent.programs,
        image_bwd=image_bwd,
        latent_bwd=latent_bwd,
        image_programs_bwd=image_bwd.programs,
        latent_programs_bwd=latent_bwd.programs,
        likelihood=None if metas.recon is None else likelihood(options.error, metas.recon, metas.target),
        bounds=bounds_of(options),
        recon_partials=((image.n_rows, image.n_col_programs), (image.n_col_programs, 1)),
        recon_dtype=compute_dtype(*metas[:4], metas.weight_map),
        counts_mask=by_sample and metas.mask is not None,
        weighs_elements=metas.weight_map is not None,
        kl_partials=((latent.n_rows, latent.n_col_programs), (latent.n_col_programs, 1)),
        kl_dtype=compute_dtype(*metas[4:8]),
        n_kl=0 if metas.kl is None else batch,
        dkl_dtype=triton_dtype(compute_dtype(metas.kl)),
        recon_scale=recon_scale,
        factors=tuple(map(pack_f64, (recon_scale, recon_constant(metas, options), options.kl_normalizer))),
        shape=(batch,) if options.per_sample else (),
        dtype=compute_dtype(*metas, *numbers),
        fold_programs=triton.cdiv(n_rows, block_rows),
        fold=fold,
        has_number_tensors=any(isinstance(number, TensorMeta) for number in numbers),
        sample_options=sample_options(metas, options) if by_sample else None,
        recon_normalizer=pack_f64(options.recon_normalizer),
        mask_normalize=options.mask_normalize,
        batch_capacity=options.capacity_mode == "batch",
    )


def seen_numbers(plan: ElboPlan, saved: tuple[Tensor, ...], numbers: Sequence[Any]) -> Sequence[Any]:
    """The numbers as the forward pass saw them: tensors may have changed since."""
    if not saved:
        return numbers
    seen: tuple[Any, ...]
    if plan.sample_options is None:
        recon_weight, beta = saved[0].unbind()
        seen = beta, recon_weight, None
    else:
        recon_weight, beta, capacity, *_ = saved[1].unbind()
        seen = beta, recon_weight, capacity
    return [s if isinstance(n, Tensor) else n for n, s in zip(numbers, seen, strict=True)]


def _images(metas: ElboTensors, gradients: ElboTensors) -> Images:
    inputs = metas.recon, metas.target, metas.log_scale, metas.mask, metas.extra_map, metas.weight_map
    return Images(*inputs, gradients.recon, gradients.target, gradients.log_scale, gradients.extra_map)


def _latents(metas: ElboTensors, gradients: ElboTensors) -> Latents:
    return Latents(*metas[4:8], metas.kl_mask, *gradients[4:8])
