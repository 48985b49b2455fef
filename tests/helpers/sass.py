"""NVIDIA machine code as a list of instructions, and the cheapest paths through it."""

from collections import Counter, deque
from collections.abc import Callable, Container
from dataclasses import dataclass

BYTES_PER_INSTRUCTION = 16  # since sm_70
WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
GLOBAL_LOADS, GLOBAL_STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str = ""
    predicate: str = ""  # @!P0

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bits that a thread moves, if this is a load or a store."""
        return next((WIDTHS[modifier] for modifier in self.opcode.split(".") if modifier in WIDTHS), 32)


class Code(list[Instruction]):
    """Instructions: all of a kernel's, or those on one path through it."""

    def widths(self, mnemonics: Container[str]) -> Counter[int]:
        return Counter(instruction.width for instruction in self if instruction.mnemonic in mnemonics)

    @property
    def global_loads(self) -> Counter[int]:
        """Width in bits -> number of loads."""
        return self.widths(GLOBAL_LOADS)

    @property
    def global_stores(self) -> Counter[int]:
        return self.widths(GLOBAL_STORES)

    @property
    def bits_moved(self) -> int:
        """Between a thread and global memory."""
        return sum(width * count for width, count in (self.global_loads + self.global_stores).items())

    @property
    def shared_accesses(self) -> int:
        return self.widths(("LDS", "LDSM", "STS", "STSM", "LDGSTS")).total()

    @property
    def local_accesses(self) -> int:
        return self.widths(("LDL", "STL")).total()

    @property
    def barriers(self) -> int:
        return self.widths(("BAR",)).total()

    def paths(self, through: Container[str] | None = None) -> list["Code"]:
        """The cheapest path from entry to exit through each of the widest accesses, the cheapest of them first.

        Widest accesses, because the cheapest path of all may be an early return or, by way of narrow accesses, the
        masked tail. A loop is run as rarely as that allows: once if the access is inside. What a warp executes is never
        less; slow paths of library functions, subroutines and further rounds of loops come on top. Where arms exclude
        each other, the last path is that through the costliest arm.

        Args:
            through: Mnemonics to choose from: GLOBAL_STORES or GLOBAL_LOADS. None: the stores, or the loads where no
                store is as wide as the widest load (reductions).
        """
        if through is None:
            stores_are_widest = max(self.global_stores, default=0) >= max(self.global_loads, default=0)
            through = GLOBAL_STORES if stores_are_widest else GLOBAL_LOADS
        successors = [self._successors(index) for index in range(len(self))]
        predecessors: list[list[int]] = [[] for _ in self]
        for index, following in enumerate(successors):
            for successor in following:
                predecessors[successor].append(index)
        exits = [index for index, instruction in enumerate(self) if instruction.mnemonic == "EXIT"]
        toward_entry = _steps([0], successors.__getitem__)
        toward_exit = _steps(exits, predecessors.__getitem__)
        paths = []
        for anchor in self._widest(through):
            if anchor in toward_entry and anchor in toward_exit:
                before, after = _follow(anchor, toward_entry), _follow(anchor, toward_exit)
                path = Code(self[index] for index in [*reversed(before), anchor, *after])
                if path not in paths:
                    paths.append(path)
        return sorted(paths, key=len)

    def _successors(self, index: int) -> list[int]:
        instruction = self[index]
        following = [index + 1] if index + 1 < len(self) else []
        if instruction.mnemonic == "BRA":
            *conditions, target = instruction.operands.split(",")
            taken = int(target, 16) // BYTES_PER_INSTRUCTION
            return [taken, *following] if instruction.predicate or conditions else [taken]
        if instruction.mnemonic in ("EXIT", "RET") and not instruction.predicate:
            return []
        return following

    def _widest(self, mnemonics: Container[str]) -> list[int]:
        widest = max(self.widths(mnemonics), default=0)
        return [i for i, access in enumerate(self) if access.mnemonic in mnemonics and access.width == widest]


def _steps(starts: list[int], neighbours: Callable[[int], list[int]]) -> dict[int, int | None]:
    """For every instruction that can be reached, the next one on the shortest way back to a start (breadth first)."""
    steps: dict[int, int | None] = dict.fromkeys(starts)
    queue = deque(starts)
    while queue:
        index = queue.popleft()
        for neighbour in neighbours(index):
            if neighbour not in steps:
                steps[neighbour] = index
                queue.append(neighbour)
    return steps


def _follow(index: int, steps: dict[int, int | None]) -> list[int]:
    way: list[int] = []
    step = steps[index]
    while step is not None:
        way.append(step)
        step = steps[step]
    return way
