"""What each PTX instruction does to the registers of a warp.

`operation` makes of an instruction a function of the warp and of the threads that take part: None
for all 32. Registers hold arrays of 32 unsigned integers, one for each thread; predicates hold
booleans. The reference is NVIDIA's "Parallel Thread Execution ISA". What it calls approximate is
exact here, to float32; a fused product and sum is rounded twice, to float64 first.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_text import Address, Instruction, Nowhere, Number, Operand, Register, Special, Vector

LANES = 32
LANE = np.arange(LANES)

Array = NDArray[Any]
# Of a warp and the threads that take part.
Operation = Callable[[Any, Array | None], None]
Reader = Callable[[Any], Array]
Writer = Callable[[Any, Array | None, Array], None]

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_LETTERS = {"s": "i", "u": "u", "b": "u", "f": "f"}


class Unknown(Exception):
    """An instruction that the machine does not know."""


def width(kind: str) -> int:
    """Bits of a type such as s32, bf16 or f32x2."""
    if kind == "pred":
        return 1
    number = kind.split("x")[0].lstrip("sbuft")
    return int(number) * (2 if kind.endswith("x2") else 1)


def _dtype(kind: str) -> Any:
    return np.dtype(f"{_LETTERS[kind[0]]}{width(kind) // 8}")


# Operands -----------------------------------------------------------------------------------------


def reader(operand: Operand, kind: str) -> Reader:
    """How to read an operand as numbers of a type; of bf16 as those of float32."""
    if kind == "bf16":
        bits = reader(operand, "b16")
        return lambda w: from_bf16(bits(w))
    if isinstance(operand, Register):
        return _register_reader(operand, kind)
    if isinstance(operand, Special):
        name = operand.name
        if name == "%clock":
            return lambda w: w.clock
        return lambda w: w.special[name]
    if isinstance(operand, Number):
        if kind == "pred":
            truth = np.full(LANES, operand.value != 0)
            return lambda w: truth
        bits_of = np.array([operand.value % (1 << width(kind))], np.uint64)
        constant = np.repeat(bits_of.astype(_UNSIGNED[width(kind)]).view(_dtype(kind)), LANES)
        return lambda w: constant
    raise Unknown(f"{operand} as {kind}")


def _register_reader(register: Register, kind: str) -> Reader:
    index, bits = register.index, width(kind)
    if register.bits == bits and kind[0] in "bup":
        return lambda w: w.registers[index]
    dtype = _dtype(kind)
    if register.bits == bits:
        return lambda w: w.registers[index].view(dtype)
    if register.bits > bits:
        narrow = _UNSIGNED[bits]
        return lambda w: w.registers[index].astype(narrow).view(dtype)
    raise Unknown(f"{kind} of a register of {register.bits} bits")


def writer(operand: Operand, kind: str) -> Writer:
    """How to write numbers of a type to an operand; of bf16 those of float32, rounded."""
    if isinstance(operand, Nowhere):
        return lambda w, m, value: None
    assert isinstance(operand, Register)
    index, bits = operand.index, operand.bits
    unsigned = bool if bits == 1 else _UNSIGNED[bits]
    is_signed = kind[0] == "s"

    def write(w: Any, m: Array | None, value: Array) -> None:
        if kind == "bf16":
            value = to_bf16(value)
        if bits > 1:
            value = value.view(_UNSIGNED[8 * value.dtype.itemsize])
            if value.dtype != unsigned:
                if is_signed:
                    value = value.view(f"i{value.dtype.itemsize}").astype(f"i{bits // 8}")
                value = value.astype(unsigned)
        if m is not None:
            value = np.where(m, value, w.registers[index])
        w.registers[index] = value

    return write


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Array) -> Array:
    """The bits of the nearest bf16, of two the even one."""
    bits = value.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(value: Array) -> Array:
    """The nearest TF32, of two the one away from zero."""
    bits = (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), bits, value.view(np.uint32))


# Arithmetic ---------------------------------------------------------------------------------------


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    bits = 8 * a.dtype.itemsize
    return (a.astype(object) * b.astype(object) >> bits).astype(a.dtype)


def _wide(a: Array, b: Array) -> Array:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def _quotient(a: Array, b: Array) -> Array:
    """Rounded towards zero."""
    if a.dtype.kind == "f":
        return a / b
    divisor = np.where(b == 0, 1, b).astype(b.dtype)
    below = a // divisor
    return (below + ((below < 0) & (below * divisor != a))).astype(a.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return exact.astype(c.dtype)


def _left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = np.left_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    return np.where(by >= bits, 0, shifted).astype(a.dtype)


def _right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = np.right_shift(a, np.minimum(by, bits - 1).astype(a.dtype))
    if a.dtype.kind == "u":
        shifted = np.where(by >= bits, 0, shifted)
    return shifted.astype(a.dtype)


def _field(a: Array, start: Array, length: Array) -> Array:
    """Bits of a number, of a signed one with the highest of them for its sign."""
    start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
    bits = a.view(np.uint32).astype(np.int64)
    field = np.where(start < 32, bits >> np.minimum(start, 31), 0)
    field &= (1 << np.minimum(length, 32)) - 1
    if a.dtype.kind == "i":
        # Of bits beyond the number its own sign stands for them.
        inside = np.minimum(length, np.maximum(32 - start, 0))
        negative = (length > 0) & (bits >> np.minimum(start + length - 1, 31) & 1 > 0)
        field = np.where(negative, field | -(1 << inside), field)
    return field.astype(np.uint32).view(a.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": _quotient,
    "rem": lambda a, b: (a - _quotient(a, b) * b).astype(a.dtype),
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "mov": lambda a: a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: (np.float32(1) / a).astype(np.float32),
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (np.float32(1) / np.sqrt(a)).astype(np.float32),
    "tanh": np.tanh,
}
_SHIFTS = {"shl": _left, "shr": _right}

# Modifiers of arithmetic that change nothing here: numbers as small as ftz drops do not matter to
# any test.
_IDLE = {"rn", "ftz", "approx", "full"}


def _knows(ins: Instruction, parts: list[str], *others: str) -> None:
    """Raises Unknown if an instruction asks for more than these."""
    if set(parts[1:-1]) - _IDLE - set(others):
        raise Unknown(ins.text)


def _unary(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts)
    function = _UNARY[parts[0]]
    if kind.endswith("x2"):
        raise Unknown(ins.text)
    if kind == "pred" and parts[0] == "not":
        function = np.logical_not
    into, a = writer(ins.operands[0], kind), reader(ins.operands[1], kind)
    return lambda w, m: into(w, m, function(a(w)))


def _binary(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts, *(("lo", "hi", "wide") if parts[0] == "mul" else ("f32",)))
    into = writer(ins.operands[0], kind)
    function = _BINARY[parts[0]]
    kinds = [kind, kind]
    if parts[0] == "mul" and "hi" in parts:
        function = _high
    elif parts[0] == "mul" and "wide" in parts:
        function = _wide
    elif parts[-1] in ("f16", "bf16") and parts[-2] == "f32":
        # A narrow number and one of float32.
        into, kinds = writer(ins.operands[0], "f32"), [kind, "f32"]
        exact = function

        def function(a: Array, b: Array) -> Array:
            return exact(a.astype(np.float32), b)
    elif kind.endswith("x2"):
        return _paired(ins, kind, function)
    a, b = (reader(o, k) for o, k in zip(ins.operands[1:], kinds, strict=True))
    return lambda w, m: into(w, m, function(a(w), b(w)))


def _paired(ins: Instruction, kind: str, function: Callable[..., Array]) -> Operation:
    """Of both halves of registers."""
    if kind == "bf16x2":
        raise Unknown(ins.text)
    half = _dtype(kind.split("x")[0])
    into = writer(ins.operands[0], f"b{width(kind)}")
    sources = [reader(operand, f"b{width(kind)}") for operand in ins.operands[1:]]

    def run(w: Any, m: Array | None) -> None:
        result = function(*(np.ascontiguousarray(source(w)).view(half) for source in sources))
        into(w, m, result.view(_UNSIGNED[width(kind)]))

    return run


def _multiply_add(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts, *(("lo", "wide") if parts[0] == "mad" else ("f32",)))
    result = kind
    if "wide" in parts:
        result = f"{kind[0]}{2 * width(kind)}"
    if kind.endswith("x2"):
        return _paired(ins, kind, _fused)
    if parts[-1] in ("f16", "bf16") and parts[-2] == "f32":
        result = "f32"
    into = writer(ins.operands[0], result)
    a, b = reader(ins.operands[1], kind), reader(ins.operands[2], kind)
    c = reader(ins.operands[3], result)
    if parts[0] == "fma":
        return lambda w, m: into(w, m, _fused(a(w), b(w), c(w)))
    product = _wide if "wide" in parts else np.multiply
    return lambda w, m: into(w, m, product(a(w), b(w)) + c(w))


def _shift(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts)
    function = _SHIFTS[parts[0]]
    into = writer(ins.operands[0], kind)
    a, by = reader(ins.operands[1], kind), reader(ins.operands[2], "u32")
    return lambda w, m: into(w, m, function(a(w), by(w)))


def _extract(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    if width(kind) != 32:
        raise Unknown(ins.text)
    into, a = writer(ins.operands[0], kind), reader(ins.operands[1], kind)
    start, length = (reader(operand, "u32") for operand in ins.operands[2:])
    return lambda w, m: into(w, m, _field(a(w), start(w), length(w)))


def _select(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    into, a, b = writer(ins.operands[0], kind), *(reader(o, kind) for o in ins.operands[1:3])
    condition = reader(ins.operands[3], "pred")
    return lambda w, m: into(w, m, np.where(condition(w), a(w), b(w)))


def _lookup(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """lop3: of three numbers, bit by bit, what a table of eight bits says."""
    into, table = writer(ins.operands[0], kind), ins.operands[4]
    assert isinstance(table, Number)
    sources = [reader(operand, kind) for operand in ins.operands[1:4]]
    rows = [row for row in range(8) if table.value >> row & 1]

    def run(w: Any, m: Array | None) -> None:
        values = [source(w) for source in sources]
        result = np.zeros(LANES, _dtype(kind))
        for row in rows:
            part = np.full(LANES, -1, f"i{width(kind) // 8}").view(_dtype(kind))
            for bit, value in zip((4, 2, 1), values, strict=True):
                part &= value if row & bit else ~value
            result |= part
        into(w, m, result)

    return run


def _permute_bytes(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts)
    into = writer(ins.operands[0], kind)
    a, b, choice = (reader(operand, "u32") for operand in ins.operands[1:4])

    def run(w: Any, m: Array | None) -> None:
        both = a(w).astype(np.uint64) | b(w).astype(np.uint64) << np.uint64(32)
        result = np.zeros(LANES, np.uint32)
        for byte in range(4):
            asked = choice(w) >> np.uint32(4 * byte)
            assert not (asked & 8).any(), "prmt with a sign"
            taken = both >> ((asked & 7).astype(np.uint64) * np.uint64(8)) & np.uint64(255)
            result |= taken.astype(np.uint32) << np.uint32(8 * byte)
        into(w, m, result)

    return run


_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~_either_nan(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~_either_nan(a, b),
    "nan": lambda a, b: _either_nan(a, b),
    "equ": lambda a, b: (a == b) | _either_nan(a, b),
    "neu": lambda a, b: (a != b) | _either_nan(a, b),
    "ltu": lambda a, b: (a < b) | _either_nan(a, b),
    "leu": lambda a, b: (a <= b) | _either_nan(a, b),
    "gtu": lambda a, b: (a > b) | _either_nan(a, b),
    "geu": lambda a, b: (a >= b) | _either_nan(a, b),
}
_COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _either_nan(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


def _compare(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    _knows(ins, parts, parts[1], *_COMBINED)
    function = _COMPARED[parts[1]]
    if kind == "f16x2":
        first, second = (writer(operand, "pred") for operand in ins.operands[:2])
        a, b = (reader(operand, "b32") for operand in ins.operands[2:4])

        def run(w: Any, m: Array | None) -> None:
            truth = function(a(w).view(np.float16), b(w).view(np.float16))
            first(w, m, truth[::2])
            second(w, m, truth[1::2])

        return run
    into = writer(ins.operands[0], "pred")
    a, b = reader(ins.operands[1], kind), reader(ins.operands[2], kind)
    if parts[2] in _COMBINED:
        combined, other = _COMBINED[parts[2]], reader(ins.operands[3], "pred")
        return lambda w, m: into(w, m, combined(function(a(w), b(w)), other(w)))
    return lambda w, m: into(w, m, function(a(w), b(w)))


def _test(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    assert parts[1] == "number"
    into, a = writer(ins.operands[0], "pred"), reader(ins.operands[1], kind)
    return lambda w, m: into(w, m, ~np.isnan(a(w)))


def _convert(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    to = parts[-2]
    _knows(ins, parts, to, *(["rna"] if to == "tf32" else []))
    if to == "tf32":
        if "rna" not in parts:
            raise Unknown(ins.text)
        into, a = writer(ins.operands[0], "b32"), reader(ins.operands[1], kind)
        return lambda w, m: into(w, m, to_tf32(a(w)))
    if to.endswith("x2"):
        # The first number into the upper half.
        into = writer(ins.operands[0], "b32")
        upper, lower = (reader(operand, kind) for operand in ins.operands[1:3])
        narrow = (
            to_bf16 if to == "bf16x2" else lambda value: value.astype(np.float16).view(np.uint16)
        )

        def run(w: Any, m: Array | None) -> None:
            high, low = narrow(upper(w)), narrow(lower(w))
            into(w, m, high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32))

        return run
    into, a = writer(ins.operands[0], to), reader(ins.operands[1], kind)
    if "bf16" in (to, kind):
        return lambda w, m: into(w, m, a(w))
    if (to[0] == "f") != (kind[0] == "f"):
        raise Unknown(ins.text)
    dtype = _dtype(to)
    return lambda w, m: into(w, m, a(w).astype(dtype))


def _move(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """Also apart, and together, of a vector of narrower registers."""
    into, source = ins.operands
    if isinstance(into, Vector):
        narrow = f"b{width(kind) // len(into.parts)}"
        writers = [writer(part, narrow) for part in into.parts]
        whole = reader(source, kind)

        def apart(w: Any, m: Array | None) -> None:
            pieces = np.ascontiguousarray(whole(w)).view(_dtype(narrow)).reshape(LANES, -1)
            for i, write in enumerate(writers):
                write(w, m, np.ascontiguousarray(pieces[:, i]))

        return apart
    if isinstance(source, Vector):
        narrow = f"b{width(kind) // len(source.parts)}"
        readers = [reader(part, narrow) for part in source.parts]
        write_whole = writer(into, kind)
        return lambda w, m: write_whole(
            w, m, np.stack([r(w) for r in readers], 1).view(_dtype(kind))[:, 0]
        )
    return _unary(ins, kind, parts)


# Across the warp ----------------------------------------------------------------------------------


def _shuffle(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    into, a = writer(ins.operands[0], kind), reader(ins.operands[1], kind)
    by = reader(ins.operands[2], "u32")
    mode, everybody = parts[2], [Number(31), Number(-1)]
    if mode not in ("bfly", "idx") or list(ins.operands[3:]) != everybody:
        raise Unknown(ins.text)

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        lane = LANE ^ by(w) if mode == "bfly" else by(w)
        into(w, m, a(w)[lane % LANES])

    return run


def _reduce(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    if parts[1:-1] != ["sync", "max"] or ins.operands[2] != Number(0xFFFFFFFF):
        raise Unknown(ins.text)
    into, a = writer(ins.operands[0], kind), reader(ins.operands[1], kind)

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        into(w, m, np.full(LANES, a(w).max()))

    return run


def _warp_barrier(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    if parts[1] != "warp":
        raise Unknown(ins.text)
    return lambda w, m: w.must_be_whole(m, ins)


_GROUP, _PLACE = LANE // 4, LANE % 4


def _fragment(offsets: list[tuple[int, int]], places: int, shape: tuple[int, int]) -> Array:
    """Which of (registers, lanes, numbers of a register) is each element of a matrix.

    Args:
        offsets: of each register, what is added to the row that a lane's group is and to the column
            that its place in it is, times `places`, the numbers in a register.
    """
    index = np.zeros(shape, np.int64)
    for number, (row, column) in enumerate(offsets):
        for part in range(places):
            rows, columns = _GROUP + row, places * _PLACE + part + column
            index[rows, columns] = (number * LANES + LANE) * places + part
    return index


_CORNERS = [(0, 0), (8, 0), (0, 1), (8, 1)]
_RESULT = _fragment([(0, 0), (8, 0)], 2, (16, 8))
# The inverse: of registers 0, 1 and 2, 3 the rows of a lane's group, and eight rows below.
_RESULT_OF = np.argsort(_RESULT.ravel(), kind="stable")


def _matrices(kind: str) -> tuple[Array, Array]:
    """Where the elements of A and of B, turned, are."""
    if kind == "tf32":
        left = _fragment([(row, 4 * column) for row, column in _CORNERS], 1, (16, 8))
        return left, _fragment([(0, 0), (0, 4)], 1, (8, 8)).T
    left = _fragment([(row, 8 * column) for row, column in _CORNERS], 2, (16, 16))
    return left, _fragment([(0, 0), (0, 8)], 2, (8, 16)).T


def _numbers(kind: str, words: list[Array]) -> Array:
    """What a matrix instruction takes registers for, one number after the other, in float32."""
    bits = np.concatenate(words)
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "bf16":
        return from_bf16(bits.view(np.uint16))
    return bits.view(np.float16).astype(np.float32)


def _matrix_product(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    shape, kind = parts[3], parts[7]
    assert (shape, kind) in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32"))
    assert parts[6] == parts[9] == "f32", ins.text
    left, right = _matrices(kind)
    vectors = [operand.parts for operand in ins.operands if isinstance(operand, Vector)]
    into = [writer(part, "f32") for part in vectors[0]]
    a, b, c = ([reader(part, "b32") for part in vector] for vector in vectors[1:])

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        product = _numbers(kind, [r(w) for r in a])[left] @ _numbers(kind, [r(w) for r in b])[right]
        # Registers 0 and 1 lie side by side in a row.
        start = np.stack([r(w) for r in c]).view(np.float32)
        pairs = start.reshape(2, 2, LANES).transpose(0, 2, 1).ravel()[_RESULT]
        result = (pairs + product).ravel()[_RESULT_OF].reshape(2, LANES, 2).transpose(0, 2, 1)
        for write, numbers in zip(into, result.reshape(4, LANES), strict=True):
            write(w, None, np.ascontiguousarray(numbers))

    return run


def _group_product(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """wgmma: of four warps each multiplies its 16 rows, with matrices in shared memory.

    It runs to its end at once: that a GPU may be late with it is left to the compiler that waits.
    """
    if parts[1] != "mma_async":
        return lambda w, m: None
    shape, kind = parts[4], parts[6]
    columns = int(shape[4:].split("k")[0])
    assert (shape[:4], kind) in (("m64n", "f16"), ("m64n", "bf16"), ("m64n", "tf32")), ins.text
    if any(not isinstance(o, Number) or o.value != 1 for o in ins.operands[4:6]):
        raise Unknown(ins.text)
    turns = [bool(operand.value) for operand in ins.operands[6:] if isinstance(operand, Number)]
    d, a, b, is_added = ins.operands[:4]
    assert isinstance(d, Vector)
    into, start = [writer(part, "f32") for part in d.parts], [reader(p, "b32") for p in d.parts]
    added = reader(is_added, "pred")
    left_words = [reader(part, "b32") for part in a.parts] if isinstance(a, Vector) else None
    left_at = None if isinstance(a, Vector) else reader(a, "u64")
    right_at = reader(b, "u64")

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        if left_words is None:
            assert left_at is not None
            first = 16 * (w.number % 4)
            left = _matrix_in_memory(w, int(left_at(w)[0]), first, 16, kind, turns[:-1] == [True])
        else:
            left = _numbers(kind, [r(w) for r in left_words])[_matrices(kind)[0]]
        right = _matrix_in_memory(w, int(right_at(w)[0]), 0, columns, kind, turns[-1:] == [True])
        product = left @ right.T
        # Tiles of eight columns as those of `mma`.
        tiles = product.reshape(16, columns // 8, 8).transpose(1, 0, 2)
        before = np.stack([r(w) for r in start]).view(np.float32)
        for tile in range(columns // 8):
            numbers = tiles[tile].ravel()[_RESULT_OF].reshape(2, LANES, 2).transpose(0, 2, 1)
            for i, number in enumerate(numbers.reshape(4, LANES), 4 * tile):
                into[i](w, None, np.where(added(w), before[i], np.float32(0)) + number)

    return run


# Bytes of a row, by what a descriptor says of how addresses are mixed.
_ROW = {1: 128, 2: 64, 3: 32}


def _matrix_in_memory(
    w: Any, descriptor: int, first: int, rows: int, kind: str, turned: bool
) -> Array:
    """Rows of a matrix of which a descriptor tells where it is; 32 bytes of each, in float32.

    Args:
        turned: what lies side by side in memory are numbers of one column, not of one row.
    """
    start, across, down = ((descriptor >> place & 0x3FFF) << 4 for place in (0, 16, 32))
    mixed = descriptor >> 62
    width = _ROW.get(mixed, 16)
    row = first + np.arange(rows)[:, None]
    size = 2 if turned else 4
    if turned:
        # Of sixteen columns, numbers of 16 bits.
        column, per = np.arange(16)[None, :], width // 2
        far, near = (across, down) if mixed else (down, across)
        places = start + row // per * far + column // 8 * near + column % 8 * width + row % per * 2
    else:
        byte = 4 * np.arange(8)[None, :]
        places = start + row // 8 * down + byte // width * across + row % 8 * width + byte % width
    if mixed:
        places ^= places >> 3 & (width - 1) & ~15
    found = w.load_shared("weak", places.ravel(), size).reshape(rows, -1)
    return _numbers(kind, list(np.ascontiguousarray(found).view(np.uint32))).reshape(rows, -1)


# Memory -------------------------------------------------------------------------------------------


def _place_of(operand: Operand, is_wide: bool) -> Reader:
    assert isinstance(operand, Address)
    base, offset = reader(operand.base, "u64" if is_wide else "u32"), operand.offset
    if is_wide:
        return lambda w: base(w) + np.uint64(offset % (1 << 64))
    return lambda w: base(w) + np.uint32(offset % (1 << 32))


def _is_wide(operand: Operand) -> bool:
    return isinstance(operand, Address) and (
        isinstance(operand.base, Register) and operand.base.bits == 64
    )


def _load(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    into, source = ins.operands
    place = _place_of(source, _is_wide(source))
    written = into.parts if isinstance(into, Vector) else (into,)
    writers = [writer(part, kind) for part in written]
    count, size = len(writers), width(kind) // 8
    dtype = _dtype(kind)
    how = _how(ins, parts)

    def run(w: Any, m: Array | None) -> None:
        loaded = w.load(how, place(w), m, size * count).view(dtype).reshape(LANES, count)
        for i, write in enumerate(writers):
            write(w, m, np.ascontiguousarray(loaded[:, i]))

    return run


def _store(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    into, source = ins.operands
    place = _place_of(into, _is_wide(into))
    stored = source.parts if isinstance(source, Vector) else (source,)
    readers = [reader(part, f"b{width(kind)}") for part in stored]
    how = _how(ins, parts)
    return lambda w, m: w.store(how, place(w), m, np.stack([r(w) for r in readers], 1))


# What a memory instruction's modifiers ask for: where, and in which order with others.
_SPACES = ("global", "shared", "shared::cta", "param")
_ORDERS = ("relaxed", "acquire", "release", "volatile", "cg", "cv")


def _how(ins: Instruction, parts: list[str]) -> tuple[str, str]:
    """Space and order; a space that is not said is another program's shared memory."""
    if "cta" in parts or (parts[0] == "st" and "release" in parts):
        raise Unknown(ins.text)
    space = next((part for part in parts if part in _SPACES), "cluster")
    order = next((part for part in parts if part in _ORDERS), "weak")
    return space.removesuffix("::cta"), order


