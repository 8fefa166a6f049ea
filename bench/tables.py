"""The table of ratios that a run ends with, on the terminal and in files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.cases import CELLS, EXTRA_CELLS, Case, Size
from bench.paired import Pair, geometric_mean

COLUMNS = (
    ("inference", "padded"),
    ("inference", "packed"),
    ("training", "padded"),
    ("training", "packed"),
)


@dataclass(frozen=True)
class Target:
    """What is asked of a group of cases, over the whole grid, on two cores."""

    group: str
    mean: float | None
    worst: float
    contains: Callable[[Case], bool]


def _of(cell: str, mode: str) -> Callable[[Case], bool]:
    return lambda case: case.cell == cell and case.mode == mode


TARGETS = (
    Target("RNN inference", 2.0, 1.0, _of("rnn", "inference")),
    Target("RNN training", 2.2, 1.0, _of("rnn", "training")),
    Target("RNN relu inference", 2.0, 1.0, _of("rnn-relu", "inference")),
    Target("RNN relu training", 2.2, 1.0, _of("rnn-relu", "training")),
    Target("GRU inference", 1.6, 1.0, _of("gru", "inference")),
    Target("GRU training", 2.6, 1.0, _of("gru", "training")),
    Target("LSTM inference", 1.05, 0.97, _of("lstm", "inference")),
    Target("LSTM training", 1.05, 0.97, _of("lstm", "training")),
    Target("all cells training, packed", 2.0, 1.0, lambda case: case.training and case.packed),
)


# Of the machine, used by others during a measurement: beyond this, its ratio is marked.
QUIET_SHARE = 0.1
MARK = "?"


@dataclass(frozen=True)
class Measurement:
    case: Case
    pair: Pair

    @property
    def is_disturbed(self) -> bool:
        """Measured beside other work, so worth little."""
        return (self.pair.others_share or 0.0) > QUIET_SHARE

    @property
    def is_slower(self) -> bool:
        """Slower than torch.nn in most rounds, by more than the spread of the rounds."""
        return self.pair.ratio_quartiles[1] < 1.0


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
        return mean_held and self.worst.pair.ratio >= self.target.worst


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


@dataclass
class Report:
    """Everything measured in a session, in the order of measuring."""

    title: str
    complete: bool
    machine: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    memory: list[PeakMemory] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    # Ids of cases that the gate, or an error, kept from being timed.
    failed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.measurements or self.memory or self.costs)

    def cells(self) -> list[str]:
        present = {measurement.case.cell for measurement in self.measurements}
        return [cell for cell in CELLS + EXTRA_CELLS if cell in present]

    def sizes(self, cell: str) -> list[Size]:
        """Sizes measured for a cell, each once, in the order of measuring."""
        return list(dict.fromkeys(m.case.size for m in self.measurements if m.case.cell == cell))

    def find(self, cell: str, size: Size, mode: str, form: str) -> Measurement | None:
        case = Case(cell, mode == "training", form == "packed", size)
        return next((m for m in self.measurements if m.case == case), None)

    def summaries(self) -> list[Summary]:
        return [
            summarise(target, chosen)
            for target in TARGETS
            if (chosen := [m for m in self.measurements if target.contains(m.case)])
        ]

    def slower(self) -> list[Measurement]:
        found = [measurement for measurement in self.measurements if measurement.is_slower]
        return sorted(found, key=lambda measurement: measurement.pair.ratio)


def summarise(target: Target, measurements: Sequence[Measurement]) -> Summary:
    def mean(form: str | None) -> float | None:
        ratios = [m.pair.ratio for m in measurements if form is None or m.case.form == form]
        return geometric_mean(ratios) if ratios else None

    both = mean(None)
    assert both is not None
    worst = min(measurements, key=lambda measurement: measurement.pair.ratio)
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


def _ratio_table(report: Report, cell: str) -> Rows:
    """Ratio, quartiles of the rounds, and the time of ours."""
    rows = []
    for size in report.sizes(cell):
        row = [_size(size)]
        for mode, form in COLUMNS:
            found = report.find(cell, size, mode, form)
            if found is None:
                row.append("-")
                continue
            first, third = found.pair.ratio_quartiles
            seconds = _microseconds(statistics.median(found.pair.ours))
            mark = MARK if found.is_disturbed else ""
            row.append(f"{found.pair.ratio:.2f} ({first:.2f}-{third:.2f}) {seconds}{mark}")
        rows.append(row)
    header = [cell, *(f"{mode}, {form}" for mode, form in COLUMNS)]
    return f"{cell}: torch.nn's time over ours (quartiles), our time per call", header, rows


def _summary_table(report: Report) -> Rows:
    header = ["geometric means", "padded", "packed", "both", "target"]
    header += ["worst", "target", "worst case", "reached"]
    rows = []
    for summary in report.summaries():
        target = summary.target
        row = [target.group, _ratio(summary.padded), _ratio(summary.packed), _ratio(summary.both)]
        row += [_ratio(target.mean), _ratio(summary.worst.pair.ratio), _ratio(target.worst)]
        rows.append([*row, _place(summary.worst.case), _yes(summary.reached)])
    note = "" if report.complete else " (a selection: the targets are for the whole issue grid)"
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
    return "Costs once per process, ms", ["", "ours", "target", "reached"], rows


def tables(report: Report) -> list[Rows]:
    found = [_ratio_table(report, cell) for cell in report.cells()]
    if report.memory:
        found.append(_memory_table(report))
    if report.costs:
        found.append(_cost_table(report))
    if report.measurements:
        found.append(_summary_table(report))
    return found


def closing_lines(report: Report) -> list[str]:
    lines = []
    if report.failed:
        lines.append(f"Not timed, the gate or an error stopped them: {', '.join(report.failed)}")
    disturbed = [m for m in report.measurements if m.is_disturbed]
    if disturbed:
        lines.append(
            f"{len(disturbed)} of {len(report.measurements)} cases are marked {MARK}: others used "
            f"more than {QUIET_SHARE:.0%} of the machine meanwhile. Measure these again."
        )
    slower = report.slower()
    if slower:
        listed = ", ".join(f"{m.case.id} {m.pair.ratio:.2f}" for m in slower)
        lines.append(f"Slower than torch.nn beyond the spread of the rounds: {listed}")
    elif report.measurements:
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
        "title": report.title,
        "complete": report.complete,
        "machine": report.machine,
        "cases": [
            {
                "id": m.case.id,
                **m.case.as_dict(),
                "ratio": m.pair.ratio,
                "ratio_quartiles": m.pair.ratio_quartiles,
                "seconds_ours": statistics.median(m.pair.ours),
                "seconds_torch": statistics.median(m.pair.reference),
                "rounds": len(m.pair.ours),
                "calls_per_round": m.pair.calls_per_round,
                "others_share": m.pair.others_share,
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
                "worst": s.worst.pair.ratio,
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
        "failed": report.failed,
    }
    return json.dumps(content, indent=1) + "\n"


def save(report: Report, path: Path) -> tuple[Path, Path]:
    """Write the report beside ``path`` as ``.md`` and ``.json``; returns both paths."""
    markdown, data = path.with_suffix(".md"), path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text(to_markdown(report))
    data.write_text(to_json(report))
    return markdown, data
