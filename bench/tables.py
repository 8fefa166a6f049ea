"""The table of ratios that a run ends with, on the terminal and in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.cases import MODES, Case, Size
from bench.machine import write
from bench.turns import Quartiles, Rounds, geometric_mean
from bench.workload import OURS, TORCH
from triton_rnn.profiling.ceilings import ceilings

COLUMNS = (
    ("inference", "padded"),
    ("inference", "packed"),
    ("training", "padded"),
    ("training", "packed"),
    ("step", "padded"),
)


@dataclass(frozen=True)
class Target:
    """What is asked of a group of cases, over the whole grid, on two cores."""

    group: str
    mean: float | None
    worst: float
    contains: Callable[[Case], bool]


def _of(cell: str, mode: str) -> Callable[[Case], bool]:
    return lambda case: (case.cell, case.mode, case.device) == (cell, mode, "cpu")


def _is_packed_training(case: Case) -> bool:
    return case.mode == "training" and case.packed and case.device == "cpu"


def _small(cell: str, mode: str) -> Callable[[Case], bool]:
    contains = _of(cell, mode)
    return lambda case: contains(case) and case.size.hidden_size <= 128 and case.size.batch <= 8


TARGETS = (
    Target("RNN inference", 2.0, 1.0, _of("rnn", "inference")),
    Target("RNN training", 2.2, 1.0, _of("rnn", "training")),
    Target("RNN relu inference", 2.0, 1.0, _of("rnn-relu", "inference")),
    Target("RNN relu training", 2.2, 1.0, _of("rnn-relu", "training")),
    Target("GRU inference", 1.6, 1.0, _of("gru", "inference")),
    Target("GRU training", 2.6, 1.0, _of("gru", "training")),
    Target("LSTM inference", 1.05, 0.97, _of("lstm", "inference")),
    Target("LSTM training", 1.05, 0.97, _of("lstm", "training")),
    Target("all cells training, packed", 2.0, 1.0, _is_packed_training),
)


# Of the grid "small": hidden sizes up to 128 and batches up to 8.
SMALL_TARGETS = (
    Target("RNN inference, small", 6.0, 1.5, _small("rnn", "inference")),
    Target("RNN training, small", 5.0, 1.5, _small("rnn", "training")),
    Target("GRU inference, small", 6.0, 1.5, _small("gru", "inference")),
    Target("GRU training, small", 5.0, 1.5, _small("gru", "training")),
    Target("LSTM inference, small", 2.5, 1.1, _small("lstm", "inference")),
    Target("LSTM training, small", 2.5, 1.1, _small("lstm", "training")),
)


# Of the machine, used by others during a measurement: beyond this, its ratio is marked.
QUIET_SHARE = 0.1
MARK = "?"
# Other packages that ours is compared with in a line.
PEERS_COMPARED = ("onnxruntime",)


@dataclass
class Measurement:
    """A case: the rounds of its providers, what ran, what failed, and what the work is.

    ``rounds`` is None where nothing was timed: ours or torch.nn failed, or only the gate was asked.
    """

    case: Case
    rounds: Rounds | None = None
    details: dict[str, dict[str, object]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    operations: int = 0
    least_bytes: int = 0
    floor_seconds: float | None = None

    @property
    def ratio(self) -> float:
        """torch.nn's time over ours."""
        return self.ratio_of(OURS)

    @property
    def providers(self) -> list[str]:
        return list(self.rounds.seconds) if self.rounds else []

    def ratio_of(self, provider: str) -> float:
        """torch.nn's time over a provider's."""
        assert self.rounds is not None
        return self.rounds.ratio(provider, TORCH)

    @property
    def quartiles(self) -> Quartiles:
        assert self.rounds is not None
        return self.rounds.ratio_quartiles(OURS, TORCH)

    @property
    def is_disturbed(self) -> bool:
        """Measured beside other work, so worth little."""
        return self.rounds is not None and (self.rounds.others_share or 0.0) > QUIET_SHARE

    @property
    def is_slower(self) -> bool:
        """Slower than torch.nn in most rounds, by more than the spread of the rounds."""
        return self.quartiles[1] < 1.0

    def facts(self) -> dict[str, object]:
        """What is said of the case, whoever runs it."""
        return {
            "id": self.case.id,
            **self.case.as_dict(),
            "operations": self.operations,
            "least_bytes": self.least_bytes,
            "floor_seconds": self.floor_seconds,
            "others_share": self.rounds.others_share if self.rounds else None,
        }

    def provider(self, name: str) -> dict[str, object]:
        """What was measured of one provider."""
        assert self.rounds is not None
        seconds = self.rounds.median(name)
        return {
            "seconds": seconds,
            "quartiles": self.rounds.quartiles(name),
            "minimum": min(self.rounds.of(name)),
            "rounds": len(self.rounds.of(name)),
            "calls_per_round": self.rounds.calls_per_round[name],
            "ratio": self.ratio_of(name),
            "ratio_quartiles": self.rounds.ratio_quartiles(name, TORCH),
            "roofline": None if self.floor_seconds is None else self.floor_seconds / seconds,
            **self.details.get(name, {}),
        }


