"""What is checked on a GPU, in the order of importance, and how near is near; no torch."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu_grid import Values, covering

# Cell -> class of torch.nn and its options; proj_size is a third of the hidden size.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {}),
}
# Users' cells (`gpu_inside.OWN`), held against their plain loops; the last has no product, and so
# no variants.
OWN_CELLS = ("peephole", "mgu", "ind_rnn")
# torch's with a module's options on, held against the plain loops with the same masks.
OPTIONS = {"recurrent_dropout": 0.4, "zoneout": 0.3, "clip_hidden": 0.9, "weight_dropout": 0.1}
EXTENDED_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_options": ("RNN", OPTIONS),
    "gru_options": ("GRU", OPTIONS),
    "lstm_options": ("LSTM", {**OPTIONS, "clip_cell": 1.5}),
}
# float32 with TF32 products, as torch's default is, and without.
DTYPES = ("float16", "bfloat16", "float32_tf32", "float32")
# TRITON_RNN_VARIANT, and after a plus what the plan's exchange is replaced by.
VARIANTS = ("resident", "cooperative", "cluster", "cooperative+barrier", "streaming", "stepwise")
FORMS = ("padded", "packed", "batch_first", "packed_unsorted", "strided", "unbatched")
# Another one: padded with lengths and resets, all states shown.
EPISODES = "episodes"


@dataclass(frozen=True)
class Tolerance:
    """What a result may be off against float64.

    Attributes:
        norm: norm of the difference over norm of the expected tensor.
        peak: largest difference over the root mean square of the expected tensor. One wrong
            element is off by about 1, so it is seen in a tensor of any size.
    """

    norm: float
    peak: float


# Both sides start from the same numbers, so what differs is the rounding of products, gates, states
# and gradients on the way; a state's goes on into all later steps. torch.nn itself, on a CPU over
# these very cases, is off by the numbers at the right (norm, peak); ours may be three times as far.
TOLERANCES = {
    # 2^-11 a rounding: states are stored so, and so are the gates that the backward reads.
    # 2e-3, 0.03
    "float16": Tolerance(6e-3, 0.1),
    # 2^-8 a rounding. 1.3e-2, 0.16
    "bfloat16": Tolerance(4e-2, 0.5),
    # Both operands of every product keep 10 bits; everything else is float32. They are cut, not
    # rounded, so of few numbers the errors do not even out: 5.3e-3 after 37 steps of one unit.
    "float32_tf32": Tolerance(1e-2, 0.1),
    # Three TF32 products keep 21 bits. 6e-7, 7e-6 with all 24
    "float32": Tolerance(1e-5, 2e-4),
}

# How a check looks at its case.
#   numbers: outputs, states and gradients against float64.
#   repeat: the same bits, many times over, beside other work on the GPU and beside itself.
#   poison: the same bits with all unwritten memory full of NaN.
#   graph: captured in a CUDA graph and replayed on other numbers.
#   compiled: by torch.compile(mode="reduce-overhead"), which makes CUDA graphs of its own.
#   nonfinite: NaN and infinity in the input come out as torch gives them.
#   autocast: float32 weights under autocast, in torch.nn's dtypes, and as near as float16 comes.
#   devices: on all GPUs of the machine, one by one and at the same time; not where there is one.
CHECKS = (
    "numbers",
    "repeat",
    "poison",
    "graph",
    "compiled",
    "nonfinite",
    "autocast",
    "devices",
)


@dataclass(frozen=True)
class CheckCase:
    """One call that is checked."""

    check: str
    cell: str
    dtype: str
    variant: str
    hidden: int
    batch: int
    steps: int
    form: str = "padded"
    width: int = 40
    directions: int = 1
    layers: int = 1
    hx: bool = True
    bias: bool = True
    training: bool = True

    @property
    def id(self) -> str:
        flags = ("" if self.hx else "-nohx") + ("" if self.bias else "-nobias")
        flags += "" if self.training else "-inference"
        return (
            f"{self.check}-{self.cell}-{self.dtype}-{self.variant or 'auto'}-H{self.hidden}"
            f"-N{self.batch}-T{self.steps}-I{self.width}-D{self.directions}-L{self.layers}"
            f"-{self.form}{flags}"
        )

    @property
    def is_packed(self) -> bool:
        return self.form.startswith("packed")

    @property
    def proj_size(self) -> int:
        return max(1, self.hidden // 3) if self.cell == "lstm_proj" else 0

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    def lengths(self) -> list[int]:
        """Lengths of a packed batch, in no order."""
        draw = random.Random(self.batch * 1000 + self.steps)
        lengths = [draw.randint(1, self.steps) for _ in range(self.batch)]
        lengths[self.batch // 2] = self.steps
        return lengths


AXES: dict[str, tuple[Any, ...]] = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_proj"),
    "dtype": ("bfloat16", "float16", "float32_tf32", "float32"),
    "variant": VARIANTS,
    "hidden": (100, 64, 19, 500, 256, 63, 1, 768),
    "batch": (17, 3, 70, 1, 300),
    "steps": (37, 2, 1),
    "form": FORMS,
    "width": (40, 1, 129),
    "directions": (1, 2),
    "layers": (1, 2),
    "hx": (True, False),
    "bias": (True, False),
    "training": (True, False),
}
SEED = 7


def _allowed(values: Values) -> bool:
    """What can be planned at all: the planner refuses more, and the check then says so."""
    if values["variant"] == "resident" and values["hidden"] > (
        64 if values["dtype"].startswith("float32") else 128
    ):
        return False
    if values["variant"] == "cluster" and not _clusters(values["hidden"], values["dtype"]):
        return False
    if values["form"] == "unbatched" and values["batch"] != 1:
        return False
    # relu's on and off depend on a bias that keeps its numbers away from the edge.
    if values["cell"] == "rnn_relu" and not values["bias"]:
        return False
    return not (values["cell"] == "lstm_proj" and values["hidden"] == 1)


def _clusters(hidden: int, dtype: str) -> bool:
    """Whether a few programs hold W_hh, in rows of whole pieces of 16 bytes."""
    piece = 4 if dtype == "float32_tf32" else 8
    return dtype != "float32" and 16 < hidden <= 256 and hidden % piece == 0


def _specials() -> list[CheckCase]:
    """Races, unwritten memory, graphs and numbers that are none, the riskiest first."""
    case = CheckCase("repeat", "lstm", "float16", "cooperative", 512, 16, 64)
    repeat = [
        case,
        replace(case, variant="cluster", hidden=256),
        # A part of W_hh is read again at every step.
        replace(case, hidden=1536),
        replace(case, cell="gru", dtype="float32_tf32", hidden=1536, batch=3, form="packed"),
        replace(case, dtype="bfloat16", variant="cooperative+barrier"),
        replace(
            case,
            cell="gru",
            dtype="bfloat16",
            variant="cluster",
            hidden=128,
            batch=70,
            form="packed",
            directions=2,
        ),
        replace(case, cell="gru", dtype="bfloat16", hidden=1024, batch=70, directions=2),
        replace(case, variant="streaming", hidden=1024, dtype="float32_tf32"),
        replace(case, cell="rnn_tanh", hidden=500, batch=300, form="packed"),
        replace(case, cell="gru", variant="cooperative+barrier", directions=2, batch=300),
        replace(case, dtype="float32_tf32", hidden=256, batch=3, form="packed_unsorted"),
        replace(case, dtype="float32_tf32", variant="cluster", hidden=100, batch=300),
        replace(case, hidden=1000, variant="streaming", cell="gru", form="packed"),
        replace(case, variant="", hidden=64, dtype="bfloat16"),
        replace(case, cell="lstm_proj", variant="", directions=2, layers=2, form="packed"),
        replace(case, cell="rnn_relu", dtype="float32", variant="cooperative", hidden=768),
        replace(case, variant="stepwise", hidden=100, steps=20),
        replace(case, dtype="bfloat16", hidden=1024, batch=64, training=False, steps=300),
    ]
    case = CheckCase("poison", "lstm", "float16", "", 100, 17, 12)
    poison = [
        case,
        replace(case, cell="gru", dtype="bfloat16", form="packed", directions=2, hidden=500),
        replace(case, variant="cluster", hidden=104, form="packed_unsorted"),
        replace(case, cell="lstm_proj", form="packed_unsorted", directions=2),
        replace(case, cell="rnn_tanh", dtype="float32_tf32", variant="streaming", hidden=500),
        replace(case, cell="gru", dtype="float32", variant="stepwise", directions=2, layers=2),
        replace(case, variant="cooperative+barrier", hidden=300, form="batch_first", batch=70),
        replace(case, cell="rnn_relu", variant="resident", hidden=63, hx=False),
        replace(case, hidden=2048, directions=2, form="packed"),
    ]
    case = CheckCase("graph", "lstm", "float16", "", 500, 17, 20)
    graph = [
        replace(case, training=False),
        case,
        replace(case, cell="gru", dtype="bfloat16", directions=2, layers=2),
        replace(case, variant="cluster", hidden=256, layers=2),
        replace(case, cell="gru", form="packed", training=False),
        replace(case, cell="rnn_tanh", dtype="float32_tf32", variant="stepwise", hidden=100),
        replace(case, cell="lstm_proj", form="packed", hidden=64),
        replace(case, variant="cooperative+barrier", hidden=256),
    ]
    # Each takes the compiler seconds.
    case = CheckCase("compiled", "lstm", "float16", "", 500, 17, 20)
    compiled = [case, replace(case, cell="gru", dtype="bfloat16", hidden=128, training=False)]
    case = CheckCase("nonfinite", "lstm", "float16", "cooperative", 256, 17, 12)
    nonfinite = [
        case,
        replace(case, variant="cluster", dtype="bfloat16"),
        replace(case, cell="gru", dtype="bfloat16", variant="cooperative+barrier"),
        replace(case, cell="rnn_tanh", dtype="float32_tf32", variant="resident", hidden=63),
        replace(case, cell="rnn_relu", dtype="float32", form="packed"),
        replace(case, variant="streaming", dtype="float32", directions=2),
        replace(case, cell="gru", variant="stepwise", hidden=100),
    ]
    case = CheckCase("autocast", "lstm", "float32_tf32", "", 500, 17, 20)
    autocast = [
        replace(case, form="packed", directions=2),
        replace(case, cell="gru", layers=2, hx=False),
        replace(case, cell="lstm_proj", hidden=192),
        replace(case, cell="rnn_tanh", form="batch_first", training=False),
    ]
    case = CheckCase("devices", "lstm", "float16", "", 500, 17, 20)
    devices = [
        replace(case, hidden=512),
        replace(case, cell="gru", dtype="bfloat16", variant="cluster", hidden=128, form="packed"),
        replace(case, dtype="float32_tf32", directions=2, layers=2),
        replace(case, cell="rnn_tanh", variant="stepwise", hidden=100),
    ]
    return _in_turn(repeat, poison, graph, compiled, nonfinite, autocast, devices)


def _in_turn(*lists: list[CheckCase]) -> list[CheckCase]:
    longest = max(map(len, lists))
    return [cases[i] for i in range(longest) for cases in lists if i < len(cases)]


def _products() -> list[CheckCase]:
    """Every cell in every dtype in every variant, at a middling size of each variant."""
    sizes = {"resident": 64, "cluster": 128, "stepwise": 63}
    found = [
        CheckCase("numbers", cell, dtype, variant, sizes.get(variant, 320), 17, 7, directions=2)
        for variant in VARIANTS
        for dtype in DTYPES
        for cell in CELLS
        # Three products for one leave no room in registers for W_hh.
        if (variant, dtype) != ("cluster", "float32")
    ]
    random.Random(SEED).shuffle(found)
    return found


def _own() -> list[CheckCase]:
    """Users' cells, of which the kernels are generated: each variant and dtype, each kind of check.

    Their programs exchange what those of other cells do, so a few are enough.
    """
    case = CheckCase("numbers", "peephole", "float16", "resident", 64, 17, 7, directions=2)
    return [
        case,
        replace(case, cell="mgu", dtype="bfloat16", variant="cooperative", hidden=320),
        replace(case, dtype="float16", variant="cluster", hidden=192, form="packed"),
        replace(case, cell="ind_rnn", variant="", form="packed", hidden=500),
        replace(case, variant="streaming", dtype="float32_tf32", hidden=320, form="packed"),
        replace(case, variant="cooperative+barrier", dtype="bfloat16", hidden=500, directions=1),
        replace(case, cell="mgu", variant="stepwise", dtype="float32", hidden=63),
        replace(
            case, check="repeat", dtype="bfloat16", variant="cooperative", hidden=512, steps=64
        ),
        replace(case, check="poison", cell="mgu", variant="", hidden=100, form="packed_unsorted"),
        replace(case, check="graph", variant="", hidden=256, steps=20),
        replace(case, cell="mgu", variant="", hidden=1024, batch=70, layers=2, bias=False),
        replace(case, cell="ind_rnn", variant="", dtype="float32", batch=300, hx=False),
        # Large enough that cuBLAS makes the input's product.
        replace(
            case,
            cell="ind_rnn",
            variant="",
            dtype="bfloat16",
            hidden=1024,
            width=1024,
            batch=70,
            steps=60,
            directions=1,
        ),
    ]


def _extended() -> list[CheckCase]:
    """Options, lengths and resets: their kernels are generated, or multiply what they send."""
    case = CheckCase("numbers", "lstm_options", "float16", "", 256, 17, 9, EPISODES, directions=2)
    return [
        case,
        replace(case, cell="gru_options", dtype="bfloat16", variant="cooperative", hidden=500),
        replace(case, cell="lstm", dtype="float32_tf32", layers=2, hidden=100),
        replace(case, variant="cluster", hidden=128, form="padded"),
        replace(case, cell="rnn_options", variant="resident", hidden=64, form="packed"),
        replace(case, cell="gru_options", variant="streaming", dtype="float32", hidden=320),
        replace(case, variant="cooperative+barrier", dtype="bfloat16", hidden=320),
        replace(case, cell="gru_options", variant="stepwise", hidden=63, hx=False),
        replace(case, hidden=768, batch=70, training=False),
        replace(case, check="repeat", cell="gru_options", hidden=512, steps=64),
        replace(case, check="repeat", form="padded", variant="cluster", directions=1, steps=64),
        replace(case, check="poison", hidden=500),
    ]


def _crowds() -> list[CheckCase]:
    """So many sequences that resident programs take more than eight at once, or come in waves."""
    case = CheckCase("numbers", "lstm", "float16", "resident", 64, 2500, 7, training=False)
    return [
        case,
        replace(case, cell="gru", dtype="float32_tf32", hidden=32, training=True),
        replace(case, cell="rnn_tanh", dtype="bfloat16", training=True, form="packed"),
        replace(case, dtype="bfloat16", hidden=128, training=True),
    ]


def check_cases() -> list[CheckCase]:
    """All checks, the most informative first, the same at every call.

    1. A covering of all pairs of axis values, with the special checks let in between, one for two,
    and users' cells, options and crowds after the first few; 2. every cell, dtype and variant once.
    """
    pairs = [CheckCase("numbers", **values) for values in covering(AXES, SEED, _allowed)]
    specials = _specials()
    mixed: list[CheckCase] = []
    for number in range(0, max(len(pairs), 2 * len(specials)), 2):
        mixed += pairs[number : number + 2]
        mixed += specials[number // 2 : number // 2 + 1]
    added = [*_own(), *_extended(), *_crowds()]
    return _once([*mixed[:24], *added, *mixed[24:], *_products()])


def rehearsal_cases() -> list[CheckCase]:
    """Tiny ones, for Triton's interpreter: it knows no cooperative launch and no bfloat16."""
    case = CheckCase("numbers", "lstm", "float16", "resident", 5, 3, 3, "packed", 4)
    return [
        case,
        replace(case, cell="gru", dtype="float32", form="strided", directions=2),
        replace(
            case, cell="lstm_proj", dtype="float32", form="packed_unsorted", variant="stepwise"
        ),
        replace(case, cell="rnn_relu", form="batch_first", layers=2, variant="stepwise", hx=False),
        replace(case, cell="rnn_tanh", form="unbatched", batch=1, training=False),
        replace(case, variant="cooperative"),
        replace(case, check="repeat", cell="gru", variant="stepwise", steps=2),
        replace(case, check="poison", form="packed_unsorted"),
        replace(case, check="nonfinite", dtype="float32", form="padded", batch=5),
        replace(case, check="graph"),
        replace(case, check="autocast", dtype="float32"),
        replace(case, check="devices", dtype="float32", variant=""),
        replace(case, cell="peephole", variant="stepwise"),
        replace(case, cell="ind_rnn", variant="", dtype="float32", directions=2),
        replace(case, cell="lstm_options", dtype="float32", form=EPISODES, layers=2),
        replace(case, cell="gru_options", variant="stepwise"),
        replace(case, cell="rnn_options", form=EPISODES, training=False),
        replace(case, check="repeat", cell="lstm", form=EPISODES),
    ]


def _once(cases: Iterable[CheckCase]) -> list[CheckCase]:
    return list(dict.fromkeys(cases))
