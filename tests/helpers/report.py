"""Facts about a compiled kernel, read from what the compiler wrote. Needs no GPU: the tools come with Triton."""

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.helpers.amdgcn import AmdReport
from tests.helpers.sass import Code, Instruction


@dataclass(frozen=True)
class NvidiaReport:
    """A kernel for an NVIDIA GPU. Each fact is computed when it is first asked for: resources in 5 ms, `code` in 0.5 s.

    Counts of accesses are per thread and of the whole code; ask `code` or `path` for more.
    """

    kernel: Any

    @property
    def shared(self) -> int:
        """Bytes of shared memory per program."""
        return int(self.kernel.metadata.shared)

    @property
    def registers(self) -> int:
        return self._resources["REG"]

    @property
    def stack(self) -> int:
        """Bytes of private memory per thread: spilled registers and arrays with computed indices."""
        return self._resources["STACK"]

    @property
    def spill_stores(self) -> int:
        """Bytes per thread."""
        return self._spills[0]

    @property
    def spill_loads(self) -> int:
        return self._spills[1]

    @property
    def global_loads(self) -> Counter[int]:
        """Width in bits -> number of instructions."""
        return self.code.global_loads

    @property
    def global_stores(self) -> Counter[int]:
        return self.code.global_stores

    @property
    def shared_accesses(self) -> int:
        return self.code.shared_accesses

    @property
    def local_accesses(self) -> int:
        return self.code.local_accesses

    @property
    def barriers(self) -> int:
        return self.code.barriers

    @cached_property
    def code(self) -> Code:
        from triton import knobs

        disassembly, _ = _run(knobs.nvidia.nvdisasm.path, self.kernel.asm["cubin"], "-json")
        _, functions = json.loads(disassembly)
        (function,) = (function for function in functions if function["function-name"] == self.kernel.metadata.name)
        return Code(
            Instruction(line["opcode"], line.get("operands", ""), line.get("predicate", ""))
            for line in function["sass-instructions"]
        )

    @cached_property
    def paths(self) -> list[Code]:
        return self.code.paths()

    @property
    def path(self) -> Code:
        """The cheapest of the `paths` that move the most bytes: through whole tiles, past no part of the work."""
        return max(self.paths, key=lambda path: path.bits_moved)  # the first of several, which is the cheapest

    def instructions_per_element(self, elements_per_program: int) -> float:
        """Instructions that a thread executes on `path` for each of its elements."""
        threads: int = 32 * self.kernel.metadata.num_warps
        return len(self.path) * threads / elements_per_program

    @property
    def drops_nan(self) -> bool:
        """Whether a floating-point minimum or maximum returns its other operand where one is NaN.

        PTX has a form that keeps NaN for all types but float64, where the compiler tests the operands beside it.
        """
        ptx = self.kernel.asm["ptx"]
        tested = set(re.findall(r"%\w+", " ".join(re.findall(r"\bsetp\.nan\.[\w.]+\s+%\w+,([^;]+);", ptx))))
        for modifiers, operands in re.findall(r"\b(?:min|max)((?:\.\w+)*)\.b?f\d+(?:x2)?\s+%\w+,([^;]+);", ptx):
            if "NaN" not in modifiers and not tested.issuperset(re.findall(r"%\w+", operands)):
                return True
        return False

    @property
    def widens_floats(self) -> bool:
        """Whether a float32 becomes a float64: in a float64 kernel, a constant or scalar that lost its digits."""
        return "cvt.f64.f32" in self.kernel.asm["ptx"]

    @property
    def fused_multiply_add(self) -> bool:
        """Whether the compiler may fuse a product and a sum, and did so at least once."""
        return bool(self.kernel.metadata.enable_fp_fusion) and "fma.rn.f" in self.kernel.asm["ptx"]

    @cached_property
    def _resources(self) -> dict[str, int]:
        from triton import knobs

        usage, _ = _run(knobs.nvidia.cuobjdump.path, self.kernel.asm["cubin"], "-res-usage")
        return {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}

    @cached_property
    def _spills(self) -> tuple[int, int]:
        if self.stack == 0:  # where spilled registers would be
            return 0, 0
        from triton.backends.nvidia.compiler import get_ptxas

        ptx = self.kernel.asm["ptx"]
        target = re.search(r"\.target (\w+)", ptx)
        flags = ("-v", f"--gpu-name={target and target[1]}", "--output-file=/dev/null")
        ptxas = get_ptxas(self.kernel.metadata.target.arch).path
        _, remarks = _run(ptxas, ptx.encode(), *flags)
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", remarks)
        if found is None:
            raise RuntimeError(f"{ptxas} names no spills of {self.kernel.metadata.name}")
        return int(found[1]), int(found[2])


Report = NvidiaReport | AmdReport


def report(kernel: Any) -> Report:
    """Report on a compiled kernel; of equal kernels the same one."""
    if kernel.hash not in _reports:
        _reports[kernel.hash] = (AmdReport if kernel.metadata.target.backend == "hip" else NvidiaReport)(kernel)
    return _reports[kernel.hash]


_reports: dict[str, Report] = {}


def _run(tool: str, data: bytes, *flags: str) -> tuple[str, str]:
    """What a tool prints about a file that holds `data`, on stdout and on stderr."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        done = subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr
