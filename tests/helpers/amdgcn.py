"""Facts about a kernel compiled for an AMD GPU, read from its assembly."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AmdReport:
    """A kernel for an AMD GPU, under the names of `NvidiaReport`; spills are in registers, not bytes."""

    kernel: Any

    @property
    def shared(self) -> int:
        return int(self.kernel.metadata.shared)

    @property
    def registers(self) -> int:
        return self._metadata("vgpr_count")

    @property
    def scalar_registers(self) -> int:
        return self._metadata("sgpr_count")

    @property
    def stack(self) -> int:
        """Bytes of scratch memory per thread."""
        return self._metadata("private_segment_fixed_size")

    @property
    def spill_stores(self) -> int:
        return self._metadata("vgpr_spill_count") + self._metadata("sgpr_spill_count")

    @property
    def spill_loads(self) -> int:
        return self.spill_stores

    @property
    def global_loads(self) -> Counter[int]:
        return self._widths("load")

    @property
    def global_stores(self) -> Counter[int]:
        return self._widths("store")

    @property
    def shared_accesses(self) -> int:
        return self._count(r"ds_(?:read|write)\w*")

    @property
    def local_accesses(self) -> int:
        return self._count(r"scratch_(?:load|store)\w*")

    @property
    def barriers(self) -> int:
        return self._count("s_barrier")

    def _metadata(self, key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", self.kernel.asm["amdgcn"], re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the metadata of {self.kernel.metadata.name} has no {key}")
        return int(found[1])

    def _count(self, instruction: str) -> int:
        return len(re.findall(rf"^\s+{instruction}\b", self.kernel.asm["amdgcn"], re.MULTILINE))

    def _widths(self, verb: str) -> Counter[int]:
        forms = re.findall(rf"^\s+(?:global|buffer|flat)_{verb}_(\w+)", self.kernel.asm["amdgcn"], re.MULTILINE)
        return Counter(_width(form) for form in forms)


def _width(form: str) -> int:
    """Bits of dword, dwordx4, ushort, short_d16_hi, ubyte, ..."""
    words = re.match(r"dword(?:x(\d))?", form)
    if words:
        return 32 * int(words[1] or 1)
    return 16 if "short" in form else 8
