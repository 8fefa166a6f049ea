"""Stored runs, read and checked: what follows may rely on every field that is named here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import CommandError
from bench.tables import QUIET_SHARE

OURS, THEIRS = "triton_rnn", "torch.nn"
Quartiles = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """One provider's time for a case; the ratio is torch.nn's time over this one's."""

    seconds: float
    quartiles: Quartiles
    ratio: float | None
    ratio_quartiles: Quartiles | None
    peak_bytes: float | None


@dataclass(frozen=True)
class Case:
    id: str
    cell: str
    mode: str
    form: str
    device: str
    dtype: str
    batch: int
    seq_len: int
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    floor_seconds: float | None
    others_share: float | None
    timings: dict[str, Timing]
    failed: dict[str, str]

    @property
    def size(self) -> str:
        return (
            f"N{self.batch} T{self.seq_len} I{self.input_size} H{self.hidden_size} "
            f"L{self.layers} D{self.directions}"
        )

    @property
    def is_disturbed(self) -> bool:
        """Measured beside other work, so worth little."""
        return (self.others_share or 0.0) > QUIET_SHARE

    def ratio(self, provider: str = OURS) -> float | None:
        timing = self.timings.get(provider)
        return timing.ratio if timing else None


@dataclass(frozen=True)
class Summary:
    """A group of cases beside its target, as the run itself summarised it."""

    group: str
    padded: float | None
    packed: float | None
    both: float | None
    target: float | None
    worst: float | None
    worst_target: float | None
    worst_case: str
    reached: bool


@dataclass(frozen=True)
class Run:
    """What runs of all kinds have; ``name`` tells the runs of one report apart."""

    name: str
    machine: dict[str, str]


@dataclass(frozen=True)
class CasesRun(Run):
    title: str
    complete: bool
    quick: bool
    ceilings: dict[str, tuple[float | None, float | None]]
    cases: list[Case]
    summaries: list[Summary]
    # Name of the case, bytes of ours, bytes of torch.nn.
    memory: list[tuple[str, float, float]]
    # Name, seconds, target.
    costs: list[tuple[str, float, float | None]]


@dataclass(frozen=True)
class Curve:
    cell: str
    mode: str
    axis: str
    provider: str
    base: str
    points: list[tuple[float, float]]
    exponent: float | None
    exponent_error: float | None
    exponent_last: float | None


@dataclass(frozen=True)
class GrowthRun(Run):
    curves: list[Curve]
    # Name, seconds, note.
    first_results: list[tuple[str, float, str]]


@dataclass(frozen=True)
class Scaling:
    processes: int
    threads_per_process: int
    samples_per_second: float
    seconds_per_step: float
    efficiency: float
    mode: str


@dataclass(frozen=True)
class ScalingRun(Run):
    runs: list[Scaling]


