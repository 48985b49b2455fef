"""The step that `capture_step` builds: replayed as a CUDA graph, or run eagerly with the same numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import _graphs
from .functional import VAELossTerms
from .noise_state import NoiseState
from .schedules import Schedule

Terms = Tensor | VAELossTerms


class CapturedStep:
    """A training step that `capture_step` built; call it with a batch of images.

    Attributes:
        captured: Whether a graph is held.
        reason: Why the last call ran eagerly, or why every call will; None if the graph was replayed.
        steps: 0-d int64 tensor on the device: optimizer steps so far, which `lr_schedule` takes.
        nonfinite: 0-d int64 tensor on the device: steps so far whose loss was NaN or infinite. Nothing waits for it
            until the caller reads it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        criterion: Callable[..., Terms] | None,
        optimizer: torch.optim.Optimizer,
        example: Tensor,
        *,
        noise: NoiseState | None,
        clip_norm: float | None,
        autocast: torch.dtype | None,
        lr_schedule: Callable[[Tensor], Tensor] | None,
        accumulate: int,
        ema: AveragedModel | None,
        compile: bool,
    ) -> None:
        self._model, self._criterion, self._optimizer = model, criterion, optimizer
        self._noise, self._clip_norm, self._autocast = noise, clip_norm, autocast
        self._lr_schedule, self._accumulate, self._ema = lr_schedule, accumulate, ema
        self._device = example.device
        self._forward: Callable[..., tuple[Terms, int]] = torch.compile(self._terms) if compile else self._terms
        modules = [m for m in (model, criterion) if isinstance(m, nn.Module)]
        self._modules = [*modules, *(m for m in (noise, ema) if m is not None)]
        self._schedules = [m for module in modules for m in module.modules() if isinstance(m, Schedule)]
        self._copies_into_ema = ema is not None and int(ema.n_averaged) == 0
        self.steps = torch.zeros((), dtype=torch.int64, device=self._device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=self._device)
        self._scaler = torch.amp.GradScaler(self._device.type) if autocast == torch.float16 else None
        self._images: Tensor = example.detach()
        self._results: Terms | None = None  # written by the graph
        self._gradients: list[tuple[Tensor, Tensor | None]] = []  # of the parameters, as the graph writes them
        self._graph: Any = None
        self._groups_before = [dict(group) for group in optimizer.param_groups]
        self.reason = _graphs.obstacle(self._device, model, optimizer, scaled=self._scaler is not None)

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self, images: Tensor) -> Terms:
        """Take one step.

        Args:
            images: [B, ...]. The graph takes the shape and dtype of the example; others run eagerly.

        Returns:
            What the criterion returns, without a graph of autograd. A replay returns the same tensors each time and
            overwrites them: clone what must outlive the next step.
        """
        if self._graph is None:
            terms = _detached(self._run(images))
        elif images.shape != self._images.shape or images.dtype != self._images.dtype:
            self.reason = (
                f"the graph takes {_name(self._images)}; got {_name(images)}. Drop the last, smaller batch of an epoch "
                "(drop_last=True) to replay every step"
            )
            terms = _detached(self._run(images))
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        else:
            self.reason = None
            self._images.copy_(images, non_blocking=True)
            self._graph.replay()
            assert self._results is not None
            terms = self._results
        if self._copies_into_ema and self._ema is not None:  # as AveragedModel does at its first update
            self._copies_into_ema = False
            for averaged, current in self._averaged_pairs():
                averaged.copy_(current)
        return terms

    def undo(self) -> None:
        """Drop the graph and its memory, and give the optimizer its own options back; later calls run eagerly."""
        self._graph = self._results = None
        self._gradients = []
        self._optimizer.zero_grad(set_to_none=True)
        for group, before in zip(self._optimizer.param_groups, self._groups_before, strict=True):
            lr = float(group["lr"])
            group.update({name: before[name] for name in ("capturable", "lr") if name in before})
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.reason = "undo() was called"

    def _terms(self, images: Tensor, offset: int) -> tuple[Terms, int]:
        """The loss of a batch, and how many latent elements were drawn for it."""
        context: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            context = torch.autocast(self._device.type, dtype=self._autocast)
        with context:
            if self._criterion is None:
                return self._model(images), 0
            seed = {} if self._noise is None else {"seed": self._noise.seed, "offset": offset}
            out = self._model(images, **seed)
            return self._criterion(out.recon, images, kl=out.kl), out.z.numel()

    def _run(self, images: Tensor) -> Terms:
        """The step itself, on these images; reads no value on the host."""
        self._optimizer.zero_grad(set_to_none=True)
        results: list[Terms] = []
        offset = 0
        for part in images.chunk(self._accumulate):
            terms, drawn = self._forward(part, offset)
            offset += drawn
            loss = _loss_of(terms) / self._accumulate if self._accumulate > 1 else _loss_of(terms)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
            results.append(_detached(terms))
            if self._noise is not None and (self._criterion is None or len(results) == self._accumulate):
                self._noise.advance()  # a function takes no offset that would tell its micro-batches apart
        results_mean = _mean(results)
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self._clip_norm)
        if self._lr_schedule is not None:
            self._set_lr(self._lr_schedule(self.steps))
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self.steps.add_(1)
        loss = _loss_of(results_mean)
        self.nonfinite.add_((loss - loss).ne(0))  # NaN or infinity minus itself is NaN; isfinite takes four kernels
        for schedule in self._schedules:
            schedule.step()
        if self._ema is not None:
            averaged, current = zip(*self._averaged_pairs(), strict=True)
            assert self._ema.multi_avg_fn is not None
            self._ema.multi_avg_fn(averaged, current, self._ema.n_averaged)
            if not self._ema.use_buffers:
                for kept, buffer in zip(self._ema.module.buffers(), self._buffers(), strict=True):
                    kept.copy_(buffer)
            self._ema.n_averaged.add_(1)
        return results_mean

    def _set_lr(self, lr: Tensor) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = float(lr)  # on a CPU, where reading it waits for nothing

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _buffers(self) -> Iterator[Tensor]:
        assert isinstance(self._model, nn.Module)
        return self._model.buffers()

    def _averaged_pairs(self) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(self._model, nn.Module)
        assert self._ema is not None
        pairs = list(zip(self._ema.module.parameters(), self._model.parameters(), strict=True))
        if self._ema.use_buffers:
            pairs += zip(self._ema.module.buffers(), self._model.buffers(), strict=True)  # type: ignore[arg-type]
        return [(averaged.detach(), current.detach()) for averaged, current in pairs]

    def _state(self) -> list[Tensor]:
        """Every tensor that a step changes."""
        tensors = [self.steps, self.nonfinite, *self._parameters()]
        for module in self._modules:
            tensors += [*module.parameters(), *module.buffers()]
        for group in self._optimizer.param_groups:
            tensors += [value for value in group.values() if isinstance(value, Tensor)]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors

    def _capture(self, warmup: int) -> None:
        _graphs.make_capturable(self._optimizer, self._device)
        if self._ema is not None:
            self._ema.n_averaged = self._ema.n_averaged.to(self._device)
        self._images = self._images.clone()
        before = {id(t): t.detach().clone() for t in self._state()}
        copies_into_ema = self._copies_into_ema
        graph = _graphs.Graph(self._device)
        self._results = _detached(graph.warm_up(lambda: self._run(self._images), warmup))
        with torch.no_grad():
            for tensor in self._state():
                seen = before.get(id(tensor))
                tensor.zero_() if seen is None else tensor.copy_(seen)
        self._copies_into_ema = copies_into_ema
        self._optimizer.zero_grad(set_to_none=True)
        graph.capture(lambda: _copy(self._results, self._run(self._images)))
        self._gradients = [(p, p.grad) for p in self._parameters()]
        self._graph = graph


def _loss_of(terms: Terms) -> Tensor:
    return terms.loss if isinstance(terms, VAELossTerms) else terms


def _detached(terms: Terms) -> Terms:
    return VAELossTerms(*(t.detach() for t in terms)) if isinstance(terms, VAELossTerms) else terms.detach()


def _mean(results: Sequence[Terms]) -> Terms:
    """Of the micro-batches."""
    first = results[0]
    if len(results) == 1:
        return first
    if isinstance(first, VAELossTerms):
        return VAELossTerms(*(torch.stack(terms).mean(0) for terms in zip(*results, strict=True)))
    return torch.stack([_loss_of(terms) for terms in results]).mean(0)


def _copy(to: Terms | None, terms: Terms) -> None:
    """Write the results to where the caller reads them."""
    assert to is not None
    pairs = zip(to, terms, strict=True) if isinstance(terms, VAELossTerms) else [(to, terms)]
    for static, fresh in pairs:
        static.copy_(fresh)  # type: ignore[union-attr]


def _name(images: Tensor) -> str:
    return f"{list(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
