"""torch.compile, torch.export and ONNX: a layer is one operator, whatever the length."""

import copy
import io
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch
from tolerances import (
    LAYERS,
    assert_close,
    assert_same_results,
    flat_outputs,
    random,
    random_state,
    run,
    twins,
)
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn import compiled as compiled_module
from triton_rnn import dispatch, functional, op
from triton_rnn.backends import native, torchscript
from triton_rnn.cells import CELLS

ROOT = Path(__file__).parent.parent
TIMEOUT = 240
KINDS = tuple(LAYERS)

pytestmark = [
    # Dynamo makes an instance of every autograd.Function that it traces, and hears from it.
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
    # Of the list of weights that torch.nn itself keeps on every recurrent module.
    pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Recorder:
    """A backend of torch.compile that runs a graph as it is and keeps its operators."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def layers(self):
        """The backends of all operators of ours in all graphs."""
        return [
            node.args[-2]
            for graph in self.graphs
            for node in graph
            if "triton_rnn" in str(node.target)
        ]


def run_compiled(module, input, hx=None, backend="aot_eager", **options):
    """As `run`, through torch.compile, one graph."""
    compiled = torch.compile(module, backend=backend, fullgraph=True, **options)
    with triton_rnn.allow_compile():
        return run(module, input, hx, call=compiled)


# --- The switch.


def test_allow_compile_called_holds_from_then_on_and_as_a_block_until_its_end():
    config = torch._dynamo.config
    assert not config.allow_rnn, "another test left it on"
    with triton_rnn.allow_compile():
        assert config.allow_rnn
        with triton_rnn.allow_compile():
            assert config.allow_rnn
        assert config.allow_rnn
    assert not config.allow_rnn
    with pytest.raises(ZeroDivisionError), triton_rnn.allow_compile():
        _ = 1 / 0
    assert not config.allow_rnn
    with config.patch(allow_rnn=False):
        triton_rnn.allow_compile()
        assert config.allow_rnn
    assert not config.allow_rnn


def test_allow_compile_holds_for_its_thread_as_dynamos_settings_do():
    seen = []
    with triton_rnn.allow_compile():
        thread = threading.Thread(target=lambda: seen.append(torch._dynamo.config.allow_rnn))
        thread.start()
        thread.join()
    assert seen == [False]


def test_without_the_switch_fullgraph_is_refused_and_says_the_switch():
    ours = triton_rnn.GRU(3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
        torch.compile(ours, backend="eager", fullgraph=True)(torch.randn(5, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_switch_the_graph_breaks_and_our_own_backend_runs(kind, monkeypatch):
    """Dynamo looks into none of our functions: it would have torch.nn's forward run instead."""
    theirs, ours = twins(kind, 3, 4, 2)
    served = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *args: served.append(1) or forward(*args))
    record = Recorder()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.float64), ours)
    input = random(20, 2, 3)
    with triton_rnn.use_backend("native"):
        output = torch.compile(model, backend=record)(input)[0]
    assert_close(output, theirs(model[0](input))[0])
    assert len(served) == 2, "one call for each layer"
    assert not record.layers()


