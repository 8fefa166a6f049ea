"""The content of a report, once for Markdown and the page: headings, text, tables, pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.report import curves, pictures
from bench.report.compare import (
    RULE,
    Change,
    Comparison,
    Group,
    comparisons,
    groups,
    mean_ratio,
    slower,
    worst,
)
from bench.report.load import OURS, THEIRS, Case, CasesRun, GrowthRun, Run, ScalingRun

TITLE = "Benchmark report"
DISTURBED = "?"
NONE = "-"


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Listing:
    items: list[str]


@dataclass(frozen=True)
class Table:
    caption: str
    header: list[str]
    rows: list[list[str]]
    # Columns that hold words; the others are numbers, which align at the right.
    text: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Picture:
    name: str
    png: bytes
    alt: str
    caption: str


Block = Paragraph | Listing | Table | Picture


@dataclass
class Section:
    title: str
    level: int = 2
    anchor: str = ""
    blocks: list[Block] = field(default_factory=list)


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def build(runs: Sequence[Run]) -> list[Section]:
    """All sections of the report, in order; anchors and names of pictures are unique."""
    cases = [run for run in runs if isinstance(run, CasesRun)]
    growth = [run for run in runs if isinstance(run, GrowthRun)]
    scaling = [run for run in runs if isinstance(run, ScalingRun)]
    sections = [_summary(runs, cases), _machines(runs)]
    sections += [_group(group, cases) for group in groups(cases)]
    sections += [*_memory(cases), *_totals(cases)]
    sections += [_comparison(comparison) for comparison in comparisons(cases)]
    sections += [*_growth(growth), *_first_results(growth), *_scaling(scaling)]
    _name(sections)
    return sections


def _name(sections: list[Section]) -> None:
    taken: set[str] = set()

    def unique(text: str) -> str:
        # The names of a file's cells and modes become file names, so only plain letters are left.
        stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "part"
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        return name

    for section in sections:
        section.anchor = unique(section.title)
        section.blocks = [
            Picture(f"{unique(block.name)}.png", block.png, block.alt, block.caption)
            if isinstance(block, Picture)
            else block
            for block in section.blocks
        ]


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _summary(runs: Sequence[Run], cases: Sequence[CasesRun]) -> Section:
    section = Section("Summary")
    items = []
    for run in runs:
        cpu = run.machine.get("CPU", "unknown processor")
        cores = run.machine.get("cores", "?")
        threads = run.machine.get("threads", "?")
        place = f"{cpu}; {cores} cores, {threads} threads; {run.machine.get('date', 'no date')}"
        items.append(f"{run.name}: {_content(run)} ({place})")
    section.blocks.append(Listing(items))
    header = ["cell and mode", *(["run"] if len(cases) > 1 else [])]
    words = frozenset({*range(len(header)), len(header) + 4})
    header += ["padded", "packed", "all", "worst", "worst case", "cases", "slower", "disturbed"]
    header += ["failed"]
    rows = []
    for group in groups(cases):
        for run in cases:
            chosen = group.of(run)
            if not chosen:
                continue
            lowest = worst(chosen)
            rows.append(
                [
                    group.title,
                    *([run.name] if len(cases) > 1 else []),
                    *(_ratio(mean_ratio(chosen, form)) for form in ("padded", "packed", None)),
                    _ratio(lowest.ratio() if lowest else None),
                    f"{lowest.form} {lowest.size}" if lowest else NONE,
                    str(len(chosen)),
                    str(len(slower(chosen))),
                    str(sum(case.is_disturbed for case in chosen)),
                    str(sum(bool(case.failed) for case in chosen)),
                ]
            )
    if rows:
        caption = (
            "Geometric means of torch.nn's time over ours: above 1, triton_rnn is faster. Slower: "
            "cases below 1 by more than the spread of the rounds. Disturbed: others used more "
            "than 10% of the machine; such cases are in the means."
        )
        section.blocks.append(Table(caption, header, rows, words))
    named = [
        (f"{_prefix(run, cases)}{group.title}", run.name, group.of(run))
        for group in groups(cases)
        for run in cases
    ]
    if png := pictures.overview(named):
        alt = "Speed-up over torch.nn of every case, by cell and mode"
        text = f"{alt}. Right of the line is faster than torch.nn."
        section.blocks.append(Picture("overview", png, alt, text))
    return section


def _content(run: Run) -> str:
    if isinstance(run, CasesRun):
        part = "" if run.complete else ", not complete"
        quick = ", quick: fewer rounds" if run.quick else ""
        return f"{run.title}, {len(run.cases)} cases{part}{quick}"
    if isinstance(run, GrowthRun):
        return f"growth, {len(run.curves)} curves, {len(run.first_results)} first results"
    if isinstance(run, ScalingRun):
        return f"scaling over processes, {len(run.runs)} runs"
    raise TypeError(type(run).__name__)


def _machines(runs: Sequence[Run]) -> Section:
    names = dict.fromkeys(name for run in runs for name in run.machine)
    rows = [[name, *(run.machine.get(name, NONE) for run in runs)] for name in names]
    for ceiling in dict.fromkeys(k for r in runs if isinstance(r, CasesRun) for k in r.ceilings):
        rows.append([f"ceiling {ceiling}", *(_ceiling(run, ceiling) for run in runs)])
    header = ["", *(run.name for run in runs)]
    table = Table("What the numbers depend on", header, rows, frozenset(range(len(header))))
    return Section("Machine", blocks=[table] if rows else [])


def _ceiling(run: Run, name: str) -> str:
    if not isinstance(run, CasesRun) or name not in run.ceilings:
        return NONE
    flops, rate = run.ceilings[name]
    parts = [f"{flops / 1e9:.3g} GFLOP/s"] if flops else []
    return ", ".join([*parts, *([f"{rate / 1e9:.3g} GB/s"] if rate else [])]) or NONE


def _providers(cases: Sequence[Case]) -> list[str]:
    names = {name for case in cases for name in (*case.timings, *case.failed)} - {THEIRS}
    return pictures.in_order(names)


def _group(group: Group, runs: Sequence[CasesRun]) -> Section:
    chosen = [(run, cases) for run in runs if (cases := group.of(run))]
    header, columns = ["size", "form"], []
    for run, cases in chosen:
        before = _prefix(run, runs)
        found = {(case.size, case.form): case for case in cases}
        providers = _providers(cases)
        header += [f"{before}{provider}" for provider in providers] + [f"{before}our time"]
        columns.append((found, providers))
    rows = []
    for size, form in dict.fromkeys((c.size, c.form) for _, cases in chosen for c in cases):
        row = [size, form]
        for found, providers in columns:
            row += _cells(found.get((size, form)), providers)
        rows.append(row)
    caption = (
        f"{group.title}: torch.nn's time over each provider's (triton_rnn with quartiles), and "
        f"our time per call; {DISTURBED} marks cases during which others used the machine"
    )
    section = Section(group.title, blocks=[Table(caption, header, rows, frozenset({0, 1}))])
    failures = [
        f"{_prefix(run, runs)}{case.form} {case.size}, {provider} failed: {message}"
        for run, cases in chosen
        for case in cases
        for provider, message in case.failed.items()
    ]
    if failures:
        section.blocks += [Paragraph("Not timed:"), Listing(failures)]
    panels = [(run.name, cases) for run, cases in chosen]
    for axis, words in (("hidden_size", "hidden size"), ("batch", "batch")):
        if png := pictures.speed_ups(group.title, axis, words, panels):
            alt = f"{group.title}: speed-up over torch.nn by {words}"
            text = f"{alt}. A point per case, lines through geometric means; pale points are "
            text += "disturbed cases. Above 1 is faster than torch.nn."
            section.blocks.append(Picture(f"{group.title} by {words}", png, alt, text))
    if png := pictures.against_floor(group.title, panels):
        alt = f"{group.title}: time per step against the floor"
        text = f"{alt}, both divided by steps and layers. The line is where time equals floor."
        section.blocks.append(Picture(f"{group.title} floor", png, alt, text))
    return section


def _cells(case: Case | None, providers: Sequence[str]) -> list[str]:
    if case is None:
        return [NONE] * (len(providers) + 1)
    cells = []
    mark = f" {DISTURBED}" if case.is_disturbed else ""
    for provider in providers:
        timing = case.timings.get(provider)
        if timing is None or timing.ratio is None:
            cells.append("failed" if provider in case.failed else NONE)
            continue
        spread = timing.ratio_quartiles if provider == OURS else None
        quartiles = f" ({spread[0]:.2f}-{spread[1]:.2f})" if spread else ""
        cells.append(f"{timing.ratio:.2f}{quartiles}{mark}")
    ours = case.timings.get(OURS)
    cells.append(f"{seconds_text(ours.seconds)}{mark}" if ours else NONE)
    return cells


def _peaks(run: CasesRun) -> list[tuple[str, float, float]]:
    """Measured peaks: those of the run's own list, and those of its cases."""
    peaks = {name: (name, ours, theirs) for name, ours, theirs in run.memory}
    for case in run.cases:
        ours, theirs = case.timings.get(OURS), case.timings.get(THEIRS)
        if ours and theirs and ours.peak_bytes and theirs.peak_bytes:
            peaks.setdefault(case.id, (case.id, ours.peak_bytes, theirs.peak_bytes))
    return list(peaks.values())