def _copy(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """cp.async: from global memory to shared memory, some time before it is waited for."""
    if parts[1:] == ["async", "commit_group"]:
        return lambda w, m: w.commit_copies()
    if parts[1:] == ["async", "wait_group"]:
        (left,) = ins.operands
        assert isinstance(left, Number)
        count = left.value
        return lambda w, m: w.await_copies(count)
    if parts[2:] not in (["ca", "shared", "global"], ["cg", "shared", "global"]):
        raise Unknown(ins.text)
    to, source = (_place_of(operand, _is_wide(operand)) for operand in ins.operands[:2])
    size = ins.operands[2]
    assert isinstance(size, Number)
    taken = reader(ins.operands[3] if len(ins.operands) > 3 else size, "u32")
    order = "cg" if "cg" in parts else "weak"
    return lambda w, m: w.copy(order, to(w), source(w), m, size.value, taken(w))


def _load_matrix(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """ldmatrix: each lane is given two numbers of 16 bits of matrices of eight rows."""
    into, source = ins.operands
    assert isinstance(into, Vector)
    writers = [writer(part, "b32") for part in into.parts]
    place, turned = _place_of(source, False), "trans" in parts

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        rows = place(w)[: 8 * len(writers)]
        padded = np.resize(rows, LANES)
        taking = len(rows) > LANE
        matrices = w.load(("shared", "weak"), padded, None if taking.all() else taking, 16)
        matrices = matrices.view(np.uint16).reshape(-1, 8, 8)
        for matrix, write in zip(matrices, writers, strict=False):
            numbers = np.ascontiguousarray(matrix.T if turned else matrix)
            write(w, None, numbers.view(np.uint32).ravel())

    return run


def _store_matrix(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    into, source = ins.operands
    assert isinstance(source, Vector)
    readers = [reader(part, "b32") for part in source.parts]
    place, turned = _place_of(into, False), "trans" in parts

    def run(w: Any, m: Array | None) -> None:
        w.must_be_whole(m, ins)
        matrices = np.concatenate([r(w) for r in readers]).view(np.uint16).reshape(-1, 8, 8)
        rows = np.zeros((LANES, 8), np.uint16)
        taking = 8 * len(readers) > LANE
        rows[taking] = (matrices.transpose(0, 2, 1) if turned else matrices).reshape(-1, 8)
        w.store(("shared", "weak"), place(w), None if taking.all() else taking, rows)

    return run


def _add_in_memory(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    if "add" not in parts or kind != "u32" or "gpu" not in parts:
        raise Unknown(ins.text)
    # `red` gives nothing back.
    into = writer(Nowhere() if parts[0] == "red" else ins.operands[0], kind)
    place, value = _place_of(ins.operands[-2], True), reader(ins.operands[-1], kind)
    order = next(part for part in parts if part in ("release", "acquire", "acq_rel", "relaxed"))
    return lambda w, m: into(w, m, w.add(order, place(w), m, value(w)))


def _generic(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    if parts[1:] != ["shared", "u64"]:
        raise Unknown(ins.text)
    into, place = writer(ins.operands[0], "u64"), reader(ins.operands[1], "u64")
    return lambda w, m: into(w, m, w.generic(place(w), m))


def _of_rank(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """mapa: an address in shared memory as one of another program of the cluster."""
    into, place = writer(ins.operands[0], kind), reader(ins.operands[1], kind)
    rank = reader(ins.operands[2], "u32")
    return lambda w, m: into(w, m, w.of_rank(place(w), rank(w), m))


def _fence(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    """Only between a program's own stores and matrix instructions, which are never late here."""
    if parts[1:3] != ["proxy", "async"]:
        raise Unknown(ins.text)
    return lambda w, m: None


def _prefetch(ins: Instruction, kind: str, parts: list[str]) -> Operation:
    place = _place_of(ins.operands[0], True)
    return lambda w, m: w.prefetch(place(w), m)


_OPERATIONS: dict[str, Callable[[Instruction, str, list[str]], Operation]] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_SHIFTS, _shift),
    "fma": _multiply_add,
    "mad": _multiply_add,
    "bfe": _extract,
    "selp": _select,
    "lop3": _lookup,
    "prmt": _permute_bytes,
    "setp": _compare,
    "testp": _test,
    "cvt": _convert,
    "mov": _move,
    "shfl": _shuffle,
    "redux": _reduce,
    "bar": _warp_barrier,
    "mma": _matrix_product,
    "wgmma": _group_product,
    "fence": _fence,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "atom": _add_in_memory,
    "red": _add_in_memory,
    "cvta": _generic,
    "mapa": _of_rank,
    "prefetch": _prefetch,
}


def operation(ins: Instruction) -> Operation:
    """What an instruction does, without its guard.

    Raises:
        Unknown: if the machine does not know it.
    """
    parts = ins.name.split(".")
    make = _OPERATIONS.get(parts[0])
    if make is None:
        raise Unknown(ins.text)
    try:
        return make(ins, parts[-1], parts)
    except (AssertionError, KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        raise Unknown(ins.text) from error
