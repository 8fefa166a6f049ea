"""What a launch of a kernel is, for Triton's profiler Proton: name, operations, bytes.

Triton calls these with the kernel's arguments by name, only while a profiler listens. Operations
are the useful ones, two per multiply-add of the matrix products; bytes are the least that has to be
read and written once. Nothing here looks into a tensor, so nothing waits for the device.
"""

from collections.abc import Mapping
from typing import Any


def _described(name: str, itemsize: int, operations: float, bytes: float) -> dict[str, Any]:
    # Proton's keys: the width of what is multiplied, in bits.
    return {"name": name, f"flops{8 * itemsize}": int(operations), "bytes": int(bytes)}


def matmul_metadata(grid: Any, kernel: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """A product (M, K) x (K, N) of each direction, side by side or added up."""
    m, n, k, directions = args["M"], args["N"], args["K"], args["D"]
    itemsize = args["a_ptr"].element_size()
    results = 1 if args["SUM"] else directions
    moved = directions * k * (m + n) + results * m * n
    name = f"triton_rnn_matmul_M{m}_N{n}_K{k}"
    return _described(name, itemsize, 2 * directions * m * n * k, itemsize * moved)


def _recurrence(name: str, rows: int, args: Mapping[str, Any], moved: int) -> dict[str, Any]:
    """A recurrence that moves `moved` numbers a hidden unit and row, and W_hh once."""
    size, gates, directions = args["H"], args["GATES"], args["AT_ONCE"]
    itemsize = args["gates_ptr"].element_size()
    # A stepwise launch is a share of the steps.
    active = rows * (args["end"] - args["begin"]) / max(args["T"], 1)
    operations = 2 * active * gates * size * size * directions
    numbers = directions * size * (active * moved + gates * size)
    return _described(f"{name}_H{size}_N{args['N']}", itemsize, operations, itemsize * numbers)


def forward_metadata(grid: Any, kernel: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """The recurrence, forward: reads preactivations, writes h and what the backward needs."""
    rows = args["gates_ptr"].shape[0]
    moved = args["INPUTS"] + 1 + args["SAVED"] + args["SAVE_C"]
    return _recurrence("triton_rnn_recurrence_forward", rows, args, moved)


def backward_metadata(grid: Any, kernel: Any, args: Mapping[str, Any]) -> dict[str, Any]:
    """The recurrence, backward: reads what was saved and the gradient of h, writes the gates'."""
    rows = args["grad_gates_ptr"].shape[0]
    moved = args["SAVED"] + args["WIDTH"] + 2 + args["HAS_C"]
    return _recurrence("triton_rnn_recurrence_backward", rows, args, moved)
