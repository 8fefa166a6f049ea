"""Known calls: what was decided about a call serves the next one of its kind, and no other.

A call is known by its facts. So after some calls one fact is changed at a time, and the next call
must be what a call is that nobody has seen before: torch.nn's result, or torch.nn's error.
"""

import copy
import ctypes
import functools
import gc
import math
import sys
import threading
import weakref

import pytest
import torch
from tolerances import assert_same_results, flat_outputs, random, random_state, run, twins
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import triton_rnn
from triton_rnn import cell_call, functional, health, known
from triton_rnn.backends import native
from triton_rnn.backends.native import calls, parts
from triton_rnn.profiling import ranges

pytestmark = pytest.mark.skipif(native.known() is None, reason="calls.c cannot be used here")

LAYERS = ("rnn_tanh", "gru", "lstm", "lstm_proj")
CELLS = {
    "rnn": (torch.nn.RNNCell, triton_rnn.RNNCell),
    "gru": (torch.nn.GRUCell, triton_rnn.GRUCell),
    "lstm": (torch.nn.LSTMCell, triton_rnn.LSTMCell),
}


@pytest.fixture(autouse=True)
def forgotten():
    """No call is known, and what knows calls is at hand."""
    calls.forget()
    with torch.no_grad():
        triton_rnn.GRU(2, 2)(torch.zeros(4, 1, 2))
    calls.forget()
    yield
    calls.forget()


def decides_nothing(monkeypatch):
    def refuse(*args):
        raise AssertionError("the call was decided anew")

    monkeypatch.setattr(functional, "prepare", refuse)
    monkeypatch.setattr(cell_call, "prepare", refuse)


def outcome(module, *args):
    """What a call returns, or its error."""
    try:
        return flat_outputs(module, module(*args))
    except Exception as error:
        return error


def assert_same_outcome(found, expected):
    if isinstance(expected, Exception):
        assert type(found) is type(expected), found
        assert str(found) == str(expected)
        return
    assert not isinstance(found, Exception), found
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].shape == value.shape, name
            assert found[name].stride() == value.stride(), name
            assert found[name].requires_grad == value.requires_grad, name
            torch.testing.assert_close(found[name], value)


def _packed(x, form):
    """A padded input (6, 3, F) in the form of a packed batch, if the form is one."""
    lengths = {"packed": [6, 4, 1], "unsorted": [2, 6, 4], "one length": [6, 6, 6]}.get(form)
    if lengths is None:
        return x
    return pack_padded_sequence(x, lengths, enforce_sorted=form != "unsorted")


