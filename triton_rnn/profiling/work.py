"""Operations and bytes of a layer's phases, counted on paper.

Operations are those of matrix products, two per multiply-add; the pointwise arithmetic of a cell is
some tens per hidden unit and step and is not counted. Bytes are the least that has to cross the
memory's border if everything is read once and written once: a phase may move more.
"""

from typing import NamedTuple

from triton_rnn.cells import OwnCell
from triton_rnn.request import Request


class Work(NamedTuple):
    """Operations and bytes."""

    operations: int = 0
    bytes: int = 0

    def plus(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def forward_work(request: Request, rows: int) -> dict[str, Work]:
    """Work of the forward's phases, all directions of a layer; `rows` is T * N, or packed rows."""
    size, out, item = request.hidden_size, request.output_size, request.dtype.itemsize
    gate_rows, hidden_rows = request.cell.gates * size, _hidden_rows(request)
    projection = Work(
        2 * rows * request.input_size * gate_rows,
        item * (rows * request.input_size + request.input_size * gate_rows + rows * gate_rows),
    )
    recurrence = Work(
        2 * rows * (out * hidden_rows + (size * out if request.cell.projected else 0)),
        item * (rows * gate_rows + out * hidden_rows + rows * out),
    )
    return {
        "projection": _times(projection, request.directions),
        "recurrence": _times(recurrence, request.directions),
    }


def backward_work(request: Request, rows: int) -> dict[str, Work]:
    """Work of the backward's phases, every gradient asked for."""
    size, out, item = request.hidden_size, request.output_size, request.dtype.itemsize
    gate_rows, hidden_rows = request.cell.gates * size, _hidden_rows(request)
    projected = size * out if request.cell.projected else 0
    recurrence = Work(
        2 * rows * (out * hidden_rows + projected),
        item * (2 * rows * gate_rows + out * hidden_rows + 2 * rows * out),
    )
    weights = Work(
        2 * rows * (2 * request.input_size * gate_rows + out * hidden_rows + projected),
        item
        * (
            rows * (gate_rows + 2 * request.input_size + out)
            + 2 * gate_rows * request.input_size
            + hidden_rows * out
        ),
    )
    return {
        "backward.recurrence": _times(recurrence, request.directions),
        "backward.weights": _times(weights, request.directions),
    }


def _hidden_rows(request: Request) -> int:
    """Rows of weight_hh: a user's cell may have other products than gates."""
    cell = request.cell
    return (cell.products if isinstance(cell, OwnCell) else cell.gates) * request.hidden_size


def total(work: dict[str, Work]) -> Work:
    """All phases together."""
    found = Work()
    for part in work.values():
        found = found.plus(part)
    return found


def _times(work: Work, count: int) -> Work:
    return Work(count * work.operations, count * work.bytes)
