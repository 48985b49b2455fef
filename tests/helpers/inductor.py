"""What torch.compile would launch on an NVIDIA GPU, run by Triton's interpreter on a machine without one.

Inductor's default code for an H100: its own graph passes, fusion and code generation, with only the questions to the
device answered here. It reaches into PyTorch's private parts, so it is tied to one version. How many elements a program
takes is chosen here and not tuned; neither launches nor distinct bytes depend on it.
"""

import copy
import itertools
import linecache
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

TORCH = "2.13"
H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)
# of the generated host code: its device is the CPU, its kernels are interpreted
HOST_CODE = {
    "empty_strided_cuda": "empty_strided_cpu",
    "torch.cuda._DeviceGuard(0)": "nullcontext()",
    "torch.cuda.set_device(0)": "pass",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = int",
    "AsyncCompile()": "InterpretedKernels()",
}
_file_numbers = itertools.count()


def skip_reason() -> str | None:
    """Why this cannot be done here; None if it can."""
    if not torch.__version__.startswith(f"{TORCH}."):
        return f"it is written for the private parts of torch {TORCH}, and this is {torch.__version__}"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    return None if triton.knobs.runtime.interpret else "TRITON_INTERPRET was not 1 when Triton was imported"


def compiled_for_h100(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)` whose kernels, forward and backward, are an H100's and run on CPU tensors."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=_compile_for_h100)

    torch.compiler.reset()
    return torch.compile(function, backend=backend, dynamic=False)


def _compile_for_h100(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    """Inductor's `compile_fx_inner` for the same graph on another device."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu = torch.device("cuda", 0)

    def moved(argument: Any) -> Any:
        return gpu if isinstance(argument, torch.device) else argument

    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
    graph.recompile()
    mode = FakeTensorMode()
    with mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu) if isinstance(x, torch.Tensor) else x
            for x in inputs
        ]
    with (
        config.patch(fx_graph_cache=False, compile_threads=1),
        _pretended_gpu(),
        mock.patch.object(GraphLowering, "compile_to_module", _host_module),
        tracing(TracingContext(mode)),
    ):
        return compile_fx.compile_fx_inner(graph, inputs, **options)


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """Answers to what Inductor asks of a GPU while it generates code."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch.utils import _triton

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    seed = torch.ops.prims.inductor_lookup_seed.default
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", answer(H100)),
        (CudaInterface, "get_device_properties", staticmethod(answer(H100))),
        (CudaInterface.Worker, "get_device_properties", staticmethod(answer(H100))),
        (CudaInterface, "get_compute_capability", staticmethod(answer(90))),
        (CudaInterface, "is_available", staticmethod(answer(True))),
        (CudaInterface, "is_triton_capable", staticmethod(answer(True))),
        (CudaInterface, "is_bf16_supported", staticmethod(answer(True))),
        (CudaInterface, "current_device", staticmethod(answer(0))),
        (CudaInterface, "device_count", staticmethod(answer(1))),
        (scheduler, "has_triton", answer(True)),
        (_triton, "triton_hash_with_backend", answer("")),
        # its own would index a CUDA tensor, for which a build without CUDA has no device guard
        (seed, "prim_meta_impl", lambda seeds, index: seeds.new_empty(())),
    ]
    with ExitStack() as stack:
        for owner, name, value in answers:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _host_module(lowering: Any) -> Any:
    """In place of `GraphLowering.compile_to_module`: run the generated host code here."""
    source: str = lowering.codegen()[0].value
    for theirs, ours in HOST_CODE.items():
        source = source.replace(theirs, ours)
    kernels = SimpleNamespace(triton=_interpreted, wait=lambda names: None)
    names: dict[str, Any] = {"InterpretedKernels": lambda: kernels, "nullcontext": nullcontext, "__name__": "inductor"}
    exec(source, names)
    return SimpleNamespace(call=names["call"], runner=None, __file__="inductor")


def _interpreted(name: str, source: str, *, device_str: str) -> Any:
    """The kernel from its source text, without the imports that ask for a GPU."""
    import triton
    import triton.language as tl
    from torch._inductor.runtime import hints, triton_helpers

    source = source[source.index("@triton_heuristics") :]
    file = f"<inductor kernel {next(_file_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # the interpreter reads it
    names = {
        "triton": triton,
        "tl": tl,
        "libdevice": tl,  # of which the interpreter has none
        "tl_math": tl.math,
        "triton_helpers": triton_helpers,
        "triton_heuristics": _Heuristics(),
        "__file__": file,
        **{hint: getattr(hints, hint) for hint in ("AutotuneHint", "ReductionHint", "TileHint", "DeviceProperties")},
    }
    exec(compile(source, file, "exec"), names)
    return names[name]


class _Heuristics:
    """Every decorator of `triton_heuristics`, none of which tunes anything."""

    def __getattr__(self, heuristic: str) -> Callable[..., Callable[[Any], "_Kernel"]]:
        return lambda *, inductor_meta, **_: lambda kernel: _Kernel(kernel, inductor_meta["grid_type"])


class _Kernel:
    def __init__(self, kernel: Any, grid_type: str) -> None:
        if grid_type != "Grid1D":
            raise NotImplementedError(f"a kernel on a {grid_type}; only one-dimensional grids are interpreted here")
        self.kernel = kernel

    def run(self, *arguments: Any, stream: int) -> None:
        import triton

        values = dict(zip(self.kernel.arg_names, arguments, strict=False))
        reduces = "r0_numel" in values
        blocks = {"XBLOCK": 1 if reduces else 1024}
        if reduces:
            blocks["R0_BLOCK"] = min(2048, triton.next_power_of_2(values["r0_numel"]))
        parameters = {name: size for name, size in blocks.items() if name in self.kernel.arg_names}
        self.kernel[(triton.cdiv(values["xnumel"], blocks["XBLOCK"]),)](*arguments, **parameters)
