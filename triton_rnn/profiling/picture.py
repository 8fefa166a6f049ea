"""The timeline of one call and its backward, as a PNG."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from triton_rnn.profiling import ranges
from triton_rnn.profiling.session import Span

# Colours that colour-blind readers tell apart, by the last word of a phase's name.
_COLOURS = {
    "projection": "#56B4E9",
    "recurrence": "#0B4F82",
    "weights": "#E69F00",
    "native": "#CC79A7",
    "torch": "#009E73",
    "reference": "#999999",
}


def last_step(spans: Sequence[Span]) -> list[Span]:
    """The phases from the last call of a module on; its backward, if there is one, follows it."""
    calls = [span for span in spans if "[" not in span.name]
    start = max((call.start for call in calls), default=0.0)
    return sorted(
        (span for span in spans if "[" in span.name and span.start >= start),
        key=lambda span: span.start,
    )


def timeline(spans: Sequence[Span], title: str = "") -> bytes:
    """Rows by phase, layer and direction; time from the call's begin on."""
    shown = last_step(spans)
    rows: dict[str, list[Span]] = {}
    for span in shown:
        rows.setdefault(span.name.removeprefix(ranges.PREFIX), []).append(span)
    height = 1.6 + 0.32 * max(len(rows), 1)
    figure = Figure(figsize=(11.0, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    origin = min((span.start for span in shown), default=0.0)
    length = max((span.end for span in shown), default=0.0) - origin
    unit, scale = ("ms", 1e3) if length >= 1e-3 else ("us", 1e6)
    for index, (name, bars) in enumerate(rows.items()):
        kind = name.partition("[")[0].rpartition(".")[2]
        axes.broken_barh(
            [(scale * (bar.start - origin), scale * (bar.end - bar.start)) for bar in bars],
            (index - 0.38, 0.76),
            facecolors=_COLOURS.get(kind, "#999999"),
        )
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, scale * length or 1.0)
    axes.set_xlabel(f"time from the first phase on, {unit}; gaps are around and between the phases")
    axes.grid(axis="x", color="#DADCE0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    present = {name.partition("[")[0].rpartition(".")[2] for name in rows}
    handles = [Patch(color=colour, label=k) for k, colour in _COLOURS.items() if k in present]
    if handles:
        axes.legend(
            handles=handles,
            frameon=False,
            ncols=len(handles),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            fontsize=8,
        )
    if title:
        figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
