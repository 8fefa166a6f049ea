"""A user's cell in the C loops: `recurrence.c`, compiled for that one cell.

Its numbers go in as macros, its two pointwise steps as a generated header, `own_cell.h`. Both are
in the key of the compiled library, so a cell is compiled once per machine for each type of numbers.
"""

from collections.abc import Sequence

import torch

from triton_rnn.backends import locks
from triton_rnn.backends.native.parts import Library
from triton_rnn.cells import OwnCell
from triton_rnn.own.expression import Node, in_c
from triton_rnn.own.program import Program

_making = locks.Once()
# By cell, which is told apart by identity, and dtype.
_made: dict[tuple[OwnCell, torch.dtype], Library] = {}


def macros(program: Program) -> tuple[str, ...]:
    """A cell's numbers, as flags of the compiler."""
    numbers = {
        "GATES": program.gates,
        "PRODUCTS": program.products,
        "STATES": program.states,
        "UNIT_WEIGHTS": program.unit_weights,
        "KEPT": len(program.kept),
        "GRADS": len(program.grads),
        "PAST": int(program.grad_states[0] is not None),
    }
    lists = {
        "STARTS": program.starts,
        "INPUT_SLOTS": program.input_slots,
        "HIDDEN_SLOTS": program.hidden_slots,
    }
    flags = [f"-DOWN_{name}={number}" for name, number in numbers.items()]
    # An array is not empty in C, and what is not there is not read.
    flags += [f"-DOWN_{name}={','.join(map(str, some or (0,)))}" for name, some in lists.items()]
    return tuple(flags)


def _function(head: str, lines: Sequence[str]) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"INLINE void {head}\n{{\n{body}}}\n"


def header(program: Program) -> str:
    """`own_cell.h`: the pointwise step of one unit-vector of one row, forward and backward."""
    places = {"input": "input", "hidden": "hidden", "state": "state", "unit": "own"}
    leaves = program.leaves.items()
    known = {node: f"{places[kind]}[{number}]" for (kind, number), node in leaves if kind in places}
    stores = [(f"next[{s}]", node) for s, node in enumerate(program.results)]
    stores += [(f"kept[{k}]", node) for k, node in enumerate(program.kept)]
    forward = _function(
        "own_forward(const vec *input, const vec *hidden, const vec *state, const vec *own, "
        "vec *next, vec *kept)",
        ["(void)input, (void)hidden, (void)state, (void)own, (void)kept;", *in_c(stores, known)],
    )

    places = {"grad": "grad_next", "unit": "own"}
    known = {node: f"{places[kind]}[{number}]" for (kind, number), node in leaves if kind in places}
    known |= {node: f"kept[{k}]" for k, node in enumerate(program.kept)}
    if ("state", 0) in program.leaves:
        known[program.leaves["state", 0]] = "before"
    backward_stores: list[tuple[str, Node | None]] = []
    backward_stores += [(f"grads[{g}]", node) for g, node in enumerate(program.grads)]
    backward_stores += [(f"grad_state[{s}]", n) for s, n in enumerate(program.grad_states)]
    backward_stores += [(f"grad_own[{k}]", n) for k, n in enumerate(program.grad_units)]
    backward = _function(
        "own_backward(const vec *grad_next, vec before, const vec *kept, const vec *own, "
        "vec *grads, vec *grad_state, vec *grad_own)",
        [
            "(void)grad_next, (void)before, (void)kept, (void)own, (void)grad_own;",
            *in_c([(place, node) for place, node in backward_stores if node is not None], known),
            *(f"{place} = (vec){{0}};" for place, node in backward_stores if node is None),
        ],
    )
    return forward + backward


def library(cell: OwnCell, dtype: torch.dtype) -> Library:
    """The functions of a cell."""
    with _making.held():
        found = _made.get((cell, dtype))
        if found is None:
            assert cell.program is not None
            headers = {"own_cell.h": header(cell.program)}
            found = Library(dtype, "OWN", macros(cell.program), headers)
            _made[cell, dtype] = found
        return found
