"""The arithmetic of PTX instructions on NumPy arrays with one element per thread.

Registers hold bits; an instruction reads them as the type that it names. bfloat16, which NumPy lacks, is uint16.
"""

import re
from collections.abc import Callable
from functools import partial

import numpy as np

Array = np.ndarray
Function = Callable[..., Array]
Rule = tuple[list[str], Function]  # destination = function(sources): the types of the sources, and the function
TYPE = re.compile(r"pred|b?f16(?:x2)?|[bsuf](?:8|16|32|64)")
DTYPES = {"pred": np.dtype(np.bool_), "bf16": np.dtype(np.uint16)}
DTYPES |= {f"f{w}": np.dtype(f"f{w // 8}") for w in (16, 32, 64)}
DTYPES |= {f"{k}{w}": np.dtype(f"{'i' if k == 's' else 'u'}{w // 8}") for k in "bsu" for w in (8, 16, 32, 64)}
SEEN_IN_OPERANDS = ("sync", "aligned", "uni", "v2", "v4", "m8n8", "x1", "x2", "x4")  # or without effect


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that this interpreter does not know."""


class Fault(RuntimeError):
    """Something that a GPU leaves undefined or stops at."""


class Opcode:
    """`name.modifiers.types`; a modifier that nothing takes is not supported."""

    def __init__(self, text: str) -> None:
        self.name, *rest = text.split(".")
        self.types = [part for part in rest if TYPE.fullmatch(part)]
        self.modifiers = [part for part in rest if part not in (*self.types, *SEEN_IN_OPERANDS)]

    def take(self, *names: str) -> str:
        """The first of `names` that is a modifier, or ""."""
        name = next((name for name in names if name in self.modifiers), "")
        self.modifiers = [part for part in self.modifiers if part != name]
        return name


def rule(opcode: Opcode, skew: float) -> Rule:
    """What an instruction computes. Approximations err by `skew`, from -1 (toward 0) to 1, times what PTX allows."""
    if (opcode.name, opcode.types) == ("rcp", ["f64"]) and opcode.take("approx") and opcode.take("ftz"):
        return ["f64"], partial(_flushing, lambda x: _upper_half(1 / _upper_half(x)))
    if opcode.types == ["f32"] and opcode.take("approx", "full"):
        return _approximate(opcode, skew)
    return RULES[opcode.name](opcode)


def is_float(kind: str) -> bool:
    return kind == "bf16" or DTYPES[kind].kind == "f"


def flush(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign."""
    tiny = np.abs(x) < np.finfo(x.dtype).smallest_normal
    return np.where(tiny, np.copysign(x.dtype.type(0), x), x) if tiny.any() else x


def _flushing(function: Function, *operands: Array) -> Array:
    return flush(function(*map(flush, operands)))


def widen(bits: Array) -> Array:
    """bfloat16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: Array, toward_zero: bool = False) -> Array:
    """float32 to the bits of a bfloat16: the nearest, ties to even, or the next toward zero."""
    bits = x.view(np.uint32)
    near = bits if toward_zero else bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), 0x7FFF, near >> np.uint32(16)).astype(np.uint16)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once but for the ties that another 29 bits (float64: 11) can make."""
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b + c).astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    if (b == 0).any():
        raise Fault("divides an integer by 0")
    return np.where((a < 0) != (b < 0), -(np.abs(a) // np.abs(b)), np.abs(a) // np.abs(b))


FLOATING: dict[str, Function] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma, "sqrt": np.sqrt},
    **{"abs": np.abs, "neg": np.negative, "min": np.fmin, "max": np.fmax},
}
INTEGER: dict[str, Function] = FLOATING | {
    **{"mad": lambda a, b, c: a * b + c, "div": _quotient, "rem": lambda a, b: a - _quotient(a, b) * b},
    **{"min": np.minimum, "max": np.maximum},
}
OPERANDS = {"fma": 3, "mad": 3} | dict.fromkeys(("abs", "neg", "sqrt", "rsqrt", "rcp", "ex2", "lg2"), 1)


