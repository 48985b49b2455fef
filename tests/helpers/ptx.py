"""Executes PTX, what the compiler makes of a kernel, with NumPy: registers are arrays with one element per thread.

Up to 64 programs run side by side. Of threads that have diverged, those at the earliest block go first, which brings
them together again. What a GPU leaves undefined raises `Fault` with the file and line of the kernel's source: addresses
out of bounds or misaligned, registers that nothing wrote, warps and programs that are incomplete at a shuffle or a
barrier, races, conflicting stores. An unknown opcode raises `Unsupported`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from tests.helpers.ptx_arithmetic import Array, Fault, Opcode, Unsupported
from tests.helpers.ptx_memory import Memory
from tests.helpers.ptx_steps import STEPS, WARP, elementwise

ALL = slice(None)
Lanes = Array | slice  # numbers of the threads that take part, in order, or ALL
Step = Callable[["Machine", Lanes], list[tuple[int, Lanes]] | None]  # a branch returns blocks and who goes there
# file:line:column of the kernel and the text; a register and its value in threads that take part; what it does
Instruction = tuple[str, tuple[str, bool] | None, Step]
SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%nctaid.x")


@dataclass
class Program:
    threads: int
    parameters: list[str]
    skew: float
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)  # of blocks
    types: dict[str, str] = field(default_factory=dict)  # of registers, by prefix


@lru_cache(maxsize=512)
def parse(ptx: str, skew: float = 0.0) -> Program:
    """The program of a module with one kernel. skew: see `ptx_arithmetic.rule`."""
    head, body = re.search(r"\.entry\b(.*?)\n\{\n(.*?)\n\}", ptx, re.DOTALL).groups()
    source, threads = "", int(re.search(r"\.reqntid\s+(\d+)", head)[1])
    program = Program(threads, re.findall(r"\.param\b.*?([\w$]+),?\n", head), skew)
    for line in map(str.strip, body.splitlines()):
        code = line.split("//")[0].strip()
        if scope := re.fullmatch(r"\{ \.reg \.(\w+) (\w+); (.*;) \}", code):  # with a register of its own
            program.types["%local"], code = scope[1], re.sub(rf"\b{scope[2]}\b", "%local", scope[3])
        if line.startswith(".loc"):
            source = line.rpartition("// ")[2]
        elif declared := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<", code):
            program.types[declared[2]] = declared[1]
        elif label := re.match(r"(\$[\w$]+):", code):
            program.blocks += [[]] if program.blocks[-1] else []
            program.labels[label[1]] = len(program.blocks) - 1
        elif code not in ("", ";"):
            program.blocks[-1].append(_instruction(code, source, program))
            program.blocks += [[]] if re.search(r"\b(bra|ret)\b", code) else []
    return program


def _instruction(code: str, source: str, program: Program) -> Instruction:
    try:
        negated, guard, name, rest = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*?)\s*;", code).groups()
        operands = [_operand(text, program) for text in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        opcode = Opcode(name)
        step = STEPS.get(opcode.name, elementwise)(opcode, operands, program)
        if opcode.modifiers:
            raise Unsupported(f"unknown modifier {opcode.modifiers[0]}")
    except (Unsupported, AttributeError, IndexError, KeyError, ValueError, TypeError) as error:
        raise Unsupported(f"{source}: {code} {error}") from error
    return f"{source}: {code}", (guard, not negated) if guard else None, step


def _operand(text: str, program: Program) -> Any:
    if text[0] == "{":
        return "vector", [_operand(part.strip(), program) for part in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return "address", _operand(base, program), int(offset or 0)
    if number := re.fullmatch(r"0[fFdD]([0-9A-F]+)|(-?(?:0x[0-9A-Fa-f]+|\d+))U?", text):
        return "constant", int(number[1], 16) if number[1] else int(number[2], 0)
    if text in SPECIAL or text in program.parameters:
        return "register", text, "u32" if text in SPECIAL else "u64"
    if (prefix := text.rstrip("0123456789")) in program.types:
        return "register", text, program.types[prefix]
    return ("constant", 0) if text == "global_smem" else ("name", text)


class Machine:
    """Programs of a launch that run side by side: `count` from `first` on."""

    def __init__(self, program: Program, first: int, count: int, memory: Memory, shared: int, registers: dict) -> None:
        self.program = program
        self.lanes = np.arange(count * program.threads)
        self.threads = self.lanes + first * program.threads  # numbers in the launch
        self.interval = np.zeros(self.lanes.size, np.int32)  # barriers that each thread has passed
        self.shared, self.pitch = shared, -(-shared // 128) * 128  # bytes of a program, and from one to the next
        buffer = np.zeros(count * self.pitch, np.uint8)
        self.memory = {"global": memory, "shared": Memory("shared", [(0, buffer)], program.threads)}
        ids = {"%tid.x": self.lanes % program.threads, "%ctaid.x": self.threads // program.threads}
        self.registers = registers | {name: values.astype(np.uint32) for name, values in ids.items()}
        self.unwritten: dict[str, Array] = {}  # lanes that have not written a register that others have

    def run(self) -> None:
        waiting: dict[int, list[Array]] = {0: [self.lanes]}
        while waiting:
            block = min(waiting)
            lanes = np.sort(np.concatenate(waiting.pop(block)))
            for target, some in self._block(block, ALL if lanes.size == self.lanes.size else lanes):
                if len(some := self.lanes[some]):
                    waiting.setdefault(target, []).append(some)

    def _block(self, number: int, lanes: Lanes) -> list[tuple[int, Lanes]]:
        for where, guard, step in self.program.blocks[number]:
            mine, others = lanes, []
            try:
                if guard is not None:
                    here = self.lanes[lanes]
                    holds = np.broadcast_to(self.read(guard[0], lanes) == guard[1], here.shape)
                    mine, others = (lanes, []) if holds.all() else (here[holds], here[~holds])
                targets = step(self, mine) if mine is ALL or len(mine) else None
            except Fault as fault:
                raise Fault(f"{where} {fault}") from None
            if targets is not None:
                return [*targets, (number + 1, others)]
        return [(number + 1, lanes)]

    def read(self, register: str, lanes: Lanes) -> Array:
        values, unwritten = self.registers.get(register), self.unwritten.get(register)
        if values is None or (unwritten is not None and unwritten[lanes].any()):
            raise Fault(f"reads {register}, which was never written")
        return values if values.size == 1 else values[lanes]

    def write(self, register: str, dtype: np.dtype, values: Array, lanes: Lanes) -> None:
        if values.itemsize != dtype.itemsize:  # a wider register extends by the type's sign
            values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        values = values.view(dtype)
        if lanes is ALL:
            self.unwritten.pop(register, None)
        else:  # a copy, because registers share arrays
            if register not in self.registers:
                self.unwritten[register] = np.ones(self.lanes.size, np.bool_)
            if register in self.unwritten:
                self.unwritten[register][lanes] = False
            old, new = self.registers.get(register, np.zeros(1, dtype)), values
            values = np.broadcast_to(old, self.lanes.shape).copy()
            values[lanes] = new
        self.registers[register] = values

    def access(self, space: str, offset: Array, lanes: Lanes) -> tuple[Array, Array, Array]:
        """Addresses, threads, and the barriers that each thread has passed."""
        here = self.lanes[lanes]
        if space == "shared":
            if (outside := (offset < 0) | (offset >= self.shared)).any():
                raise Fault(f"is out of bounds: byte {offset[outside][0]} of {self.shared} of shared memory")
            offset = here // self.program.threads * self.pitch + offset
        return np.broadcast_to(offset, here.shape), self.threads[lanes], self.interval[lanes]

    def barrier(self, lanes: Lanes) -> None:
        self.grouped(self.interval[lanes], lanes, self.program.threads, "program")
        self.interval[lanes] += 1

    def grouped(self, values: Array, lanes: Lanes, size: int = WARP, what: str = "warp") -> Array:
        here = self.lanes[lanes]
        if (np.unique(here // size, return_counts=True)[1] != size).any():
            raise Fault(f"is reached by an incomplete {what}")
        return np.broadcast_to(values, here.shape).reshape(-1, size)


def execute(program: Program, grid: int, arguments: list[int], buffers: list[tuple[int, Array]], shared: int) -> None:
    """Run `grid` programs on the bits of their parameters, memory as (address, bytes) and bytes of shared memory."""
    registers = {name: np.array([bits], np.uint64) for name, bits in zip(program.parameters, arguments, strict=True)}
    registers |= {"%ntid.x": np.array([program.threads], np.uint32), "%nctaid.x": np.array([grid], np.uint32)}
    memory = Memory("global", buffers, program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, grid, 64):
            Machine(program, first, min(64, grid - first), memory, shared, registers).run()
