"""A cell of one's own: its tracing, its derived backward, and the module made of it.

Cells and their plain loops are in own_cells.py.
"""

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_cells import (
    ALL,
    PLAIN,
    MinimalGatedUnit,
    OwnGRU,
    OwnLSTM,
    OwnRNN,
    PeepholeLSTM,
    ThreeStates,
    plain_loop,
)
from own_operations import CORNERS, ONE
from test_native import ROOT, sanitizers
from tolerances import assert_close, leaf, random
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import triton_rnn
from triton_rnn import Recurrent
from triton_rnn.backends import native
from triton_rnn.backends.native import build, own, rules
from triton_rnn.own import expression, program, trace

EVERY_CELL = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
NAMES = {OwnLSTM: "LSTM", OwnGRU: "GRU", OwnRNN: "RNN"}


@pytest.fixture
def backend(request):
    """One of the two that run users' cells, by name."""
    if request.param == "native" and build.compiler() is None:
        pytest.skip("there is no C compiler")
    with triton_rnn.use_backend(request.param):
        yield request.param


def define(function, **numbers):
    """A subclass with this step."""

    class Defined(Recurrent, **{"gates": 1, **numbers}):
        step = staticmethod(function)

    return Defined


def states_for(module, batch):
    """Random states as hx, leaves."""
    shape = (module.num_layers * (2 if module.bidirectional else 1), batch, module.hidden_size)
    dtype = module.weight_ih_l0.dtype
    found = [leaf(random(*shape, seed=20 + s, dtype=dtype)) for s in range(module.cell.states)]
    return found[0] if len(found) == 1 else tuple(found)