def _arithmetic(opcode: Opcode) -> Rule:
    (kind,) = opcode.types
    if kind.endswith("x2"):
        opcode.types, half = [kind.removesuffix("x2")], DTYPES[kind.removesuffix("x2")]
        sources, function = _arithmetic(opcode)
        return ["b32"] * len(sources), lambda *a: function(*(x[:, None].view(half) for x in a)).view(np.uint32)[:, 0]
    sources = [kind] * OPERANDS.get(opcode.name, 2)
    if not is_float(kind):
        return _integer(opcode, kind, sources)
    opcode.take("rn")
    function = (INTEGER if opcode.take("NaN") else FLOATING)[opcode.name]  # those minima and maxima keep NaN
    if kind == "bf16":
        return sources, lambda *operands: narrow(function(*map(widen, operands)))
    return sources, partial(_flushing, function) if opcode.take("ftz") else function


def _integer(opcode: Opcode, kind: str, sources: list[str]) -> Rule:
    function, part = INTEGER[opcode.name], opcode.take("lo", "hi", "wide")
    if part not in ("hi", "wide"):
        return sources, function
    bits = int(kind[1:])
    wide = DTYPES[f"{kind[0]}{2 * bits}"]
    if part == "hi":
        return sources, lambda a, b: (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)
    sources[2:] = [f"{kind[0]}{2 * bits}"] * len(sources[2:])
    return sources, lambda a, b, *c: function(a.astype(wide), b.astype(wide), *c)


# The function, and the greatest error of a result y (PTX ISA 9, chapter 9.7.3; of ex2 2 ulp from the rounded result).
APPROXIMATE: dict[str, tuple[Function, Callable[[Array, Array], Array]]] = {
    "ex2": (np.exp2, lambda y, ulp: 2.5 * ulp),
    "rcp": (np.reciprocal, lambda y, ulp: ulp),
    "div": (np.divide, lambda y, ulp: 2 * ulp),
    "sqrt": (np.sqrt, lambda y, ulp: np.abs(y) * 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda y, ulp: np.abs(y) * 2.0**-22.9),
    "lg2": (np.log2, lambda y, ulp: np.maximum(np.abs(y), 1.0) * 2.0**-22),
}


def _approximate(opcode: Opcode, skew: float) -> Rule:
    function, error = APPROXIMATE[opcode.name]

    def run(*operands):
        exact = function(*(x.astype(np.float64) for x in operands))
        nearest = exact.astype(np.float32)
        bound = skew * error(exact, np.spacing(np.abs(nearest)))
        worst = (exact + np.copysign(bound, exact * skew)).astype(np.float32)
        worst = np.where(np.abs(worst - exact) > np.abs(bound), np.nextafter(worst, nearest), worst)
        named = ~np.isfinite(exact) | (operands[0] == 0)  # results that the manual lays down
        return np.where(named, nearest, worst) if skew else nearest

    return ["f32"] * OPERANDS.get(opcode.name, 2), partial(_flushing, run) if opcode.take("ftz") else run


def _upper_half(x: Array) -> Array:
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, **dict.fromkeys(("lt", "lo"), np.less)}
COMPARISONS |= dict.fromkeys(("le", "ls"), np.less_equal) | dict.fromkeys(("gt", "hi"), np.greater)
COMPARISONS |= dict.fromkeys(("ge", "hs"), np.greater_equal)


def _setp(opcode: Opcode) -> Rule:
    (kind,) = opcode.types
    name = opcode.take("nan", *COMPARISONS, *(f"{ordered}u" for ordered in COMPARISONS))
    flushes = opcode.take("ftz")
    if not is_float(kind):
        return [kind] * 2, COMPARISONS[name]

    def compare(a, b):
        a, b = (widen(a), widen(b)) if kind == "bf16" else (flush(a), flush(b)) if flushes else (a, b)
        unordered = np.isnan(a) | np.isnan(b)
        if name == "nan":
            return unordered
        holds = COMPARISONS[name[:2]](a, b)
        return holds | unordered if name[2:] else holds & ~unordered

    return [kind] * 2, compare


