"""What people use beside torch.nn: torch.compile, ONNX Runtime, a loop written by hand."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench.cases import Case
from bench.workload import TORCH, Results, Workload

COMPILED = "torch.compile"
ONNXRUNTIME = "onnxruntime"
LOOP = "loop"

# Dynamo unrolls the loop over time, and the C++ of a step takes about a second to compile.
MOST_COMPILED_STEPS = 12


def compiled_obstacle(case: Case) -> str | None:
    size = case.size
    if case.packed:
        return "Dynamo does not trace packed sequences"
    if size.seq_len * size.layers * size.directions > MOST_COMPILED_STEPS:
        return f"compiles over {MOST_COMPILED_STEPS} unrolled steps, a second each"
    if case.device == "cpu" and shutil.which("c++") is None and shutil.which("g++") is None:
        return "needs a C++ compiler"
    return None


class CompiledWorkload(Workload):
    """torch.nn's layer under torch.compile, with the switch that lets Dynamo look inside."""

    def __init__(self, case: Case, seed: int = 0):
        super().__init__(case, TORCH, seed)
        # Dynamo counts how often it compiled one function; every case is a new one.
        torch._dynamo.reset()
        self.call = torch.compile(self.layer, fullgraph=True, dynamic=False)
        self.context = self._allowed

    @staticmethod
    def _allowed() -> AbstractContextManager[object]:
        return torch._dynamo.config.patch(allow_rnn=True)  # type: ignore[no-any-return]

    def results(self) -> Results:
        with warnings.catch_warnings():
            # Inductor's own imports and compilations, of no concern to who reads a table of times.
            warnings.simplefilter("ignore")
            return super().results()


def loop_obstacle(case: Case) -> str | None:
    return "a loop over cells takes padded input" if case.packed else None