@dataclass(frozen=True)
class Summary:
    """A group of cases beside its target; the cells' targets name no form, so each is shown."""

    target: Target
    padded: float | None
    packed: float | None
    both: float
    worst: Measurement
    cases: int

    @property
    def reached(self) -> bool:
        """Held by both readings of the target: padded cases alone, and all cases."""
        mean = min(self.both, self.padded or self.both)
        mean_held = self.target.mean is None or mean >= self.target.mean
        return mean_held and self.worst.ratio >= self.target.worst


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes in use during training steps beyond what was there before them."""

    case: Case
    ours: int
    reference: int

    @property
    def reached(self) -> bool:
        """No more than torch.nn's, within what equal runs differ by."""
        return self.ours <= 1.05 * self.reference + 2**20


@dataclass(frozen=True)
class Cost:
    """A cost paid once per process: seconds, and what is asked for."""

    name: str
    seconds: float
    target: float


class Kind(NamedTuple):
    """What a table is about."""

    cell: str
    device: str
    dtype: str

    @classmethod
    def of(cls, case: Case) -> Kind:
        return cls(case.cell, case.device, case.dtype)

    def __str__(self) -> str:
        return self.cell if self.device == "cpu" else f"{self.cell} on {self.device}, {self.dtype}"


@dataclass
class Report:
    """Everything measured in a session, in the order of measuring."""

    title: str
    complete: bool
    quick: bool = False
    targets: tuple[Target, ...] = TARGETS
    machine: dict[str, str] = field(default_factory=dict)
    # By device and dtype: what the machine can do at best, measured.
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    memory: list[PeakMemory] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.measurements or self.memory or self.costs)

    @property
    def timed(self) -> list[Measurement]:
        return [measurement for measurement in self.measurements if measurement.rounds]

    def add_ceilings(self, case: Case) -> None:
        """Note the ceilings of the case's device and dtype; they are measured once."""
        limits = ceilings(torch.device(case.device), getattr(torch, case.dtype))
        self.ceilings[f"{case.device}-{case.dtype}"] = {
            "flops_per_second": limits.operations_per_second,
            "bytes_per_second": limits.bytes_per_second,
        }

    def kinds(self) -> list[Kind]:
        """Cells on a device in a dtype, in the order of measuring."""
        return list(dict.fromkeys(Kind.of(m.case) for m in self.timed))

    def sizes(self, kind: Kind) -> list[Size]:
        """Sizes measured for a kind, each once, in the order of measuring."""
        return list(dict.fromkeys(m.case.size for m in self.timed if Kind.of(m.case) == kind))

    def find(self, kind: Kind, size: Size, mode: str, form: str) -> Measurement | None:
        case = Case(kind.cell, mode, form == "packed", size, kind.device, kind.dtype)
        return next((m for m in self.timed if m.case == case), None)

    def summaries(self) -> list[Summary]:
        """Beside their targets, which are set for the CPU."""
        return [
            summarise(target, chosen)
            for target in self.targets
            if (chosen := [m for m in self.timed if target.contains(m.case)])
        ]

    def slower(self) -> list[Measurement]:
        found = [measurement for measurement in self.timed if measurement.is_slower]
        return sorted(found, key=lambda measurement: measurement.ratio)


