"""The ops as torch knows them, for whoever looks on: fake tensors, dispatch modes, compiled regions, torch.export.

Eager code calls a backend's room directly, because the dispatcher costs as much as the loss of a small batch. A room of
the same functions, with the same arguments, stands here, whose functions go through `torch.ops.fastvae`.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import _backend
from .._dtypes import compute_dtype
from .._options import Clamp, ElboOptions, ElboTensors, ErrorOptions, FloorOptions, PhiloxNoise

_LIBRARY = torch.library.Library("fastvae", "DEF")
_READ = ", ".join(f"Tensor? {name}" for name in ElboTensors._fields)
_OPTIONS = (
    "Tensor? beta, Tensor? recon_weight, Tensor? row_weight, float[] constants, str error, str? floor, bool per_sample"
)
_GRADIENTS = ElboTensors._fields[:-1]  # the mask has none

_LIBRARY.define(
    f"elbo_fwd({_READ}, Tensor(a!)? drecon, Tensor(b!)? dlog_scale, {_OPTIONS})"
    " -> (Tensor loss, Tensor recon_term, Tensor kl_term, Tensor floored, Tensor weights)"
)
_LIBRARY.define(
    f"elbo_bwd({_READ}, Tensor? dloss, Tensor? drecon_term, Tensor? dkl_term, Tensor? dfloored, "
    + ", ".join(f"Tensor({chr(ord('a') + i)}!)? d{name}" for i, name in enumerate(_GRADIENTS))
    + f", {_OPTIONS}, bool holds_forward_gradient) -> ()"
)
_SAMPLE = "Tensor mu, Tensor logvar"
_NOISE = "Tensor seed, SymInt offset, float? low, float? high"
_LIBRARY.define(f"reparam_kl({_SAMPLE}, {_NOISE}, bool with_kl) -> (Tensor z, Tensor kl)")
_LIBRARY.define(f"reparam_kl_bwd({_SAMPLE}, Tensor? dz, Tensor? dkl, {_NOISE}) -> (Tensor dmu, Tensor dlogvar)")
_LIBRARY.define("philox_normal(Tensor seed, SymInt[] size, SymInt offset, ScalarType dtype) -> Tensor")


def is_watched(like: Tensor) -> bool:
    """Whether a tensor subclass or a dispatch mode has to see what is computed."""
    plain = type(like) is Tensor or type(like) is torch.nn.Parameter
    return not plain or torch._C._len_torch_dispatch_stack() > 0


def elbo_fwd(
    tensors: ElboTensors, written: ElboTensors, options: ElboOptions, notes: dict[Any, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the functions of this name in the backends."""
    outputs = torch.ops.fastvae.elbo_fwd(*tensors, written.recon, written.log_scale, *_packed(options))
    loss, recon_term, kl_term, floored, weights = outputs
    has_weights = isinstance(options.beta, Tensor) or isinstance(options.recon_weight, Tensor)
    floored = None if options.floor is None else floored
    return loss, recon_term, kl_term, floored, weights if has_weights else None


def elbo_bwd(
    tensors: ElboTensors,
    upstream: tuple[Tensor | None, ...],
    gradients: ElboTensors,
    options: ElboOptions,
    notes: dict[Any, Any],
    *,
    holds_forward_gradient: bool,
) -> None:
    """As the functions of this name in the backends."""
    torch.ops.fastvae.elbo_bwd(*tensors, *upstream, *gradients[:-1], *_packed(options), holds_forward_gradient)