# --- One graph.

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given_hx", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_has_torchs_numbers_and_gradients(kind, dtype, given_hx, options):
    theirs, ours = twins(kind, 3, 4, dtype=dtype, **options)
    input = random(5, 2, 3, dtype=dtype)
    batch = 5 if options.get("batch_first") else 2
    hx = random_state(ours, batch) if given_hx else None
    assert_same_results(run_compiled(ours, input, hx), run(theirs, input, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unbatched_input_is_in_the_graph_too(kind):
    theirs, ours = twins(kind, 3, 4, 2, bidirectional=True, batch_first=True)
    input, hx = random(5, 3), random_state(ours, None)
    assert_same_results(run_compiled(ours, input, hx), run(theirs, input, hx))
    record = Recorder()
    run_compiled(ours, input, hx, backend=record)
    assert record.layers() == ["auto/native"] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["native", "torchscript"])
def test_a_backend_asked_for_by_name_is_the_operators(kind, backend):
    theirs, ours = twins(kind, 3, 4, 2)
    input, hx = random(5, 2, 3), random_state(ours, 2)
    record = Recorder()
    with triton_rnn.use_backend(backend):
        run_compiled(ours, input, hx, backend=record)
        torch._dynamo.reset()
        actual = run_compiled(ours, input, hx)
    assert record.layers() == [backend] * 2
    assert_same_results(actual, run(theirs, input, hx))


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj"])
def test_the_reference_and_torchs_own_kernels_are_traced_without_the_operator(kind):
    theirs, ours = twins(kind, 3, 4, 2, bidirectional=True)
    input, hx = random(5, 2, 3), random_state(ours, 2)
    expected = run(theirs, input, hx)
    for backend in ("reference", "aten"):
        torch._dynamo.reset()
        record = Recorder()
        with triton_rnn.use_backend(backend):
            assert_same_results(run_compiled(ours, input, hx, backend=record), expected)
        assert len(record.graphs) == 1
        assert not record.layers()


def test_a_backend_that_cannot_be_in_the_graph_says_so():
    ours = triton_rnn.GRU(3, 4).half()
    with (
        triton_rnn.use_backend("native"),
        triton_rnn.allow_compile(),
        pytest.raises(
            RuntimeError, match=r"backend 'native' cannot run this call: dtype .*float16"
        ),
    ):
        torch.compile(ours, backend="eager")(torch.randn(5, 2, 3).half())


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_inference_leaves_the_choice_to_the_run(kind):
    """Sizes are known only then: "auto" is in the graph, and takes torch's kernels where due."""
    theirs, ours = twins(kind, 3, 4)
    record = Recorder()
    with torch.no_grad(), triton_rnn.allow_compile():
        compiled = torch.compile(ours, backend=record, fullgraph=True, dynamic=True)
        for steps in (4, 30):
            input = random(steps, 2, 3)
            outputs = flat_outputs(ours, compiled(input))
            assert_same_results(outputs, flat_outputs(theirs, theirs(input)))
    assert record.layers() == ["auto"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_does_not_grow_with_the_sequence(kind):
    sizes = []
    for steps in (5, 300):
        torch._dynamo.reset()
        _, ours = twins(kind, 3, 4)
        record = Recorder()
        run_compiled(ours, random(steps, 2, 3), backend=record)
        sizes.append([len(graph) for graph in record.graphs])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_other_lengths_and_batches_are_not_compiled_again(kind, grad):
    theirs, ours = twins(kind, 3, 4, 2, bidirectional=True)
    record = Recorder()
    compiled = torch.compile(ours, backend=record, fullgraph=True, dynamic=True)
    with triton_rnn.allow_compile(), torch.set_grad_enabled(grad):
        for steps, batch in ((4, 5), (7, 2), (9, 5), (30, 17)):
            input = random(steps, batch, 3)
            outputs = flat_outputs(ours, compiled(input))
            assert_same_results(outputs, flat_outputs(theirs, theirs(input)))
            if grad:
                gradients = torch.autograd.grad(outputs["output"].sum(), list(ours.parameters()))
                expected = torch.autograd.grad(theirs(input)[0].sum(), list(theirs.parameters()))
                for actual, value in zip(gradients, expected, strict=True):
                    assert_close(actual, value)
    assert len(record.graphs) == 1


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_dropout_between_layers_is_in_the_graph(kind):
    theirs, ours = twins(kind, 3, 4, 3, dropout=0.5)
    results = []
    for module, call in ((theirs, None), (ours, torch.compile(ours, backend="eager"))):
        torch.manual_seed(3)
        with triton_rnn.allow_compile():
            results.append(run(module, random(5, 2, 3), call=call))
    assert_same_results(results[1], results[0])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_malformed_calls_say_what_torch_says_in_a_graph_as_well(kind):
    theirs, ours = twins(kind, 3, 4)
    for input in (random(5, 2, 4), random(0, 2, 3), random(5, 2, 3).float()):
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(input)
        with triton_rnn.allow_compile(), pytest.raises(Exception, match=r"\w") as actual:
            torch.compile(ours, backend="eager")(input)
        assert str(expected.value) in str(actual.value)


def test_packed_input_and_autocast_are_torchs_to_trace():
    theirs, ours = twins("gru", 3, 4, dtype=torch.float32)
    compiled = torch.compile(ours, backend="eager")
    packed = pack_padded_sequence(random(5, 2, 3).float(), [5, 3])
    with triton_rnn.allow_compile():
        assert_close(compiled(packed)[0].data, theirs(packed)[0].data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(compiled(random(5, 2, 3).float())[0], theirs(random(5, 2, 3).float())[0])


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_of_a_gpu_is_casts_and_the_operator_in_float16(monkeypatch, kind, given):
    """The CPU's autocast in the place of CUDA's: its own dtype has no part in anything."""

    def casts(device, dtype):
        return dtype == torch.float32

    casts._dynamo_marked_constant = True
    monkeypatch.setattr(compiled_module, "_is_half", casts)
    module = twins(kind, 3, 4, num_layers=2, dtype=torch.float32)[1]
    half = copy.deepcopy(module).half()
    input, hx = random(5, 2, 3).float(), random_state(module, 2) if given else None
    seen = []

    def keep(graph, example_inputs):
        seen.append(graph)
        return graph

    found = []
    for one, on in ((module, True), (half, False)):
        torch._dynamo.reset()
        graph = torch.compile(one, backend=keep, fullgraph=True)
        x = input if on else input.half()
        state = hx
        if given and not on:
            state = tuple(s.half() for s in hx) if isinstance(hx, tuple) else hx.half()

        def call(*args, graph=graph, on=on):
            # Forward and backward, as a user's loop might have it.
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                return graph(*args)

        with triton_rnn.allow_compile(), triton_rnn.use_backend("torchscript"):
            found.append(run(one, x, state, call=call))
    assert all("triton_rnn.layer" in str(graph.graph) for graph in seen)
    cast, expected = found
    assert cast["output"].dtype == torch.float16
    assert cast["grad of weight_hh_l0"].dtype == torch.float32
    for name, value in expected.items():
        assert torch.equal(cast[name].half(), value), name


@pytest.mark.skipif(
    isinstance(native.library(torch.float32, "lstm"), str), reason="no C compiler here"
)
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_takes_the_operator_forward_and_back(kind):
    """torch.nn's own float32 LSTM does not get through it: mkldnn_rnn_layer has no such rule."""
    theirs, ours = twins(kind, 3, 4, 2, dtype=torch.float32)
    input, hx = random(5, 2, 3).float(), random_state(ours, 2)
    actual = run_compiled(ours, input, hx, backend="inductor", dynamic=True)
    assert_same_results(actual, run(theirs, input, hx))


def test_importing_the_package_does_not_import_dynamo():
    code = "import sys, triton_rnn; sys.exit('torch._dynamo' in sys.modules)"
    before = subprocess.run([sys.executable, "-c", code.replace("triton_rnn", "torch")], cwd=ROOT)
    after = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert after.returncode == before.returncode == 0


# --- The operator.


def operands(name, dtype=torch.float64):
    """input, h_0, c_0 and the weights of a layer both ways."""
    cell = CELLS[name]
    size = 3 if cell.projected else 4
    shapes = [(cell.gates * 4, 5), (cell.gates * 4, size)] + [(cell.gates * 4,)] * 2
    shapes += [(3, 4)] if cell.projected else []
    weights = [random(*shape, seed=i, dtype=dtype) / 2 for i, shape in enumerate(shapes * 2)]
    c_0 = random(2, 2, 4, seed=51, dtype=dtype) if cell.states == 2 else None
    tensors = [random(3, 2, 5, dtype=dtype), random(2, 2, size, seed=50, dtype=dtype), c_0]
    return [None if t is None else t.requires_grad_() for t in (*tensors, *weights)]


@pytest.mark.parametrize("backend", ["torchscript", "aten"])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_autocast_stays_out_of_the_operator(name, backend):
    """What it is given has been cast, if it was to be."""
    input, h_0, c_0, *weights = operands(name, torch.float32)
    arguments = (input, h_0, c_0, weights, name, True, False, backend, op.LAYOUT)
    expected = op.layer(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = op.layer(*arguments)
    assert all(map(torch.equal, found, expected))


# torch 2.14 itself checks .grad of what is no leaf, and hides the warning only where warnings
# are shown, not where they are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["native", "torchscript", "auto"])
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", list(CELLS))
def test_the_operator_keeps_torchs_rules_for_operators(name, save, backend):
    input, h_0, c_0, *weights = operands(name)
    torch.library.opcheck(
        torch.ops.triton_rnn.layer.default,
        (input, h_0, c_0, weights, name, True, save, backend, ""),
    )


@pytest.mark.parametrize("name", list(CELLS))
def test_the_backwards_operator_keeps_torchs_rules_for_operators(name):
    input, h_0, c_0, *weights = (
        None if t is None else t.detach() for t in operands(name, torch.float32)
    )
    states = CELLS[name].states
    for backend in ("native", "torchscript"):
        arguments = (input, h_0, c_0, weights)
        results = torch.ops.triton_rnn.layer(*arguments, name, True, True, backend, "")
        grads = [torch.ones_like(result) for result in results[: 1 + states]]
        torch.library.opcheck(
            torch.ops.triton_rnn.layer_backward.default,
            (grads, *arguments, results, name, True, backend),
        )


MISUSES = {
    "weight_shape": lambda t: t.__setitem__(4, random(12, 5)),
    "one_weight_less": lambda t: t.pop(),
    "bias_too_short": lambda t: t.__setitem__(5, random(11)),
    "weight_dtype": lambda t: t.__setitem__(4, t[4].float()),
    "h_0_dtype": lambda t: t.__setitem__(1, t[1].float()),
    "batches_differ": lambda t: t.__setitem__(1, random(2, 3, 4)),
    "c_0_for_a_gru": lambda t: t.__setitem__(2, random(2, 2, 4)),
    "h_0_of_more_units": lambda t: t.__setitem__(1, random(2, 2, 400)),
    "h_0_of_one_sequence": lambda t: t.__setitem__(1, random(2, 4)),
    "a_third_direction": lambda t: t.extend(t[3:7]) or t.__setitem__(1, random(3, 2, 4)),
    "no_direction": lambda t: t.__delitem__(slice(3, None)) or t.__setitem__(1, random(0, 2, 4)),
    "no_weights": lambda t: t.__delitem__(slice(3, None)),
    "input_of_one_sequence": lambda t: t.__setitem__(0, random(3, 5)),
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("backend", ["native", "torchscript", "auto"])
def test_the_operator_refuses_tensors_that_do_not_fit(backend, misuse):
    """It can be called by anybody, and the C loops would read beyond the arrays."""
    tensors = [None if t is None else t.detach() for t in operands("gru")]
    MISUSES[misuse](tensors)
    input, h_0, c_0, *weights = tensors
    with pytest.raises(RuntimeError, match="triton_rnn::layer"):
        torch.ops.triton_rnn.layer(input, h_0, c_0, weights, "gru", True, False, backend, "")


def test_the_operator_refuses_a_cell_that_there_is_not():
    input, h_0, c_0, *weights = (None if t is None else t.detach() for t in operands("gru"))
    with pytest.raises(RuntimeError, match="no cell 'grue'"):
        torch.ops.triton_rnn.layer(input, h_0, c_0, weights, "grue", True, False, "auto", "")


BACKWARD_MISUSES = {
    "gradient_of_fewer_steps": lambda grads, results: grads.__setitem__(0, grads[0][1:]),
    "a_gradient_less": lambda grads, results: grads.pop(),
    "gradient_dtype": lambda grads, results: grads.__setitem__(1, grads[1].float()),
    "saved_too_short": lambda grads, results: results.__setitem__(-1, results[-1][:-1]),
    "a_result_less": lambda grads, results: results.__delitem__(slice(1, None)),
}


@pytest.mark.parametrize("misuse", BACKWARD_MISUSES)
def test_the_backwards_operator_refuses_tensors_that_do_not_fit(misuse):
    arguments = input, h_0, c_0, weights = _detached("gru")
    results = torch.ops.triton_rnn.layer(*arguments, "gru", True, True, "native", "")
    grads = [torch.ones_like(result) for result in results[:2]]
    BACKWARD_MISUSES[misuse](grads, results)
    with pytest.raises(RuntimeError, match="triton_rnn::layer_backward"):
        torch.ops.triton_rnn.layer_backward(
            grads, input, h_0, c_0, weights, results, "gru", True, "native"
        )


def _detached(name):
    input, h_0, c_0, *weights = (None if t is None else t.detach() for t in operands(name))
    return input, h_0, c_0, weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_whose_backend_cannot_any_more_falls_back_if_nobody_asked_for_it(kind, monkeypatch):
    """As an eager call does: the graph was made for a backend that `auto` had chosen."""
    theirs, ours = twins(kind, 3, 4, 2, bidirectional=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    input, served = random(5, 2, 3), []
    with triton_rnn.allow_compile():
        first = run(ours, input, call=compiled)
        monkeypatch.setattr(native, "supports", lambda request: "no more")
        dispatch._choose.cache_clear()
        forward = torchscript.forward
        monkeypatch.setattr(
            torchscript, "forward", lambda *given: served.append(1) or forward(*given)
        )
        second = run(ours, input, call=compiled)
    dispatch._choose.cache_clear()
    assert served
    expected = run(theirs, input)
    assert_same_results(first, expected)
    assert_same_results(second, expected)


def test_a_graph_for_a_backend_that_was_asked_for_does_not_fall_back(monkeypatch):
    ours, input = triton_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with triton_rnn.allow_compile(), triton_rnn.use_backend("native"):
        compiled(input)
        monkeypatch.setattr(native, "supports", lambda request: "no more")
        dispatch._choose.cache_clear()
        with pytest.raises(triton_rnn.BackendError, match="'native' cannot run this call: no more"):
            compiled(input)
    dispatch._choose.cache_clear()


def test_another_backend_than_the_graphs_is_refused():
    """It would be ignored: Dynamo cannot see that another one is asked for."""
    ours, input = triton_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with triton_rnn.allow_compile():
        expected = compiled(input)[0]
        for name in ("reference", "triton", "aten"):
            with (
                triton_rnn.use_backend(name),
                pytest.raises(triton_rnn.BackendError, match=f"'{name}'.*its graph was made for"),
            ):
                compiled(input)
        with triton_rnn.use_backend("auto"):
            assert torch.equal(compiled(input)[0], expected)
        torch._dynamo.reset()
        with triton_rnn.use_backend("torchscript"):
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(input)[0], expected)
        torch.testing.assert_close(compiled(input)[0], expected)


def test_a_graph_that_chooses_when_it_runs_takes_what_is_asked_for_then(monkeypatch):
    ours, input, served = triton_rnn.GRU(3, 4).requires_grad_(False), torch.randn(5, 2, 3), []
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with triton_rnn.allow_compile():
        expected = compiled(input)[0]
        forward = torchscript.forward
        monkeypatch.setattr(
            torchscript, "forward", lambda *given: served.append(1) or forward(*given)
        )
        for name in ("torchscript", "reference", "aten"):
            with triton_rnn.use_backend(name):
                torch.testing.assert_close(compiled(input)[0], expected)
        with triton_rnn.use_backend("triton"), pytest.raises(triton_rnn.BackendError):
            compiled(input)
    assert len(served) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_be_changed_in_place_in_a_graph_and_after_it(kind):
    theirs, ours = twins(kind, 3, 4, 2)
    inside = torch.compile(
        lambda x: torch.relu_(ours(x)[0]).sum(), backend="aot_eager", fullgraph=True
    )
    after = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = []
    with triton_rnn.allow_compile():
        for loss in (
            lambda x: theirs(x)[0].relu().sum(),
            inside,
            lambda x: after(x)[0].relu_().sum(),
        ):
            input = random(5, 2, 3).requires_grad_()
            loss(input).backward()
            found.append(input.grad)
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


def test_a_graph_names_what_the_backends_of_this_version_save():
    """Else one that a compiler has kept on disk would be run with what another version saves."""
    recorder = Recorder()
    module = triton_rnn.GRU(3, 4)
    with triton_rnn.allow_compile():
        torch.compile(module, backend=recorder, fullgraph=True)(torch.randn(5, 2, 3))
    (node,) = (n for n in recorder.graphs[0] if "triton_rnn" in str(n.target))
    assert node.args[-1] == op.LAYOUT
    loops = Path(triton_rnn.__file__).parent / "backends" / "native"
    read = b"".join(
        file.read_bytes() for file in (loops / "recurrence.c", *sorted(loops.glob("*.h")))
    )
    assert b"kept_of(i64 cell" in read, "where it says what a row keeps"
    assert f"{triton_rnn.__version__}:{zlib.crc32(read):08x}" == op.LAYOUT


# --- torch.export and ONNX.


class Tagger(torch.nn.Module):
    """A recurrent network as programs have them: a layer, and a linear one after it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = torch.nn.Linear(inner.hidden_size * (2 if inner.bidirectional else 1), 2)

    def forward(self, input):
        return self.head(self.inner(input)[0])


def tagger(kind):
    _, ours = twins(kind, 3, 4, 2, dtype=torch.float32, bidirectional=True, batch_first=True)
    return Tagger(ours).eval()


def export(model):
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=2), 1: dim("seq_len", min=2)}
    return torch.export.export(model, (torch.randn(2, 5, 3),), dynamic_shapes={"input": sizes})


EXPORTED = ["rnn_tanh", "gru", "lstm"]
LOADER = """
import sys, torch, triton_rnn
module = torch.export.load(sys.argv[1]).module()
inputs, outputs = torch.load(sys.argv[2])
for input, expected in zip(inputs, outputs):
    torch.testing.assert_close(module(input), expected)
print("same")
"""


@pytest.mark.parametrize("with_compiler", [True, False], ids=["compiler", "no_compiler"])
def test_a_saved_program_runs_in_a_fresh_process_on_other_sizes(tmp_path, with_compiler):
    """One without a C compiler too: what runs the program is chosen there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not with_compiler:
        environment |= {"CC": "no-such-compiler", "TRITON_RNN_CACHE": str(tmp_path / "cache")}
    children = []
    for kind in EXPORTED:
        model = tagger(kind)
        program = export(model)
        assert any("triton_rnn.layer" in str(node.target) for node in program.graph.nodes)
        inputs = [torch.randn(n, t, 3) for n, t in ((2, 5), (3, 2), (4, 40))]
        paths = [str(tmp_path / f"{kind}.{end}") for end in ("pt2", "pt")]
        torch.export.save(program, paths[0])
        torch.save((inputs, [model(input).detach() for input in inputs]), paths[1])
        command = [sys.executable, "-c", LOADER, *paths]
        children.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    for child in children:
        assert child.communicate(timeout=TIMEOUT)[0].strip() == "same"


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_exported_program_can_be_trained(kind):
    model = tagger(kind)
    module = export(model).module()
    input = torch.randn(3, 7, 3)
    model(input).square().sum().backward()
    module(input).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, expected[name].grad, name)


def test_a_program_exported_for_others_has_no_operator_of_ours():
    with triton_rnn.use_backend("aten"):
        program = torch.export.export(tagger("gru"), (torch.randn(2, 5, 3),))
    assert not any("triton_rnn" in str(node.target) for node in program.graph.nodes)


def test_an_exported_program_refuses_no_steps_as_torch_does():
    ours = triton_rnn.GRU(3, 4)
    sizes = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(ours, (torch.randn(5, 2, 3),), dynamic_shapes={"input": sizes})
    layer = torch.ops.triton_rnn.layer
    weights = list(ours.parameters())
    empty, h_0 = torch.randn(0, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(empty, h_0, None, weights, "gru", True, False, "auto", "")
    assert program.module()(torch.randn(9, 2, 3))[0].shape == (9, 2, 4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("dynamo", [True, False], ids=["by_export", "by_trace"])
@pytest.mark.parametrize("restored", [True, False], ids=["restored", "ours"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_onnx_file_of_a_model_gives_its_numbers_in_onnx_runtime(kind, restored, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    model = tagger(kind)
    expected = model(torch.ones(2, 5, 3)).detach()
    if restored:
        model = triton_rnn.restore(model)
    file = io.BytesIO()
    inputs = (torch.randn(2, 5, 3),)
    if dynamo:
        torch.onnx.export(model, inputs, dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, inputs, file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]
    (actual,) = session.run(None, {name: torch.ones(2, 5, 3).numpy()})
    assert_close(torch.from_numpy(actual), expected)


def test_functional_forward_is_not_marked_for_good():
    """The mark keeps Dynamo from starting there, not from tracing it inside a graph."""
    _, ours = twins("gru", 3, 4)
    record = Recorder()
    with triton_rnn.allow_compile():
        torch.compile(lambda x: functional.forward(ours, x, None), backend=record, fullgraph=True)(
            random(5, 2, 3)
        )
    assert record.layers() == ["auto/native"]


@pytest.mark.parametrize(
    ("options", "given"),
    [({}, {"lengths": torch.tensor([5, 2])}), ({"layer_norm": True}, {}), ({"zoneout": 0.1}, {})],
    ids=["lengths", "layer_norm", "zoneout"],
)
def test_what_torch_does_not_have_cannot_be_exported_and_says_so(options, given):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = triton_rnn.GRU(3, 4, **options)

        def forward(self, input):
            return self.inner(input, **given)[0]

    with pytest.raises(triton_rnn.BackendError, match=r"while torch\.export traces it"):
        torch.export.export(Model(), (torch.randn(5, 2, 3),))