def summarise(target: Target, measurements: Sequence[Measurement]) -> Summary:
    def mean(form: str | None) -> float | None:
        ratios = [m.ratio for m in measurements if form is None or m.case.form == form]
        return geometric_mean(ratios) if ratios else None

    both = mean(None)
    assert both is not None
    worst = min(measurements, key=lambda measurement: measurement.ratio)
    return Summary(target, mean("padded"), mean("packed"), both, worst, len(measurements))


def _microseconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _size(size: Size) -> str:
    return size.id.replace("-", " ")


# A table is its title, its header and its rows; both renderings are made of it.
Rows = tuple[str, list[str], list[list[str]]]


def _ratio_table(report: Report, kind: Kind) -> Rows:
    """Ratio, quartiles of the rounds, and the time of ours."""
    rows = []
    for size in report.sizes(kind):
        row = [_size(size)]
        for mode, form in COLUMNS:
            found = report.find(kind, size, mode, form)
            if found is None or found.rounds is None:
                row.append("-")
                continue
            first, third = found.quartiles
            seconds = _microseconds(found.rounds.median(OURS))
            mark = MARK if found.is_disturbed else ""
            row.append(f"{found.ratio:.2f} ({first:.2f}-{third:.2f}) {seconds}{mark}")
        rows.append(row)
    header = [str(kind), *(f"{mode}, {form}" for mode, form in COLUMNS)]
    return f"{kind}: torch.nn's time over ours (quartiles), our time per call", header, rows


def _provider_table(report: Report, kind: Kind, mode: str) -> Rows | None:
    """Every provider's ratio, and torch.nn's time and algorithm; None where there are but two."""
    chosen = [m for m in report.timed if Kind.of(m.case) == kind and m.case.mode == mode]
    names = [name for m in chosen for name in m.providers if name not in (OURS, TORCH)]
    if not names:
        return None
    columns = [OURS, *dict.fromkeys(names)]
    rows = []
    for m in chosen:
        assert m.rounds is not None
        cells = [f"{m.ratio_of(name):.2f}" if name in m.providers else "-" for name in columns]
        algorithm = str(m.details.get(TORCH, {}).get("algorithm", ""))
        ran = str(m.details.get(OURS, {}).get("backend", ""))
        torchs = [_microseconds(m.rounds.median(TORCH)), algorithm, ran]
        rows.append([f"{m.case.form}, {_size(m.case.size)}", *cells, *torchs])
    # The backends by their names alone: the table is wide.
    names = [name.removeprefix(f"{OURS}:") for name in columns]
    header = ["case, size", *names, "torch.nn", "torch.nn, algorithm", "ours, backend"]
    return f"{kind} {mode}: torch.nn's time over each provider's", header, rows


def _summary_table(report: Report) -> Rows:
    header = ["geometric means", "padded", "packed", "both", "target"]
    header += ["worst", "target", "worst case", "reached"]
    rows = []
    for summary in report.summaries():
        target = summary.target
        row = [target.group, _ratio(summary.padded), _ratio(summary.packed), _ratio(summary.both)]
        row += [_ratio(target.mean), _ratio(summary.worst.ratio), _ratio(target.worst)]
        rows.append([*row, _place(summary.worst.case), _yes(summary.reached)])
    note = "" if report.complete else " (a selection: the targets are for the whole standard grid)"
    return f"Ratios over torch.nn beside the targets{note}", header, rows


def _place(case: Case) -> str:
    return f"{case.cell} {case.form} {_size(case.size)}"


def _memory_table(report: Report) -> Rows:
    header = ["case", "torch.nn", "ours", "ours/torch.nn", "reached"]
    rows = [
        [
            _place(peak.case),
            f"{peak.reference / 2**20:.1f}",
            f"{peak.ours / 2**20:.1f}",
            f"{peak.ours / peak.reference:.2f}",
            _yes(peak.reached),
        ]
        for peak in report.memory
    ]
    return "Peak memory of a training step, MiB", header, rows


def _cost_table(report: Report) -> Rows:
    rows = [
        [
            cost.name,
            f"{cost.seconds * 1e3:.1f}",
            f"{cost.target * 1e3:.0f}",
            _yes(cost.seconds <= cost.target),
        ]
        for cost in report.costs
    ]
    return "Costs once per process or machine, ms", ["", "ours", "target", "reached"], rows


