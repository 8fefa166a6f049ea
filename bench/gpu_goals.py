"""What is asked of a GPU run, and how it is read off the timed cases; plain Python, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_grid import ANCHORS
from bench.turns import geometric_mean

# A timed case, as gpu.json has it.
Row = dict[str, Any]


def number(value: Any, digits: int = 2) -> str:
    """A number for a table; what is none as it stands, nothing as a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else str(value)


def mean(rows: Sequence[Row], key: str) -> float | None:
    return geometric_mean([row[key] for row in rows]) if rows else None


@dataclass(frozen=True)
class Goal:
    """What is asked of a number that a run yields."""

    name: str
    wanted: float
    least: bool
    measure: Callable[[list[Row]], float | None]

    def line(self, rows: list[Row]) -> list[str]:
        found = self.measure(rows)
        sign = ">=" if self.least else "<="
        if found is None:
            return [self.name, f"{sign} {self.wanted}", "-", "not measured"]
        reached = found >= self.wanted if self.least else found <= self.wanted
        return [self.name, f"{sign} {self.wanted}", number(found), "yes" if reached else "no"]


def is_standard_ground(case: Row) -> bool:
    """Where cuDNN has no persistent kernel, by the goals' wording."""
    return bool(
        case["dtype"] in ("bfloat16", "float32")
        or case["cell"] == "gru"
        or case["directions"] == 2
        or case["layers"] > 1
        or case["packed"]
    )


def _mean_where(contains: Callable[[Row], bool]) -> Callable[[list[Row]], float | None]:
    return lambda rows: mean([row for row in rows if contains(row["case"])], "ratio_auto")


def _of_anchor(index: int, value: Callable[[Row], float]) -> Callable[[list[Row]], float | None]:
    def find(rows: list[Row]) -> float | None:
        return next((value(row) for row in rows if row["id"] == ANCHORS[index].id), None)

    return find


def _us(row: Row) -> float:
    return float(row["times"]["auto"]["us_per_step"])


GOALS = (
    Goal(
        "geometric mean over bfloat16, float32, GRU, two directions, several layers, packed",
        3.0,
        True,
        _mean_where(is_standard_ground),
    ),
    Goal("- bfloat16 alone", 3.0, True, _mean_where(lambda case: case["dtype"] == "bfloat16")),
    Goal("- float32 alone", 3.0, True, _mean_where(lambda case: case["dtype"] == "float32")),
    Goal("- GRU alone", 3.0, True, _mean_where(lambda case: case["cell"] == "gru")),
    Goal("- two directions alone", 3.0, True, _mean_where(lambda case: case["directions"] == 2)),
    Goal("- several layers alone", 3.0, True, _mean_where(lambda case: case["layers"] > 1)),
    Goal("- packed alone", 3.0, True, _mean_where(lambda case: case["packed"])),
    Goal(
        "LSTM float16 N16 T1024 H768 forward, ratio",
        1.2,
        True,
        _of_anchor(0, lambda r: r["ratio_auto"]),
    ),
    Goal("the same, us per step", 1.6, False, _of_anchor(0, _us)),
    Goal(
        "the same, forward and backward, ratio",
        1.2,
        True,
        _of_anchor(1, lambda r: r["ratio_auto"]),
    ),
    Goal("LSTM bfloat16 N16 T1024 H128 forward, us per step", 0.6, False, _of_anchor(2, _us)),
    Goal(
        "worst case on auto",
        1.0,
        True,
        lambda rows: min((row["ratio_auto"] for row in rows), default=None),
    ),
)