def _shift(shift: Function, a: Array, count: Array) -> Array:
    last = a.dtype.type(8 * a.itemsize - 1)
    beyond = a >> last if a.dtype.kind == "i" and shift is np.right_shift else a.dtype.type(0)
    return np.where(count > last, beyond, shift(a, np.minimum(count, last).astype(a.dtype)))


def _extract(a: Array, start: Array, length: Array) -> Array:
    unused = (8 * a.itemsize - np.minimum(start + length, 8 * a.itemsize)).astype(a.dtype)
    return np.where(length == 0, a.dtype.type(0), (a << unused) >> (unused + start.astype(a.dtype)))


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
    for i in range(4):
        pick = selector >> np.uint32(4 * i)
        byte = (both >> (8 * (pick & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(pick & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte)  # its sign, eight times
        result = result | byte << np.uint32(8 * i)
    return result


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(opcode: Opcode) -> Rule:
    to, of = opcode.types[0].removesuffix("x2"), opcode.types[1]
    mode, to_integer = opcode.take("rn", "rz", *ROUND), is_float(of) and not is_float(to)
    if (mode == "rz" and to != "bf16") or (to_integer and mode not in ROUND):
        raise Unsupported("unknown rounding")

    def convert(x):
        x = ROUND.get(mode, np.asarray)(widen(x) if of == "bf16" else x)
        if to == "bf16":
            return narrow(x, mode == "rz")
        if to_integer:  # the nearest that there is; NaN becomes 0
            limits = np.iinfo(DTYPES[to])
            x = np.clip(np.nan_to_num(x.astype(np.longdouble)), limits.min, limits.max)
        return x.astype(DTYPES[to])

    def convert_pair(high, low):
        high, low = (convert(x).view(np.uint16).astype(np.uint32) for x in (high, low))
        return high << np.uint32(16) | low

    return ([of], convert) if opcode.types[0] == to else ([of] * 2, convert_pair)


def move(opcode: Opcode, n_sources: int, n_destinations: int) -> Rule:
    """One register to another, several joined, or one split into several: the first has the lowest bits."""
    (kind,) = opcode.types
    dtype, count = DTYPES[kind], n_sources * n_destinations
    part = f"u{8 * dtype.itemsize // count}"
    shifts = [dtype.type(8 * dtype.itemsize // count * i) for i in range(count)]
    if n_destinations > 1:
        return [kind], lambda a: [(a >> shift).astype(DTYPES[part]) for shift in shifts]
    if n_sources > 1:
        return [part] * count, lambda *a: sum(x.astype(dtype) << shift for x, shift in zip(a, shifts, strict=True))
    return [kind], np.asarray


def _same(function: Function, n_sources: int, *more: str) -> Callable[[Opcode], Rule]:
    """Sources of the opcode's type, then more."""
    return lambda opcode: ([*opcode.types * n_sources, *more], function)


RULES: dict[str, Callable[[Opcode], Rule]] = {
    **dict.fromkeys((*FLOATING, *INTEGER), _arithmetic),
    **{"and": _same(np.bitwise_and, 2), "or": _same(np.bitwise_or, 2), "xor": _same(np.bitwise_xor, 2)},
    **{"not": _same(np.invert, 1), "popc": _same(lambda a: np.bitwise_count(a).astype(np.uint32), 1)},
    **{name: _same(partial(_shift, f), 1, "u32") for name, f in (("shl", np.left_shift), ("shr", np.right_shift))},
    **{"bfe": _same(_extract, 1, "u32", "u32"), "prmt": _same(_permute, 3), "cvt": _cvt, "setp": _setp},
    "selp": _same(lambda a, b, p: np.where(p, a, b), 2, "pred"),
}
