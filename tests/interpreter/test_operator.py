"""A layer as one operator: what torch.compile and torch.export see of it."""

import itertools

import pytest
import torch

import triton_rnn
from tests.tolerances import LAYERS, assert_same_results, random, random_state, run, twins
from triton_rnn.cells import CELLS

# Dynamo and torch.export warn of things of their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def allow_rnn():
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def operands(name):
    cell = CELLS[name]
    output_size = 3 if cell.projected else 4
    weights = []
    for _ in range(2):
        shapes = [(cell.gates * 4, 5), (cell.gates * 4, output_size)] + [(cell.gates * 4,)] * 2
        shapes += [(3, 4)] if cell.projected else []
        weights += [random(*s, seed=len(weights) + i) / 2 for i, s in enumerate(shapes)]
    c_0 = random(2, 2, 4, seed=51) if cell.states == 2 else None
    tensors = [random(3, 2, 5), random(2, 2, output_size, seed=50), c_0, *weights]
    return [None if t is None else t.float().requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", list(CELLS))
def test_the_operator_keeps_torchs_rules_for_operators(name):
    input, h_0, c_0, *weights = operands(name)
    torch.library.opcheck(
        torch.ops.triton_rnn.layer.default,
        (input, h_0, c_0, weights, name, True, True, "triton", ""),
    )


@pytest.mark.parametrize(
    ("kind", "batch_first"), zip(LAYERS, itertools.cycle([False, True]), strict=False)
)
def test_a_compiled_module_is_one_graph_with_the_operator_in_it(kind, batch_first, allow_rnn):
    theirs, ours = twins(
        kind, 5, 4, 2, dtype=torch.float32, bidirectional=True, batch_first=batch_first
    )
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    input = random(3, 2, 5).float()
    with triton_rnn.use_backend("triton"):
        torch.compile(ours, backend=record, fullgraph=True)(input)
        assert len(graphs) == 1
        assert sum("triton_rnn" in target for target in graphs[0]) == 2, "one for each layer"

        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
        hx = random_state(ours, 3 if batch_first else 2)
        actual = run(ours, input, hx, prepare=lambda x: x)
        outputs, state = compiled(input, hx)
    assert_same_results(actual, run(theirs, input, hx))
    expected, expected_state = theirs(input, hx)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(state, expected_state)


def test_gradients_pass_through_a_compiled_module(allow_rnn):
    theirs, ours = twins("lstm", 5, 4, dtype=torch.float32)
    input = random(6, 2, 5).float()
    with triton_rnn.use_backend("triton"):
        torch.compile(ours, backend="aot_eager", fullgraph=True)(input)[0].square().sum().backward()
    theirs(input)[0].square().sum().backward()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_other_lengths_and_batches_are_not_compiled_again(allow_rnn):
    ours = triton_rnn.GRU(5, 4)
    count = 0

    def record(graph, _):
        nonlocal count
        count += 1
        return graph

    compiled = torch.compile(ours, backend=record, fullgraph=True, dynamic=True)
    with triton_rnn.use_backend("triton"), torch.no_grad():
        for seq_len, batch in ((4, 3), (7, 2), (9, 5)):
            output, _ = compiled(torch.randn(seq_len, batch, 5))
            assert output.shape == (seq_len, batch, 4)
    assert count == 1


def test_an_exported_module_runs_on_other_sizes_after_it_was_saved(tmp_path):
    theirs, ours = twins("gru", 5, 4, dtype=torch.float32)
    sizes = {0: torch.export.Dim("seq_len", min=2), 1: torch.export.Dim("batch", min=2)}
    with triton_rnn.use_backend("triton"), torch.no_grad():
        program = torch.export.export(
            ours.eval(), (torch.randn(4, 3, 5),), dynamic_shapes={"input": sizes}
        )
        assert any("triton_rnn" in str(node.target) for node in program.graph.nodes)
        assert len(program.state_dict) == 4, "the weights are the program's, not constants"
        path = tmp_path / "gru.pt2"
        torch.export.save(program, path)
        input = random(7, 2, 5).float()
        actual = torch.export.load(path).module()(input)
    torch.testing.assert_close(actual[0], theirs(input)[0].detach())


def test_another_backend_by_name_is_what_is_traced(allow_rnn):
    ours = triton_rnn.GRU(5, 4)
    targets = []

    def record(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with triton_rnn.use_backend("aten"):
        torch.compile(ours, backend=record)(torch.randn(4, 3, 5))
    assert targets
    assert not any("triton_rnn" in target for target in targets)