FORMS = ["padded", "batch_first", "unbatched", "packed", "unsorted", "one length"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_known_call_is_torchs_and_decides_nothing(
    monkeypatch, kind, bidirectional, layers, given, form
):
    theirs, ours = twins(
        kind,
        5,
        7,
        num_layers=layers,
        bidirectional=bidirectional,
        batch_first=form == "batch_first",
        bias=layers != 2,
    )
    shape = (6, 5) if form == "unbatched" else (6, 3, 5)
    batch = {"unbatched": None, "batch_first": 6}.get(form, 3)
    inputs = [_packed(random(*shape), form) for _ in range(3)]
    states = [random_state(ours, batch) if given else None for _ in range(3)]
    with torch.no_grad(), triton_rnn.use_backend("native"):
        first = ours(inputs[0], states[0])
        decides_nothing(monkeypatch)
        again = ours(inputs[0], states[0])
        for name, value in flat_outputs(ours, first).items():
            assert torch.equal(flat_outputs(ours, again)[name], value), name
        for input, state in zip(inputs, states, strict=True):
            assert_same_outcome(outcome(ours, input, state), outcome(theirs, input, state))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_known_call_trains_alike(monkeypatch, kind, given, form):
    theirs, ours = twins(
        kind, 5, 7, num_layers=2, bidirectional=True, batch_first=form == "batch_first"
    )
    shape = (6, 5) if form == "unbatched" else (6, 3, 5)
    batch = {"unbatched": None, "batch_first": 6}.get(form, 3)
    with triton_rnn.use_backend("native"):
        pack = functools.partial(_packed, form=form)
        input, hx = random(*shape), random_state(ours, batch) if given else None
        run(ours, input, hx, prepare=pack)
        decides_nothing(monkeypatch)
        found, expected = (run(module, input, hx, prepare=pack) for module in (ours, theirs))
        assert_same_results(found, expected)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_known_call_of_a_cell_is_torchs(monkeypatch, kind, bias, batch, given):
    theirs, ours = (one(5, 7, bias=bias) for one in CELLS[kind])
    ours.load_state_dict(theirs.state_dict())
    rows = () if batch is None else (batch,)

    def arguments():
        h = torch.randn(*rows, 7)
        return torch.randn(*rows, 5), ((h, torch.randn(*rows, 7)) if kind == "lstm" else h)

    def check(grad):
        input, hx = arguments()
        input.requires_grad_(grad)
        found, expected = (m(input, hx) if given else m(input) for m in (ours, theirs))
        results = (r if kind == "lstm" else (r,) for r in (found, expected))
        for mine, other in zip(*results, strict=True):
            assert mine.requires_grad == other.requires_grad
            torch.testing.assert_close(mine, other)

    with torch.no_grad():
        check(False)
    if kind == "gru":
        check(True)
    decides_nothing(monkeypatch)
    with torch.no_grad():
        check(False)
    if kind == "gru":
        check(True)


class Mixed(triton_rnn.Recurrent, gates=2, states=2, products=1, unit_weights=1):
    @staticmethod
    def step(input, hidden, state, weight):
        h, c = state
        c = torch.sigmoid(input[0]) * c + weight[0] * torch.tanh(input[1] + hidden[0])
        return torch.tanh(c) + 0.1 * h, c


class Other(triton_rnn.Recurrent, gates=2, states=2, products=1, unit_weights=1):
    """The same numbers and other arithmetic."""

    @staticmethod
    def step(input, hidden, state, weight):
        h, c = state
        c = torch.sigmoid(input[0]) * c - weight[0] * torch.tanh(input[1] + hidden[0])
        return torch.tanh(c) - 0.1 * h, c


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", [Mixed, Other, triton_rnn.IndRNN, triton_rnn.CoupledLSTM])
def test_a_known_call_of_a_users_cell_is_the_references(monkeypatch, kind, grad, bias, form):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": form == "batch_first"}
    # What is known of one cell is of no other.
    modules = [cell(5, 7, bias=bias, **options).double() for cell in (Mixed, Other, kind)]
    shape = (6, 5) if form == "unbatched" else (6, 3, 5)
    batch = {"unbatched": (), "batch_first": (6,)}.get(form, (3,))

    def arguments(module, seed):
        states = [random(4, *batch, 7, seed=seed + k) for k in range(module.cell.states)]
        x = _packed(random(*shape, seed=seed), form)
        return x, tuple(states) if len(states) > 1 else states[0]

    def results(module, seed):
        x, hx = arguments(module, seed)
        found = [value for value in tree_leaves(module(x, hx)) if value is not None]
        found = [value for value in found if value.is_floating_point()]
        if grad:
            total = sum((value * torch.cos(value)).sum() for value in found)
            found += torch.autograd.grad(total, list(module.parameters()))
        return found

    with torch.set_grad_enabled(grad):
        for module in modules:
            with triton_rnn.use_backend("native"):
                results(module, 0)
        expected = []
        for module in modules:
            with triton_rnn.use_backend("reference"):
                expected.append(results(module, 10))

        def refuse(*args):
            raise AssertionError("the call was decided anew")

        monkeypatch.setattr("triton_rnn.own.call.prepare", refuse)
        with triton_rnn.use_backend("native"):
            for module, right in zip(modules, expected, strict=True):
                for mine, other in zip(results(module, 10), right, strict=True):
                    torch.testing.assert_close(mine, other)


def _dense(shape, dtype=torch.float64):
    return torch.sin(torch.arange(math.prod(shape), dtype=dtype)).view(shape)


class Subclass(torch.Tensor):
    pass


def _set(name, value):
    return lambda module, x, hx: (setattr(module, name, value), (x, hx))[1]


def _with_weight(change):
    def apply(module, x, hx):
        weight = module.weight_hh_l0
        found = change(weight)
        if found is not None:
            module.weight_hh_l0 = found
        return x, hx

    return apply


def _with_data(change):
    def apply(module, x, hx):
        module.weight_hh_l0.data = change(module.weight_hh_l0.data)
        return x, hx

    return apply


def _without_weight(module, x, hx):
    del module._parameters["bias_ih_l0"]
    return x, hx


def _twisted(weight):
    return torch.stack([weight, weight], -1)[..., 0]


def _lazily_negative(weight):
    return torch.complex(torch.zeros_like(weight), -weight).conj().imag


# What a call may differ in from those before it. Each is given the module, the input and the state,
# and says what the next call is given.
CHANGES = {
    "nothing": lambda m, x, h: (x, h),
    "a longer input": lambda m, x, h: (_dense((9, *x.shape[1:])), h),
    "another batch": lambda m, x, h: (x[:, :2], None),
    "a batch of other states": lambda m, x, h: (x[:, :2], h),
    "no state": lambda m, x, h: (x, None),
    "a wrong state": lambda m, x, h: (x, x),
    "a state in a tuple": lambda m, x, h: (x, (h,) if isinstance(h, torch.Tensor) else h[0]),
    "a state in a list": lambda m, x, h: (x, h if isinstance(h, torch.Tensor) else list(h)),
    "a state with gaps": lambda m, x, h: (
        x,
        _twisted(h) if isinstance(h, torch.Tensor) else tuple(map(_twisted, h)),
    ),
    "an input without a batch": lambda m, x, h: (x[:, 0], None),
    "an input of other features": lambda m, x, h: (torch.cat([x, x], -1), h),
    "float32 input": lambda m, x, h: (x.float(), h),
    "integers": lambda m, x, h: (x.long(), h),
    "no steps": lambda m, x, h: (x[:0], h),
    "no sequences": lambda m, x, h: (x[:, :0], None),
    "an input with gaps": lambda m, x, h: (_twisted(x), h),
    "an input by other strides": lambda m, x, h: (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        h,
    ),
    "a reversed minus": lambda m, x, h: (_lazily_negative(x), h),
    "zeros that lie nowhere": lambda m, x, h: (
        torch._efficientzerotensor(x.shape, dtype=x.dtype),
        h,
    ),
    "an input on no device": lambda m, x, h: (x.to("meta"), h),
    "a sparse input": lambda m, x, h: (x.to_sparse(), h),
    "a subclass": lambda m, x, h: (x.as_subclass(Subclass), h),
    "not a tensor": lambda m, x, h: (x.tolist(), h),
    "a packed batch": lambda m, x, h: (pack_padded_sequence(x, [6, 4, 1]), h),
    "an input that needs a gradient": lambda m, x, h: (x.clone().requires_grad_(), h),
    "batch_first": _set("batch_first", True),
    "another mode": lambda m, x, h: (
        setattr(m, "mode", "RNN_RELU" if m.mode.startswith("RNN") else m.mode),
        (x, h),
    )[1],
    "other sizes": _set("hidden_size", 6),
    "another input size": _set("input_size", 4),
    "more layers": _set("num_layers", 2),
    "a true number": _set("num_layers", True),
    "dropout": _set("dropout", 0.5),
    "dropout of another type": _set("dropout", True),
    "evaluation": lambda m, x, h: (m.eval(), (x, h))[1],
    "both directions": _set("bidirectional", True),
    "no bias": _set("bias", False),
    "another weight": _with_weight(lambda w: torch.nn.Parameter(w.detach() * 2)),
    "a changed weight": _with_weight(lambda w: (w.data.mul_(2), None)[1]),
    "a weight of another type": _with_data(lambda w: w.float()),
    "a weight of another shape": _with_data(lambda w: w[:-1]),
    "a weight with gaps": _with_data(_twisted),
    "a weight with a minus to do": _with_data(_lazily_negative),
    "a weight without a gradient": _with_weight(lambda w: (w.requires_grad_(False), None)[1]),
    "a missing weight": _without_weight,
    "other names": lambda m, x, h: (m._flat_weights_names.pop(), (x, h))[1],
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_in_one_fact_is_not_taken_for_a_known_one(change, kind, grad):
    theirs, ours = twins(kind, 5, 7)
    x, hx = random(6, 3, 5), random_state(ours, 3)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            ours(x, hx)
            ours(x)
        found, expected = (
            outcome(module, *CHANGES[change](module, x, hx)) for module in (ours, theirs)
        )
        assert_same_outcome(found, expected)
        # And so it is with the call after it.
        assert_same_outcome(outcome(ours, x, hx), outcome(theirs, x, hx))


# Packed batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("lengths", [[4], [4, 4, 4]], ids=str)
def test_rows_of_sequences_of_one_length_may_lie_apart(monkeypatch, lengths, kind, grad):
    theirs, ours = twins(kind, 5, 7)
    packed = pack_padded_sequence(random(4, len(lengths), 5), lengths)
    with torch.set_grad_enabled(grad):
        ours(packed)
        decides_nothing(monkeypatch)
        apart = PackedSequence(torch.cat([packed.data, packed.data], 1)[:, 2:7], *packed[1:])
        for batch in (packed, apart):
            assert_same_outcome(outcome(ours, batch), outcome(theirs, batch))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_packed_call_is_known_whatever_its_lengths_if_they_are_as_many(monkeypatch, kind, grad):
    theirs, ours = twins(kind, 5, 7, bidirectional=True)
    # 6 steps, 4 sequences and 2 rows in a step on average, 15 to 17 in all.
    every = [[6, 6, 2, 1], [6, 3, 3, 3], [6, 4, 4, 1], [1, 6, 6, 4]]
    batches = [pack_padded_sequence(random(6, 4, 5), n, enforce_sorted=False) for n in every]
    with torch.set_grad_enabled(grad):
        ours(batches[0])
        decides_nothing(monkeypatch)
        for batch in batches:
            assert_same_outcome(outcome(ours, batch), outcome(theirs, batch))


def _changed(**fields):
    return lambda x: PackedSequence(*{**x._asdict(), **fields}.values())


def _changed_data(change):
    return lambda x: PackedSequence(change(x.data), *x[1:])


# As `CHANGES`, of a batch with the sizes 3, 2, 2, 2, 1, 1.
PACKED_CHANGES = {
    "nothing": lambda x: x,
    "other lengths": lambda x: pack_padded_sequence(_dense((6, 3, 5)), [6, 3, 2]),
    "more rows": lambda x: pack_padded_sequence(_dense((6, 3, 5)), [6, 6, 5]),
    "more steps": lambda x: pack_padded_sequence(_dense((9, 3, 5)), [9, 4, 1]),
    "more sequences": lambda x: pack_padded_sequence(_dense((6, 4, 5)), [6, 4, 1, 1]),
    "one length": lambda x: pack_padded_sequence(_dense((6, 3, 5)), [6, 6, 6]),
    "not sorted": lambda x: pack_padded_sequence(
        _dense((6, 3, 5)), [1, 6, 4], enforce_sorted=False
    ),
    "sorted in a wrong order": lambda x: PackedSequence(
        *x[:2], torch.tensor([0, 7, 1]), torch.arange(3)
    ),
    "padded": lambda x: _dense((6, 3, 5)),
    "sizes that grow": _changed(batch_sizes=torch.tensor([3, 1, 2, 2, 2, 1])),
    "too few rows": _changed_data(lambda data: data[:-1]),
    "too many rows": _changed_data(lambda data: torch.cat([data, data])),
    "sizes of 32 bits": _changed(batch_sizes=torch.tensor([3, 2, 2, 2, 1, 1], dtype=torch.int32)),
    "other features": _changed_data(lambda data: torch.cat([data, data], 1)),
    "data with gaps": _changed_data(_twisted),
    "rows that lie apart": _changed_data(lambda data: torch.cat([data, data], 1)[:, :5]),
    "float32": _changed_data(lambda data: data.float()),
    "integers": _changed_data(lambda data: data.long()),
    "a subclass": _changed_data(lambda data: data.as_subclass(Subclass)),
    "data that need a gradient": _changed_data(lambda data: data.clone().requires_grad_()),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("change", PACKED_CHANGES)
def test_a_packed_call_that_differs_is_not_taken_for_a_known_one(change, kind, grad):
    theirs, ours = twins(kind, 5, 7)
    x, hx = pack_padded_sequence(random(6, 3, 5), [6, 4, 1]), random_state(ours, 3)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            ours(x, hx)
            ours(x)
        changed = PACKED_CHANGES[change](x)
        for state in (hx, None):
            found, expected = (outcome(module, changed, state) for module in (ours, theirs))
            assert_same_outcome(found, expected)
        assert_same_outcome(outcome(ours, x, hx), outcome(theirs, x, hx))


def test_batch_sizes_with_gaps_are_read_as_they_are():
    """Not beside torch.nn, which reads what lies between them."""
    gru, x = triton_rnn.GRU(5, 7).double(), pack_padded_sequence(random(6, 3, 5), [6, 4, 1])
    apart = PackedSequence(x.data, _twisted(x.batch_sizes))
    with torch.no_grad():
        expected = gru(x)
        assert_same_outcome(outcome(gru, apart), flat_outputs(gru, expected))


def test_the_wrong_cell_state_of_a_packed_call_is_refused_when_the_call_is_known():
    lstm, x = triton_rnn.LSTM(5, 7).double(), pack_padded_sequence(random(6, 3, 5), [6, 4, 1])
    right, wrong = random(1, 3, 7), random(1, 2, 7)
    with torch.no_grad():
        lstm(x, (right, right))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
            lstm(x, (right, wrong))


# Elsewhere than on the CPU ------------------------------------------------------------------------


class _Look(ctypes.Structure):
    """The beginning of DLPack's record of a tensor."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("number", ctypes.c_int32))


@pytest.fixture
def elsewhere():
    """calls.c, to which every tensor is on a GPU with the number that this function is given."""
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.argtypes, pointer_of.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    real = pointer_of(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    # Two numbers of 32 bits, five pointers, of which the last looks at a tensor.
    record = ctypes.create_string_buffer(ctypes.string_at(real, 48), 48)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Look))
    place = ctypes.c_void_p.from_buffer(record, 40)
    look = kind(place.value)
    device = [0]

    def look_elsewhere(tensor, found):
        failed = look(tensor, found)
        found.contents.kind, found.contents.number = 2, device[0]
        return failed

    there = kind(look_elsewhere)
    place.value = ctypes.cast(there, ctypes.c_void_p).value
    calls.looking_by(ctypes.addressof(record))
    yield functools.partial(device.__setitem__, 0)
    calls.looking_by(real)


def key_of(module, input, hx=None):
    names = module._flat_weights_names
    return known.seen_before(module, input, hx, "layer", functional.TORCHS_DECIDING, names)


def test_a_call_elsewhere_is_known_by_its_device_and_python_does_it(elsewhere, monkeypatch):
    module, x = triton_rnn.LSTM(3, 5), random(2, 4, 3, dtype=torch.float32)
    keys = []
    for number in (0, 1, 0):
        elsewhere(number)
        keys.append(key_of(module, x))
    assert keys[0] == keys[2] != keys[1]
    assert all(type(key) is bytes for key in keys)
    expected = module(x)
    assert key_of(module, x)[-1].backend is native, "what was decided, to be done by Python"
    assert all(w is p for w, p in zip(key_of(module, x), module.parameters(), strict=False))
    decides_nothing(monkeypatch)
    assert_same_outcome(outcome(module, x), flat_outputs(module, expected))


def test_the_c_loops_are_not_given_what_is_elsewhere(elsewhere, monkeypatch):
    asked = []
    right = native._call

    def watched(*args):
        asked.append(1)
        return right(*args)

    module, x = triton_rnn.GRU(3, 5), random(4, 2, 3, dtype=torch.float32)
    module(x)[0].sum().backward()
    monkeypatch.setattr(native, "_call", watched)
    module(x)[0].sum().backward()
    assert len(asked) == 2, "forward and backward"


SWITCHES = {
    "of recurrent layers": (torch.backends.cudnn.rnn, "fp32_precision", ("ieee", "tf32")),
    "of cuBLAS": (torch.backends.cuda.matmul, "fp32_precision", ("ieee", "tf32")),
    "for determinism": (
        torch,
        "are_deterministic_algorithms_enabled",
        (lambda: False, lambda: True),
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_switches_of_float32_are_facts_of_calls_elsewhere_alone(elsewhere, monkeypatch, switch):
    place, name, values = SWITCHES[switch]

    def differs(dtype):
        module, x = triton_rnn.GRU(3, 5, dtype=dtype), random(4, 2, 3, dtype=dtype)
        keys = []
        for value in values:
            monkeypatch.setattr(place, name, value)
            keys.append(key_of(module, x))
        return keys[0] != keys[1]

    assert differs(torch.float32)
    assert not differs(torch.float16) and not differs(torch.float64)


def test_the_switch_of_float32_is_no_fact_on_the_cpu(monkeypatch):
    module, x = triton_rnn.GRU(3, 5), random(4, 2, 3, dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    key = key_of(module, x)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    assert type(key) is bytes and key_of(module, x) == key


# torch.nn's own forward under a trace, which warns of it.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_goes_on_around_a_call_is_a_fact():
    theirs, ours = twins("gru", 5, 7, dtype=torch.float32)
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        for _ in range(2):
            ours(x)
        plain = ours(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x)[0].dtype == theirs(x)[0].dtype
        torch.testing.assert_close(torch.vmap(lambda one: ours(one)[0])(x.unsqueeze(0))[0], plain)
        torch.testing.assert_close(torch.func.jvp(lambda one: ours(one)[0], (x,), (x,))[0], plain)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
            expected = torch.autograd.forward_ad.unpack_dual(theirs(dual)[0]).tangent
            torch.testing.assert_close(tangent, expected)
        traced = torch.jit.trace(ours, (x,), check_trace=False)
        torch.testing.assert_close(traced(x)[0], plain)
        with torch.profiler.profile() as profile:
            ours(x)
        assert any(
            event.key == "triton_rnn::gru.native[0.both]" for event in profile.key_averages()
        )
        for name in ("aten", "reference", "torchscript"):
            with triton_rnn.use_backend(name), torch.profiler.profile() as profile:
                torch.testing.assert_close(ours(x)[0], plain)
            assert not any("native" in event.key for event in profile.key_averages()), name
    with torch.inference_mode():
        assert ours(x)[0].is_inference()
    assert ours(x)[0].requires_grad


# torch says this whenever the flags are set, whatever they are set to.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
def test_switches_are_facts(monkeypatch):
    lstm = triton_rnn.LSTM(3, 600)
    x = torch.randn(20, 1, 3)
    # Of no size on every processor.
    monkeypatch.setattr(native.rules, "_onednn_is_faster", lambda *how: True)

    def backend():
        with torch.profiler.profile() as profile:
            lstm(x)
        return {event.key.split("[")[0].split(".")[-1] for event in profile.key_averages()}

    with torch.no_grad():
        for _ in range(2):
            ours = [lstm(x)[0] for _ in range(2)][1]
            with torch.backends.mkldnn.flags(enabled=False):
                loops = [lstm(x)[0] for _ in range(2)][1]
                assert "native" in backend()
            assert "torch" in backend()
            torch.testing.assert_close(ours, loops)
    teams = []
    monkeypatch.setattr(
        native.rules, "threads", lambda request, rows: teams.append(torch.get_num_threads()) or 1
    )
    gru, before = triton_rnn.GRU(3, 300), torch.get_num_threads()
    try:
        with torch.no_grad():
            for threads in (1, 2, 1, 2):
                torch.set_num_threads(threads)
                for _ in range(3):
                    gru(x)
    finally:
        torch.set_num_threads(before)
    assert teams == [1, 2]


def test_a_backend_that_failed_is_a_fact(monkeypatch):
    gru, x = triton_rnn.GRU(3, 4), torch.randn(6, 2, 3)
    with torch.no_grad():
        for _ in range(2):
            gru(x)
        chosen = []
        choose = functional.dispatch.choose
        monkeypatch.setattr(
            functional.dispatch, "choose", lambda *args: chosen.append(args) or choose(*args)
        )
        gru(x)
        assert not chosen
        monkeypatch.setitem(health._failures, ("triton", torch.device("cpu")), "a test")
        gru(x)
        assert len(chosen) == 1


def test_the_dropout_of_a_known_call_is_drawn_anew():
    torch.manual_seed(0)
    ours = triton_rnn.GRU(5, 7, num_layers=2, dropout=0.5)
    theirs = triton_rnn.restore(copy.deepcopy(ours))
    x = torch.randn(6, 3, 5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for drop in (0.5, 0.9, 0.0, 0.5):
                found = []
                for module in (ours, theirs):
                    torch.manual_seed(1)
                    module.dropout = drop
                    found.append([module(x)[0] for _ in range(4)])
                    found[-1].append(module.eval()(x)[0])
                    module.train()
                for mine, other in zip(*found, strict=True):
                    torch.testing.assert_close(mine, other)
                assert torch.equal(found[0][2], found[0][3]) == (drop == 0)


def test_nothing_of_a_known_call_is_kept_alive_or_let_go_too_early():
    gru, x = triton_rnn.GRU(5, 7, num_layers=2), torch.randn(6, 3, 5)
    watched = [gru.weight_hh_l0, x, torch.randn(2, 3, 7)]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                gru(x, watched[2])
            counts = [sys.getrefcount(one) for one in (*watched, None, False, 7, "auto")]
            for _ in range(100):
                gru(x, watched[2])
            after = [sys.getrefcount(one) for one in (*watched, None, False, 7, "auto")]
    # Others hold the common ones too, and come and go.
    assert all(abs(now - then) < 50 for now, then in zip(after, counts, strict=True))
    assert after[:3] == counts[:3]
    dead = [weakref.ref(one) for one in (gru, *watched)]
    del gru, x, watched
    gc.collect()
    assert [one() for one in dead] == [None] * 4


def test_no_memory_raises_in_a_known_call(monkeypatch):
    functions = native.library(torch.float32, "gru")
    failing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(lambda call: 1)
    gru, x = triton_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    request = functional.prepare(gru, x, None).request
    with torch.no_grad():
        gru(x)
        with triton_rnn.use_backend("reference"):
            key = known.seen_before(
                gru, x, None, "layer", functional.TORCHS_DECIDING, gru._flat_weights_names
            )
        monkeypatch.setattr(functions, "forward", parts.Function.of(failing, 1))
        decided = known.Decided(request._replace(needs_grad=False), native, "padded", 1, 0.0)
        native.remember(key, decided, 10)
        with triton_rnn.use_backend("reference"), pytest.raises(MemoryError, match="layer"):
            gru(x)


def test_an_interrupt_inside_of_a_known_call_is_not_lost(monkeypatch):
    gru, x = triton_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    once = [KeyboardInterrupt]

    def interrupted():
        if once:
            raise once.pop()
        return False

    with torch.no_grad():
        gru(x)
        monkeypatch.setattr(ranges, "_profiler_enabled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gru(x)
        assert gru(x)[0].shape == (5, 2, 4)


def test_calls_are_forgotten_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(calls, "_MOST_CALLS", 5)
    gru = triton_rnn.GRU(3, 4)
    with torch.no_grad():
        for steps in range(4, 16):
            gru(torch.randn(steps, 2, 3))
            assert len(calls._calls) <= 5
            gru(torch.randn(steps, 2, 3))


def test_known_calls_of_many_threads():
    gru, failed = triton_rnn.GRU(3, 4), []
    inputs = [torch.randn(steps, 2, 3) for steps in range(4, 40)]
    with torch.no_grad():
        expected = [gru(x)[0] for x in inputs]

    def work():
        with torch.no_grad():
            for _ in range(20):
                for x, right in zip(inputs, expected, strict=True):
                    if not torch.equal(gru(x)[0], right):
                        failed.append(x.size(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
