"""What a cell is: one frozen record each, and one table of all cells."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Cell:
    """One recurrent cell, as every backend sees it.

    Attributes:
        name: key of the cell in every table of this package (``"lstm"``).
        gates: G, the number of gates; ``weight_ih`` is (G * hidden_size, input_size).
        states: 1 when the state is h, 2 when it is (h, c).
        projected: True when h is ``weight_hr`` times the cell's output (LSTM with ``proj_size``).
    """

    name: str
    gates: int
    states: int = 1
    projected: bool = False


RNN_TANH = Cell("rnn_tanh", gates=1)
RNN_RELU = Cell("rnn_relu", gates=1)
GRU = Cell("gru", gates=3)
LSTM = Cell("lstm", gates=4, states=2)
LSTM_PROJECTED = Cell("lstm_projected", gates=4, states=2, projected=True)

CELLS = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, GRU, LSTM, LSTM_PROJECTED)}

# torch.nn calls a cell by its `mode`; a projected LSTM has the mode of the plain one.
MODES = {"RNN_TANH": RNN_TANH, "RNN_RELU": RNN_RELU, "GRU": GRU, "LSTM": LSTM}
