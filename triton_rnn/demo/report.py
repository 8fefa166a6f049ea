"""Runs a demo: progress while it works, then the table, the text and the two files."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text

from triton_rnn.demo import distributed, plots
from triton_rnn.demo.series import SeriesJob
from triton_rnn.demo.settings import DemoError, Settings
from triton_rnn.demo.text import TextJob
from triton_rnn.demo.training import (
    NAMES,
    OURS,
    ROUNDING,
    THEIRS,
    Comparison,
    Progress,
    run_pair,
)
from triton_rnn.version import __version__

_SECONDS_BETWEEN_REFRESHES = 0.1


def run(settings: Settings) -> None:
    """Run the demo that ``settings`` names and write its PNG and JSON into ``settings.out``.

    Raises:
        DemoError: the request or the run is at fault; nothing was written.
    """
    # highlight would colour every number of the generated text and the paths.
    console = Console(highlight=False, quiet=not distributed.is_first())
    with distributed.group(settings):
        if settings.demo == "text":
            _run_text(settings, console)
        else:
            _run_series(settings, console)


def _run_text(settings: Settings, console: Console) -> None:
    job = TextJob(settings)
    console.print(
        f"Text: prose of Python's manual (pydoc_data.topics), {len(job.text):,} characters"
    )
    comparison = _train(
        settings, console, lambda told: run_pair(settings, job.build, job.batch_at, job.loss, told)
    )
    if not distributed.is_first():
        return
    sample = job.sample(comparison)
    table = _table(settings, comparison)
    per_step = settings.batch * settings.seq_len
    rates = {name: per_step / comparison.median_seconds[name] for name in NAMES}
    table.add_row("characters per second", f"{rates[THEIRS]:,.0f}", f"{rates[OURS]:,.0f}", "")
    console.print(table)
    title = "triton_rnn's model writes"
    console.print(Panel(Text(sample), title=title, title_align="left", width=_width(console)))
    picture = plots.text_picture(comparison, f"Character model, {_describe(settings)}")
    extra = {"characters": len(job.text), "alphabet": "".join(job.alphabet), "sample": sample}
    _write(settings, console, picture, _numbers(settings, comparison) | extra)


def _run_series(settings: Settings, console: Console) -> None:
    job = SeriesJob(settings)
    years, split = job.years, job.split
    console.print(
        f"Series: yearly sunspot numbers (NOAA), each from the {settings.seq_len} before it;"
        f"\ntrained on {years[0]}-{years[split - 1]}, validated on {years[split]}-{years[-1]}"
    )
    comparison = _train(
        settings, console, lambda told: run_pair(settings, job.build, job.batch_at, job.loss, told)
    )
    if not distributed.is_first():
        return
    forecast = job.forecast(comparison)
    table = _table(settings, comparison)
    rmse = forecast.rmse
    table.add_row(
        "forecast RMSE, sunspots",
        f"{rmse[THEIRS]:.2f}",
        f"{rmse[OURS]:.2f}",
        f"last value: {rmse['last value']:.2f}",
    )
    console.print(table)
    picture = plots.series_picture(comparison, forecast, f"Sunspots, {_describe(settings)}")
    extra = {
        "years": forecast.years,
        "truth": forecast.truth,
        "forecasts": forecast.forecasts,
        "rmse": rmse,
    }
    _write(settings, console, picture, _numbers(settings, comparison) | extra)


def _train(
    settings: Settings,
    console: Console,
    train: Callable[[Callable[[Progress], None]], Comparison],
) -> Comparison:
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[live]}"),
    )
    # Drawn by hand between steps: rich's own thread would draw in the middle of a timed step.
    with ProgressBars(*columns, console=console, auto_refresh=False) as bars:
        tasks = {
            name: bars.add_task(name, total=settings.steps, live="warming up") for name in NAMES
        }
        drawn_at = 0.0

        def told(progress: Progress) -> None:
            nonlocal drawn_at
            bars.update(
                tasks[progress.name],
                completed=progress.step,
                live=f"loss {progress.loss:.4f}, {1000 * progress.seconds:.2f} ms a step",
            )
            if time.monotonic() - drawn_at > _SECONDS_BETWEEN_REFRESHES:
                bars.refresh()
                drawn_at = time.monotonic()

        return train(told)


def _describe(settings: Settings) -> str:
    layers = f"{settings.layers} layer" + ("s" if settings.layers > 1 else "")
    cell = settings.cell.replace("-", " ").upper()
    over = f" over {distributed.processes()} processes" if distributed.processes() > 1 else ""
    return (
        f"{cell}, {layers}, hidden {settings.hidden}, batch {settings.batch}{over},"
        f" sequence length {settings.seq_len}, {settings.device.type.upper()}"
    )


def _width(console: Console) -> int:
    # Wider lines than these are hard to read.
    return min(console.width, 100)


def _table(settings: Settings, comparison: Comparison) -> Table:
    apart = comparison.first_step_apart
    # Training amplifies every rounding error, so a long run ends in losses that are seen to differ.
    caption = apart and f"equal to rounding ({ROUNDING:.0e}) up to step {apart - 1}, then it grows"
    table = Table(
        title=_describe(settings),
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
    )
    table.add_column("")
    table.add_column(THEIRS, justify="right")
    table.add_column(OURS, justify="right")
    table.add_column("compared")
    same = "identical" if comparison.same_initial_weights else "DIFFERENT"
    table.add_row("initial weights", "", "", same)
    losses = comparison.losses
    for label, step in (("loss, first step", 0), ("loss, last step", -1)):
        table.add_row(label, f"{losses[THEIRS][step]:.6f}", f"{losses[OURS][step]:.6f}", "")
    table.add_row("largest loss difference", "", "", comparison.difference_text)
    median = {name: 1000 * seconds for name, seconds in comparison.median_seconds.items()}
    table.add_row(
        "time per step, median",
        f"{median[THEIRS]:.2f} ms",
        f"{median[OURS]:.2f} ms",
        comparison.speed_text,
    )
    table.add_row("backend", "torch's own", comparison.backend, "")
    return table


def _numbers(settings: Settings, comparison: Comparison) -> dict[str, Any]:
    return {
        "demo": settings.demo,
        "versions": {"torch": torch.__version__, "triton_rnn": __version__},
        "cell": settings.cell,
        "hidden": settings.hidden,
        "layers": settings.layers,
        "steps": settings.steps,
        "batch": settings.batch,
        "seq_len": settings.seq_len,
        "lr": settings.lr,
        "seed": settings.seed,
        "device": settings.device.type,
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "backend_asked": settings.backend,
        "backend": comparison.backend,
        "same_initial_weights": comparison.same_initial_weights,
        "losses": comparison.losses,
        "first_step_apart": comparison.first_step_apart,
        "largest_loss_difference": comparison.largest_loss_difference,
        "step_seconds": comparison.seconds,
        "median_step_seconds": comparison.median_seconds,
        "ratio": comparison.ratio,
    }


def _write(settings: Settings, console: Console, picture: bytes, numbers: dict[str, Any]) -> None:
    files = {
        settings.out / f"{settings.demo}.png": picture,
        settings.out / f"{settings.demo}.json": (json.dumps(numbers) + "\n").encode(),
    }
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_together(files)
    except OSError as error:
        raise DemoError(f"cannot write into {settings.out}: {error}", exit_code=1) from error
    for path in files:
        # soft_wrap: a path broken over two lines can be neither clicked nor copied.
        console.print(Text(f"wrote {path}"), soft_wrap=True)


def write_together(files: dict[Path, bytes]) -> None:
    """Write all files or none of them half: each is finished beside its place, then renamed."""
    finished: list[tuple[Path, Path]] = []
    try:
        for path, content in files.items():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            finished.append((Path(name), path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        for temporary, path in finished:
            # mkstemp makes files that only their owner reads; these are ordinary results.
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        for temporary, _ in finished:
            temporary.unlink(missing_ok=True)
