"""Compile what the library would launch, for GPUs that are not here.

with DryRun("sm_90") as dry:
    reparam_kl_fwd(mu, logvar, seed)
assert report(dry.launches[0].kernel).spill_stores == 0
"""

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self
from unittest import mock

import torch

from tests.helpers.amdgcn import AmdReport
from tests.helpers.report import NvidiaReport, Report, report

__all__ = ["TARGETS", "AmdReport", "DryLaunch", "DryRun", "NvidiaReport", "Report", "report"]

# backend, architecture, threads of a warp
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class DryLaunch:
    """A launch that was compiled and not executed."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name)

    @property
    def divisible_by_16(self) -> set[str]:
        """Arguments that the compiler was told to be divisible by 16."""
        source = self.kernel.src
        return {
            source.fn.arg_names[path[0]]
            for path, attributes in source.attrs.items()
            if ["tt.divisibility", 16] in attributes
        }


class DryRun:
    """Context manager in which launches compile for `target`, one of `TARGETS`, instead of running.

    Everything before the GPU is real: the library's Python, the specialization of arguments by value and alignment,
    options, grid, compiler. Tensors may be on the CPU or, where memory matters, on meta; outputs keep what they held,
    unless `execute`, which is called with every launch, writes them.
    """

    def __init__(self, target: str, execute: Callable[[DryLaunch], None] | None = None) -> None:
        self.target = target
        self._execute = execute
        self.launches: list[DryLaunch] = []

    def __enter__(self) -> Self:
        import triton
        from triton.runtime.driver import driver

        if triton.knobs.runtime.interpret:
            raise RuntimeError("DryRun needs the compiler: unset TRITON_INTERPRET before triton is imported")
        self._exit = ExitStack()
        self._exit.enter_context(mock.patch.object(driver, "_active", _AbsentGPU(self.target)))
        original = triton.JITFunction.run

        # not a bound method: it has to become one of the kernel that it is called on
        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(original, function, *args, **kwargs)

        self._exit.enter_context(mock.patch.object(triton.JITFunction, "run", run))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _run(
        self, original: Callable[..., Any], function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> Any:
        from triton.runtime.driver import driver

        # Triton caches kernels by device, and this device is an object of our own: no other run can meet them
        self._exit.callback(function.device_caches.pop, driver.active.get_current_device(), None)
        kernel = original(function, *args, grid=grid, warmup=True, **kwargs)  # a warm-up compiles and does not launch
        if not warmup:
            parameters = function.signature.parameters
            bound = function.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in parameters})
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            self.launches.append(DryLaunch(kernel, tuple(grid(arguments) if callable(grid) else grid), arguments))
            if self._execute is not None:
                self._execute(self.launches[-1])
        return kernel


class _AbsentGPU:
    """As much of a Triton driver as compilation needs."""

    def __init__(self, target: str) -> None:
        self._target = TARGETS[target]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self._target)

    def get_current_device(self) -> Hashable:
        return self

    def get_current_stream(self, device: Hashable) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