class _Fields:
    """A JSON object whose fields are checked as they are read; ValueError tells what is wrong."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object")
        self.value, self.where = value, where

    def wrong(self, name: str, wanted: str) -> ValueError:
        found = "is missing" if name not in self.value else f"is not {wanted}"
        return ValueError(f"{name!r} of {self.where} {found}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.value.get(name, default)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.value.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def maybe_number(self, name: str) -> float | None:
        return None if self.value.get(name) is None else self.number(name)

    def number(self, name: str) -> float:
        value = self.value.get(name)
        if not _is_number(value):
            raise self.wrong(name, "a number")
        return float(value)

    def maybe_positive(self, name: str) -> float | None:
        return None if self.value.get(name) is None else self.positive(name)

    def positive(self, name: str) -> float:
        value = self.value.get(name)
        if not _is_number(value) or value <= 0:
            raise self.wrong(name, "a number above zero")
        return float(value)

    def count(self, name: str) -> int:
        value = self.value.get(name)
        if not _is_number(value) or value < 1 or value != int(value):
            raise self.wrong(name, "a whole number above zero")
        return int(value)

    def quartiles(self, name: str) -> Quartiles:
        first, third = self.pair(self.value.get(name), name)
        return first, third

    def maybe_quartiles(self, name: str) -> Quartiles | None:
        return None if self.value.get(name) is None else self.quartiles(name)

    def pair(self, value: Any, name: str) -> tuple[float, float]:
        good = isinstance(value, list) and len(value) == 2
        if not good or not all(_is_number(item) and item > 0 for item in value):
            raise self.wrong(name, "made of pairs of numbers above zero")
        return float(value[0]), float(value[1])

    def pairs(self, name: str) -> list[tuple[float, float]]:
        value = self.value.get(name)
        if not isinstance(value, list) or not value:
            raise self.wrong(name, "a list of points")
        return [self.pair(item, name) for item in value]

    def records(self, name: str, optional: bool = False) -> list[_Fields]:
        value = self.value.get(name, [] if optional else None)
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return [
            _Fields(item, f"{name}[{index}] of {self.where}") for index, item in enumerate(value)
        ]

    def named(self, name: str, optional: bool = False) -> dict[str, _Fields]:
        value = self.value.get(name, {} if optional else None)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return {key: _Fields(item, f"{name} of {self.where}") for key, item in value.items()}

    def texts(self, name: str, optional: bool = False) -> dict[str, str]:
        """Text by name; numbers are as good, since they are only shown."""
        value = self.value.get(name, {} if optional else None)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        if any(isinstance(item, (list, dict)) for item in value.values()):
            raise self.wrong(name, "an object of texts")
        return {key: "unknown" if item is None else str(item) for key, item in value.items()}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and abs(value) < 1e100


def _timing(fields: _Fields) -> Timing:
    return Timing(
        fields.positive("seconds"),
        fields.quartiles("quartiles"),
        fields.maybe_positive("ratio"),
        fields.maybe_quartiles("ratio_quartiles"),
        fields.maybe_number("peak_bytes"),
    )


def _case(fields: _Fields) -> Case:
    texts = {name: fields.text(name) for name in ("id", "cell", "mode", "form", "device", "dtype")}
    sizes = ("batch", "seq_len", "input_size", "hidden_size", "layers", "directions")
    return Case(
        **texts,
        **{name: fields.count(name) for name in sizes},
        floor_seconds=fields.maybe_positive("floor_seconds"),
        others_share=fields.maybe_number("others_share"),
        timings={name: _timing(timing) for name, timing in fields.named("providers").items()},
        failed=fields.texts("failed", optional=True),
    )


def _summary(fields: _Fields) -> Summary:
    numbers = ("padded", "packed", "both", "target", "worst", "worst_target")
    return Summary(
        group=fields.text("group"),
        **{name: fields.maybe_positive(name) for name in numbers},
        worst_case=fields.text("worst_case", ""),
        reached=fields.flag("reached"),
    )


def _cases(name: str, top: _Fields) -> CasesRun:
    cases = [_case(fields) for fields in top.records("cases")]
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ValueError(f"case {case.id!r} is there twice")
        seen.add(case.id)
    return CasesRun(
        name,
        top.texts("machine"),
        title=top.text("title"),
        complete=top.flag("complete"),
        quick=top.flag("quick", False),
        ceilings={
            key: (
                value.maybe_positive("flops_per_second"),
                value.maybe_positive("bytes_per_second"),
            )
            for key, value in top.named("ceilings", optional=True).items()
        },
        cases=cases,
        summaries=[_summary(fields) for fields in top.records("summaries", optional=True)],
        memory=[
            (fields.text("id"), fields.positive("bytes_ours"), fields.positive("bytes_torch"))
            for fields in top.records("memory", optional=True)
        ],
        costs=[
            (fields.text("name"), fields.positive("seconds"), fields.maybe_positive("target"))
            for fields in top.records("costs", optional=True)
        ],
    )


def _curve(fields: _Fields) -> Curve:
    axis = fields.text("axis")
    letters = {"batch": "N", "seq_len": "T", "hidden_size": "H", "layers": "L"}
    # The axis itself varies, so its base says nothing.
    base = " ".join(
        letters.get(name, f"{name} ") + value
        for name, value in fields.texts("base", optional=True).items()
        if name != axis
    )
    return Curve(
        fields.text("cell"),
        fields.text("mode"),
        axis,
        fields.text("provider"),
        base,
        sorted(fields.pairs("points")),
        fields.maybe_number("exponent"),
        fields.maybe_number("exponent_error"),
        fields.maybe_number("exponent_last"),
    )


def _growth(name: str, top: _Fields) -> GrowthRun:
    return GrowthRun(
        name,
        top.texts("machine"),
        curves=[_curve(fields) for fields in top.records("curves")],
        first_results=[
            (fields.text("name"), fields.positive("seconds"), fields.text("note", ""))
            for fields in top.records("first_results", optional=True)
        ],
    )


def _scaling(name: str, top: _Fields) -> ScalingRun:
    runs = [
        Scaling(
            fields.count("processes"),
            fields.count("threads_per_process"),
            fields.positive("samples_per_second"),
            fields.positive("seconds_per_step"),
            fields.positive("efficiency"),
            fields.text("mode"),
        )
        for fields in top.records("runs")
    ]
    return ScalingRun(name, top.texts("machine"), runs)


# By kind: the schema that is understood, and what reads it.
_KINDS: dict[str, tuple[int, Callable[[str, _Fields], Run]]] = {
    "cases": (2, _cases),
    "growth": (1, _growth),
    "scaling": (1, _scaling),
}


def load(path: Path, name: str) -> Run:
    """One file as a run called ``name``; CommandError names the file and what is wrong with it."""
    try:
        # JSON's NaN is in no file of ours; both errors of reading text are ValueErrors.
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        return _known(content)(name, _Fields(content, "the file"))
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error
    except json.JSONDecodeError as error:
        raise _refusal(path, f"not JSON, or cut off: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, str(error)) from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _refusal(path: Path, reason: str) -> CommandError:
    # One line, whatever the path or the file's own text holds.
    return CommandError(" ".join(f"{path}: {reason}".split()))


def _known(content: Any) -> Callable[[str, _Fields], Run]:
    if not isinstance(content, dict):
        raise ValueError("not a stored run")
    if "kind" not in content and "cases" in content:
        raise ValueError("written by an older version of the benchmark; measure again")
    kind, schema = content.get("kind"), content.get("schema")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(_KINDS)}")
    known, reader = _KINDS[kind]
    if schema != known or isinstance(schema, bool):
        older = _is_number(schema) and schema < known
        age = "an older" if older else "a newer or another"
        raise ValueError(f"schema {schema!r} of kind {kind}, of {age} version; {known} is read")
    return reader


def load_all(paths: Sequence[Path]) -> list[Run]:
    """All files, each named by its stem; where stems are equal, a number is added."""
    runs: list[Run] = []
    names: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f"{path.stem} ({number})"
        names.add(name)
        runs.append(load(path, name))
    return runs
