"""The tables of a GPU run, made of its JSON alone; plain Python, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu_checks import TOLERANCES
from bench.gpu_goals import GOALS, Row, mean, number
from bench.gpu_grid import ANCHORS

Data = dict[str, Any]

# So many are written out in the Markdown file; gpu.json has all.
MOST_LISTED = 40
ANCHOR_IDS = {case.id for case in ANCHORS}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; nothing but a note if it has no rows."""
    lines = ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
    if not lines:
        return "Nothing.\n"
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *lines]) + "\n"


def power(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, (int, float)) else str(value or "-")


def of(data: Data, part: str) -> list[Row]:
    found: list[Row] = data.get(part, {}).get("results", [])
    return found


# What is timed beside the cases, which goals and means are not about: parts of a step, users'
# cells, few steps.
BESIDE = ("phases", "own", "short")


def beside_timing(data: Data, names: Sequence[str] = BESIDE) -> list[Row]:
    """What was timed beside the cases."""
    timing = data.get("timing", {})
    return [row for name in names for row in timing.get(name, {}).get("results", [])]


def failures(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] not in ("ok", "skipped")]


def is_right(data: Data) -> bool:
    """Whether everything that ran gave right numbers, and something ran."""
    rows = [row for part in ("correctness", "timing") for row in of(data, part)]
    rows += beside_timing(data)
    started = all("start_failures" not in part for part in data.values() if isinstance(part, dict))
    return bool(data.get("machine")) and started and not failures(rows)


# Correctness ------------------------------------------------------------------------------------


def _worst(rows: Sequence[Row]) -> Row | None:
    """The row with the largest error; a number that is none was written as a string."""

    def size(row: Row) -> float:
        norm = row["worst"]["norm"]
        return norm if isinstance(norm, (int, float)) else float("inf")

    return max((row for row in rows if row.get("worst")), key=size, default=None)


def correctness_rows(rows: Sequence[Row], axes: tuple[str, ...]) -> list[list[str]]:
    """Per value of some axes: how many were right, and the worst of them beside the tolerance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row["case"][axis]) or "auto" for axis in axes)
        groups.setdefault(key, []).append(row)
    found = []
    for key, group in sorted(groups.items()):
        counts = [sum(row["status"] == status for row in group) for status in ("ok", "skipped")]
        worst = _worst(group)
        torchs = [row["torch"] for row in group if isinstance(row.get("torch"), float)]
        line = [*key, str(counts[0]), str(len(group) - sum(counts)), str(counts[1])]
        if worst is None:
            found.append([*line, "-", "-", "-", "-"])
            continue
        tolerance = TOLERANCES[worst["case"]["dtype"]]
        peak = power(worst["worst"]["peak"])
        line += [f"{power(worst['worst']['norm'])} ({tolerance.norm:.0e})"]
        line += [f"{peak} ({tolerance.peak:.0e})", power(max(torchs, default=None))]
        found.append([*line, f"{worst['worst']['name']} of {worst['id']}"])
    return found


def correctness(data: Data) -> str:
    rows = of(data, "correctness")
    header = ["right", "wrong", "no plan", "worst norm (limit)", "its peak (limit)", "torch.nn's"]
    text = "Against torch.nn in float64: norm of the difference over norm, and largest difference "
    text += "over root mean square. torch.nn's is its own worst in the same dtype.\n\n"
    numbers = [row for row in rows if row["case"]["check"] == "numbers"]
    others = [row for row in rows if row["case"]["check"] != "numbers"]
    for chosen, axes in (
        (numbers, ("cell", "dtype")),
        (numbers, ("variant", "dtype")),
        (others, ("check", "variant", "dtype")),
    ):
        text += table([*axes, *header, "worst case"], correctness_rows(chosen, axes)) + "\n"
    return text


def failure_list(rows: Sequence[Row]) -> str:
    """Each with its first words; the first of every kind with its traceback."""
    failed = failures(rows)
    if not failed:
        return "None.\n"
    text = ""
    for row in failed[:MOST_LISTED]:
        text += f"- {row['status']}: `{row['id']}`: {str(row.get('error', ''))[:300]}\n"
    if len(failed) > MOST_LISTED:
        text += f"- and {len(failed) - MOST_LISTED} more, in gpu.json\n"
    kinds: dict[str, Row] = {}
    for row in failed:
        if row.get("traceback"):
            kinds.setdefault(str(row.get("error", ""))[:60], row)
    for row in list(kinds.values())[:6]:
        text += f"\n`{row['id']}`\n\n```\n{row['traceback'][-2000:]}\n```\n"
    return text


def not_reached(data: Data) -> str:
    text = ""
    for part in ("correctness", "timing", "tuning"):
        names = list(data.get(part, {}).get("not_reached", []))
        for beside in BESIDE:
            names += data.get(part, {}).get(beside, {}).get("not_reached", [])
        if names:
            text += f"- {part} ({len(names)}): {', '.join(names)}\n"
        skipped = [row["id"] for row in of(data, part) if row["status"] == "skipped"]
        if skipped:
            text += f"- {part}, no plan or no such thing ({len(skipped)}): {', '.join(skipped)}\n"
        for row in of(data, part):
            left = row.get("plans_not_reached", [])
            if left:
                text += f"- {part}: {len(left)} plans of {row['id']}\n"
    return text or "All was reached.\n"


# Timing -----------------------------------------------------------------------------------------


def timed(data: Data) -> list[Row]:
    return [row for row in of(data, "timing") if row["status"] == "ok"]


def _means(name: str, rows: Sequence[Row]) -> list[str]:
    """Geometric means and the worst on auto of a group."""
    inference = [row for row in rows if not row["case"]["training"]]
    training = [row for row in rows if row["case"]["training"]]
    line = [name, str(len(rows))]
    for group in (inference, training, rows):
        line += [number(mean(group, "ratio_auto")), number(mean(group, "ratio_triton"))]
    line += [number(mean(rows, "wall_ratio_auto"))]
    return [*line, number(min((row["ratio_auto"] for row in rows), default=None))]


def by_axis(rows: Sequence[Row]) -> str:
    """Geometric means of torch.nn's time over ours for every value of every axis."""
    header = ["", "cases", "inference auto", "kernels", "training auto", "kernels"]
    header += ["both auto", "kernels", "wall auto", "worst auto"]
    lines = [_means("all", rows)] if rows else []
    for axis in ("cell", "dtype", "directions", "layers", "packed", "hidden", "batch", "steps"):
        for value in sorted({row["case"][axis] for row in rows}):
            lines.append(_means(f"{axis} {value}", [r for r in rows if r["case"][axis] == value]))
    for name in sorted({row["algorithm"] for row in rows}):
        lines.append(_means(f"cuDNN {name}", [r for r in rows if r["algorithm"] == name]))
    return table(header, lines)


