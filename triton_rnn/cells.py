"""What a cell is: one frozen record each, and one table of all cells."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_rnn.own.program import Program


@dataclass(frozen=True, eq=False)
class Cell:
    """One recurrent cell, as every backend sees it.

    Attributes:
        name: key of the cell in every table of this package (``"lstm"``).
        gates: G, the number of gates; ``weight_ih`` is (G * hidden_size, input_size).
        states: 1 when the state is h, 2 when it is (h, c).
        projected: True when h is ``weight_hr`` times the cell's output (LSTM with ``proj_size``).
        fifth: True when a direction has a weight behind its two matrices and two biases.
        together: of a cell with layer normalization, how many gates after each other are normalized
            as one. Its fifth weight is (2 G + 2, H), or (2 G, H) for a cell without c: the gains of
            ``weight_ih @ x`` and of ``weight_hh @ h``, the gain and the shift of c.
    """

    name: str
    gates: int
    states: int = 1
    projected: bool = False
    fifth: bool = False
    together: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class OwnCell(Cell):
    """A cell that a user wrote (`own.module.Recurrent`); in no table.

    Its h_0 is (D, N, H), its c_0 all other states beside each other, (D, N, (states - 1) * H). Its
    layer has five weights in each direction: weight_ih, weight_hh (products * H, H)[, bias_ih,
    bias_hh], and (unit_weights, H), whichever of them are empty.

    Attributes:
        products: how many gates have a part of ``weight_hh @ h``.
        unit_weights: how many numbers are learned for each hidden unit.
        step: the user's function.
        program: what it computes.
        number: tells it from all others of the process.
    """

    fifth: bool = True
    products: int = 0
    unit_weights: int = 0
    step: Callable[..., Any] = tuple
    program: "Program | None" = None
    number: int = field(default_factory=itertools.count().__next__)


@dataclass(frozen=True, eq=False)
class RegularizedCell(Cell):
    """One of torch's cells that is given more at a step (`own.regularized`); in no table.

    For kernels that are generated from a pointwise step. Its layer has the weights of the plain
    one's; `gates` and `states` are the plain one's too.

    Attributes:
        plain: the cell that it is without.
        program: what it computes; None if that is what the plain one does.
        clip_hidden, clip_cell: the largest absolute values of h and of c, 0.0 for any.
        zoneout: of each state the part that stays as it was, or None if a mask says what.
        locked: whether h is multiplied by a mask of each sequence before W_hh multiplies it.
        shows_c: whether c after every step is a result.
    """

    plain: Cell | None = None
    program: "Program | None" = None
    clip_hidden: float = 0.0
    clip_cell: float = 0.0
    zoneout: tuple[float | None, ...] = ()
    locked: bool = False
    shows_c: bool = False


RNN_TANH = Cell("rnn_tanh", gates=1)
RNN_RELU = Cell("rnn_relu", gates=1)
GRU = Cell("gru", gates=3)
LSTM = Cell("lstm", gates=4, states=2)
LSTM_PROJECTED = Cell("lstm_projected", gates=4, states=2, projected=True, fifth=True)

CELLS = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED)}

# With layer normalization (`triton_rnn.normalized`), by torch's mode. torch has none of them, so
# they are in no other table.
NORMALIZED = {
    "GRU": Cell("gru_normalized", gates=3, fifth=True, together=(2, 1)),
    "LSTM": Cell("lstm_normalized", gates=4, states=2, fifth=True, together=(4,)),
}

# torch.nn calls a cell by its `mode`; a projected LSTM has the mode of the plain one.
MODES = {"RNN_TANH": RNN_TANH, "RNN_RELU": RNN_RELU, "GRU": GRU, "LSTM": LSTM}
