"""What the rules of `auto` would have made of a GPU run, by the times that it took.

    python -m bench.gpu_rules bench/results/gpu.json

Of every case that was timed both ways, cuDNN and the kernels, it asks today's rules
(`backends.triton.rules`) which of them `auto` takes, and says how fast that is beside cuDNN: 1
where it leaves the call to it. Every case in which the choice loses, or forgoes, more than a tenth
is listed with what the rules expected. The kernels' times are those of the run, so a rule can be
judged before it is measured; whether the kernels are still those of the run is for the reader to
know.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.gpu_grid import TimingCase
from bench.turns import geometric_mean
from triton_rnn.backends.triton import launch, rules
from triton_rnn.cells import CELLS
from triton_rnn.kernels.chips import CHIPS
from triton_rnn.request import Request

# A choice that is off by less may be the measurement's.
MATTERS = 1.1


class Judged(NamedTuple):
    """One case.

    Attributes:
        id: of the case.
        ratio: cuDNN's time over the kernels', on the wall, the launches included.
        reason: why the rules leave it to cuDNN; empty if they take the kernels.
    """

    id: str
    ratio: float
    reason: str

    @property
    def outcome(self) -> float:
        """cuDNN's time over that of what is chosen."""
        return 1.0 if self.reason else self.ratio

    @property
    def best(self) -> float:
        return max(1.0, self.ratio)


def requests_of(case: TimingCase) -> list[Request]:
    """What the first layer of a case asks of a backend, and if there are more the next one."""
    first = Request(
        CELLS["rnn_tanh" if case.cell == "rnn" else case.cell],
        torch.device("cuda", 0),
        getattr(torch, case.dtype),
        case.steps,
        case.batch,
        case.hidden,
        case.hidden,
        case.hidden,
        case.directions,
        True,
        case.packed,
        case.training,
    )
    deeper = first._replace(input_size=case.directions * case.hidden)
    return [first, deeper][: case.layers]


def judged(data: dict[str, Any], chip: str = "H200") -> list[Judged]:
    """Every case of a run, as today's rules see it on that chip."""
    found = []
    with (
        mock.patch.object(launch, "chip_of", return_value=CHIPS[chip]),
        mock.patch.object(launch.dispatch, "float32_precision", return_value="tf32"),
    ):
        for row in data["timing"]["results"]:
            if row["status"] != "ok" or row["case"]["cell"] not in ("rnn", "gru", "lstm"):
                continue
            reasons = [
                rules.slower_than_torch(request)
                for request in requests_of(TimingCase(**row["case"]))
            ]
            # A layer that is left to cuDNN takes the others with it, or as good as.
            reason = next((reason for reason in reasons if reason), "")
            times = row["times"]
            ratio = times["cudnn"]["wall_s"] / times["triton"]["wall_s"]
            found.append(Judged(row["id"], ratio, reason))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_rules", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path, help="gpu.json of `bench.gpu_session`")
    parser.add_argument("--chip", choices=sorted(CHIPS), default="H200", help="it ran on this one")
    options = parser.parse_args(arguments)
    try:
        cases = judged(json.loads(options.results.read_text()), options.chip)
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{options.results} is no gpu.json of bench.gpu_session: {error!r}")
    if not cases:
        print("no case was timed there", file=sys.stderr)
        return 1
    taken = [case for case in cases if not case.reason]
    print(f"{len(cases)} cases, the kernels taken in {len(taken)}")
    for name, values in (
        ("by the rules", [case.outcome for case in cases]),
        ("the kernels alone", [case.ratio for case in cases]),
        ("the better one always", [case.best for case in cases]),
    ):
        print(f"{name:22s} geometric mean {geometric_mean(values):.2f}, worst {min(values):.2f}")
    for case in sorted(cases, key=lambda case: case.outcome / case.best):
        if case.best / case.outcome > MATTERS:
            chosen = f"left to cuDNN: {case.reason}" if case.reason else "taken"
            print(f"{case.id:52s} {case.ratio:5.2f}  {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
