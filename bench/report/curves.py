"""The pictures of growth, memory, first results and scaling, as PNG bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.report.load import Curve, Scaling
from bench.report.pictures import (
    GREY,
    legend,
    log_axis,
    panels,
    plain,
    seconds_tick,
    styles,
    to_png,
    value_ticks,
)

# Colour and marker by turn, of cells and of runs.
_TURNS = (
    ("#0B4F82", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#D55E00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
_DASHES = ("-", "--", "-.", ":")


def exponent(curve: Curve) -> str:
    """The fitted exponent with its error, as far as they are known."""
    if curve.exponent is None:
        return "-"
    # Two points lie on a line, so they say nothing of an error.
    known = curve.exponent_error is not None and len(curve.points) > 2
    error = "" if not known else f" ± {curve.exponent_error:.2f}"
    return f"{curve.exponent:.2f}{error}"


def growth(title: str, words: str, runs: Sequence[tuple[str, Sequence[Curve]]]) -> bytes:
    """Time by one size, log-log; the exponents are in the legend of each panel."""
    figure, all_axes = panels(title, [name for name, _ in runs], 3.9)
    curves = [curve for _, chosen in runs for curve in chosen]
    chosen_styles = styles({curve.provider for curve in curves})
    for axes, (_, chosen) in zip(all_axes, runs, strict=True):
        for curve in chosen:
            axes.plot(
                *zip(*curve.points, strict=True),
                label=f"{plain(curve.provider)}: exponent {exponent(curve)}",
                markersize=5.5,
                linewidth=1.6,
                **chosen_styles[curve.provider],
            )
        value_ticks(axes.xaxis, [x for curve in curves for x, _ in curve.points])
        log_axis(axes.yaxis, [y for curve in curves for _, y in curve.points], seconds_tick)
        axes.set_ylabel("time per call", fontsize=10.5)
        axes.set_xlabel(plain(words), fontsize=10.5)
        # Below the panel: curves of any slope keep all of it.
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=1 if len(chosen) < 2 else 2,
            frameon=False,
            fontsize=9.5,
            columnspacing=1.2,
        )
    return to_png(figure)


def memory(runs: Sequence[tuple[str, Sequence[tuple[str, float, float]]]]) -> bytes:
    """Ours over torch.nn's peak by torch.nn's, a shape per cell."""
    figure, all_axes = panels("Peak memory, ours over torch.nn's", [name for name, _ in runs], 3.2)
    peaks = [peak for _, chosen in runs for peak in chosen]
    # An id begins with its cell and mode: rnn-relu-training-padded-...
    cells = list(dict.fromkeys(_cell(name) for name, _, _ in peaks))
    turns = {cell: _TURNS[index % len(_TURNS)] for index, cell in enumerate(cells)}
    for axes, (_, chosen) in zip(all_axes, runs, strict=True):
        axes.axhline(1.0, color="black", linewidth=1.0, zorder=1)
        for name, ours, theirs in chosen:
            colour, marker = turns[_cell(name)]
            axes.plot([theirs / 2**20], [ours / theirs], marker=marker, color=colour, alpha=0.8)
        log_axis(axes.xaxis, [theirs / 2**20 for _, _, theirs in peaks], "{:g}".format)
        highest = max(ours / theirs for _, ours, theirs in peaks)
        top = 1.12 * max(1.0, highest)
        # So that a point at zero is whole.
        axes.set_ylim(-0.04 * top, top)
        axes.set_ylabel("ours over torch.nn's", fontsize=10.5)
    all_axes[-1].set_xlabel("torch.nn's peak, MiB", fontsize=10.5)
    handles = [
        Line2D(
            [], [], label=plain(cell), linestyle="none", color=turns[cell][0], marker=turns[cell][1]
        )
        for cell in cells
    ]
    legend(figure, handles, 4)
    return to_png(figure)


def _cell(name: str) -> str:
    for mode in ("-inference", "-training", "-step"):
        if mode in name:
            return name.split(mode)[0]
    return name.split("-")[0]


def first_results(runs: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> bytes:
    """Bars, a panel per run."""
    most = max(len(chosen) for _, chosen in runs)
    names = [name for name, _ in runs]
    figure, all_axes = panels("Time to the first result", names, 0.6 + 0.5 * most, share=False)
    longest = max(seconds for _, chosen in runs for _, seconds, _ in chosen)
    for axes, (_, chosen) in zip(all_axes, runs, strict=True):
        labels = [textwrap.fill(plain(name), 26) for name, _, _ in chosen]
        # By place, not by name: two bars may be called the same.
        places = range(len(chosen))
        bars = axes.barh(
            places, [seconds for _, seconds, _ in chosen], color="#0B4F82", height=0.62
        )
        axes.bar_label(bars, [seconds_tick(seconds) for _, seconds, _ in chosen], padding=4)
        axes.set_yticks(places, labels)
        axes.set_ylim(most - 0.4, -0.6)
        axes.set_xlim(0.0, 1.2 * longest)
        axes.grid(visible=False, axis="y")
    all_axes[-1].set_xlabel("seconds", fontsize=10.5)
    return to_png(figure)


def _series(runs: Sequence[Scaling]) -> list[tuple[str, list[Scaling]]]:
    """Lines of a run: one per mode, or per mode and threads where a mode has a count twice."""
    lines = []
    for mode in dict.fromkeys(one.mode for one in runs):
        own = sorted((one for one in runs if one.mode == mode), key=lambda one: one.processes)
        threads = sorted({one.threads_per_process for one in own})
        if len({one.processes for one in own}) == len(own) or len(threads) == 1:
            lines.append((mode, own))
        else:
            for count in threads:
                chosen = [one for one in own if one.threads_per_process == count]
                lines.append((f"{mode}, {count} threads each", chosen))
    return lines


def scaling(runs: Sequence[tuple[str, Sequence[Scaling]]]) -> bytes:
    """Samples per second above, efficiency below; a line per run and mode."""
    figure, (above, below) = panels("Scaling over processes", ["", ""], 3.0, share=False)
    everything = [one for _, chosen in runs for one in chosen]
    handles = []
    for index, (name, chosen) in enumerate(runs):
        for turn, (mode, line) in enumerate(_series(chosen)):
            # By turns over all lines, so that modes of one run differ in colour too.
            colour, marker = _TURNS[(3 * index + turn) % len(_TURNS)]
            dashes = _DASHES[turn % len(_DASHES)]
            style = {"color": colour, "marker": marker, "linestyle": dashes}
            x = [one.processes for one in line]
            above.plot(x, [one.samples_per_second for one in line], **style)
            below.plot(x, [one.efficiency for one in line], **style)
            label = plain(f"{name}: {mode}" if len(runs) > 1 else mode)
            handles.append(Line2D([], [], label=label, **style))
            first = line[0].samples_per_second / line[0].processes
            above.plot(x, [first * count for count in x], color=GREY, linestyle=":", zorder=1)
    handles.append(Line2D([], [], label="ideal", color=GREY, linestyle=":"))
    _finish_scaling(above, below, everything)
    legend(figure, handles, 3 if len(runs) == 1 else 2)
    return to_png(figure)


def _finish_scaling(above: Axes, below: Axes, everything: Sequence[Scaling]) -> None:
    for axes in (above, below):
        value_ticks(axes.xaxis, [one.processes for one in everything])
    above.set_ylim(bottom=0.0)
    above.set_ylabel("samples per second", fontsize=10.5)
    below.axhline(1.0, color=GREY, linestyle=":", zorder=1)
    below.set_ylim(0.0, 1.12 * max(1.0, *(one.efficiency for one in everything)))
    below.set_ylabel("efficiency", fontsize=10.5)
    below.set_xlabel("processes", fontsize=10.5)
