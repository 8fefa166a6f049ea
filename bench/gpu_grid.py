"""What is timed and tuned on a GPU, in the order of importance; plain Python, no torch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GATES = {"rnn": 1, "gru": 3, "lstm": 4, "peephole": 4, "mgu": 2, "ind_rnn": 1}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

Values = dict[str, Any]


def _pairs(values: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    """All pairs of (axis, value) that a choice of values holds."""
    return set(itertools.combinations(values.items(), 2))


def covering(
    axes: Mapping[str, Sequence[Any]],
    seed: int,
    allowed: Callable[[Values], bool] = lambda values: True,
    tries: int = 60,
) -> list[Values]:
    """Few choices of values in which every pair of two axes' values meets, the same for a seed.

    Greedy: of `tries` random choices around a pair not yet met, the one with the most new pairs
    comes next. So the first few already hold every value of every axis. A pair for which no allowed
    choice is found is left out.
    """
    draw = random.Random(seed)
    every = [
        ((a, x), (b, y))
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
    ]
    missing = dict.fromkeys(every)
    chosen: list[Values] = []
    while missing:
        best: Values | None = None
        most = 0
        pairs = list(missing)
        for attempt in range(tries):
            values = {axis: draw.choice(list(options)) for axis, options in axes.items()}
            # Half of them around the pair that waits longest, so that the search always ends.
            values.update(pairs[0] if attempt % 2 == 0 else draw.choice(pairs))
            if not allowed(values):
                continue
            new = len(_pairs(values) & missing.keys())
            if new > most:
                best, most = values, new
        if best is None:
            del missing[pairs[0]]
            continue
        chosen.append(best)
        for pair in _pairs(best):
            missing.pop(pair, None)
    return chosen


@dataclass(frozen=True)
class TimingCase:
    """One layer or stack that is timed against torch.nn; the input is as wide as the layer."""

    cell: str
    dtype: str
    training: bool
    hidden: int
    batch: int
    steps: int
    directions: int = 1
    layers: int = 1
    packed: bool = False

    @property
    def mode(self) -> str:
        return "training" if self.training else "inference"

    @property
    def id(self) -> str:
        form = "-packed" if self.packed else ""
        return (
            f"{self.cell}-{self.dtype}-{self.mode}-H{self.hidden}-N{self.batch}-T{self.steps}"
            f"-D{self.directions}-L{self.layers}{form}"
        )

    def lengths(self) -> list[int]:
        """Lengths of a packed batch: descending from `steps` to about half of it."""
        shortest, last = (self.steps + 1) // 2, max(1, self.batch - 1)
        return [self.steps - row * (self.steps - shortest) // last for row in range(self.batch)]

    @property
    def flops(self) -> float:
        """Of all matrix products, forward and backward."""
        weights = GATES[self.cell] * self.hidden**2 * self.directions
        inputs = weights * (1 + (self.layers - 1) * self.directions)
        products = 2.0 * self.batch * self.steps * (inputs + weights * self.layers)
        return products * (3 if self.training else 1)

    @property
    def bytes(self) -> float:
        """Roughly, of one side's activations: a layer's input, gates, cells and their gradients."""
        width = self.directions * self.hidden * ITEMSIZE[self.dtype]
        per_row = width * (2 * GATES[self.cell] + 4 if self.training else GATES[self.cell] + 2)
        return per_row * self.batch * self.steps * (self.layers if self.training else 1)


# The sizes that the goals name, and their own training.
ANCHORS = (
    TimingCase("lstm", "float16", False, 768, 16, 1024),
    TimingCase("lstm", "float16", True, 768, 16, 1024),
    TimingCase("lstm", "bfloat16", False, 128, 16, 1024),
    TimingCase("lstm", "bfloat16", True, 128, 16, 1024),
)

AXES: dict[str, tuple[Any, ...]] = {
    "cell": ("lstm", "gru", "rnn"),
    "dtype": ("bfloat16", "float16", "float32"),
    "training": (False, True),
    "hidden": (64, 128, 192, 256, 512, 768, 1024, 1536, 2048),
    "batch": (1, 16, 64, 256),
    "steps": (128, 1024),
    "directions": (1, 2),
    "layers": (1, 2, 4),
    "packed": (False, True),
}
SEED = 20
# So many are listed; a run that is stopped by the clock names those that it did not reach.
TIMING_CASES = 240


def _fits(values: Values) -> bool:
    """Not so large that one case takes seconds, or a good part of the memory."""
    case = TimingCase(**values)
    # A batch of one sequence cannot be packed to different lengths.
    return case.flops < 1e14 and case.bytes < 12e9 and not (case.packed and case.batch == 1)


def timing_cases(count: int = TIMING_CASES) -> list[TimingCase]:
    """The cases to time, the most informative first, the same at every call.

    1. the anchors; 2. a covering of all pairs of axis values; 3. of the rest a sample with several
    layers or packed input in every fifth, everywhere else one padded layer.
    """
    cases = [*ANCHORS, *(TimingCase(**values) for values in covering(AXES, SEED, _fits))]
    draw = random.Random(SEED)
    plain = {**AXES, "layers": (1,), "packed": (False,)}
    while len(cases) < 4 * count:
        axes = AXES if len(cases) % 5 == 0 else plain
        values = {axis: draw.choice(options) for axis, options in axes.items()}
        if _fits(values):
            cases.append(TimingCase(**values))
    return list(dict.fromkeys(cases))[:count]


# A few whose parts (projection, recurrences, weight gradients) are timed one by one.
PHASE_CASES = (
    TimingCase("lstm", "float16", True, 768, 16, 1024),
    TimingCase("lstm", "bfloat16", True, 128, 16, 1024),
    TimingCase("gru", "bfloat16", True, 512, 64, 512),
    TimingCase("lstm", "float32", True, 512, 64, 512),
    TimingCase("rnn", "bfloat16", True, 1024, 16, 512, directions=2),
    TimingCase("lstm", "bfloat16", True, 1024, 256, 128),
)

# Users' cells, beside their plain loops: what such a cell costs without kernels.
OWN_CASES = (
    TimingCase("peephole", "bfloat16", True, 512, 16, 256),
    TimingCase("mgu", "bfloat16", True, 512, 16, 256),
    TimingCase("ind_rnn", "bfloat16", True, 512, 16, 256),
)

# Few steps, for which the launches cost more than the device: what `auto` does there is not decided
# by the time of a step.
SHORT_CASES = tuple(
    TimingCase("lstm", "bfloat16", training, hidden, 16, steps)
    for training, hidden, steps in itertools.product((False, True), (64, 512), (1, 8, 32))
)

REHEARSAL_CASES = (
    TimingCase("lstm", "float16", True, 16, 3, 2),
    TimingCase("gru", "float32", True, 16, 3, 2, directions=2, packed=True),
)


@dataclass(frozen=True)
class TuningPoint:
    """One recurrence kernel of one layer, to be timed under every plan in reach."""

    cell: str
    dtype: str
    hidden: int
    batch: int
    kernel: str
    steps: int = 512
    directions: int = 1
    # Whether a forward saves what a backward needs.
    saving: bool = True

    @property
    def id(self) -> str:
        return (
            f"{self.kernel}-{self.cell}-{self.dtype}-H{self.hidden}-N{self.batch}"
            f"-D{self.directions}{'' if self.saving else '-inference'}"
        )


TUNING_POINTS = (
    # The goals' own cases; the anchor with all its steps, which do not fit the L2 cache.
    TuningPoint("lstm", "float16", 768, 16, "forward", steps=1024, saving=False),
    TuningPoint("lstm", "float16", 768, 16, "backward", steps=1024),
    TuningPoint("lstm", "bfloat16", 128, 16, "forward", saving=False),
    TuningPoint("lstm", "float16", 768, 16, "forward", steps=1024),
    TuningPoint("lstm", "bfloat16", 128, 16, "forward"),
    TuningPoint("lstm", "float16", 1536, 16, "forward"),
    TuningPoint("lstm", "float16", 1536, 16, "backward"),
    TuningPoint("gru", "bfloat16", 512, 64, "forward"),
    TuningPoint("gru", "bfloat16", 512, 64, "backward"),
    TuningPoint("lstm", "float32", 512, 16, "forward"),
    TuningPoint("lstm", "bfloat16", 128, 16, "backward"),
    TuningPoint("lstm", "bfloat16", 1024, 64, "forward"),
    TuningPoint("lstm", "bfloat16", 1024, 64, "backward"),
    TuningPoint("lstm", "float32", 1024, 16, "backward"),
    TuningPoint("rnn", "bfloat16", 256, 16, "forward"),
    TuningPoint("gru", "bfloat16", 128, 64, "forward"),
    TuningPoint("lstm", "float16", 256, 16, "forward"),
    TuningPoint("lstm", "float16", 256, 16, "backward"),
    TuningPoint("lstm", "float32", 128, 16, "forward"),
    TuningPoint("lstm", "bfloat16", 256, 256, "forward"),
    TuningPoint("lstm", "float16", 2048, 64, "forward"),
    TuningPoint("lstm", "float32", 512, 16, "backward"),
)
REHEARSAL_OWN_CASES = (TimingCase("mgu", "float32", True, 16, 3, 2),)
REHEARSAL_SHORT_CASES = (TimingCase("lstm", "float32", False, 16, 3, 1),)
REHEARSAL_POINTS = (
    TuningPoint("lstm", "float16", 16, 3, "forward", steps=3),
    TuningPoint("gru", "float32", 16, 3, "backward", steps=3),
)

# The first cuDNN whose bfloat16 torch calls, as torch.backends.cudnn.version() writes it.
BFLOAT16_CUDNN = 91300
# Up to this hidden size torch asks for the small persistent algorithm: forward, backward.
SMALL_HIDDEN = {"rnn": (384, 256), "gru": (192, 128), "lstm": (192, 128)}


def algorithm(case: TimingCase, cudnn: int, backward: bool = False) -> str:
    """The algorithm that torch asks cuDNN for, by the rule of its cudnn/RNN.cpp."""
    if case.cell not in SMALL_HIDDEN:
        return "plain loop (no cuDNN)"
    if case.dtype == "bfloat16" and cudnn < BFLOAT16_CUDNN:
        return "torch's own (no cuDNN)"
    if not case.packed and case.hidden <= SMALL_HIDDEN[case.cell][backward]:
        return "PERSIST_STATIC_SMALL_H"
    persistent = (
        case.dtype == "float16"
        and not case.packed
        and case.cell != "gru"
        and case.layers == 1
        and case.directions == 1
        and case.hidden <= 1024
        and case.hidden % 128 == 0
        and case.batch % 8 == 0
        and case.batch <= 128
    )
    return "PERSIST_STATIC" if persistent else "STANDARD"


def is_packed_to_one_length(case: TimingCase) -> bool:
    """Whether the packed batch of a case is none at all."""
    return case.packed and len(set(case.lengths())) == 1