def case_line(row: Row) -> list[str]:
    times = row["times"]
    algorithm = row["algorithm"]
    if row.get("algorithm_backward") not in ("", None, algorithm):
        algorithm += f", backward {row['algorithm_backward']}"
    peaks = [times[name].get("peak_bytes") for name in ("cudnn", "auto", "triton")]
    return [
        row["id"],
        algorithm,
        row["backend"],
        *(number(times[name]["us_per_step"]) for name in ("cudnn", "auto", "triton")),
        number(max(times[name]["spread"] for name in times)),
        number(row["ratio_auto"]),
        number(row["ratio_triton"]),
        number(row["wall_ratio_auto"]),
        "/".join(f"{times[name]['host_s'] * 1e6:.0f}" for name in ("cudnn", "auto", "triton")),
        number(row["floor_us"]),
        number(row["floor_share"]),
        "/".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
    ]


CASE_HEADER = (
    "case",
    "cuDNN's algorithm",
    "auto takes",
    "cudnn us/step",
    "auto",
    "kernels",
    "spread",
    "ratio auto",
    "ratio kernels",
    "wall ratio",
    "host us a call",
    "floor us",
    "floor/measured",
    "peak MiB",
)


def cases_beside(data: Data, name: str) -> str:
    rows = beside_timing(data, [name])
    return table(CASE_HEADER, [case_line(row) for row in rows if row["status"] == "ok"])


def goals(data: Data) -> str:
    rows = timed(data)
    return table(["goal", "wanted", "measured", "reached"], [goal.line(rows) for goal in GOALS])


def slower(data: Data) -> list[Row]:
    """Cases that are slower than torch.nn on auto, the worst first."""
    rows = [row for row in timed(data) if row["ratio_auto"] < 1.0]
    return sorted(rows, key=lambda row: float(row["ratio_auto"]))


def compile_line(data: Data) -> str:
    """How long first calls took, side by side with those of other processes."""
    seconds = list(data.get("timing", {}).get("compile_s", {}).values())
    if not seconds:
        return ""
    return (
        f"First calls, compiling beside other processes: median {statistics.median(seconds):.1f} s,"
        f" longest {max(seconds):.1f} s of {len(seconds)}."
    )


