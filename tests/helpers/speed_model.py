"""A model of a kernel's speed on GPUs that are not here, from its machine code: predictions, not measurements.

Three bounds, of which the greatest counts most: memory bandwidth; instructions that an SM issues or a pipe takes; and
latency, as the programs that fit into an SM have only so many bytes under way.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.helpers.aot import DryLaunch, report
from tests.helpers.kernel_cases import elements_per_program
from tests.helpers.report import NvidiaReport
from tests.helpers.sass import BYTES_PER_INSTRUCTION, GLOBAL_LOADS, Code


@dataclass(frozen=True)
class GPU:
    """Of compute capability 9.0. The clock is the boost clock of data sheets; `reach` is the part of the bandwidth that
    the best published kernels of two loads and a store come to.
    """

    name: str
    bandwidth: float  # bytes/s
    sms: int = 132
    clock: float = 1.755e9
    reach: float = 0.915
    registers: int = 65536  # of an SM, as are the next three
    warps: int = 64
    programs: int = 32
    shared: int = 227 * 1024
    latency: int = 700  # clocks from a load to its value under load
    launch: int = 500  # clocks in which a program starts and ends


H100, H200 = GPU("H100 SXM", 3.35e12), GPU("H200 SXM", 4.8e12)

# threads a clock and SM (CUDA C++ Programming Guide, throughput of arithmetic instructions)
PIPES = {"fma": 128, "multiply": 64, "alu": 64, "special": 16, "memory": 32, "shuffle": 32, "float64": 64, "half": 128}
MNEMONICS = {
    "fma": ("FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"),
    "multiply": ("IMAD", "IMUL"),
    "special": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"),
    "memory": ("LDG", "STG", "LDS", "STS", "LD", "ST", "LDC", "LDSM", "STSM", "LDL", "STL", "ATOMG", "RED"),
    "shuffle": ("SHFL", "REDUX"),
    "float64": ("DFMA", "DADD", "DMUL", "DSETP"),
    "half": ("HFMA2", "HADD2", "HMUL2"),
    "": ("BRA", "EXIT", "NOP", "BAR", "S2R", "S2UR", "CS2R", "BSSY", "BSYNC", "R2UR", "MOV", "CALL", "RET", "WARPSYNC"),
}
PIPE = {mnemonic: pipe for pipe, mnemonics in MNEMONICS.items() for mnemonic in mnemonics}
CLOCKS_ALONE = 3.2  # an instruction of a warp that is alone: between one that waits for none and one that waits for all


@dataclass(frozen=True)
class Prediction:
    seconds: float
    share: float  # of the peak bandwidth
    instructions: float  # of a thread for each of its elements
    occupancy: float  # of an SM's warps
    in_flight: int  # bytes that an SM's programs load at once
    bound: str


def predict(launch: DryLaunch, path: Code, bytes_per_element: float, elements: int, gpu: GPU) -> Prediction:
    """Of a launch that was compiled for sm_90, whose programs go along `path`."""
    facts = report(launch.kernel)
    assert isinstance(facts, NvidiaReport)
    warps = int(launch.kernel.metadata.num_warps)
    in_a_round = elements_per_program(launch.arguments)
    rounds = max(elements / (launch.grid[0] * in_a_round), 1.0)
    once, body = split_at_loop(facts.code, path)
    resident = programs_per_sm(facts, gpu)
    of_once, of_body = busy_clocks(once), busy_clocks(body)
    issue, issue_bound = max((of_once[pipe] + rounds * busy, pipe) for pipe, busy in of_body.items())
    in_flight = resident * warps * 32 * sum(w // 8 * n for w, n in body.widths(GLOBAL_LOADS).items())
    alone = gpu.launch + CLOCKS_ALONE * len(once) + rounds * (gpu.latency + CLOCKS_ALONE * len(body))
    waves = launch.grid[0] / gpu.sms
    seconds = {
        "memory": bytes_per_element * elements / (gpu.bandwidth * gpu.reach),
        issue_bound: issue * warps * waves / gpu.clock,
        "latency": alone * max(waves / resident, 1.0) / gpu.clock,
    }
    total = sum(bound**4 for bound in seconds.values()) ** 0.25  # bounds that are near each other do not overlap well
    return Prediction(
        total,
        bytes_per_element * elements / total / gpu.bandwidth,
        (len(once) / rounds + len(body)) * 32 * warps / in_a_round,
        resident * warps / gpu.warps,
        in_flight,
        max(seconds, key=seconds.__getitem__),
    )


def busy_clocks(path: Code) -> Counter[str]:
    """For how many clocks of an SM a warp on this path occupies each pipe; "issue": the four schedulers."""
    clocks: Counter[str] = Counter()
    for instruction in path:
        pipe = PIPE.get(instruction.mnemonic, "" if instruction.mnemonic.startswith("U") else "alu")
        wide = pipe == "multiply" and {"WIDE", "HI"} & set(instruction.opcode.split("."))
        if pipe:
            clocks[pipe] += 32 * (2 if wide else 1) / PIPES[pipe]
        if pipe == "memory":
            clocks["cache"] += instruction.width / 8 * 32 / 128
    clocks["issue"] = len(path) / 4
    return clocks


def split_at_loop(code: Code, path: Code) -> tuple[Code, Code]:
    """What a path does once, and what in every round: the part inside the largest loop with a load; without, all."""
    place = {id(instruction): i for i, instruction in enumerate(code)}
    inside: set[int] = set()
    for i, instruction in enumerate(code):
        if instruction.mnemonic == "BRA":
            start = int(instruction.operands.split(",")[-1], 16) // BYTES_PER_INSTRUCTION
            loop = {id(step) for step in path if start <= place[id(step)] <= i}
            if len(loop) > len(inside) and Code(step for step in path if id(step) in loop).global_loads:
                inside = loop
    inside = inside or set(map(id, path))
    return Code(s for s in path if id(s) not in inside), Code(s for s in path if id(s) in inside)


def programs_per_sm(facts: Any, gpu: GPU) -> int:
    warps = facts.kernel.metadata.num_warps
    registers = -(-facts.registers // 8) * 8 * 32 * warps
    limits = gpu.registers // registers, gpu.warps // warps, gpu.programs, gpu.shared // (facts.shared + 1024)
    return int(min(limits))