def tables(report: Report) -> list[Rows]:
    found = [_ratio_table(report, kind) for kind in report.kinds()]
    for kind in report.kinds():
        found += [table for mode in MODES if (table := _provider_table(report, kind, mode))]
    if report.memory:
        found.append(_memory_table(report))
    if report.costs:
        found.append(_cost_table(report))
    if report.measurements:
        found.append(_summary_table(report))
    return found


def closing_lines(report: Report) -> list[str]:
    lines = []
    for m in report.measurements:
        # Ours or torch.nn takes all with it.
        names = [name for name in m.failed if m.rounds or name in (OURS, TORCH)]
        lines += [f"Not timed: {m.case.id}, {name}: {m.failed[name]}" for name in names[:3]]
    disturbed = [m for m in report.timed if m.is_disturbed]
    if disturbed:
        lines.append(
            f"{len(disturbed)} of {len(report.timed)} cases are marked {MARK}: others used "
            f"more than {QUIET_SHARE:.0%} of the machine meanwhile. Measure these again."
        )
    for peer in dict.fromkeys(name for m in report.timed for name in m.providers):
        if peer not in PEERS_COMPARED:
            continue
        ratios = {
            m.case.id: m.ratio / m.ratio_of(peer) for m in report.timed if peer in m.providers
        }
        worst = min(ratios, key=lambda name: ratios[name])
        faster = sum(ratio >= 1 for ratio in ratios.values())
        lines.append(
            f"As fast as {peer} or faster in {faster} of {len(ratios)} cases; geometric mean "
            f"{geometric_mean(ratios.values()):.2f}, worst {ratios[worst]:.2f} ({worst})"
        )
    slower = report.slower()
    if slower:
        listed = ", ".join(f"{m.case.id} {m.ratio:.2f}" for m in slower)
        lines.append(f"Slower than torch.nn beyond the spread of the rounds: {listed}")
    elif report.timed:
        lines.append("No measured case is slower than torch.nn beyond the spread of the rounds.")
    return lines


def render(report: Report) -> Iterable[RenderableType]:
    """The report for the terminal."""
    for title, header, rows in tables(report):
        table = Table(title=title, title_justify="left", title_style="bold")
        for index, name in enumerate(header):
            # The ratio columns are read by their first number; other numbers align at the right.
            left = index == 0 or "," in name or name == "worst case"
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        yield table
    for line in closing_lines(report):
        yield Text(line)
    yield Text(report.title)
    yield Text("; ".join(f"{name}: {value}" for name, value in report.machine.items()))


def _style(cell: str) -> str:
    if cell == "no":
        return "red"
    ratio, quartiles, _ = cell.partition(" (")
    return "red" if quartiles and float(ratio) < 1 else ""


def to_markdown(report: Report) -> str:
    lines = [report.title, ""]
    lines += [f"- {name}: {value}" for name, value in report.machine.items()]
    for title, header, rows in tables(report):
        lines += ["", f"**{title}**", ""]
        lines += [_markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += map(_markdown_row, rows)
    lines += [text for line in closing_lines(report) for text in ("", line)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_json(report: Report) -> str:
    """All numbers of the report, seconds and bytes."""
    content = {
        "kind": "cases",
        "schema": 2,
        "title": report.title,
        "complete": report.complete,
        "quick": report.quick,
        "machine": report.machine,
        "ceilings": report.ceilings,
        "cases": [
            {
                **m.facts(),
                "providers": {name: m.provider(name) for name in m.providers},
                "failed": m.failed,
            }
            for m in report.measurements
        ],
        "summaries": [
            {
                "group": s.target.group,
                "padded": s.padded,
                "packed": s.packed,
                "both": s.both,
                "target": s.target.mean,
                "worst": s.worst.ratio,
                "worst_target": s.target.worst,
                "worst_case": s.worst.case.id,
                "cases": s.cases,
                "reached": s.reached,
            }
            for s in report.summaries()
        ],
        "memory": [
            {"id": p.case.id, "bytes_ours": p.ours, "bytes_torch": p.reference}
            for p in report.memory
        ],
        "costs": [{"name": c.name, "seconds": c.seconds, "target": c.target} for c in report.costs],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def save(report: Report, path: Path) -> tuple[Path, Path]:
    """Write the report beside ``path`` as ``.md`` and ``.json``; returns both paths."""
    markdown, data = path.with_suffix(".md"), path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(markdown, to_markdown(report))
    write(data, to_json(report))
    return markdown, data
