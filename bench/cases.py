"""What is measured: sizes, and the cases made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

CELLS = ("rnn", "gru", "lstm")
# Not part of the grid; asked for with --cell.
EXTRA_CELLS = ("rnn-relu",)

# A training step ends with the gradients; a whole step has a head, a loss and an optimiser too.
MODES = ("inference", "training", "step")

GATES = {"rnn": 1, "rnn-relu": 1, "gru": 3, "lstm": 4}

# The most multiply-adds that the forward of a --quick case may take.
QUICK_MULTIPLY_ADDS = 2_000_000


@dataclass(frozen=True)
class Size:
    batch: int
    seq_len: int
    input_size: int
    hidden_size: int
    layers: int = 1
    directions: int = 1

    @property
    def id(self) -> str:
        return (
            f"N{self.batch}-T{self.seq_len}-I{self.input_size}-H{self.hidden_size}"
            f"-L{self.layers}-D{self.directions}"
        )

    def multiply_adds(self, cell: str) -> int:
        """Multiply-adds of one padded forward pass, matrix products only."""
        hidden = self.hidden_size
        first = self.input_size + hidden
        deeper = (self.directions * hidden + hidden) * (self.layers - 1)
        rows = GATES[cell] * hidden * self.directions
        return self.batch * self.seq_len * rows * (first + deeper)

    def lengths(self) -> list[int]:
        """Lengths of a packed batch: descending from ``seq_len`` to about half of it."""
        shortest = (self.seq_len + 1) // 2
        last = max(self.batch - 1, 1)
        return [
            self.seq_len - round(row * (self.seq_len - shortest) / last)
            for row in range(self.batch)
        ]


@dataclass(frozen=True)
class Case:
    cell: str
    mode: str
    packed: bool
    size: Size
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.mode != "inference"

    @property
    def form(self) -> str:
        return "packed" if self.packed else "padded"

    @property
    def id(self) -> str:
        place = "" if self.device == "cpu" else f"-{self.device}-{self.dtype}"
        return f"{self.cell}-{self.mode}-{self.form}-{self.size.id}{place}"

    @property
    def is_quick(self) -> bool:
        return self.size.multiply_adds(self.cell) <= QUICK_MULTIPLY_ADDS

    def as_dict(self) -> dict[str, object]:
        facts = {"cell": self.cell, "mode": self.mode, "form": self.form}
        return {**facts, "device": self.device, "dtype": self.dtype, **asdict(self.size)}


# The sizes that the targets are set over.
STANDARD_SIZES = (
    Size(1, 5, 4, 3),
    Size(1, 50, 1, 16),
    Size(10, 3, 100, 20, layers=4),
    Size(32, 10, 10, 20, layers=2),
    Size(1, 100, 128, 128),
    Size(8, 100, 128, 128, directions=2),
    Size(32, 100, 128, 128, layers=2),
    Size(32, 100, 256, 256, directions=2),
    Size(64, 256, 512, 512),
    Size(1, 1000, 512, 512),
    Size(16, 256, 1024, 1024),
)

# Sizes that nobody tunes for, so that a rule made on the grid is seen to hold off it. Keep it so:
# when one of these decides a constant in the package, replace it here by another.
OTHER_SIZES = (
    Size(1, 1, 65, 33),
    Size(64, 1, 200, 127),
    Size(128, 2, 384, 384),
    Size(3, 2, 127, 384, layers=2, directions=2),
    Size(2, 20, 33, 65),
    Size(1, 20, 384, 33, layers=3),
    Size(4, 20, 200, 200, layers=2),
    Size(16, 20, 384, 384, directions=2),
    Size(128, 20, 65, 200),
    Size(128, 20, 33, 33),
    Size(1, 500, 200, 200),
    Size(2, 500, 384, 384),
    Size(3, 500, 127, 127),
    Size(16, 500, 33, 65, directions=2),
)

# Where a call's cost is that of its operations; and some beyond, up to where it is arithmetic.
SMALL_SIZES = (
    *(
        Size(batch, seq_len, size, size)
        for seq_len, size in ((5, 3), (50, 16), (20, 64), (100, 128))
        for batch in (1, 2, 8)
    ),
    *(Size(batch, 50, size, size) for size in (256, 512) for batch in (1, 8)),
)

GRIDS = {"standard": STANDARD_SIZES, "other": OTHER_SIZES, "small": SMALL_SIZES}

# Where a GPU is at hand. Small and large states, few and many sequences; the first is for --quick.
GPU_SIZES = (
    Size(1, 64, 64, 64),
    Size(16, 1024, 128, 128),
    Size(64, 512, 512, 512),
    Size(16, 1024, 768, 768),
    Size(16, 256, 256, 256, layers=2, directions=2),
    Size(256, 128, 1024, 1024),
    Size(1, 1000, 512, 512),
)
GPU_DTYPES = ("float16", "bfloat16", "float32")


def cases_of(
    sizes: Iterable[Size],
    cells: Iterable[str] = CELLS,
    device: str = "cpu",
    dtypes: Iterable[str] = ("float32",),
) -> list[Case]:
    """Every cell, dtype, mode and form over ``sizes``; the modes of a size stand together.

    A whole step is measured on padded input only: head, loss and optimiser do not ask.
    """
    sizes, dtypes = tuple(sizes), tuple(dtypes)
    return [
        Case(cell, mode, packed, size, device, dtype)
        for cell in cells
        for dtype in dtypes
        for size in sizes
        for mode in MODES
        for packed in (False, True)
        if not (packed and mode == "step")
    ]


def select(
    grid: str,
    cells: Iterable[str] = CELLS,
    substring: str = "",
    quick: bool = False,
    devices: Iterable[str] = ("cpu",),
) -> list[Case]:
    """The cases that the command line asks for."""
    cells, found = tuple(cells), list[Case]()
    for device in devices:
        if device == "cpu":
            found += cases_of(GRIDS[grid], cells)
        else:
            found += cases_of(GPU_SIZES, cells, device, GPU_DTYPES)
    return [case for case in found if substring in case.id and (case.is_quick or not quick)]


def case_by_id(case_id: str) -> Case:
    """The case on the CPU of any grid, or of the extra cells, that has this id.

    Raises:
        KeyError: there is none.
    """
    sizes = dict.fromkeys((*STANDARD_SIZES, *OTHER_SIZES, *SMALL_SIZES))
    return {case.id: case for case in cases_of(sizes, CELLS + EXTRA_CELLS)}[case_id]