def _memory(runs: Sequence[CasesRun]) -> list[Section]:
    found = [(run, peaks) for run in runs if (peaks := _peaks(run))]
    if not found:
        return []
    header = ["case"]
    for run, _ in found:
        before = _prefix(run, runs)
        header += [f"{before}torch.nn, MiB", f"{before}ours, MiB", f"{before}ours/torch.nn"]
    by_name = [{name: (ours, theirs) for name, ours, theirs in peaks} for _, peaks in found]
    rows = []
    for name in dict.fromkeys(name for peaks in by_name for name in peaks):
        row = [name]
        for peaks in by_name:
            if name in peaks:
                ours, theirs = peaks[name]
                row += [f"{theirs / 2**20:.1f}", f"{ours / 2**20:.1f}", f"{ours / theirs:.2f}"]
            else:
                row += [NONE] * 3
        rows.append(row)
    png = curves.memory([(run.name, peaks) for run, peaks in found])
    alt = "Peak memory, ours over torch.nn's"
    text = f"{alt}, by torch.nn's peak. Below 1, triton_rnn needs less."
    blocks = [Table(f"{alt}, a row per case", header, rows), Picture("peak memory", png, alt, text)]
    return [Section("Peak memory", blocks=blocks)]


def _totals(runs: Sequence[CasesRun]) -> list[Section]:
    targets, costs = Section("Targets"), Section("Costs once per process")
    for run in runs:
        before = _prefix(run, runs)
        if run.summaries:
            header = ["group", "padded", "packed", "both", "target", "worst", "target of worst"]
            rows = [
                [
                    summary.group,
                    *map(_ratio, (summary.padded, summary.packed, summary.both, summary.target)),
                    *map(_ratio, (summary.worst, summary.worst_target)),
                    summary.worst_case,
                    "yes" if summary.reached else "no",
                ]
                for summary in run.summaries
            ]
            header += ["worst case", "reached"]
            note = "" if run.complete else " (not complete: the targets are for all cases)"
            caption = f"{before}geometric means beside their targets{note}"
            targets.blocks.append(Table(caption, header, rows, frozenset({0, 7, 8})))
        if run.costs:
            rows = [
                [
                    name,
                    seconds_text(seconds),
                    NONE if target is None else seconds_text(target),
                    NONE if target is None else "yes" if seconds <= target else "no",
                ]
                for name, seconds, target in run.costs
            ]
            header = ["cost", "ours", "target", "reached"]
            caption = f"{before}costs beside their targets"
            costs.blocks.append(Table(caption, header, rows, frozenset({0, 3})))
    return [section for section in (targets, costs) if section.blocks]