def reparam_kl(
    mu: Tensor, logvar: Tensor, noise: PhiloxNoise, logvar_clamp: Clamp | None, *, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """(z, KL of each sample or None), differentiable."""
    seed = _seed_tensor(noise.seed, mu.device)
    z, kl = torch.ops.fastvae.reparam_kl(mu, logvar, seed, noise.offset, *(logvar_clamp or (None, None)), with_kl)
    return z, kl if with_kl else None


def philox_normal(
    shape: Sequence[int], seed: int | Tensor, offset: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """As the functions of this name in the backends."""
    normals: Tensor = torch.ops.fastvae.philox_normal(_seed_tensor(seed, device), list(shape), offset, dtype)
    return normals


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


def _packed(options: ElboOptions) -> tuple[Any, ...]:
    tensors = [w if isinstance(w, Tensor) else None for w in (options.beta, options.recon_weight)]
    numbers = [1.0 if isinstance(w, Tensor) else w for w in (options.beta, options.recon_weight)]
    low, high = options.logvar_clamp or (math.nan, math.nan)
    floor = options.floor
    constants = [
        *(*numbers, options.recon_scale, options.recon_constant, options.kl_scale, low, high),
        *(options.error[1:]),
        math.nan if floor is None else floor.nats,
    ]
    mode = None if floor is None else floor.mode
    return *tensors, options.row_weight, constants, options.error.name, mode, options.per_sample


def _unpacked(
    beta: Tensor | None,
    recon_weight: Tensor | None,
    row_weight: Tensor | None,
    constants: list[float],
    error: str,
    floor: str | None,
    per_sample: bool,
) -> ElboOptions:
    beta_number, weight_number, scale, constant, kl_scale, low, high, *error_constants, nats = constants
    return ElboOptions(
        beta=beta_number if beta is None else beta,
        recon_weight=weight_number if recon_weight is None else recon_weight,
        recon_scale=scale,
        recon_constant=constant,
        kl_scale=kl_scale,
        per_sample=per_sample,
        logvar_clamp=None if math.isnan(low) else (low, high),
        error=ErrorOptions(error, *error_constants),
        floor=None if floor is None else FloorOptions(nats, cast(Any, floor)),
        row_weight=row_weight,
    )


_N = len(ElboTensors._fields)


@torch.library.impl(_LIBRARY, "elbo_fwd", "CompositeExplicitAutograd")
def _elbo_fwd(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = ElboTensors(*args[:_N]), _unpacked(*args[_N + 2 :])
    like = next(t for t in tensors if t is not None)
    written = ElboTensors(recon=args[_N], log_scale=args[_N + 1])
    outputs = _backend.room_of(like, "elbo").elbo_fwd(tensors, written, options, {})
    loss, recon_term, kl_term = outputs[:3]
    return _distinct(loss, recon_term, kl_term, *(like.new_empty(0) if t is None else t for t in outputs[3:]))


def _distinct(*outputs: Tensor) -> tuple[Tensor, ...]:
    """An op's outputs are no tensor twice."""
    seen: list[Tensor] = []
    for output in outputs:
        seen.append(output.clone() if any(output is other for other in seen) else output)
    return tuple(seen)


@torch.library.register_fake("fastvae::elbo_fwd", lib=_LIBRARY)
def _elbo_fwd_fake(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = ElboTensors(*args[:_N]), _unpacked(*args[_N + 2 :])
    like = next(t for t in tensors if t is not None)
    dtype = compute_dtype(*tensors[:-1])
    loss, recon_term, kl_term, floored = (
        like.new_empty(like.shape[:1] if options.per_sample else (), dtype=dtype) for _ in range(4)
    )
    on_device = isinstance(options.beta, Tensor) or isinstance(options.recon_weight, Tensor)
    weights = like.new_empty(2, dtype=dtype) if on_device else like.new_empty(0)
    return loss, recon_term, kl_term, like.new_empty(0) if options.floor is None else floored, weights


@torch.library.impl(_LIBRARY, "elbo_bwd", "CompositeExplicitAutograd")
def _elbo_bwd(*args: Any) -> None:
    tensors, upstream, rest = ElboTensors(*args[:_N]), args[_N : _N + 4], args[_N + 4 :]
    gradients = ElboTensors(*rest[: len(_GRADIENTS)])
    options = _unpacked(*rest[len(_GRADIENTS) : -1])
    like = next(t for t in gradients if t is not None)
    room = _backend.room_of(like, "elbo")
    room.elbo_bwd(tensors, upstream, gradients, options, {}, holds_forward_gradient=rest[-1])


@torch.library.register_fake("fastvae::elbo_bwd", lib=_LIBRARY)
def _elbo_bwd_fake(*args: Any) -> None:
    return None


def _bounds(low: float | None, high: float | None) -> Clamp | None:
    return None if low is None or high is None else (low, high)


@torch.library.impl(_LIBRARY, "reparam_kl", "CompositeExplicitAutograd")
def _reparam_kl(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: int, low: float | None, high: float | None, with_kl: bool
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    room = _backend.room_of(mu, "reparam_kl")
    kl, _ = room.reparam_kl_fwd(mu, logvar, PhiloxNoise(seed, offset), z, _bounds(low, high), {}, with_kl=with_kl)
    return z, mu.new_empty(0) if kl is None else kl


@torch.library.register_fake("fastvae::reparam_kl", lib=_LIBRARY)
def _reparam_kl_fake(
    mu: Tensor, logvar: Tensor, seed: Tensor, offset: int, low: float | None, high: float | None, with_kl: bool
) -> tuple[Tensor, Tensor]:
    z = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    return z, mu.new_empty(mu.shape[0], dtype=compute_dtype(mu, logvar)) if with_kl else mu.new_empty(0)


@torch.library.impl(_LIBRARY, "reparam_kl_bwd", "CompositeExplicitAutograd")
def _reparam_kl_bwd(
    mu: Tensor,
    logvar: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    seed: Tensor,
    offset: int,
    low: float | None,
    high: float | None,
) -> tuple[Tensor, Tensor]:
    noise, bounds = PhiloxNoise(seed, offset), _bounds(low, high)
    room = _backend.room_of(mu, "reparam_kl")
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    saved = room.saved_again(mu, logvar, noise, bounds)
    room.reparam_kl_bwd(mu, logvar, saved, dz, dkl, dmu, dlogvar, noise, bounds, {})
    return dmu, dlogvar


@torch.library.register_fake("fastvae::reparam_kl_bwd", lib=_LIBRARY)
def _reparam_kl_bwd_fake(mu: Tensor, logvar: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mu), torch.empty_like(logvar)


@torch.library.impl(_LIBRARY, "philox_normal", "CompositeExplicitAutograd")
def _philox_normal(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    room = _backend.room_of(seed, "philox")
    normals: Tensor = room.philox_normal(torch.Size(size), seed, offset, dtype, seed.device)
    return normals.clone()  # an op's output has memory of its own


@torch.library.register_fake("fastvae::philox_normal", lib=_LIBRARY)
def _philox_normal_fake(seed: Tensor, size: Sequence[int], offset: int, dtype: torch.dtype) -> Tensor:
    return seed.new_empty(size, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    mu, logvar, seed, offset, low, high, with_kl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mu, logvar, seed)
    ctx.constants = offset, low, high
    ctx.with_kl = with_kl


def _backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
    mu, logvar, seed = ctx.saved_tensors
    dkl = dkl if ctx.with_kl else None
    gradients = torch.ops.fastvae.reparam_kl_bwd(mu, logvar, dz, dkl, seed, *ctx.constants)
    wanted = (g if want else None for g, want in zip(gradients, ctx.needs_input_grad, strict=False))
    return *wanted, None, None, None, None, None


torch.library.register_autograd("fastvae::reparam_kl", _backward, setup_context=_setup_context, lib=_LIBRARY)
