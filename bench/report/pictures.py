"""The pictures of cases, as PNG bytes; and what pictures of all kinds share.

Pictures are narrow, a panel per run below each other: they are read on a phone too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from bench.report.load import OURS, THEIRS, Case
from bench.turns import geometric_mean

WIDTH, DPI = 6.4, 150
# The provider that the overview shows beside ours.
PEER = "onnxruntime"
GREY = "#5F6368"
# Colours that colour-blind readers tell apart; shape and dashes do it on a grey print.
_STYLES = {
    OURS: ("#0B4F82", "o", "-"),
    THEIRS: ("#E69F00", "s", "--"),
    "onnxruntime": ("#009E73", "^", "-."),
    "loop": ("#CC79A7", "D", ":"),
    "torch.compile": ("#D55E00", "v", (0, (5, 1, 1, 1, 1, 1))),
    "triton_rnn:torchscript": ("#56B4E9", "P", (0, (8, 2))),
}
_OTHER_STYLES = (
    ("#000000", "X", (0, (1, 3))),
    ("#7F7F7F", "*", (0, (3, 3))),
    ("#8C6D31", "h", (0, (3, 1, 1, 3))),
    ("#6A3D9A", "<", (0, (6, 3, 1, 3))),
)
# A label per value fits below a panel up to this many values.
_MOST_TICKS = 14


def in_order(providers: Collection[str]) -> list[str]:
    """Ours first, then those that are known, then the others by name."""
    known = [name for name in _STYLES if name in providers]
    return known + sorted(set(providers) - set(known))


def styles(providers: Collection[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each provider."""
    others = iter(range(len(providers)))
    chosen = {}
    for name in in_order(providers):
        style = _STYLES.get(name) or _OTHER_STYLES[next(others) % len(_OTHER_STYLES)]
        chosen[name] = dict(zip(("color", "marker", "linestyle"), style, strict=True))
    return chosen


def plain(text: str, longest: int = 60) -> str:
    """Text that the font can draw and that is no formula, on one line."""
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    # A legend leaves out what begins with an underscore.
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")


