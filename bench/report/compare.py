"""Means of a run, groups of cases, and what changed between two runs of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.report.load import OURS, Case, CasesRun, Quartiles
from bench.turns import geometric_mean

LEAST_CHANGE = 0.05
SAME_MACHINE = ("CPU", "cores", "threads", "system")
RULE = (
    "A change is marked only where it exceeds the noise: the quartile ranges of the two runs do "
    "not overlap, and the change is over 5%. Cases during which others used more than 10% of "
    "the machine, in either run, are never marked."
)


@dataclass(frozen=True)
class Group:
    """The cases that a section, a table and a line of the summary are about."""

    cell: str
    mode: str
    device: str
    dtype: str
    title: str

    def of(self, run: CasesRun) -> list[Case]:
        key = (self.cell, self.mode, self.device, self.dtype)
        return [c for c in run.cases if (c.cell, c.mode, c.device, c.dtype) == key]


def groups(runs: Sequence[CasesRun]) -> list[Group]:
    """Cell by mode, in the order of the files; device and dtype are named only if they differ."""
    keys = dict.fromkeys((c.cell, c.mode, c.device, c.dtype) for run in runs for c in run.cases)
    several = len({key[2:] for key in keys}) > 1
    return [
        Group(*key, title=f"{key[0]} {key[1]}" + (f", {key[2]} {key[3]}" if several else ""))
        for key in keys
    ]


def mean_ratio(cases: Iterable[Case], form: str | None = None) -> float | None:
    """Geometric mean of torch.nn's time over ours; None where no case has one."""
    ratios = [
        ratio for case in cases if form in (None, case.form) and (ratio := case.ratio()) is not None
    ]
    return geometric_mean(ratios) if ratios else None


def worst(cases: Iterable[Case]) -> Case | None:
    timed = [(ratio, case) for case in cases if (ratio := case.ratio()) is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def slower(cases: Iterable[Case]) -> list[Case]:
    """Cases in which ours is slower than torch.nn by more than the spread of the rounds."""
    return [
        case
        for case in cases
        if (ours := case.timings.get(OURS))
        and ours.ratio_quartiles is not None
        and ours.ratio_quartiles[1] < 1.0
    ]


@dataclass(frozen=True)
class Change:
    """One number of a case in two runs; ``marked`` if the change exceeds the noise."""

    before: float
    after: float
    marked: bool

    @property
    def relative(self) -> float:
        return self.after / self.before - 1.0


@dataclass(frozen=True)
class CaseChange:
    case: Case
    time: Change
    # None where torch.nn was not timed in both runs.
    ratio: Change | None
    disturbed: bool


@dataclass(frozen=True)
class Comparison:
    before: CasesRun
    after: CasesRun
    changes: list[CaseChange]
    # Ids of cases that one of the runs lacks, or in which ours failed.
    uncompared: list[str]


def exceeds_noise(
    before: float, after: float, spread_before: Quartiles, spread_after: Quartiles, disturbed: bool
) -> bool:
    """Whether a change is marked.

    It is where the quartile ranges of both runs do not overlap and the change is over 5%. A case
    during which others used more than a tenth of the machine, in either run, is never marked.
    """
    apart = spread_before[1] < spread_after[0] or spread_after[1] < spread_before[0]
    return not disturbed and apart and abs(after / before - 1.0) > LEAST_CHANGE


def comparisons(runs: Sequence[CasesRun]) -> list[Comparison]:
    """Every run beside the first one that was made on the same machine."""
    first: dict[tuple[str | None, ...], CasesRun] = {}
    found = []
    for run in runs:
        machine = tuple(run.machine.get(name) for name in SAME_MACHINE)
        # A machine that is not fully described cannot be known to be the same.
        if None in machine:
            continue
        if machine in first:
            found.append(_compare(first[machine], run))
        else:
            first[machine] = run
    return found


def _compare(before: CasesRun, after: CasesRun) -> Comparison:
    earlier = {case.id: case for case in before.cases}
    later = {case.id: case for case in after.cases}
    changes, uncompared = [], []
    for name in dict.fromkeys([*earlier, *later]):
        old, new = earlier.get(name), later.get(name)
        if old and new and OURS in old.timings and OURS in new.timings:
            changes.append(_change(old, new))
        else:
            uncompared.append(name)
    return Comparison(before, after, changes, uncompared)


def _change(old: Case, new: Case) -> CaseChange:
    disturbed = old.is_disturbed or new.is_disturbed
    a, b = old.timings[OURS], new.timings[OURS]
    time = Change(
        a.seconds,
        b.seconds,
        exceeds_noise(a.seconds, b.seconds, a.quartiles, b.quartiles, disturbed),
    )
    ratio = None
    if a.ratio is not None and b.ratio is not None:
        # Without a spread nothing is known of the noise, so nothing is marked.
        known = a.ratio_quartiles is not None and b.ratio_quartiles is not None
        marked = known and exceeds_noise(
            a.ratio, b.ratio, a.ratio_quartiles, b.ratio_quartiles, disturbed
        )
        ratio = Change(a.ratio, b.ratio, marked)
    return CaseChange(new, time, ratio, disturbed)
