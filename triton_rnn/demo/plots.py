"""The pictures of a demo run, as PNG bytes."""

import io
import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from triton_rnn.demo.series import Forecast
from triton_rnn.demo.training import OURS, THEIRS, Comparison

# Light orange and dark blue: colour-blind readers tell them apart, and so does a grey print.
_COLOURS = {THEIRS: "#E69F00", OURS: "#0B4F82"}
_GREY = "#5F6368"
# Two lines that lie on each other are both seen when the lower one is wide and pale.
_LINES = {
    THEIRS: {"linewidth": 6.0, "alpha": 0.55, "solid_capstyle": "round"},
    OURS: {"linewidth": 1.3, "alpha": 1.0},
}
_SHARE_OF_STEPS_SHOWN = 0.95
_MEDIANS_SHOWN = 3
_BINS = 48


def text_picture(comparison: Comparison, title: str) -> bytes:
    """Loss curves on the left, step times on the right."""
    figure, (left, right) = _two_panels(title)
    _loss_curves(left, comparison)
    _step_times(right, comparison)
    return _png(figure)


def series_picture(comparison: Comparison, forecast: Forecast, title: str) -> bytes:
    """Forecasts and truth of the validation years on the left, step times on the right."""
    figure, (left, right) = _two_panels(title)
    left.plot(
        forecast.years,
        forecast.truth,
        linestyle="none",
        marker="o",
        markersize=4.5,
        markerfacecolor="white",
        markeredgecolor="black",
        label="observed",
        zorder=3,
    )
    for name in (THEIRS, OURS):
        label = f"{name}, RMSE {forecast.rmse[name]:.1f}"
        left.plot(
            forecast.years,
            forecast.forecasts[name],
            color=_COLOURS[name],
            label=label,
            **_LINES[name],  # type: ignore[arg-type]  # matplotlib's stubs name no TypedDict
        )
    left.plot(
        forecast.years,
        forecast.forecasts["last value"],
        color=_GREY,
        linewidth=1.0,
        linestyle=":",
        label=f"last value, RMSE {forecast.rmse['last value']:.1f}",
        zorder=1,
    )
    left.set_title("Forecast one year ahead, years not trained on")
    left.set_xlabel("year")
    left.set_ylabel("yearly mean sunspot number")
    # Room above the highest cycle, so that the legend covers no data.
    highest = max(max(values) for values in (forecast.truth, *forecast.forecasts.values()))
    left.set_ylim(top=1.32 * highest)
    left.legend(frameon=False, ncols=2, loc="upper left")
    _step_times(right, comparison)
    return _png(figure)


def _two_panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    # Figure and canvas by hand: pyplot would pick a window system and keep global state.
    figure = Figure(figsize=(12.0, 4.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DADCE0", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, (left, right)


def _loss_curves(axes: Axes, comparison: Comparison) -> None:
    for name in (THEIRS, OURS):
        losses = comparison.losses[name]
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            color=_COLOURS[name],
            label=f"{name}, last {losses[-1]:.4f}",
            **_LINES[name],  # type: ignore[arg-type]  # matplotlib's stubs name no TypedDict
        )
    axes.set_title(f"Loss: largest difference {comparison.difference_text}")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("cross-entropy (nats per character)")
    axes.legend(frameon=False, loc="upper right")


def _step_times(axes: Axes, comparison: Comparison) -> None:
    times = {
        name: [1000 * seconds for seconds in comparison.seconds[name]] for name in (THEIRS, OURS)
    }
    # A step that the system interrupted may take ten times as long; it would squeeze the rest.
    pooled = sorted(time for values in times.values() for time in values)
    shown = pooled[math.ceil(_SHARE_OF_STEPS_SHOWN * len(pooled)) - 1]
    medians = {name: 1000 * seconds for name, seconds in comparison.median_seconds.items()}
    slower = max(medians.values())
    left, right = 0.95 * pooled[0], 1.05 * max(slower, min(shown, _MEDIANS_SHOWN * slower))
    width = (right - left) / _BINS
    edges = [left + width * index for index in range(_BINS + 1)]
    for name, values in times.items():
        label = f"{name}, median {medians[name]:.2f} ms"
        colour = _COLOURS[name]
        axes.hist(values, bins=edges, color=colour, alpha=0.45)
        axes.hist(values, bins=edges, color=colour, histtype="step", linewidth=1.4)
        axes.axvline(
            medians[name], ymax=0.78, color=colour, linewidth=2.0, linestyle="--", label=label
        )
    # Room above the bars, so that the legend covers nothing.
    axes.set_ylim(top=1.28 * axes.get_ylim()[1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right")
    axes.set_xlim(left, right)
    hidden = sum(time > right for time in pooled)
    beyond = f" ({hidden} of {len(pooled)} took longer than shown)" if hidden else ""
    axes.set_title(f"Training step: triton_rnn {comparison.speed_text}")
    axes.set_xlabel(f"time of a step, ms{beyond}")
    axes.set_ylabel("number of steps")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