def flat(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def gradients(results, inputs):
    """Gradients of a random weighted sum."""
    weights = [random(*r.shape, seed=50 + i, dtype=r.dtype) for i, r in enumerate(results)]
    return torch.autograd.grad(results, inputs, weights, allow_unused=True, materialize_grads=True)


# Derived backwards


def assert_derived_is_autograd(function, rows=7, units=9, leaves=None, tolerance=None, **numbers):
    """Forward and backward of the program, as the C loops use it, against autograd."""
    counts = {"gates": 1, "products": 1, "states": 1, "unit_weights": 0, **numbers}
    traced = trace.trace(function, "step", **counts)
    p = program.derive(*traced, **counts)
    shapes = {"input": (rows, units), "hidden": (rows, units), "state": (rows, units)}
    shapes["unit"] = (units,)
    numbers_of = zip(shapes, ("gates", "products", "states", "unit_weights"), strict=True)
    tensors = {
        (kind, i): leaf(random(*shapes[kind], seed=97 * len(kind) + i))
        for kind, name in numbers_of
        for i in range(counts[name])
    }
    for key, value in (leaves or {}).items():
        tensors[key] = leaf(value)
    groups = [
        tuple(t for (kind, _), t in tensors.items() if kind == k)
        for k in ("input", "hidden", "state", "unit")
    ]
    expected = flat(function(*(groups if counts["unit_weights"] else groups[:3])))
    grads = [random(*e.shape, seed=70 + i) for i, e in enumerate(expected)]
    expected_grads = torch.autograd.grad(
        expected, list(tensors.values()), grads, allow_unused=True, materialize_grads=True
    )

    def value_of(key):
        kind, i = key
        if kind == "grad":
            return grads[i]
        plain = tensors[key].detach()
        starts = p.starts[i] if kind == "hidden" else -1
        return plain if starts < 0 else plain + tensors["input", starts].detach()

    leaves_now = {node: value_of(key) for key, node in p.leaves.items()}
    anything = {expression.Graph().leaf("none", 0): grads[0]}
    found = expression.evaluate([*p.results, *p.kept], {**anything, **leaves_now})
    for result, value in zip(found, expected, strict=False):
        assert_close(result.expand_as(value), value.detach(), "result")
    # The backward may only read what the C loops give it.
    given_back = dict(zip(p.kept, found[len(p.results) :], strict=True))
    for key, node in p.leaves.items():
        if key[0] in ("grad", "unit") or key == ("state", 0):
            given_back[node] = leaves_now[node]
    zero = torch.zeros(rows, units, dtype=torch.float64)
    roots = [*p.grads, *(g for g in (*p.grad_states, *p.grad_units) if g is not None)]
    values = dict(zip(roots, expression.evaluate(roots, {**anything, **given_back}), strict=True))
    nodes = [p.grads[slot] for slot in (*p.input_slots, *p.hidden_slots)]
    for node, (key, tensor), grad in zip(
        [*nodes, *p.grad_states, *p.grad_units], tensors.items(), expected_grads, strict=True
    ):
        value = zero if node is None else values[node].expand(rows, units)
        value = value.sum(0) if tensor.dim() == 1 else value
        assert_close(value, grad, f"gradient of {key}", tolerance)
    return p


@pytest.mark.parametrize("name", ONE)
def test_the_derived_gradient_of_an_operation_is_torchs_at_its_corners_too(name):
    function = ONE[name]
    corners = torch.tensor(CORNERS, dtype=torch.float64).expand(2, -1)
    assert_derived_is_autograd(
        lambda input, hidden, state: function(state[0]) + input[0] + hidden[0],
        rows=2,
        units=len(CORNERS),
        leaves={("state", 0): corners},
        # torch's own gradients of these have constants rounded to float32.
        tolerance=1e-7 if name in ("celu", "hardsigmoid") else None,
    )


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_every_operation_is_the_same_in_c(backend):
    """All of them in one cell, so that one compilation does."""

    def step(input, hidden, state):
        x = input[0]
        total = hidden[0] * 0
        functions = (ONE[name] for name in ONE if name not in ("celu", "hardsigmoid"))
        for number, function in enumerate(functions):
            total = total + torch.sigmoid(hidden[0] + number) * torch.tanh(0.1 * function(x))
        return total + 0.1 * torch.tanh(state[0])

    kind = define(step)
    # An identity projection, so that the corners reach the cell as they are.
    size = len(CORNERS)
    module = kind(size, size, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(size))
    x = leaf(torch.tensor(CORNERS, dtype=torch.float64).repeat(3, 2, 1))
    found = []
    for name in ("native", "reference"):
        with triton_rnn.use_backend(name):
            results = flat(module(x))
        found.append([*results, *gradients(results, [x, *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours.detach(), theirs.detach())


@EVERY_CELL
def test_the_derived_backward_of_a_cell_is_autograds(kind):
    cell = kind.cell
    assert_derived_is_autograd(
        cell.step,
        gates=cell.gates,
        products=cell.products,
        states=cell.states,
        unit_weights=cell.unit_weights,
    )


LEAVES = ("input0", "input1", "hidden0", "hidden1", "state0", "state1", "unit0")
UNARY = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "neg": lambda a: -a,
    "abs": torch.abs,
    "exp": lambda a: torch.exp(-torch.abs(a)),
    "log": lambda a: torch.log(1 + a * a),
    "sqrt": lambda a: torch.sqrt(1 + a * a),
    "scale": lambda a: 0.7 * a - 0.2,
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (1 + b * b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, b * 0.5),
}
TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), inner),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    ),
    max_leaves=12,
)


def compute(tree, values):
    if isinstance(tree, str):
        return values[tree]
    name, *parts = tree
    return {**UNARY, **BINARY}[name](*(compute(part, values) for part in parts))


def step_of(trees):
    """A cell's step that computes these; tanh keeps the states of a sequence bounded."""

    def step(input, hidden, state, unit):
        values = dict(zip(LEAVES, (*input, *hidden, *state, *unit), strict=True))
        whole = torch.zeros_like(state[0])
        return tuple(torch.tanh(compute(tree, values)) + whole for tree in trees)

    return step


UNEVEN = {"gates": 2, "products": 2, "states": 2, "unit_weights": 1}