def explained(rows: Sequence[Row]) -> str:
    """What `explain` says of the kernels' plan, of every case once."""
    found = {row["id"]: row.get("plan", "") for row in rows}
    return "".join(f"`{name}`\n\n```\n{plan}\n```\n\n" for name, plan in found.items())


def phases(data: Data) -> str:
    rows = data.get("timing", {}).get("phases", {}).get("results", [])
    names = list(dict.fromkeys(name for row in rows for name in row.get("seconds", {})))
    lines = []
    for row in rows:
        if row["status"] != "ok":
            continue
        seconds, products = row["seconds"], row["products"]
        line = [row["id"], *(number(1e6 * seconds.get(name, 0), 0) for name in names)]
        for product in ("project", "grad_weight"):
            pair = products.get(product)
            line.append(
                "-" if pair is None else f"{1e6 * pair['ours']:.0f}/{1e6 * pair['cublas']:.0f}"
            )
        lines.append(line)
    return table(["us", *names, "project ours/cuBLAS", "grad_weight ours/cuBLAS"], lines)


# Tuning -----------------------------------------------------------------------------------------

PLAN_FIELDS = (
    "variant", "exchange", "block_h", "block_n", "block_k", "warps", "units", "slots", "pause",
)  # fmt: skip


def tuning(data: Data) -> str:
    text = ""
    for row in of(data, "tuning"):
        text += f"### {row['id']}\n\n"
        if row["status"] != "ok":
            text += f"{row['status']}: {row.get('error', '')}\n\n"
        lines = []
        for tried in row.get("plans", []):
            plan = tried["plan"]
            said = tried["status"] if tried["status"] != "ok" else ""
            lines.append(
                [
                    "chosen" if tried.get("chosen") else "",
                    *(plan.get(name, "-") for name in PLAN_FIELDS),
                    number(plan.get("bytes_on_chip", 0) / 1024, 0),
                    number(tried.get("us_per_step"), 3),
                    number(plan.get("floor_us"), 3),
                    number(tried.get("spread")),
                    f"{said} {str(tried.get('error', ''))[:80]}".strip(),
                ]
            )
        header = ["", *PLAN_FIELDS, "KB", "us/step", "floor us", "spread", ""]
        text += table(header, lines) + "\n"
    return text or "Nothing.\n"


def tuning_gain(row: Row) -> str | None:
    """The fastest plan of a point beside the planner's, in a line."""
    rows = [tried for tried in row.get("plans", []) if tried.get("us_per_step")]
    chosen = next((tried for tried in rows if tried.get("chosen")), None)
    if chosen is None or not rows:
        return None
    best = min(rows, key=lambda tried: float(tried["us_per_step"]))
    text = f"{row['id']}: {chosen['us_per_step']:.2f} us/step (floor {chosen['floor_us']:.2f})"
    if best is chosen:
        return f"{text}, the fastest of {len(rows)}"
    plan = best["plan"]
    blocks = "x".join(str(plan[name]) for name in ("block_h", "block_n", "block_k"))
    fastest = f"{plan['variant']} {plan['exchange']} {blocks} w{plan['warps']}"
    fastest += f" pause {plan['pause']}" if plan.get("pause") else ""
    return f"{text}; {best['us_per_step']:.2f} with {fastest} (floor {plan['floor_us']:.2f})"


# The whole --------------------------------------------------------------------------------------


def machine_line(data: Data) -> str:
    line = "; ".join(f"{name}: {value}" for name, value in data.get("machine", {}).items())
    found = data.get("measured_ceilings", {}).get("ceilings", {})
    return line + "".join(f"; {name}: {number(value)}" for name, value in found.items())


def markdown(data: Data) -> str:
    state = "finished" if data.get("finished") else "not finished"
    every = of(data, "correctness") + of(data, "timing") + of(data, "tuning")
    every += beside_timing(data)
    starts = [text for part in data.values() if isinstance(part, dict)
              for text in part.get("start_failures", [])]  # fmt: skip
    parts = [
        f"# A run on a GPU ({state}, {number(data.get('seconds'), 0)} s)\n",
        machine_line(data) + "\n",
        *(f"A child process did not start:\n\n```\n{text[-2000:]}\n```\n" for text in starts),
    ]
    # Of a run of some parts what belongs to them.
    if "timing" in data:
        parts += ["## Goals\n", goals(data)]
    if "correctness" in data:
        parts += ["## Correctness\n", correctness(data)]
    parts += ["## What failed\n", failure_list(every)]
    if "timing" in data:
        parts += _times(data)
    if "tuning" in data:
        parts += [
            "## Plans of single recurrences\n",
            "One kernel alone, its buffers' allocation and filling included; fastest first.\n",
            tuning(data),
        ]
    return "\n".join([*parts, "## Not reached\n", not_reached(data)])