def _comparison(found: Comparison) -> Section:
    old, new = found.before.name, found.after.name
    times = [change.time for change in found.changes]
    ratios = [change.ratio for change in found.changes if change.ratio]
    text = (
        f"Of {len(times)} cases in both runs, our time is marked faster in "
        f"{_marks(times, -1)} and slower in {_marks(times, 1)}; our ratio over torch.nn is "
        f"marked better in {_marks(ratios, 1)} and worse in {_marks(ratios, -1)}."
    )
    header = ["case", f"{old}: our time", f"{new}: our time", "change", "time"]
    header += [f"{old}: ratio", f"{new}: ratio", "change", "ratio"]
    rows = []
    for change in found.changes:
        note = f" {DISTURBED}" if change.disturbed else ""
        time, ratio = change.time, change.ratio
        row = [f"{change.case.id}{note}", seconds_text(time.before), seconds_text(time.after)]
        row += [f"{time.relative:+.1%}", _verdict(time, "faster", "slower")]
        if ratio is None:
            row += [NONE] * 4
        else:
            row += [_ratio(ratio.before), _ratio(ratio.after), f"{ratio.relative:+.1%}"]
            row.append(_verdict(ratio, "worse", "better"))
        rows.append(row)
    blocks: list[Block] = [Paragraph(RULE), Paragraph(text)]
    caption = f"Change from {old} to {new}, a row per case; {DISTURBED} marks disturbed cases"
    blocks.append(Table(caption, header, rows, frozenset({0, 4, 8})))
    if found.uncompared:
        names = ", ".join(found.uncompared)
        blocks.append(Paragraph(f"Not in both runs, or failed in one: {names}"))
    return Section(f"Comparison of {old} and {new}", blocks=blocks)