def seconds_tick(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 0.999:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def panels(
    title: str, names: Sequence[str], height: float = 3.5, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A panel per run, below each other; named only where there are several."""
    # Figure and canvas by hand: pyplot would pick a window system and keep global state.
    figure = Figure(
        figsize=(WIDTH, 1.1 + height * len(names)), dpi=DPI, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(plain(title), fontsize=13)
    grid = figure.subplots(len(names), 1, squeeze=False, sharex=share, sharey=share)
    found = [row[0] for row in grid]
    for axes, name in zip(found, names, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DADCE0", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=10)
        if len(names) > 1:
            axes.set_title(plain(name), fontsize=11, loc="left")
    return figure, found


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the name of the software the bytes depend on the content alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def log_axis(axis: Axis, values: Iterable[float], text: Callable[[float], str]) -> None:
    """A logarithmic axis over the values, with few round ticks."""
    low, high = _range(values)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    _put_ticks(axis, _round_ticks(low, high), text)


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    low, high = min(known), max(known)
    room = max((high / low) ** 0.06, 1.1)
    return low / room, high * room


def _put_ticks(axis: Axis, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter([text(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _round_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return [low * (high / low) ** (part / 3) for part in range(4)] if len(ticks) < 3 else ticks


def value_ticks(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic axis with a tick at each value, less those that would touch another."""
    known = sorted(set(values))
    low, high = _range(known)
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    shown = known[-1:]
    for value in reversed(known[:-1]):
        if math.log(shown[-1] / value) > math.log(high / low) * 0.075:
            shown.append(value)
    _put_ticks(axis, shown[::-1], "{:g}".format)


def legend(figure: Figure, handles: Sequence[Line2D], columns: int = 3) -> None:
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=10,
        columnspacing=1.4,
    )


def _handles(names: Sequence[str], cases: Iterable[Case], lines: bool) -> list[Line2D]:
    chosen = styles(names)
    handles = []
    for name in names:
        style = chosen[name] if lines else {**chosen[name], "linestyle": "none"}
        handles.append(Line2D([], [], label=plain(name), markersize=6, **style))
    if len({case.form == "packed" for case in cases}) > 1:
        for label, fill in (("padded", GREY), ("packed", "white")):
            handles.append(
                Line2D(
                    [],
                    [],
                    label=label,
                    linestyle="none",
                    marker="o",
                    color=GREY,
                    markerfacecolor=fill,
                )
            )
    return handles


def _point(axes: Axes, x: float, y: float, case: Case, style: dict[str, Any]) -> None:
    axes.plot(
        [x],
        [y],
        marker=style["marker"],
        color=style["color"],
        markersize=5.5,
        markerfacecolor="white" if case.form == "packed" else style["color"],
        alpha=0.25 if case.is_disturbed else 0.8,
        zorder=2,
    )


Runs = Sequence[tuple[str, Sequence[Case]]]


def speed_ups(title: str, field: str, words: str, runs: Runs) -> bytes | None:
    """Ratios over torch.nn by one size of the cases; None where there are none."""
    cases = [case for _, chosen in runs for case in chosen]
    names = in_order(
        {n for c in cases for n, timing in c.timings.items() if timing.ratio and n != THEIRS}
    )
    if not names:
        return None
    values = sorted({getattr(case, field) for case in cases})
    chosen_styles = styles(names)
    figure, all_axes = panels(f"{title}: speed-up over torch.nn", [name for name, _ in runs])
    ratios = [c.ratio(n) for c in cases for n in names if c.ratio(n) is not None]
    for axes, (_, chosen) in zip(all_axes, runs, strict=True):
        axes.axhline(1.0, color="black", linewidth=1.0, zorder=1)
        for index, name in enumerate(names):
            # Side by side within the room of a value, so that providers do not hide each other.
            aside = (index - (len(names) - 1) / 2) * 0.62 / len(names)
            means = []
            for place, value in enumerate(values):
                here = [
                    (case, ratio)
                    for case in chosen
                    if getattr(case, field) == value and (ratio := case.ratio(name)) is not None
                ]
                for case, ratio in here:
                    _point(axes, place + aside, ratio, case, chosen_styles[name])
                if here:
                    means.append((place + aside, geometric_mean([ratio for _, ratio in here])))
            if means:
                line = {k: v for k, v in chosen_styles[name].items() if k != "marker"}
                axes.plot(*zip(*means, strict=True), linewidth=1.8, zorder=3, **line)
        axes.set_ylabel("torch.nn's time over this", fontsize=10.5)
        log_axis(axes.yaxis, [*ratios, 1.0], "{:.3g}".format)
        axes.set_xlim(-0.6, len(values) - 0.4)
        step = math.ceil(len(values) / _MOST_TICKS)
        axes.set_xticks(range(0, len(values), step), [str(value) for value in values[::step]])
    all_axes[-1].set_xlabel(words, fontsize=10.5)
    legend(figure, _handles(names, cases, lines=True))
    return to_png(figure)


def against_floor(title: str, runs: Runs) -> bytes | None:
    """Time per step against the floor; None where no case has a floor."""
    with_floor = [
        (name, [c for c in chosen if c.floor_seconds and c.timings]) for name, chosen in runs
    ]
    with_floor = [(name, chosen) for name, chosen in with_floor if chosen]
    if not with_floor:
        return None
    cases = [case for _, chosen in with_floor for case in chosen]
    names = in_order({name for case in cases for name in case.timings})
    chosen_styles = styles(names)
    figure, all_axes = panels(f"{title}: time per step", [name for name, _ in with_floor], 4.0)
    floors = [case.floor_seconds / _steps(case) for case in cases if case.floor_seconds]
    times = [t.seconds / _steps(case) for case in cases for t in case.timings.values()]
    for axes, (_, chosen) in zip(all_axes, with_floor, strict=True):
        ends = [min(floors) / 2, max(floors) * 2]
        axes.plot(ends, ends, color="black", linewidth=1.0, zorder=1)
        # Ours last, on top.
        for name in reversed(names):
            for case in chosen:
                timing = case.timings.get(name)
                if timing and case.floor_seconds:
                    x, y = case.floor_seconds / _steps(case), timing.seconds / _steps(case)
                    _point(axes, x, y, case, chosen_styles[name])
        log_axis(axes.xaxis, floors, seconds_tick)
        log_axis(axes.yaxis, [*times, min(floors)], seconds_tick)
        axes.set_ylabel("time per step and layer", fontsize=10.5)
    all_axes[-1].set_xlabel("floor per step and layer", fontsize=10.5)
    legend(figure, _handles(names, cases, lines=False))
    return to_png(figure)


def _steps(case: Case) -> int:
    return case.seq_len * case.layers


def overview(groups: Sequence[tuple[str, str, Sequence[Case]]]) -> bytes | None:
    """Every case's ratio over torch.nn, a row per group, ours and ONNX Runtime: which, not why.

    Args:
        groups: name of the group, name of the run, cases.
    """
    rows = [
        (name, [r for case in cases if (r := case.ratio()) is not None], cases)
        for name, _, cases in groups
    ]
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    figure, (axes,) = panels("Speed-up over torch.nn, a dot per case", [""], 0.55 * len(rows))
    shown: list[float] = [1.0]
    colours = styles([OURS, PEER])
    for place, (_, ours, cases) in enumerate(reversed(rows)):
        theirs = [r for case in cases if (r := case.ratio(PEER)) is not None]
        for ratios, name, shift in ((ours, OURS, 0.13), (theirs, PEER, -0.17)):
            if not ratios:
                continue
            shown += ratios
            colour = colours[name]["color"]
            y = place + (shift if theirs else 0.0)
            axes.plot(ratios, [y] * len(ratios), "o", color=colour, alpha=0.35, markersize=5, mew=0)
            axes.plot([geometric_mean(ratios)], [y], "|", color=colour, markersize=15, mew=2.5)
    axes.set_yticks(range(len(rows)), [plain(name) for name, *_ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(1.0, color="#3C4043", linewidth=1)
    log_axis(axes.xaxis, shown, lambda value: f"{value:g}x")
    names = [OURS, *([PEER] if any(c.ratio(PEER) for *_, cases in rows for c in cases) else [])]
    handles = [Line2D([], [], color=colours[n]["color"], marker="o", linestyle="") for n in names]
    axes.legend(handles, names, loc="lower right", frameon=False, fontsize=9)
    axes.set_xlabel("torch.nn's time over it; bars are geometric means", fontsize=10)
    return to_png(figure)