def _times(data: Data) -> list[str]:
    rows, slow = timed(data), slower(data)
    return [
        "## Time: torch.nn's over ours, geometric means\n",
        "Device time by events, of cuDNN as torch.nn calls it by default, in turn with ours on "
        "`auto` and with the kernels asked for by name; wall time includes the launches, host time "
        "is Python and the launches alone. A step is one of the sequence, all layers, projection "
        "included.\n",
        by_axis(rows),
        f"## Slower than torch.nn on auto: {len(slow)} of {len(rows)}\n",
        table(CASE_HEADER, map(case_line, slow)),
        "## Every case, in the order of measuring\n",
        "peak MiB: torch.nn, auto, kernels. Times that lie within the spread are alike. "
        f"{compile_line(data)}\n",
        table(CASE_HEADER, map(case_line, rows)),
        "## Plans of the anchors and of the slowest beside torch.nn (all: gpu.json)\n",
        explained([row for row in rows if row["id"] in ANCHOR_IDS] + slow[:10]),
        "## Parts of a training step of ours\n",
        "Device time, the CPU kept ahead; `other` is all that lies between the parts.\n",
        phases(data),
        "## Users' cells\n",
        "Beside the plain loop of their steps, which stands where cuDNN does above.\n",
        cases_beside(data, "own"),
        "## Few steps\n",
        "Where launches cost more than the device does.\n",
        cases_beside(data, "short"),
    ]


def summary(data: Data) -> str:
    """The end of what a run prints: a few thousand characters."""
    checks, rows, slow = of(data, "correctness"), timed(data), slower(data)
    right = sum(row["status"] == "ok" for row in checks)
    skipped = sum(row["status"] == "skipped" for row in checks)
    lines = ["", "== GPU run ==", machine_line(data), ""]
    lines += [
        f"correctness: {right} right, {len(failures(checks))} not, {skipped} without a plan, "
        f"{len(data.get('correctness', {}).get('not_reached', []))} not reached"
    ]
    for row in failures(checks)[:12]:
        lines.append(f"  {row['status']}: {row['id']}: {str(row.get('error', ''))[:140]}")
    for key in _correctness_by_dtype(checks):
        lines.append(f"  {key}")
    lines += ["", f"timing: {len(rows)} cases, {len(failures(of(data, 'timing')))} failed, "
              f"{len(data.get('timing', {}).get('not_reached', []))} not reached"]  # fmt: skip
    for row in failures(of(data, "timing"))[:8]:
        lines.append(f"  {row['status']}: {row['id']}: {str(row.get('error', ''))[:140]}")
    lines += ["  " + " | ".join(goal.line(rows)) for goal in GOALS]
    for axis in ("cell", "dtype"):
        for value in sorted({row["case"][axis] for row in rows}):
            group = [row for row in rows if row["case"][axis] == value]
            means = f"{number(mean(group, 'ratio_auto'))}, {number(mean(group, 'ratio_triton'))}"
            lines.append(f"  {axis} {value}: auto, kernels {means} over {len(group)}")
    for row in [row for row in rows if row["id"] in ANCHOR_IDS]:
        times = [f"{row['times'][name]['us_per_step']:.2f}" for name in ("cudnn", "auto", "triton")]
        lines.append(f"  {row['id']}: us/step {' / '.join(times)}, floor {number(row['floor_us'])}")
    lines.append(f"  slower than torch.nn on auto: {len(slow)}")
    lines += [f"    {row['ratio_auto']:.2f} {row['id']} ({row['backend']})" for row in slow[:10]]
    gains = [gain for row in of(data, "tuning") if (gain := tuning_gain(row))]
    lines += ["", f"tuning: {len(gains)} points", *(f"  {gain}" for gain in gains)]
    end = "finished" if data.get("finished") else "NOT FINISHED"
    lines.append(f"{end} after {number(data.get('seconds'), 0)} s; tables in gpu.md")
    return "\n".join(lines)[-11_000:]


def _correctness_by_dtype(rows: Sequence[Row]) -> list[str]:
    found = []
    for dtype, tolerance in TOLERANCES.items():
        worst = _worst([row for row in rows if row["case"]["dtype"] == dtype])
        if worst is not None:
            norm = power(worst["worst"]["norm"])
            found.append(f"{dtype}: worst {norm} (limit {tolerance.norm:.0e}), {worst['id']}")
    return found
