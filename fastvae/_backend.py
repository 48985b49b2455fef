"""The choice between the Triton kernels and the PyTorch fallback."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]
BACKENDS = get_args(Backend)

PLAIN = torch.Tensor, torch.nn.Parameter  # a tensor of another class must see each operation
_PACKAGES = {"triton": "fastvae_kernels", "torch": "fastvae.fallback"}
# set_backend is for the whole process, threads of the autograd engine included; use_backend for one context
_process_choice: str | None = None
_context_choice: ContextVar[str | None] = ContextVar("fastvae_backend", default=None)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}.")
    return name


def set_backend(name: Backend) -> None:
    """Choose the backend in the whole process.

    Args:
        name: "auto" (Triton on a GPU that Triton supports, PyTorch elsewhere; decided per tensor), "triton", "torch".
            The environment variable FASTVAE_BACKEND sets the same before the first call.

    Raises:
        ValueError: unknown name.
    """
    global _process_choice
    _process_choice = _checked(name, "backend")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend inside a `with` block, in this thread; arguments and errors as `set_backend`.

    The backward pass runs on the backend that ran the forward pass, wherever it is called.
    """
    token = _context_choice.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _context_choice.reset(token)


def choice() -> str:
    """The backend that is set: "auto", "triton" or "torch"."""
    return _context_choice.get() or _process_choice or _environment_choice()


@cache
def _environment_choice() -> str:
    return _checked(os.environ.get("FASTVAE_BACKEND", "auto"), "FASTVAE_BACKEND")


@cache
def _triton_obstacle(device_type: str, index: int | None) -> str | None:
    """Why the Triton kernels cannot run on this device; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton does not compile for CPUs (TRITON_INTERPRET=1 interprets the kernels there, slowly, for tests)"
    if device_type != "cuda":
        return f"the kernels are not verified on {device_type!r} devices"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(index)) < (8, 0):
        return f"the kernels need compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def backend_of(tensor: Any) -> str:
    """ "triton" or "torch": which backend serves this tensor (or `TensorMeta`).

    Raises:
        RuntimeError: the backend is set to "triton" and cannot run on the tensor's device.
    """
    chosen = choice()
    if chosen == "torch":
        return "torch"
    device = tensor.device
    if chosen == "auto":
        return "triton" if device.type == "cuda" and _triton_obstacle(device.type, device.index) is None else "torch"
    if obstacle := _triton_obstacle(device.type, device.index):
        raise RuntimeError(
            f'backend "triton" cannot serve tensors on {device}: {obstacle}. Use the backend "auto" or "torch".'
        )
    return "triton"


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records what is computed: then plain formulas serve."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def needs_reference() -> bool:
    """Whether a compiler or a dispatch mode must see each operation: then the plain formula computes the loss."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


@cache
def load_backend(backend: str, op: str) -> ModuleType:
    """The module of a backend that computes `op`. Triton is imported here, at the first use of a kernel."""
    return importlib.import_module(f"{_PACKAGES[backend]}.{op}")


def backend_module(tensor: Any, op: str) -> ModuleType:
    """The module that computes `op` for this tensor; errors as `backend_of`."""
    return load_backend(backend_of(tensor), op)


def explain(device: torch.device | str) -> str:
    """One line: which backend tensors on `device` get, and why."""
    device = torch.device(device)
    chosen = choice()
    obstacle = _triton_obstacle(device.type, device.index)
    if chosen == "torch":
        return "torch, as chosen by set_backend, use_backend or FASTVAE_BACKEND"
    if chosen == "triton":
        return f"none: triton is chosen, but {obstacle}" if obstacle else "triton, as chosen"
    if obstacle or device.type != "cuda":
        return f"torch: {obstacle or 'interpreted kernels run only where the backend triton is chosen'}"
    return "triton: fused kernels"
