"""PTX as a list of instructions: names resolved to registers, places in memory and other lines."""

import re
import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    index: int
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Number:
    """A number in the text: an integer, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Special:
    """A register that the machine sets: %tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Target:
    """The number of the instruction behind a label."""

    place: int


@dataclass(frozen=True)
class Nowhere:
    """Where a result goes that nobody wants."""


Operand = Register | Number | Special | Address | Vector | Target | Nowhere


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: with all modifiers. guard: the predicate without which a thread passes it by.
        wanted: what the predicate must be. text: as it was written.
    """

    name: str
    operands: tuple[Operand, ...]
    guard: Register | None
    wanted: bool
    text: str


@dataclass
class Program:
    """The one kernel of a module.

    Attributes:
        registers: bits of each. parameters: size and place of each, in bytes.
        shared: bytes of the variables in shared memory that the text declares.
    """

    instructions: list[Instruction]
    registers: list[int]
    parameters: list[tuple[int, int]]
    shared: int


@dataclass
class _Scope:
    outer: "_Scope | None" = None
    names: dict[str, Operand] = field(default_factory=dict)

    def find(self, name: str) -> Operand | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None


# A block opens or closes; a label; a directive that ends with its line; all else ends with `;`.
_STATEMENT = re.compile(
    r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|\.(?:loc|file)\b[^\n]*|(?P<text>[^;]*);)"
)
_DECLARED = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.*)", re.DOTALL)
_SHARED = re.compile(r"\.shared\s+\.align\s+(?P<align>\d+)\s+\.b8\s+(?P<name>\w+)\[(?P<size>\d+)\]")
_GUARD = re.compile(r"@(?P<no>!?)(?P<name>[%\w]+)\s+(?P<rest>.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.[a-z](?P<bits>\d+)\b[^,]*?\b(?P<name>\w+_param_\d+)")
_ADDRESS = re.compile(r"\[\s*(?P<base>[%$\w.]+)\s*(?:(?P<sign>[+-])\s*(?P<offset>\d+))?\s*\]")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")


def parse(text: str, dynamic_shared: int) -> Program:
    """Read a module with one kernel.

    Args:
        dynamic_shared: bytes of `global_smem`, Triton's own shared memory, which lies behind the
            variables that the text declares.
    """
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+\w+\s*\((?P<parameters>.*?)\)", text, re.DOTALL)
    assert entry is not None, "no kernel"
    outermost = _Scope()
    parameters, place = [], 0
    for found in _PARAMETER.finditer(entry["parameters"]):
        size = int(found["bits"]) // 8
        place = -(-place // size) * size
        outermost.names[found["name"]] = Number(place)
        parameters.append((size, place))
        place += size
    lines: list[tuple[str, _Scope]] = []
    scope, shared = outermost, 0
    registers: list[int] = []
    at = text.index("{", entry.end())
    while True:
        statement = _STATEMENT.match(text, at)
        assert statement is not None, f"not understood: {text[at : at + 80]!r}"
        at = statement.end()
        if statement["brace"] == "{":
            scope = _Scope(scope)
        elif statement["brace"] == "}":
            assert scope.outer is not None
            scope = scope.outer
            if scope is outermost:
                break
        elif statement["label"]:
            scope.names[statement["label"]] = Target(len(lines))
        elif statement["text"] is not None:
            line = " ".join(statement["text"].split())
            if declared := _DECLARED.fullmatch(line):
                bits = 1 if declared["type"] == "pred" else int(declared["type"][1:])
                for name in _names(declared["names"]):
                    scope.names[name] = Register(len(registers), bits)
                    registers.append(bits)
            elif variable := _SHARED.fullmatch(line):
                align = int(variable["align"])
                shared = -(-shared // align) * align
                scope.names[variable["name"]] = Number(shared)
                shared += int(variable["size"])
            elif not line.startswith("."):
                lines.append((line, scope))
    shared = -(-shared // 128) * 128
    outermost.names["global_smem"] = Number(shared)
    return Program(
        [_instruction(line, scope) for line, scope in lines],
        registers,
        parameters,
        shared + dynamic_shared,
    )


def _names(text: str) -> list[str]:
    """`a, b<3>` declares a, b0, b1, b2."""
    names = []
    for name in text.split(","):
        found = re.fullmatch(r"\s*([%\w]+?)(?:<(\d+)>)?\s*", name)
        assert found is not None, text
        names += (
            [found[1]] if found[2] is None else [f"{found[1]}{i}" for i in range(int(found[2]))]
        )
    return names


def _instruction(line: str, scope: _Scope) -> Instruction:
    guard, wanted, rest = None, True, line
    if guarded := _GUARD.match(line):
        guard = scope.find(guarded["name"])
        assert isinstance(guard, Register)
        wanted, rest = not guarded["no"], guarded["rest"]
    name, _, operands = rest.partition(" ")
    return Instruction(
        name, tuple(_operand(part, scope) for part in _parts(operands)), guard, wanted, line
    )


def _parts(text: str) -> list[str]:
    """Operands: separated by commas outside of braces and brackets, or by a |."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter in ",|" and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()] if part.strip() else parts


def _operand(text: str, scope: _Scope) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part, scope) for part in _parts(text[1:-1])))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        assert found is not None, text
        offset = int((found["sign"] or "") + (found["offset"] or "0"))
        return Address(_operand(found["base"], scope), offset)
    if _NUMBER.fullmatch(text):
        return Number(int(text.rstrip("U"), 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Number(int(text[2:], 16))
    if re.fullmatch(r"\d+\.\d+", text):
        return Number(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    if text == "_":
        return Nowhere()
    named = scope.find(text)
    if named is None and text.startswith("%"):
        return Special(text)
    if named is None:
        raise ValueError(f"{text} is not declared")
    return named