class LoopWorkload(Workload):
    """The loop that tutorials write: a cell of torch.nn for each layer and direction, step by step.

    It computes with the parameters of torch.nn's layer, so that its gradients are compared by name.
    """

    def __init__(self, case: Case, seed: int = 0):
        super().__init__(case, TORCH, seed)
        cells = {
            "rnn": torch.rnn_tanh_cell,
            "rnn-relu": torch.rnn_relu_cell,
            "gru": torch.gru_cell,
            "lstm": torch.lstm_cell,
        }
        self.cell = cells[case.cell]
        self.call = self._stack

    def _stack(self, input: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        final: list[tuple[Tensor, ...]] = []
        weights = iter(self.layer.all_weights)
        for _ in range(self.case.size.layers):
            sides = []
            for direction in range(self.case.size.directions):
                output, state = self._layer(input, next(weights), direction == 1)
                sides.append(output)
                final.append(state)
            input = torch.cat(sides, -1) if len(sides) > 1 else sides[0]
        states = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
        return input, states if len(states) == 2 else states[0]

    def _layer(
        self, input: Tensor, weights: list[Tensor], reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        zeros = input.new_zeros(input.shape[1], self.case.size.hidden_size)
        state = (zeros, zeros) if self.case.cell == "lstm" else (zeros,)
        outputs = []
        for step in reversed(input) if reverse else input:
            found = self.cell(step, state if len(state) == 2 else state[0], *weights)
            state = found if isinstance(found, tuple) else (found,)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if reverse else outputs), state


def onnx_obstacle(case: Case) -> str | None:
    if case.mode != "inference":
        return "ONNX Runtime's CPU package does inference only"
    if case.device != "cpu":
        return "measured on the CPU"
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'triton_rnn[onnx]'"
    return None


# torch stacks a cell's gates as (input, forget, cell, output) and (reset, update, new); ONNX as
# (input, output, forget, cell) and (update, reset, hidden): onnx.ai/onnx/operators, LSTM and GRU.
_ONNX_GATES = {"rnn": (0,), "rnn-relu": (0,), "gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}


def onnx_model(workload: Workload) -> Any:
    """The layers as an ONNX graph: one LSTM, GRU or RNN node each, lengths as an input."""
    from onnx import TensorProto, checker, helper, numpy_helper

    case, layer = workload.case, workload.layer
    size, gates = case.size, _ONNX_GATES[case.cell]
    operator = case.cell.split("-")[0].upper()
    options: dict[str, Any] = {"hidden_size": size.hidden_size}
    options["direction"] = "bidirectional" if size.directions == 2 else "forward"
    if operator == "GRU":
        # torch applies the reset gate after the product with W_hn, cuDNN's variant.
        options["linear_before_reset"] = 1
    if operator == "RNN":
        activation = "Relu" if case.cell == "rnn-relu" else "Tanh"
        options["activations"] = [activation] * size.directions
    nodes, initial = [], []

    def constant(name: str, value: Tensor) -> str:
        initial.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    def reordered(weight: Tensor) -> Tensor:
        blocks = weight.chunk(len(gates))
        return torch.cat([blocks[gate] for gate in gates])

    constant("merged", torch.tensor([0, 0, -1]))
    source, all_weights = "input", iter(layer.all_weights)
    ends: dict[str, list[str]] = {"h_n": [], "c_n": []}
    for number in range(size.layers):
        sides = [[reordered(w) for w in next(all_weights)] for _ in range(size.directions)]
        names = [
            constant(f"W{number}", torch.stack([w_ih for w_ih, *_ in sides])),
            constant(f"R{number}", torch.stack([w_hh for _, w_hh, *_ in sides])),
            constant(f"B{number}", torch.stack([torch.cat(biases) for _, _, *biases in sides])),
        ]
        outputs = [f"Y{number}", f"h{number}"] + ([f"c{number}"] if operator == "LSTM" else [])
        nodes.append(helper.make_node(operator, [source, *names, "lengths"], outputs, **options))
        # (T, D, N, H) to (T, N, D * H)
        moved = f"moved{number}"
        nodes.append(helper.make_node("Transpose", [f"Y{number}"], [moved], perm=[0, 2, 1, 3]))
        source = f"output{number}"
        nodes.append(helper.make_node("Reshape", [moved, "merged"], [source]))
        for name, end in zip(("h_n", "c_n"), outputs[1:], strict=False):
            ends[name].append(end)
    found = [name for name, parts in ends.items() if parts]
    for name in found:
        nodes.append(helper.make_node("Concat", ends[name], [name], axis=0))
    states = [size.layers * size.directions, "batch", size.hidden_size]
    dense = ["seq_len", "batch"]

    def value(name: str, shape: list[str | int], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "layers",
        [value("input", [*dense, size.input_size]), value("lengths", ["batch"], TensorProto.INT32)],
        [
            value(source, [*dense, size.directions * size.hidden_size]),
            *(value(name, states) for name in found),
        ],
        initial,
    )
    # An opset and a format that ONNX Runtime has read for years.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return model


class OnnxWorkload:
    """The same layers in ONNX Runtime's CPU provider, with torch's number of threads.

    A packed batch is its padded form and the lengths, as the operators take it; neither packing nor
    padding is timed. What the gate compares is packed again.
    """

    def __init__(self, case: Case, seed: int = 0):
        import onnxruntime

        workload = Workload(case, TORCH, seed)
        self.case = case
        self.context = nullcontext
        dense = workload.input
        if isinstance(dense, PackedSequence):
            dense, _ = pad_packed_sequence(dense)
        assert isinstance(dense, Tensor)
        full = [case.size.seq_len] * case.size.batch
        lengths = torch.tensor(case.size.lengths() if case.packed else full, dtype=torch.int32)
        self.feed = {"input": dense.numpy(), "lengths": lengths.numpy()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Its threads would otherwise take the cores from the side that comes next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            onnx_model(workload).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def step(self) -> Any:
        return self.session.run(None, self.feed)

    def results(self) -> Results:
        """As `Workload.results`."""
        output, *states = map(torch.from_numpy, self.step())
        results: Results = {}
        if self.case.packed:
            packed = pack_padded_sequence(output, torch.from_numpy(self.feed["lengths"]).long())
            results["batch_sizes"], output = packed.batch_sizes, packed.data
        results["output"] = output
        results.update(zip(("h_n", "c_n"), states, strict=False))
        return results