@settings(max_examples=150, deadline=None)
@given(st.tuples(TREES, TREES))
def test_derived_backwards_of_random_expressions_are_autograds(trees):
    assert_derived_is_autograd(step_of(trees), rows=3, units=4, **UNEVEN)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@settings(
    max_examples=4,
    deadline=None,
    # The backend is asked for by name inside.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(trees=st.tuples(TREES, TREES))
def test_random_expressions_are_the_same_in_c(backend, trees):
    compare_backends(define(step_of(trees), **UNEVEN))


def compare_backends(kind, dtype=torch.float64, **options):
    module = kind(3, 5, num_layers=2, dtype=dtype, **options)
    x, hx = leaf(random(4, 2, 3, dtype=dtype)), states_for(module, 2)
    found = []
    for name in ("native", "reference"):
        with triton_rnn.use_backend(name):
            output, state = module(x, hx)
        results = (output, *flat(state))
        found.append([*results, *gradients(results, [x, *flat(hx), *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours.detach(), theirs.detach())


def test_a_product_that_only_occurs_in_a_sum_with_its_input_is_folded_into_it():
    for kind, starts, kept in ((OwnLSTM, (0, 1, 2, 3), 6), (OwnGRU, (0, 1, -1), 4)):
        assert kind.cell.program.starts == starts
        # As many as the C loops keep for GRU; for LSTM one more, tanh of the cell state.
        assert len(kind.cell.program.kept) == kept
        assert len(kind.cell.program.grads) == 4
    both = define(lambda i, u, s: torch.tanh(i[0] + u[0]) * i[0])
    assert both.cell.program.starts == (-1,)


# What is refused when a class is defined

OUTSIDE = torch.ones(())
VECTOR = torch.ones(16)
REFUSED = {
    "sum": (lambda i, u, s: i[0] + u[0].sum(-1, keepdim=True), "not pointwise: it calls sum"),
    "softmax": (lambda i, u, s: torch.softmax(i[0], -1), "not pointwise: it calls _softmax"),
    "matmul": (lambda i, u, s: i[0] @ u[0].T @ s[0], "not pointwise: it calls permute"),
    "a branch": (lambda i, u, s: i[0] if s[0][0, 0] > 0 else u[0], "not pointwise: it calls sel"),
    "shapes": (lambda i, u, s: torch.matmul(i[0], u[0]), "not pointwise: it calls mm"),
    "flip": (lambda i, u, s: i[0].flip(-1), "not pointwise: it calls flip"),
    "part": (lambda i, u, s: i[0][:, :1], "not pointwise: it calls slice"),
    "in place": (lambda i, u, s: i[0].add_(u[0]), "add_ writes to a tensor in place"),
    "random": (lambda i, u, s: i[0] * torch.rand_like(u[0]), "rand_like draws random numbers"),
    "a random number": (lambda i, u, s: i[0] * torch.rand(()), "rand draws random numbers"),
    "from outside": (lambda i, u, s: i[0] * OUTSIDE, r"mul takes a tensor of shape \(\)"),
    "of another size": (lambda i, u, s: i[0] * VECTOR, r"mul takes a tensor of shape \(16,\)"),
    "dropout": (
        lambda i, u, s: torch.nn.functional.dropout(i[0]),
        "empty_like is for what is written in place",
    ),
    "dtype": (lambda i, u, s: i[0].half(), "_to_copy changes the dtype to torch.float16"),
    "power": (lambda i, u, s: i[0] ** u[0], "pow with an exponent that is not a constant"),
    "rounding": (lambda i, u, s: torch.div(i[0], 2, rounding_mode="floor"), "rounding_mode"),
    "two states": (lambda i, u, s: (i[0], u[0]), "must return 1 tensor"),
    "nothing": (lambda i, u, s: None, "must return 1 tensor"),
    "a mask": (lambda i, u, s: i[0] > u[0], "state 0 that it returns is torch.bool"),
    "numpy": (lambda i, u, s: torch.from_numpy(i[0].numpy()), "not pointwise: it calls lift"),
    "its closure": (lambda i, u, s: OUTSIDE, "not made of its arguments"),
    "ends": (lambda i, u, s: torch.clamp(s[0], i[0], u[0]), "clamp with ends that are not const"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_is_not_pointwise_is_refused_by_the_operators_name(name):
    function, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        define(function)


def test_a_state_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"torch.float64 of shape \(5,\)"):
        define(lambda i, u, s, unit: unit[0] * 2, unit_weights=1)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"gates": 0}, "gates should be a whole number from 1 to 8"),
        ({"gates": 9}, "gates should be"),
        ({"gates": True}, "gates should be"),
        ({"states": 0}, "states should be"),
        ({"products": -1}, "products should be a whole number from 0 to 8"),
        ({"unit_weights": 1.0}, "unit_weights should be"),
    ],
)
def test_numbers_of_a_cell_that_make_no_sense_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        define(OwnRNN.step, **numbers)


def test_a_class_without_gates_or_with_a_step_that_is_a_method_is_refused():
    with pytest.raises(TypeError, match="needs the number of its gates"):

        class Without(Recurrent):
            pass

    with pytest.raises(TypeError, match="should be a staticmethod"):

        class Method(Recurrent, gates=1):
            def step(self, input, hidden, state):
                return input[0]

    with pytest.raises(TypeError, match="has no cell: subclass it"):
        Recurrent(3, 5)
    with pytest.raises(TypeError, match=r"a subclass of triton_rnn\.Recurrent defines"):

        class NoStep(Recurrent, gates=1):
            pass


def test_defining_a_cell_imports_nothing_that_takes_seconds():
    code = (
        "import sys, torch, triton_rnn\n"
        "class Own(triton_rnn.Recurrent, gates=1):\n"
        "    @staticmethod\n"
        "    def step(input, hidden, state): return torch.tanh(input[0] + hidden[0])\n"
        "print([m for m in ('sympy', 'triton', 'torch._dynamo') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.strip() == "[]", told.stderr


# Numbers


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
@pytest.mark.parametrize("kind", NAMES, ids=NAMES.values())
def test_torchs_cells_defined_anew_are_torchs(kind, backend):
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    theirs = getattr(torch.nn, NAMES[kind])(3, 13, **options)
    ours = kind(3, 13, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, hx = leaf(random(7, 4, 3)), states_for(ours, 4)
    found = []
    for module in (ours, theirs):
        output, state = module(x, hx)
        results = (output, *flat(state))
        found.append([*results, *gradients(results, [x, *flat(hx), *module.parameters()])])
    for mine, other in zip(*found, strict=True):
        assert_close(mine.detach(), other.detach())


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
@pytest.mark.parametrize("form", ["padded", "packed", "unbatched", "batch_first", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_cells_that_torch_does_not_have_are_their_plain_loops(kind, dtype, form, backend):
    first = form == "batch_first"
    options = {"num_layers": 2, "bidirectional": True, "batch_first": first, "dtype": dtype}
    module = kind(3, 10, bias=form != "no bias", **options)
    batch, lengths = 3, [5, 5, 5]
    if form == "unbatched":
        batch, lengths = 1, [5]
    elif form == "packed":
        lengths = [2, 5, 3]
    x = leaf(random(5, batch, 3, dtype=dtype))
    hx = states_for(module, batch)
    inputs = [x, *flat(hx), *module.parameters()]
    expected = plain_loop(module, x, lengths, hx)[: 1 + kind.cell.states]
    if form == "packed":
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        output, state = module(packed, hx)
        output = pad_packed_sequence(output)[0]
    elif form == "unbatched":
        one = tuple(s[:, 0] for s in flat(hx))
        output, state = module(x[:, 0], one[0] if len(one) == 1 else one)
        output, state = output.unsqueeze(1), tuple(s.unsqueeze(1) for s in flat(state))
    elif first:
        output, state = module(x.transpose(0, 1), hx)
        output = output.transpose(0, 1)
    else:
        output, state = module(x, hx)
    results = (output, *flat(state))
    # Sums in another order; float32 as in tolerances.py.
    for ours, theirs in zip(
        (*results, *gradients(results, inputs)),
        (*expected, *gradients(expected, inputs)),
        strict=True,
    ):
        assert_close(ours.detach(), theirs.detach())


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_states_that_are_not_given_are_zeros_and_keep_their_form(kind, backend):
    module = kind(3, 10, dtype=torch.float64)
    x = random(4, 2, 3)
    output, state = module(x)
    expected = plain_loop(module, x, [4, 4], None)
    assert isinstance(state, tuple) == (kind.cell.states == 2)
    for ours, theirs in zip((output, *flat(state)), expected, strict=False):
        assert_close(ours.detach(), theirs.detach())
    with torch.no_grad():
        assert torch.equal(module(x)[0], output)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@EVERY_CELL
def test_first_and_second_derivatives_are_those_of_differences(kind, backend):
    module = kind(2, 3, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    # Of positive sign, so that no unit of IndRNN sits on the corner of its relu.
    x, hx = leaf(random(3, 2, 2).abs() + 0.1), flat(states_for(module, 2))

    def call(x, *rest):
        states, weights = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        state = states[0] if len(states) == 1 else states
        for name, weight in weights.items():
            del module._parameters[name]
            setattr(module, name, weight)
        output, last = module(x, state)
        for name in names:
            delattr(module, name)
            module.register_parameter(name, kept[name])
        return (output, *flat(last))

    kept = dict(module.named_parameters())
    inputs = (x, *hx, *(leaf(p) for p in kept.values()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", [ThreeStates, triton_rnn.IndRNN], ids=lambda kind: kind.__name__)
def test_every_number_of_threads_gives_the_same_bits(monkeypatch, backend, packed, kind):
    module = kind(19, 75, bidirectional=True)
    # Rows of 200 steps are several chunks of preactivations.
    x = leaf(random(200, 5, 19, dtype=torch.float32))
    hx = states_for(module, 5)
    found = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(rules, "threads", lambda request, rows, n=threads: n)
        input = pack_padded_sequence(x, [200, 9, 9, 4, 1]) if packed else x
        output, state = module(input, hx)
        results = (output.data if packed else output, *flat(state))
        inputs = [x, *flat(hx), *module.parameters()]
        found.append([*results, *gradients(results, inputs)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
def test_an_empty_batch_has_empty_results_and_zero_gradients(backend):
    module = PeepholeLSTM(3, 5)
    output, (h_n, c_n) = module(torch.zeros(4, 0, 3))
    assert output.shape == (4, 0, 5)
    assert h_n.shape == c_n.shape == (1, 0, 5)
    output.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("kind", [PeepholeLSTM, triton_rnn.IndRNN], ids=lambda kind: kind.__name__)
def test_a_nan_stays_in_its_own_sequence(kind, backend):
    module = kind(3, 10)
    x = random(6, 3, 3, dtype=torch.float32)
    x[2, 1, 0] = float("nan")
    bad = module(x)[0].isnan()
    assert not bad[:, [0, 2]].any()
    assert bad[2:, 1].all()


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)
def test_only_wanted_gradients_are_made_and_the_callers_tensors_stay(backend):
    module = PeepholeLSTM(3, 5, dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == "weight_unit_l0")
    x, hx = random(4, 2, 3), tuple(s.detach() for s in states_for(module, 2))
    before = [t.clone() for t in (x, *hx, *module.parameters())]
    module(x, hx)[0].sum().backward()
    assert all(
        torch.equal(a, b) for a, b in zip((x, *hx, *module.parameters()), before, strict=True)
    )
    assert [p.grad is not None for p in module.parameters()] == [False] * 4 + [True]


def test_dropout_between_layers_is_the_same_on_both_backends():
    module = MinimalGatedUnit(3, 8, num_layers=3, dropout=0.5)
    x, found = random(5, 2, 3, dtype=torch.float32), []
    for name in ("native", "reference"):
        torch.manual_seed(1)
        with triton_rnn.use_backend(name):
            found.append(module(x)[0])
    assert_close(found[0].detach(), found[1].detach())
    module.eval()
    assert not torch.equal(module(x)[0], found[0])
    assert torch.equal(module(x)[0], module(x)[0])


# The module


def test_a_module_has_torchs_parameters_in_torchs_order_with_its_own_behind():
    theirs = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    assert list(OwnLSTM(3, 5, num_layers=2, bidirectional=True).state_dict()) == list(
        theirs.state_dict()
    )
    ours = PeepholeLSTM(3, 5)
    assert list(ours.state_dict()) == [
        *torch.nn.LSTM(3, 5).state_dict(),
        "weight_unit_l0",
    ]
    assert ours.weight_unit_l0.shape == (3, 5)
    assert list(triton_rnn.IndRNN(3, 5).state_dict()) == [
        "weight_ih_l0",
        "bias_ih_l0",
        "weight_unit_l0",
    ]
    assert triton_rnn.CoupledLSTM(3, 5).weight_hh_l0.shape == (15, 5)


def test_initial_parameters_are_torchs_for_the_same_seed():
    torch.manual_seed(5)
    theirs = torch.nn.LSTM(3, 5, num_layers=2, bidirectional=True)
    torch.manual_seed(5)
    ours = OwnLSTM(3, 5, num_layers=2, bidirectional=True)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_module_tells_of_itself_as_torchs():
    shown = repr(PeepholeLSTM(3, 5, num_layers=2, batch_first=True))
    assert shown == "PeepholeLSTM(3, 5, num_layers=2, batch_first=True)"
    assert repr(torch.nn.LSTM(3, 5, num_layers=2, batch_first=True)) == shown.replace(
        "PeepholeLSTM", "LSTM"
    )
    assert list(inspect.signature(PeepholeLSTM).parameters)[:2] == ["input_size", "hidden_size"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_compute_the_same(again):
    module = PeepholeLSTM(3, 5, num_layers=2)
    x = random(4, 2, 3, dtype=torch.float32)
    other = again(module)
    assert type(other) is PeepholeLSTM
    assert torch.equal(other(x)[0], module(x)[0])
    with torch.no_grad():
        other.weight_unit_l0.add_(1)
    assert not torch.equal(other(x)[0], module(x)[0])


def test_a_subclass_may_draw_other_weights_or_write_another_step():
    class Drawn(triton_rnn.IndRNN):
        def reset_parameters(self):
            super().reset_parameters()
            torch.nn.init.ones_(self.weight_unit_l0)

    class Bent(triton_rnn.IndRNN):
        @staticmethod
        def step(input, hidden, state, unit):
            return torch.tanh(input[0] + unit[0] * state[0])

    assert Drawn(3, 5).weight_unit_l0.eq(1).all()
    assert Drawn.cell is triton_rnn.IndRNN.cell
    assert Bent.cell.products == 0
    assert Bent(3, 5)(torch.ones(4, 2, 3))[0].abs().max() < 1
    compare_backends(Bent)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0, 5), {}),
        ((3, 0), {}),
        ((3.0, 5), {}),
        ((3, "5"), {}),
        ((3, 5, 0), {}),
        ((3, 5), {"dropout": 2}),
        ((3, 5), {"dropout": True}),
        ((3, 5), {"bias": 1}),
        ((3, 5), {"batch_first": None}),
    ],
    ids=str,
)
def test_constructions_that_torch_refuses_are_refused_in_its_words(arguments, options):
    told = []
    for kind in (OwnLSTM, torch.nn.LSTM):
        with pytest.raises((TypeError, ValueError)) as caught:
            kind(*arguments, **options)
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1]


def test_dropout_after_a_single_layer_warns_as_torch_does():
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        OwnLSTM(3, 5, dropout=0.5)


MALFORMED = {
    "four dimensions": lambda m: m(torch.zeros(1, 2, 3, 3)),
    "input size": lambda m: m(torch.zeros(4, 2, 7)),
    "no steps": lambda m: m(torch.zeros(0, 2, 3)),
    "dtype": lambda m: m(torch.zeros(4, 2, 3, dtype=torch.float64)),
    "h_0": lambda m: m(torch.zeros(4, 2, 3), (torch.zeros(1, 3, 5), torch.zeros(1, 2, 5))),
    "c_0": lambda m: m(torch.zeros(4, 2, 3), (torch.zeros(1, 2, 5), torch.zeros(1, 2, 6))),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls_are_refused_in_torchs_words(name):
    told = []
    for kind in (OwnLSTM, torch.nn.LSTM):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            MALFORMED[name](kind(3, 5))
        told.append((type(caught.value), str(caught.value).replace("OwnLSTM", "LSTM")))
    assert told[0] == told[1]


def test_states_of_another_kind_are_refused():
    module = PeepholeLSTM(3, 5)
    x, state = torch.zeros(4, 2, 3), torch.zeros(1, 2, 5)
    for hx in (state, (state,), (state, state, state), (state, None), "hx"):
        with pytest.raises(TypeError, match="Expected h"):
            module(x, hx)
    with pytest.raises(RuntimeError, match="not the same dtype"):
        module(x, (state, state.double()))
    with pytest.raises(RuntimeError, match="should also be 3-D but got 2-D"):
        module(x, (state, state[0]))
    with pytest.raises(RuntimeError, match="should also be 2-D but got 3-D"):
        module(x[:, 0], (state, state))
    with pytest.raises(TypeError, match="Expected hx to be a tensor, got tuple"):
        MinimalGatedUnit(3, 5)(x, (state,))
    with pytest.raises(TypeError, match="Expected input to be a tensor, got list"):
        module([1.0])


def test_weights_that_no_longer_fit_are_refused_before_anything_runs():
    module = PeepholeLSTM(3, 5)
    module.weight_unit_l0 = torch.nn.Parameter(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"Expected weight_unit_l0 size \(3, 5\), got \[2, 5\]"):
        module(torch.zeros(4, 2, 3))
    module = PeepholeLSTM(3, 5)
    module.weight_hh_l0 = torch.nn.Parameter(torch.zeros(20, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 is torch\.float64"):
        module(torch.zeros(4, 2, 3))


# Backends


@pytest.mark.parametrize("name", ["torchscript", "aten"])
def test_a_backend_without_users_cells_refuses_with_the_reason(name):
    with (
        triton_rnn.use_backend(name),
        pytest.raises(triton_rnn.BackendError, match=f"{name}.*user's cell"),
    ):
        PeepholeLSTM(3, 5)(torch.zeros(4, 2, 3))


def test_explain_tells_the_plan_of_each_layer():
    module = PeepholeLSTM(3, 5, num_layers=2)
    told = triton_rnn.explain(module, torch.zeros(4, 2, 3))
    assert told.backend == "native"
    assert [line.partition(",")[0] for line in told.plan] == [
        "layer 0: one C call",
        "layer 1: one C call",
    ]
    assert told.reasons["torchscript"] == "native comes first"
    assert told.reasons["triton"] == "the Triton kernels run on a GPU, the input is on the CPU"
    three = triton_rnn.explain(ThreeStates(3, 5), torch.zeros(4, 2, 3))
    assert "carry one or two states, ThreeStates has more" in three.reasons["triton"]
    half = triton_rnn.explain(module.half(), torch.zeros(4, 2, 3).half())
    assert half.backend == "reference"
    assert "not float32 or float64" in half.reasons["native"]


def test_without_a_compiler_the_plain_loop_runs_and_explain_says_why(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    kind = define(lambda i, u, s: torch.tanh(i[0] - u[0] + 0.125 * s[0]))
    module, x = kind(3, 5), torch.ones(4, 2, 3)
    told = triton_rnn.explain(module, x)
    assert told.backend == "reference"
    assert told.reasons["native"] == "no C compiler: CC=/nowhere/cc is not there"
    module(x)[0].sum().backward()
    with triton_rnn.use_backend("native"), pytest.raises(triton_rnn.BackendError, match="nowhere"):
        module(x)


def test_half_precision_runs_in_the_plain_loop():
    module = PeepholeLSTM(3, 5).bfloat16()
    output, _ = module(torch.zeros(4, 2, 3, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.sum().backward()


def test_what_the_c_loops_cannot_take_part_in_runs_in_the_plain_loop():
    module = PeepholeLSTM(3, 5, dtype=torch.float64)
    x, weights = random(4, 2, 3), dict(module.named_parameters())
    expected = module(x)[0]

    def loss(weights):
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    grads = torch.func.grad(loss)(weights)
    wanted = torch.autograd.grad(expected.square().sum(), list(weights.values()))
    for mine, other in zip(grads.values(), wanted, strict=True):
        assert_close(mine, other)
    together = torch.func.vmap(lambda x: module(x)[0])(torch.stack([x, x]))
    assert_close(together[1].detach(), expected.detach())
    _, tangent = torch.func.jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    nudged = (module(x + 1e-6)[0] - module(x - 1e-6)[0]) / 2e-6
    # A difference of second order of numbers of size 1 is good to about 1e-9.
    assert_close(tangent.detach(), nudged.detach(), tolerance=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert PeepholeLSTM(3, 5)(x.float())[0].shape == (4, 2, 5)
        with (
            triton_rnn.use_backend("native"),
            pytest.raises(triton_rnn.BackendError, match="autocast is on"),
        ):
            PeepholeLSTM(3, 5)(x.float())


# torch's own, of what Dynamo does at a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_torch_compile_breaks_its_graph_at_a_users_cell_as_at_torchs():
    module = PeepholeLSTM(3, 5)
    model = torch.nn.Sequential(module, PickOutput(), torch.nn.Linear(5, 2))
    x = random(4, 2, 3, dtype=torch.float32)
    model(x).sum().backward()
    expected = module.weight_unit_l0.grad.clone()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(x).detach(), model(x).detach())
    compiled(x).sum().backward()
    assert_close(module.weight_unit_l0.grad, expected)


class PickOutput(torch.nn.Module):
    def forward(self, returned):
        return returned[0]


def test_generated_code_is_in_the_key_of_its_library(tmp_path, monkeypatch):
    """Two cells with the same numbers and other arithmetic are not one library."""
    # What all calls go through is compiled before, elsewhere.
    native.known()
    monkeypatch.setenv("TRITON_RNN_CACHE", str(tmp_path))
    kinds = [
        define(lambda i, u, s: torch.tanh(i[0] + u[0])),
        define(lambda i, u, s: torch.sigmoid(i[0] + u[0])),
    ]
    assert own.macros(kinds[0].cell.program) == own.macros(kinds[1].cell.program)
    results = []
    for kind in kinds:
        torch.manual_seed(0)
        with triton_rnn.use_backend("native"):
            results.append(kind(3, 5)(torch.ones(2, 2, 3))[0])
    assert not torch.equal(*results)
    # A forward and a backward of each.
    assert len(list(tmp_path.glob("*.so"))) == 4


def test_no_array_is_read_or_written_outside(tmp_path):
    preload = sanitizers()
    if not preload:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    environment = {
        **os.environ,
        "TRITON_RNN_CACHE": str(tmp_path),
        "TRITON_RNN_CFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -O0 -g",
        "LD_PRELOAD": preload,
        # Python itself does not free everything at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "tests/own_cells.py", "30", "7"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "30 cases"


@pytest.mark.parametrize("backend", ["torchscript", "aten"])
def test_a_backend_that_cannot_is_refused_for_sequences_of_no_steps_too(backend):
    """As `explain` says."""
    module, input = triton_rnn.IndRNN(4, 5), torch.randn(6, 2, 4)
    lengths = torch.zeros(2, dtype=torch.int64)
    with triton_rnn.use_backend(backend):
        with pytest.raises(triton_rnn.BackendError):
            triton_rnn.explain(module, input, lengths=lengths)
        with pytest.raises(triton_rnn.BackendError):
            module(input, lengths=lengths)
    assert module(input, lengths=lengths)[0].shape == (6, 2, 5)
