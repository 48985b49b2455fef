"""A whole training step as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import _checks, _numbers
from ._captured_step import CapturedStep as CapturedStep
from ._captured_step import Terms
from .noise_state import NoiseState


def capture_step(
    model: Callable[..., Any],
    criterion: Callable[..., Terms] | None,
    optimizer: torch.optim.Optimizer,
    example: Tensor,
    *,
    noise: NoiseState | None = None,
    warmup: int = 3,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    lr_schedule: Callable[[Tensor], Tensor] | None = None,
    accumulate: int = 1,
    ema: AveragedModel | None = None,
    compile: bool = False,
) -> CapturedStep:
    """A training step that is captured once into a CUDA graph and replayed for every batch.

    The step is: zero the gradients, forward, loss, backward, clip, set the learning rate, optimizer, step the beta
    schedules of the criterion, advance the noise, average the weights. A small network spends most of a step on
    launching its kernels one by one; a replay is one launch. Where each kernel takes long anyway, as with large batches
    or images, there is nothing to gain.

    On a CPU, and wherever no graph can be captured, the same object runs the same step eagerly, with the same numbers.

    Args:
        model: `model(images)` returns an object with `recon`, `z` and `kl`, as `fastvae.models.VAEOutput` is; or, with
            criterion=None, any function `images -> VAELossTerms or 0-d loss`.
        criterion: `criterion(recon, images, kl=kl)`, for example a `VAELoss`; its schedules are stepped.
        optimizer: For the graph, one of torch.optim that has the option `capturable`, or SGD. Its `capturable` is
            set, and each `lr` becomes a tensor on the device, which torch's schedulers write in place.
        example: A batch: its shape, dtype and device are those of the graph. Its values count for nothing.
        noise: Seeds the sampling: the model is called with `seed=noise.seed` and the `offset` of the micro-batch, and
            `advance()` follows the backward pass. A function reads `noise.seed` itself, and `advance()` follows each
            micro-batch. Without `noise` the model draws from torch's default generator.
        warmup: Steps on a side stream before the capture, which compile kernels and fill caches. Afterwards weights,
            optimizer, noise, schedules and random numbers are as before. Modules that only a function holds are not
            known here: what the warm-up does to their buffers stays.
        clip_norm: Largest norm of all gradients together, as torch.nn.utils.clip_grad_norm_.
        autocast: torch.bfloat16, or torch.float16, which needs a GradScaler and so runs eagerly.
        lr_schedule: 0-d int64 tensor, the number of steps before this one -> 0-d tensor, the learning rate of all
            groups. It may read no value on the host.
        accumulate: The batch is cut into so many micro-batches, whose gradients are averaged.
        ema: torch.optim.swa_utils.AveragedModel of the model, with `multi_avg_fn`.
        compile: Compile forward pass and loss by torch.compile.

    Returns:
        CapturedStep: `terms = step(images)`.

    Raises:
        TypeError: model or criterion cannot be called; example is not a tensor; noise or ema of another type.
        ValueError: warmup or accumulate is not an int of at least 1; clip_norm is not positive; ema without a model or
            without multi_avg_fn; accumulate does not divide the batch; autocast of another dtype.

    Example:
        >>> step = fastvae.capture_step(vae, criterion, optimizer, next(iter(loader)), noise=fastvae.NoiseState(0))
        >>> for images in loader:
        ...     terms = step(images)
    """
    _check(model, criterion, optimizer, example, noise, autocast, ema)
    warmup = _numbers.integer("warmup", warmup, least=1)
    accumulate = _numbers.integer("accumulate", accumulate, least=1)
    if example.shape[0] % accumulate:
        _checks.fail(f"accumulate must divide the batch; got {accumulate} for a batch of {example.shape[0]}.")
    step = CapturedStep(
        model,
        criterion,
        optimizer,
        example,
        noise=noise,
        clip_norm=None if clip_norm is None else _numbers.positive("clip_norm", clip_norm),
        autocast=autocast,
        lr_schedule=lr_schedule,
        accumulate=accumulate,
        ema=ema,
        compile=compile,
    )
    if step.reason is None:
        step._capture(warmup)
    return step


def _check(
    model: object,
    criterion: object,
    optimizer: object,
    example: object,
    noise: object,
    autocast: object,
    ema: AveragedModel | None,
) -> None:
    for name, value in (("model", model), ("criterion", criterion)):
        if not callable(value) and (name == "model" or value is not None):
            raise TypeError(f"{name} must be a module or a function; got {type(value).__name__}.")
    wanted: tuple[tuple[str, object, type], ...] = (
        ("optimizer", optimizer, torch.optim.Optimizer),
        ("example", example, Tensor),
        ("noise", noise, NoiseState),
        ("ema", ema, AveragedModel),
    )
    for name, value, kind in wanted:
        if not isinstance(value, kind) and (value is not None or name in ("optimizer", "example")):
            raise TypeError(f"{name} must be a {kind.__module__}.{kind.__name__}; got {type(value).__name__}.")
    if autocast not in (None, torch.bfloat16, torch.float16):
        _checks.fail(f"autocast must be None, torch.bfloat16 or torch.float16; got {autocast!r}.")
    if ema is not None and not isinstance(model, nn.Module):
        _checks.fail("ema averages the weights of a model; got a function. Update it after each step instead.")
    if ema is not None and ema.multi_avg_fn is None:
        _checks.fail("ema must have multi_avg_fn, for example torch.optim.swa_utils.get_ema_multi_avg_fn(0.999).")
