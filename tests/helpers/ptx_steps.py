"""What the instructions of PTX do: functions of a `Machine` and the lanes that take part, made as a program is parsed.

Operands: ("register", name, type), ("constant", bits), ("name", text), ("vector", [...]), ("address", base, offset).
"""

import numpy as np

from tests.helpers.ptx_arithmetic import DTYPES, Fault, Opcode, Unsupported, move, rule

WARP = 32


def reader(operand, kind):
    """Reads an operand as a type: of a wider register its lower bits."""
    dtype = DTYPES[kind]
    match operand:
        case ("register", name, of) if DTYPES[of].itemsize == dtype.itemsize:
            return lambda machine, lanes: machine.read(name, lanes).view(dtype)
        case ("register", name, of) if DTYPES[of].itemsize > dtype.itemsize:
            return lambda machine, lanes: machine.read(name, lanes).astype(f"u{dtype.itemsize}").view(dtype)
        case ("constant", bits):
            bits = bits & (1 << 8 * dtype.itemsize) - 1 if kind != "pred" else bits != 0
            constant = np.array([bits], f"u{dtype.itemsize}").view(dtype)
            return lambda machine, lanes: constant
    raise Unsupported(f"operand {operand}")


def writer(operand):
    if operand == ("name", "_"):
        return lambda machine, values, lanes: None
    _, name, kind = operand
    dtype = DTYPES[kind]
    return lambda machine, values, lanes: machine.write(name, dtype, values, lanes)


def parts(operand):
    return operand[1] if operand[0] == "vector" else [operand]


def elementwise(opcode, operands, program):
    writes, operands = [writer(part) for part in parts(operands[0])], [part for o in operands[1:] for part in parts(o)]
    is_mov = opcode.name == "mov"
    sources, function = move(opcode, len(operands), len(writes)) if is_mov else rule(opcode, program.skew)
    reads = [reader(operand, kind) for operand, kind in zip(operands, sources, strict=True)]

    def step(machine, lanes):
        results = function(*[read(machine, lanes) for read in reads])
        for write, values in zip(writes, results if len(writes) > 1 else [results], strict=True):
            write(machine, values, lanes)

    return step


def _access(opcode, operand):
    """The space of an access, and a function that returns the rest: see `Machine.access`."""
    space, (_, base, offset) = opcode.take("global", "shared"), operand
    read = reader(base, {"global": "s64", "shared": "s32"}[space])
    return space, lambda machine, lanes: machine.access(space, read(machine, lanes).astype(np.int64) + offset, lanes)


def load(opcode, operands, program):
    (kind,), writes = opcode.types, [writer(part) for part in parts(operands[0])]
    if opcode.take("param"):  # the machine has them as registers
        return elementwise(Opcode(f"mov.{kind}"), [operands[0], operands[1][1]], program)
    space, access = _access(opcode, operands[1])
    size = DTYPES[kind].itemsize * len(writes)

    def step(machine, lanes):
        found = machine.memory[space].load(size, *access(machine, lanes))
        for write, values in zip(writes, found.view(DTYPES[kind]).T, strict=True):
            write(machine, np.ascontiguousarray(values), lanes)

    return step


def store(opcode, operands, program):
    reads = [reader(part, *opcode.types) for part in parts(operands[1])]
    space, access = _access(opcode, operands[0])

    def step(machine, lanes):
        address, *by = access(machine, lanes)
        values = np.stack([np.broadcast_to(read(machine, lanes), address.shape) for read in reads], 1)
        machine.memory[space].store(values, address, *by)

    return step


def matrix(opcode, operands, program):
    """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits. Lanes 8 i to 8 i + 7 have the addresses of the rows of matrix
    i; lane t has the pair t % 4 of row t // 4, or of the transposed matrix.
    """
    loads, transposes = opcode.name == "ldmatrix", opcode.take("trans")
    registers, place = operands if loads else operands[::-1]
    _, access = _access(opcode, place)
    ports = [writer(part) if loads else reader(part, "b32") for part in parts(registers)]

    def arranged(pairs):
        halves = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, 8, 8)
        return np.ascontiguousarray(halves.swapaxes(1, 2) if transposes else halves).view(np.uint32).reshape(-1, 4)

    def step(machine, lanes):
        memory, of_lanes = machine.memory["shared"], access(machine, lanes)
        for i, port in enumerate(ports):
            of_rows = [machine.grouped(values, lanes)[:, 8 * i : 8 * i + 8].ravel() for values in of_lanes]
            if loads:
                port(machine, arranged(memory.load(16, *of_rows)).ravel(), lanes)
            else:
                memory.store(arranged(machine.grouped(port(machine, lanes), lanes)), *of_rows)

    return step


def shuffle(opcode, operands, program):
    write, read, by = writer(operands[0]), reader(operands[1], "b32"), reader(operands[2], "s32")
    partner = {"bfly": np.bitwise_xor, "idx": lambda lane, by: by}[opcode.take("bfly", "idx")]
    if operands[3:] != [("constant", WARP - 1), ("constant", -1)]:
        raise Unsupported("shuffles of a part of a warp")

    def step(machine, lanes):
        values, others = (machine.grouped(operand(machine, lanes), lanes) for operand in (read, by))
        source = partner(np.arange(WARP), others) % WARP
        write(machine, np.take_along_axis(values, source, 1).ravel(), lanes)

    return step


def add_warp(opcode, operands, program):
    write, read, members = writer(operands[0]), reader(operands[1], *opcode.types), reader(operands[2], "s32")
    if opcode.take("add") != "add":
        raise Unsupported("unknown reduction")

    def step(machine, lanes):
        values = machine.grouped(read(machine, lanes), lanes)
        if (members(machine, lanes) != -1).any():
            raise Fault("leaves out lanes of a warp")
        write(machine, np.repeat(values.sum(1, dtype=values.dtype), WARP), lanes)

    return step


STEPS = {
    **{"ld": load, "st": store, "ldmatrix": matrix, "stmatrix": matrix, "shfl": shuffle, "redux": add_warp},
    "bar": lambda opcode, operands, program: lambda machine, lanes: machine.barrier(lanes),
    "bra": lambda opcode, operands, program: lambda machine, lanes: [(program.labels[operands[0][1]], lanes)],
    "ret": lambda opcode, operands, program: lambda machine, lanes: [],
}