def _marks(changes: Sequence[Change], sign: int) -> int:
    return sum(change.marked and change.relative * sign > 0 for change in changes)


def _verdict(change: Change, less: str, more: str) -> str:
    if not change.marked:
        return ""
    return less if change.relative < 0 else more


def _growth(runs: Sequence[GrowthRun]) -> list[Section]:
    sections = []
    all_curves = [curve for run in runs for curve in run.curves]
    for mode, axis in dict.fromkeys((curve.mode, curve.axis) for curve in all_curves):
        words = axis.replace("_", " ")
        section = Section(f"Growth with {words}, {mode}")
        rows = []
        chosen = [curve for curve in all_curves if (curve.mode, curve.axis) == (mode, axis)]
        for cell, base in dict.fromkeys((curve.cell, curve.base) for curve in chosen):
            panels = []
            for run in runs:
                own = [c for c in run.curves if c in chosen and (c.cell, c.base) == (cell, base)]
                if own:
                    panels.append((run.name, own))
                for c in own:
                    name = f"{_prefix(run, runs)}{cell} {base}".strip()
                    sample = f"{seconds_text(c.points[0][1])} to {seconds_text(c.points[-1][1])}"
                    ends = f"{c.points[0][0]:g} to {c.points[-1][0]:g}"
                    last = NONE if c.exponent_last is None else f"{c.exponent_last:.2f}"
                    rows.append([name, c.provider, ends, sample, curves.exponent(c), last])
            title = f"{cell} {mode}, {base}".rstrip(", ")
            png = curves.growth(title, words, panels)
            alt = f"{title}: time by {words}"
            text = f"{alt}, both axes logarithmic; the exponent is the slope of a fitted line."
            section.blocks.append(Picture(f"{cell} {mode} by {words} growth", png, alt, text))
        header = ["curve", "provider", words, "time", "exponent", "last exponent"]
        caption = f"{mode}: time grows as {words} to the power of the exponent"
        section.blocks.insert(0, Table(caption, header, rows, frozenset({0, 1})))
        sections.append(section)
    return sections


def _first_results(runs: Sequence[GrowthRun]) -> list[Section]:
    found = [run for run in runs if run.first_results]
    if not found:
        return []
    rows = [
        [f"{_prefix(run, found)}{name}", seconds_text(seconds), note]
        for run in found
        for name, seconds, note in run.first_results
    ]
    png = curves.first_results([(run.name, run.first_results) for run in found])
    alt = "Time to the first result"
    table = Table(alt, ["what", "time", "note"], rows, frozenset({0, 2}))
    blocks = [table, Picture("first results", png, alt, f"{alt}, as bars.")]
    return [Section("Time to the first result", blocks=blocks)]


def _scaling(runs: Sequence[ScalingRun]) -> list[Section]:
    found = [run for run in runs if run.runs]
    if not found:
        return []
    rows = [
        [
            f"{_prefix(run, found)}{one.mode}",
            str(one.processes),
            str(one.threads_per_process),
            f"{one.samples_per_second:.4g}",
            seconds_text(one.seconds_per_step),
            f"{one.efficiency:.1%}",
        ]
        for run in found
        for one in run.runs
    ]
    header = ["mode", "processes", "threads of each", "samples/s", "time per step", "efficiency"]
    png = curves.scaling([(run.name, run.runs) for run in found])
    alt = "Samples per second and efficiency by number of processes"
    blocks = [Table("Training in several processes", header, rows)]
    text = f"{alt}; dotted: as many times the samples as processes."
    return [Section("Scaling over processes", blocks=[*blocks, Picture("scaling", png, alt, text)])]
