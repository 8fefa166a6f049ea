"""What else holds of torch.nn's modules: their errors, their life, what torch does to them."""

import copy
import inspect
import io
import pickle
import re
import warnings

import pytest
import torch
from tolerances import (
    CELLS,
    LAYERS,
    TOLERANCES,
    assert_close,
    assert_same_results,
    flat_outputs,
    random,
    random_state,
    run,
    skip_unless_served,
    twins,
)
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import triton_rnn

CLASSES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
KINDS = (*LAYERS, *CELLS)
ONE_OF_EACH = ("rnn_tanh", "gru", "lstm", "rnn_tanh_cell", "gru_cell", "lstm_cell")


def some_input(kind, dtype=torch.float64):
    """(2, 3) for a cell, (5, 2, 3) for a layer."""
    return random(*(() if kind in CELLS else (5,)), 2, 3, dtype=dtype)


def first_output(module, *args):
    """The output of a layer, the hidden state of a cell."""
    return next(iter(flat_outputs(module, module(*args)).values()))


def said(call):
    """The type and the text of the error of a call, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


# --- Malformed calls. Each is torch's error by type and by text, whatever the backend.

with warnings.catch_warnings():
    # Indices that do not fit are the point here; PackedSequence says nothing about them.
    warnings.simplefilter("ignore")
    MISFIT = PackedSequence(random(6, 3), torch.tensor([2, 2, 1]))
    GROWING = PackedSequence(random(6, 3), torch.tensor([1, 2, 3]))

HX = "hx of a fitting size"

MALFORMED_LAYER_CALLS = {
    "no_argument": lambda m, hx: m(),
    "three_arguments": lambda m, hx: m(random(5, 2, 3), hx(2), 1),
    "unknown_keyword": lambda m, hx: m(random(5, 2, 3), h_0=hx(2)),
    "input_is_none": lambda m, hx: m(None),
    "input_is_a_list": lambda m, hx: m([[1.0, 2.0, 3.0]]),
    "input_0d": lambda m, hx: m(random()),
    "input_1d": lambda m, hx: m(random(3)),
    "input_4d": lambda m, hx: m(random(5, 2, 1, 3)),
    "input_size_3d": lambda m, hx: m(random(5, 2, 4)),
    "input_size_2d": lambda m, hx: m(random(5, 4)),
    "input_size_0": lambda m, hx: m(random(5, 2, 0)),
    "input_size_packed": lambda m, hx: m(pack_padded_sequence(random(5, 2, 4), [5, 3])),
    "input_float32": lambda m, hx: m(random(5, 2, 3).float()),
    "input_float16": lambda m, hx: m(random(5, 2, 3).half()),
    "input_int64": lambda m, hx: m(torch.ones(5, 2, 3, dtype=torch.int64)),
    "input_bool": lambda m, hx: m(torch.ones(5, 2, 3, dtype=torch.bool)),
    "input_complex": lambda m, hx: m(torch.ones(5, 2, 3, dtype=torch.complex128)),
    "input_float32_unbatched": lambda m, hx: m(random(5, 3).float()),
    "input_float32_packed": lambda m, hx: m(pack_padded_sequence(random(5, 2, 3).float(), [5, 3])),
    "input_on_meta": lambda m, hx: m(random(5, 2, 3).to("meta")),
    "input_sparse": lambda m, hx: m(random(5, 2, 3).to_sparse()),
    "no_steps": lambda m, hx: m(random(0, 2, 3)),
    "no_steps_unbatched": lambda m, hx: m(random(0, 3)),
    "no_steps_with_hx": lambda m, hx: m(random(0, 2, 3), hx(2)),
    "no_steps_no_batch": lambda m, hx: m(random(0, 0, 3)),
    "hx_batch": lambda m, hx: m(random(5, 2, 3), hx(3)),
    "hx_batch_1": lambda m, hx: m(random(5, 2, 3), hx(1)),
    "hx_batch_packed": lambda m, hx: m(pack_padded_sequence(random(5, 2, 3), [5, 3]), hx(3)),
    "hx_unbatched_for_batched": lambda m, hx: m(random(5, 2, 3), hx(None)),
    "hx_batched_for_unbatched": lambda m, hx: m(random(5, 3), hx(1)),
    "hx_unbatched_for_packed": lambda m, hx: m(
        pack_padded_sequence(random(5, 2, 3), [5, 3]), hx(None)
    ),
    "hx_float32": lambda m, hx: m(random(5, 2, 3), hx(2, torch.Tensor.float)),
    "hx_int64": lambda m, hx: m(random(5, 2, 3), hx(2, torch.Tensor.long)),
    "hx_on_meta": lambda m, hx: m(random(5, 2, 3), hx(2, lambda s: s.to("meta"))),
    "hx_hidden_size": lambda m, hx: m(random(5, 2, 3), hx(2, lambda s: s[..., :1])),
    "hx_layers": lambda m, hx: m(random(5, 2, 3), hx(2, lambda s: s[:1])),
    "hx_layers_doubled": lambda m, hx: m(random(5, 2, 3), hx(2, lambda s: torch.cat([s, s]))),
    "hx_layers_unbatched": lambda m, hx: m(random(5, 3), hx(None, lambda s: s[:1])),
    "hx_4d": lambda m, hx: m(random(5, 2, 3), hx(2, lambda s: s[None])),
    "hx_1d": lambda m, hx: m(random(5, 2, 3), hx(2, torch.Tensor.flatten)),
    "hx_is_a_number": lambda m, hx: m(random(5, 2, 3), 0.0),
    "hx_is_a_string": lambda m, hx: m(random(5, 2, 3), "zeros"),
    "hx_is_an_empty_tuple": lambda m, hx: m(random(5, 2, 3), ()),
    "hx_is_a_tuple_of_one": lambda m, hx: m(random(5, 2, 3), (random(2, 2, 4),)),
    "hx_is_a_tuple_of_three": lambda m, hx: m(random(5, 2, 3), (random(2, 2, 4),) * 3),
    "hx_has_a_none": lambda m, hx: m(random(5, 2, 3), (random(2, 2, 4), None)),
    "hx_is_a_pair_where_not_asked_and_a_tensor_where_a_pair_is": lambda m, hx: m(
        random(5, 2, 3), random(2, 2, 4) if isinstance(hx(2), tuple) else (random(2, 2, 4),) * 2
    ),
    "packed_1d_data": lambda m, hx: m(PackedSequence(random(5), torch.tensor([3, 2]))),
    "packed_3d_data": lambda m, hx: m(PackedSequence(random(5, 1, 3), torch.tensor([3, 2]))),
    "packed_batch_sizes_too_few": lambda m, hx: m(MISFIT),
    "packed_batch_sizes_too_many": lambda m, hx: m(
        PackedSequence(random(3, 3), torch.tensor([2, 2, 1]))
    ),
    "packed_batch_sizes_growing": lambda m, hx: m(GROWING),
    "packed_batch_sizes_empty": lambda m, hx: m(
        PackedSequence(random(0, 3), torch.tensor([], dtype=torch.int64))
    ),
    "packed_batch_sizes_0": lambda m, hx: m(PackedSequence(random(0, 3), torch.tensor([0]))),
    "packed_batch_sizes_int32": lambda m, hx: m(
        PackedSequence(random(5, 3), torch.tensor([3, 2], dtype=torch.int32))
    ),
    "weight_shape": lambda m, hx: with_weight(m, "weight_hh_l0", random(4, 5))(random(5, 2, 3)),
    "weight_dtype": lambda m, hx: with_weight(m, "weight_hh_l1", m.weight_hh_l1.detach().float())(
        random(5, 2, 3)
    ),
    "bias_dtype": lambda m, hx: with_weight(m, "bias_hh_l0", m.bias_hh_l0.detach().float())(
        random(5, 2, 3)
    ),
    "bias_shape": lambda m, hx: with_weight(m, "bias_ih_l0", random(3))(random(5, 2, 3)),
    "weight_is_none": lambda m, hx: with_weight(m, "weight_hh_l0", None)(random(5, 2, 3)),
    "mode_is_unknown": lambda m, hx: with_attribute(m, "mode", "RNN_SINE")(random(5, 2, 3)),
    "dropout_is_2": lambda m, hx: with_attribute(m, "dropout", 2.0)(random(5, 2, 3)),
    "dropout_is_a_string": lambda m, hx: with_attribute(m, "dropout", "half")(random(5, 2, 3)),
}


def with_weight(module, name, value):
    """A copy of the module with another parameter."""
    return with_attribute(module, name, None if value is None else torch.nn.Parameter(value))


def with_attribute(module, name, value):
    """A copy of the module with another attribute."""
    module = copy.deepcopy(module)
    setattr(module, name, value)
    return module


def given_state(module, batch, change=lambda state: state):
    """A fitting hx, each state of it changed."""
    hx = random_state(module, batch)
    return tuple(change(state) for state in hx) if isinstance(hx, tuple) else change(hx)


def outcomes(modules, call):
    """What a call does with each module: the error, or every output."""
    results = []
    for module in modules:

        def hx(batch, change=lambda state: state, module=module):
            return given_state(module, batch, change)

        try:
            results.append(flat_outputs(module, call(module, hx)))
        except Exception as error:
            results.append((type(error), str(error)))
    return results


def assert_same_outcome(modules, call):
    """The same error by type and text, or the same numbers where torch takes the call after all."""
    theirs, ours = outcomes(modules, call)
    if isinstance(theirs, tuple):
        assert isinstance(ours, tuple), f"ours takes this call, torch.nn says {theirs}"
        assert ours == theirs
        return
    assert isinstance(ours, dict), f"torch.nn takes this call, ours says {ours}"
    assert_same_results(ours, theirs)


@pytest.mark.parametrize("call", MALFORMED_LAYER_CALLS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_malformed_call_of_a_layer_says_what_torch_says(backend, kind, batch_first, call):
    modules = twins(kind, 3, 4, num_layers=2, batch_first=batch_first)
    assert_same_outcome(modules, MALFORMED_LAYER_CALLS[call])


MALFORMED_CELL_CALLS = {
    "no_argument": lambda m, hx: m(),
    "three_arguments": lambda m, hx: m(random(2, 3), hx(2), 1),
    "input_is_none": lambda m, hx: m(None),
    "input_0d": lambda m, hx: m(random()),
    "input_3d": lambda m, hx: m(random(5, 2, 3)),
    "input_size": lambda m, hx: m(random(2, 4)),
    "input_size_1d": lambda m, hx: m(random(4)),
    "input_float32": lambda m, hx: m(random(2, 3).float()),
    "input_float32_with_hx": lambda m, hx: m(random(2, 3).float(), hx(2)),
    "input_int64": lambda m, hx: m(torch.ones(2, 3, dtype=torch.int64)),
    "input_on_meta": lambda m, hx: m(random(2, 3).to("meta")),
    "input_packed": lambda m, hx: m(pack_padded_sequence(random(5, 2, 3), [5, 3])),
    "hx_batch": lambda m, hx: m(random(2, 3), hx(3)),
    "hx_batch_1": lambda m, hx: m(random(2, 3), hx(1)),
    "hx_1d_for_2d": lambda m, hx: m(random(2, 3), hx(None)),
    "hx_2d_for_1d": lambda m, hx: m(random(3), hx(1)),
    "hx_3d": lambda m, hx: m(random(2, 3), hx(2, lambda s: s[None])),
    "hx_0d": lambda m, hx: m(random(2, 3), hx(2, torch.Tensor.sum)),
    "hx_hidden_size": lambda m, hx: m(random(2, 3), hx(2, lambda s: s[:, :3])),
    "hx_float32": lambda m, hx: m(random(2, 3), hx(2, torch.Tensor.float)),
    "hx_on_meta": lambda m, hx: m(random(2, 3), hx(2, lambda s: s.to("meta"))),
    "hx_is_a_number": lambda m, hx: m(random(2, 3), 0.0),
    "hx_is_a_tuple_of_one": lambda m, hx: m(random(2, 3), (random(2, 4),)),
    "hx_is_a_tuple_of_three": lambda m, hx: m(random(2, 3), (random(2, 4),) * 3),
    "hx_is_a_pair_where_not_asked_and_a_tensor_where_a_pair_is": lambda m, hx: m(
        random(2, 3), random(2, 4) if isinstance(hx(2), tuple) else (random(2, 4),) * 2
    ),
    "states_of_different_batches": lambda m, hx: m(random(2, 3), (random(2, 4), random(3, 4))),
    "states_of_different_widths": lambda m, hx: m(random(2, 3), (random(2, 4), random(2, 3))),
    "weight_shape": lambda m, hx: with_weight(m, "weight_hh", random(4, 5))(random(2, 3)),
    "weight_dtype": lambda m, hx: with_weight(m, "weight_hh", m.weight_hh.detach().float())(
        random(2, 3)
    ),
    "one_bias_is_none": lambda m, hx: with_weight(m, "bias_hh", None)(random(2, 3)),
    "bias_shape": lambda m, hx: with_weight(m, "bias_ih", random(3))(random(2, 3)),
}


@pytest.mark.parametrize("call", MALFORMED_CELL_CALLS)
@pytest.mark.parametrize("kind", CELLS)
def test_a_malformed_call_of_a_cell_says_what_torch_says(backend, kind, call):
    assert_same_outcome(twins(kind, 3, 4), MALFORMED_CELL_CALLS[call])


def test_most_of_the_malformed_calls_are_refused():
    """Else the tests above would compare numbers instead of errors."""
    refused = [
        call
        for calls, kind, options in (
            (MALFORMED_LAYER_CALLS, "gru", {"num_layers": 2}),
            (MALFORMED_CELL_CALLS, "gru_cell", {}),
        )
        for call in calls.values()
        if isinstance(outcomes(twins(kind, 3, 4, **options)[:1], call)[0], tuple)
    ]
    assert len(refused) > 0.8 * (len(MALFORMED_LAYER_CALLS) + len(MALFORMED_CELL_CALLS))


def test_an_unknown_nonlinearity_of_a_cell_fails_at_forward_alone(backend):
    theirs, ours = (lib.RNNCell(3, 4, nonlinearity="sine") for lib in (torch.nn, triton_rnn))
    input = random(2, 3, dtype=torch.float32)
    expected = said(lambda: theirs(input))
    assert expected == (RuntimeError, "Unknown nonlinearity: sine")
    assert said(lambda: ours(input)) == expected


MALFORMED_CONSTRUCTIONS = [
    ((), {}),
    ((3,), {}),
    ((0, 4), {}),
    ((3, 0), {}),
    ((-1, 4), {}),
    ((3.0, 4), {}),
    ((3, 4.0), {}),
    (("3", 4), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "0.5"}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": None}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"nonlinearity": "sine"}),
    ((3, 4), {"mode": "GRU"}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"dtype": torch.int64}),
    ((3, 4), {"colour": "red"}),
]


@pytest.mark.parametrize(("args", "options"), MALFORMED_CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_a_malformed_construction_says_what_torch_says(name, args, options):
    theirs = said(lambda: getattr(torch.nn, name)(*args, **options))
    ours = said(lambda: getattr(triton_rnn, name)(*args, **options))
    assert ours == theirs


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_dropout_of_one_layer_warns_where_torch_does(name):
    texts = []
    for lib in (torch.nn, triton_rnn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as record:
            getattr(lib, name)(3, 4, dropout=0.5)
        texts.append([str(warning.message) for warning in record])
    assert texts[0] == texts[1]


# --- The classes, as a caller sees them.


@pytest.mark.parametrize("name", CLASSES)
def test_ours_is_an_instance_of_torchs_class(name):
    ours = getattr(triton_rnn, name)(3, 4)
    assert isinstance(ours, getattr(torch.nn, name))
    assert type(ours).__name__ == name
    assert isinstance(ours, torch.nn.RNNBase if "Cell" not in name else torch.nn.RNNCellBase)


@pytest.mark.parametrize("name", CLASSES)
def test_forward_is_called_with_torchs_argument_names(name):
    theirs, ours = (inspect.signature(getattr(lib, name).forward) for lib in (torch.nn, triton_rnn))
    # What is beyond torch's is given by name only.
    shared = {n: p for n, p in ours.parameters.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(shared) == list(theirs.parameters)
    assert [p.default for p in shared.values()] == [p.default for p in theirs.parameters.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_may_be_given_by_name(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    input, hx = some_input(kind), random_state(ours, 2)
    expected = flat_outputs(theirs, theirs(input=input, hx=hx))
    assert_same_results(flat_outputs(ours, ours(hx=hx, input=input)), expected)


@pytest.mark.parametrize("kind", ["lstm", "lstm_cell"])
def test_a_list_of_two_states_is_taken_where_torch_takes_it(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    hx = list(random_state(ours, 2))
    expected = flat_outputs(theirs, theirs(some_input(kind), hx))
    assert_same_results(flat_outputs(ours, ours(some_input(kind), hx)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_types_that_are_returned_are_torchs(backend, kind):
    theirs, ours = twins(kind, 3, 4)

    def types(returned):
        if isinstance(returned, tuple) and not isinstance(returned, PackedSequence):
            return type(returned), [types(part) for part in returned]
        return type(returned)

    input = some_input(kind)
    assert types(ours(input)) == types(theirs(input))
    if kind in LAYERS:
        packed = pack_sequence([random(5, 3), random(3, 3)])
        assert types(ours(packed)) == types(theirs(packed))


CONSTRUCTIONS = [
    ("RNN", (3, 4, 2, "relu"), {}),
    ("RNN", (3, 4), {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5}),
    ("RNN", (3, 4, 2, "tanh", False, True, 0.5, True), {}),
    ("GRU", (3, 4, 2, False, True, 0.5, True), {}),
    ("LSTM", (3, 4, 2, True, True, 0.5, True, 2), {}),
    ("LSTM", (3, 4), {"proj_size": 2, "bidirectional": True, "dtype": torch.float64}),
    ("RNNCell", (3, 4, False, "relu"), {}),
    ("GRUCell", (3, 4), {"bias": False}),
    ("LSTMCell", (3, 4), {"dtype": torch.float16}),
]


@pytest.mark.parametrize(("name", "args", "options"), CONSTRUCTIONS, ids=str)
def test_the_same_seed_gives_torchs_initial_parameters_names_and_repr(name, args, options):
    modules = []
    for lib in (torch.nn, triton_rnn):
        torch.manual_seed(5)
        modules.append(getattr(lib, name)(*args, **options))
        modules.append(torch.get_rng_state())
    theirs, theirs_rng, ours, ours_rng = modules
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours_rng, theirs_rng)
    for expected, actual in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert actual[0] == expected[0]
        assert torch.equal(actual[1], expected[1])
    assert list(ours.named_buffers()) == list(ours.children()) == []


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_attributes_that_programs_read_are_there(name):
    theirs, ours = (
        getattr(lib, name)(3, 4, 2, bidirectional=True) for lib in (torch.nn, triton_rnn)
    )
    for attribute in (*torch.nn.RNNBase.__constants__, "_flat_weights_names", "_all_weights"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)
    assert ours.flatten_parameters() is None
    assert [[p.shape for p in row] for row in ours.all_weights] == [
        [p.shape for p in row] for row in theirs.all_weights
    ]
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_a_cell_of_hidden_size_0_works_as_in_torch(backend):
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        theirs, ours = (
            getattr(lib, name)(3, 0, dtype=torch.float64) for lib in (torch.nn, triton_rnn)
        )
        assert_same_results(run(ours, random(2, 3)), run(theirs, random(2, 3)))


# --- The life of a module.


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_both_ways(kind):
    theirs, ours = twins(kind, 3, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    torch.nn.init.ones_(ours.weight_hh_l0 if kind in LAYERS else ours.weight_hh)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for expected, actual in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_state_dict_loaded_by_assignment_takes_effect(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    other = {name: random(*value.shape, seed=9) for name, value in ours.state_dict().items()}
    input = some_input(kind)
    ours(input)
    for module in (theirs, ours):
        module.load_state_dict(other, assign=True)
    assert_same_results(run(ours, input), run(theirs, input))


def by_deepcopy(module):
    return copy.deepcopy(module)


def by_copy(module):
    return copy.copy(module)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_weights_only(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [by_deepcopy, by_copy, by_pickle, by_torch_save, by_weights_only],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("used_before", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_module(backend, kind, used_before, copied):
    _, ours = twins(kind, 3, 4)
    input = some_input(kind)
    expected = run(ours, input)
    if used_before:
        # What a call may leave on a module must neither hinder the copy nor travel with it.
        assert_same_results(run(ours, input), expected)
    else:
        _, ours = twins(kind, 3, 4)
        torch.manual_seed(0)
        _, ours = twins(kind, 3, 4)
        expected = run(copy.deepcopy(ours), input)
    other = copied(ours)
    assert type(other) is type(ours)
    assert repr(other) == repr(ours)
    assert_same_results(run(other, input), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(first_output(other, input), next(iter(expected.values())))


@pytest.mark.parametrize("name", CLASSES)
def test_a_pickle_of_torchs_module_turned_into_ours_works(backend, name):
    """A change of class is all the difference: ours adds no state of its own."""
    theirs = getattr(torch.nn, name)(3, 4, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    ours.__class__ = getattr(triton_rnn, name)
    input = random(2, 3) if "Cell" in name else random(5, 2, 3)
    assert_same_results(run(ours, input), run(theirs, input))
    assert_same_results(run(by_pickle(ours), input), run(theirs, input))


@pytest.mark.parametrize("name", CLASSES)
def test_a_call_leaves_no_attribute_behind(backend, name):
    ours = getattr(triton_rnn, name)(3, 4, dtype=torch.float64)
    before = set(vars(ours))
    run(ours, random(2, 3) if "Cell" in name else random(5, 2, 3))
    assert set(vars(ours)) == before


class ScaledGRU(triton_rnn.GRU):
    """A user's subclass with a parameter of its own, a forward of its own, and its own init."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0, dtype=self.weight_hh_l0.dtype))

    def reset_parameters(self):
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, 0.1)

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output * self.scale, state


def test_a_users_subclass_keeps_its_forward_its_parameter_and_its_reset(backend):
    ours = ScaledGRU(3, 4, dtype=torch.float64)
    theirs = torch.nn.GRU(3, 4, dtype=torch.float64)
    for parameter in theirs.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    input = random(5, 2, 3)
    assert_close(ours(input)[0], 2 * theirs(input)[0])
    ours(input)[0].sum().backward()
    assert_close(ours.scale.grad, theirs(input)[0].sum().view(1))
    assert repr(ours) == "ScaledGRU(3, 4)"


class Counted:
    """A mixin that cooperates, as torch.nn.Module allows when it is the last of the bases."""

    def __init__(self, *args, label="none", **options):
        super().__init__(*args, **options)
        self.label = label
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_multiple_inheritance_works(backend, kind):
    theirs, plain = twins(kind, 3, 4)
    mixed = type("Mixed", (Counted, type(plain)), {})(3, 4, label="a", dtype=torch.float64)
    mixed.load_state_dict(theirs.state_dict())
    assert_same_results(run(mixed, some_input(kind)), run(theirs, some_input(kind)))
    assert (mixed.label, mixed.calls) == ("a", 1)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_hooks_are_called_and_may_change_what_passes(backend, kind):
    seen = []
    outputs = []
    for module in twins(kind, 3, 4):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
        module.register_full_backward_hook(
            lambda m, grad_input, grad_output: seen.append(
                ([g is None for g in grad_input], len(grad_output))
            )
        )
        input = some_input(kind).requires_grad_()
        output = first_output(module, input)
        output.sum().backward()
        outputs.append((output, input.grad))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    for expected, actual in zip(*outputs, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_hooks_on_tensors_are_called_with_torchs_gradients(backend, kind):
    gradients = []
    for module in twins(kind, 3, 4):
        caught = {}
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, name=name, caught=caught: caught.update({name: g}))
        output = first_output(module, some_input(kind))
        output.register_hook(lambda g: g * 3)
        output.sum().backward()
        gradients.append(caught)
    assert_same_results(gradients[1], gradients[0])


@pytest.mark.parametrize("change", ["half", "float", "bfloat16", "to_float32", "double"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_module_moved_to_another_dtype_computes_in_it(backend, kind, change):
    theirs, ours = twins(kind, 3, 4)
    ours(some_input(kind))
    for module in (theirs, ours):
        if change == "to_float32":
            module.to(torch.float32)
        else:
            getattr(module, change)()
    dtype = next(ours.parameters()).dtype
    skip_unless_served(backend, dtype)
    output = first_output(ours, some_input(kind, dtype))
    assert output.dtype == dtype
    expected = first_output(theirs, some_input(kind, dtype))
    assert_close(output, expected, tolerance=2 * TOLERANCES[dtype])
    if kind in LAYERS:
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_memory_shared_between_processes_stays_usable(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    ours.share_memory()
    assert next(ours.parameters()).is_shared()
    assert_same_results(run(ours, some_input(kind)), run(theirs, some_input(kind)))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_to_empty_and_reset_parameters_give_torchs_weights(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    for module in (theirs, ours):
        module.to("meta").to_empty(device="cpu")
        torch.manual_seed(3)
        module.reset_parameters()
    assert_same_results(run(ours, some_input(kind)), run(theirs, some_input(kind)))


# Each changes a weight of a module in a way that torch.nn notices at the next call.
WEIGHT_CHANGES = {
    "in_place": lambda m, name: getattr(m, name).detach().add_(1),
    "data_in_place": lambda m, name: getattr(m, name).data.mul_(2),
    "data_assigned": lambda m, name: setattr(
        getattr(m, name), "data", random(*getattr(m, name).shape, seed=4)
    ),
    "data_assigned_strided": lambda m, name: setattr(
        getattr(m, name), "data", random(*getattr(m, name).shape[::-1], seed=4).t()
    ),
    "parameter_assigned": lambda m, name: setattr(
        m, name, torch.nn.Parameter(random(*getattr(m, name).shape, seed=4))
    ),
    "deleted_and_assigned": lambda m, name: reassign(m, name),
    "weight_norm": lambda m, name: scale_original(parametrizations.weight_norm(m, name), name),
    "spectral_norm": lambda m, name: parametrizations.spectral_norm(m, name).eval(),
    "parametrized": lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
    "pruned": lambda m, name: prune.l1_unstructured(m, name, amount=0.5),
}


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def reassign(module, name):
    """As torch.nn.utils.weight_norm and dropout of weights do."""
    weight = getattr(module, name)
    del module._parameters[name]
    setattr(module, name, torch.nn.Parameter(2 * weight.detach()))


def scale_original(module, name):
    """A weight norm whose magnitude was trained a little."""
    with torch.no_grad():
        module.parametrizations[name].original0.mul_(3)
    return module


@pytest.mark.parametrize("change", WEIGHT_CHANGES)
@pytest.mark.parametrize("which", ["weight_ih", "weight_hh"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_change_of_a_weight_takes_effect_at_the_next_call(backend, kind, which, change):
    name = which if kind in CELLS else f"{which}_l0"
    theirs, ours = twins(kind, 3, 4)
    input, hx = some_input(kind), random_state(ours, 2)
    before = first_output(ours, input, hx).detach().clone()
    run(ours, input, hx)
    for module in (theirs, ours):
        torch.manual_seed(2)
        WEIGHT_CHANGES[change](module, name)
    assert_same_results(run(ours, input, hx), run(theirs, input, hx))
    assert not torch.allclose(first_output(ours, input, hx), before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_old_weight_norm_takes_effect(backend, kind):
    """It makes of the weight a plain attribute that is computed anew before every call."""
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    theirs, ours = twins(kind, 3, 4)
    for module in (theirs, ours):
        torch.nn.utils.weight_norm(module, name)
        with torch.no_grad():
            getattr(module, f"{name}_g").mul_(2)
    assert_same_results(run(ours, some_input(kind)), run(theirs, some_input(kind)))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_functional_call_uses_the_parameters_that_it_is_given(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    input = some_input(kind)
    own = first_output(ours, input)
    others = {
        name: random(*value.shape, seed=8).requires_grad_()
        for name, value in ours.named_parameters()
    }
    gradients = []
    for module in (theirs, ours):
        returned = functional_call(module, others, (input,))
        outputs = list(flat_outputs(module, returned).values())
        gradients.append([*outputs, *torch.autograd.grad(outputs[0].sum(), list(others.values()))])
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected)
    assert torch.equal(first_output(ours, input), own)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_training_with_an_optimizer_takes_torchs_steps(backend, kind):
    losses = []
    for module in twins(kind, 3, 4):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = first_output(module, some_input(kind)).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        losses.append(torch.stack(history))
    assert_close(losses[1], losses[0])
    assert losses[1][-1] < losses[1][0]


def test_torch_checkpoint_recomputes_the_same_gradients(backend):
    theirs, ours = twins("gru", 3, 4, num_layers=2, dropout=0.5)
    input = random(5, 2, 3)
    gradients = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        output = torch.utils.checkpoint.checkpoint(
            lambda x, m=module: m(x)[0], input, use_reentrant=False
        )
        gradients.append(torch.autograd.grad(output.sum(), list(module.parameters())))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected)


def test_saved_tensor_hooks_see_what_is_saved(backend):
    """So offloading of activations works: what is saved goes through autograd, not past it."""
    _, ours = twins("gru", 3, 4)
    expected = run(ours, random(5, 2, 3))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor.shape) or tensor.clone(), lambda tensor: tensor
    ):
        assert_same_results(run(ours, random(5, 2, 3)), expected)
    assert packed


def test_anomaly_mode_finds_nothing_to_object_to(backend):
    _, ours = twins("lstm", 3, 4)
    expected = run(ours, random(5, 2, 3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled", UserWarning)
        with torch.autograd.detect_anomaly():
            actual = run(ours, random(5, 2, 3))
    assert_same_results(actual, expected)


def test_deterministic_algorithms_are_all_there_is(backend):
    _, ours = twins("gru", 3, 4, num_layers=2, bidirectional=True)
    prepare = lambda x: pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)  # noqa: E731
    expected = run(ours, random(5, 2, 3), prepare=prepare)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_results(run(ours, random(5, 2, 3), prepare=prepare), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# --- Other parts of torch that take a module.


class Model(torch.nn.Module):
    """The smallest model around a layer or a cell."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = torch.nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, input):
        return self.head(self.inner(input)[0])


class CellModel(Model):
    """The same around an RNNCell or GRUCell, which returns no tuple."""

    def forward(self, input):
        return self.head(self.inner(input))


def models(kind):
    """Two models of equal weights: around torch.nn's module, around ours."""
    theirs, ours = twins(kind, 3, 4)
    model = CellModel if kind in ("rnn_tanh_cell", "rnn_relu_cell", "gru_cell") else Model
    pair = model(theirs), model(ours)
    pair[1].head.load_state_dict(pair[0].head.state_dict())
    return pair


def gradients_of(module, input):
    """The output and every gradient of its squares."""
    output = module(input)
    return [output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))]


# torch.jit warns of its own end whenever it is used, and tracing of every `if` on a shape.
scripting = pytest.mark.filterwarnings(
    "ignore:`torch.jit.*deprecated:DeprecationWarning",
    "ignore:`torch.jit.*deprecated:FutureWarning",
    "ignore::torch.jit.TracerWarning",
)


@scripting
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_model_that_holds_ours_can_be_scripted_saved_and_copied(kind):
    theirs, ours = models(kind)
    expected = gradients_of(theirs, some_input(kind))
    scripted = torch.jit.script(ours)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for module in (scripted, copy.deepcopy(scripted), torch.jit.load(file)):
        for value, actual in zip(expected, gradients_of(module, some_input(kind)), strict=True):
            assert_close(actual, value)
    for value, actual in zip(expected, gradients_of(ours, some_input(kind)), strict=True):
        assert_close(actual, value, "the model after it was scripted")


@scripting
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_model_that_holds_ours_can_be_traced(kind):
    theirs, ours = models(kind)
    expected = gradients_of(theirs, some_input(kind))
    traced = torch.jit.trace(ours, some_input(kind))
    for value, actual in zip(expected, gradients_of(traced, some_input(kind)), strict=True):
        assert_close(actual, value)


# Dynamo makes an instance of every autograd.Function that it traces, and hears from it.
compiling = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)


@compiling
@pytest.mark.parametrize("backend_of_compile", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_compiled_model_gives_the_right_numbers(kind, backend_of_compile):
    torch._dynamo.reset()
    theirs, ours = models(kind)
    compiled = torch.compile(ours, backend=backend_of_compile)
    for steps in (5, 7):
        input = random(2, 3) if kind in CELLS else random(steps, 2, 3)
        expected = gradients_of(theirs, input)
        for value, actual in zip(expected, gradients_of(compiled, input), strict=True):
            assert_close(actual, value)
        with torch.no_grad():
            assert_close(compiled(input), expected[0])


@compiling
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_model_compiles_to_one_graph_where_dynamo_is_told_to_allow_it(kind):
    torch._dynamo.reset()
    theirs, ours = models(kind)
    with triton_rnn.allow_compile():
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        actual = gradients_of(compiled, random(5, 2, 3))
    for value, got in zip(gradients_of(theirs, random(5, 2, 3)), actual, strict=True):
        assert_close(got, value)


@compiling
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_compiled_model_takes_packed_input(kind):
    torch._dynamo.reset()
    theirs, ours = twins(kind, 3, 4, bidirectional=True)
    packed = pack_padded_sequence(random(5, 2, 3), torch.tensor([3, 5]), enforce_sorted=False)
    compiled = torch.compile(ours, backend="eager")
    assert_close(compiled(packed)[0].data, theirs(packed)[0].data)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_model_on_the_meta_device_has_torchs_shapes(kind):
    shapes = []
    for module in twins(kind, 3, 4):
        module.to("meta")
        outputs = flat_outputs(module, module(some_input(kind).to("meta")))
        sum(out.sum() for out in outputs.values()).backward()
        shapes.append(
            [(out.shape, out.dtype, out.device.type, out.stride()) for out in outputs.values()]
            + [parameter.grad.shape for parameter in module.parameters()]
        )
    assert shapes[0] == shapes[1]
    assert shapes[0][0][2] == "meta"


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_fake_tensors_have_torchs_shapes(kind):
    shapes = []
    for lib in (torch.nn, triton_rnn):
        with torch._subclasses.FakeTensorMode():
            name, options = LAYERS[kind]
            module = getattr(lib, name)(3, 4, 2, bidirectional=True, batch_first=True, **options)
            outputs = flat_outputs(module, module(torch.randn(2, 5, 3)))
            sum(out.sum() for out in outputs.values()).backward()
            shapes.append(
                [(out.shape, out.dtype, out.device.type) for out in outputs.values()]
                + [parameter.grad.shape for parameter in module.parameters()]
            )
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_fake_tensors_of_a_real_model_have_torchs_shapes(kind):
    shapes = []
    for module in twins(kind, 3, 4):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            output = first_output(module, torch.randn_like(some_input(kind)))
        assert type(output).__name__ == "FakeTensor"
        shapes.append((output.shape, output.dtype, output.device))
    assert shapes[0] == shapes[1]


AUTOCASTS = [
    (kind, form, dtype)
    for kind in ONE_OF_EACH
    for form in ("padded", "packed", "hx")
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if form != "packed" or kind in LAYERS
]


@pytest.mark.parametrize(("kind", "form", "dtype"), AUTOCASTS)
def test_autocast_gives_torchs_dtypes_and_numbers(kind, form, dtype):
    theirs, ours = twins(kind, 3, 4, dtype=dtype)
    input = some_input(kind, dtype)
    if form == "packed":
        input = pack_padded_sequence(input, torch.tensor([3, 5]), enforce_sorted=False)
    args = (input, random_state(ours, 2)) if form == "hx" else (input,)

    def cast(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = flat_outputs(module, module(*args))
        sum(out.float().square().sum() for out in outputs.values()).backward()
        return outputs | {f"grad of {name}": p.grad for name, p in module.named_parameters()}

    try:
        expected = cast(theirs)
    except RuntimeError as error:
        # Not every processor has the instructions that oneDNN's LSTM asks for.
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            cast(ours)
        return
    actual = cast(ours)
    for name, value in expected.items():
        assert_close(actual[name], value, name, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_autocast_takes_an_input_of_the_lower_dtype(kind):
    theirs, ours = twins(kind, 3, 4, dtype=torch.float32)
    input = some_input(kind, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(ours(input)[0], theirs(input)[0])


def test_autocast_refuses_an_explicit_backend_that_cannot_cast():
    _, ours = twins("gru", 3, 4, dtype=torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        triton_rnn.use_backend("torchscript"),
        pytest.raises(triton_rnn.BackendError, match="autocast"),
    ):
        ours(random(5, 2, 3, dtype=torch.float32))


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_functional_gradients_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4):
        input = some_input(kind)

        def loss(parameters, input, module=module):
            outputs = flat_outputs(module, functional_call(module, parameters, (input,)))
            return sum(out.square().sum() for out in outputs.values())

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        by_parameter, by_input = grad(loss, argnums=(0, 1))(parameters, input)
        twice = grad(lambda x, loss=loss, p=parameters: grad(loss, 1)(p, x).square().sum())(input)
        jacobian = jacrev(lambda x, module=module: first_output(module, x))(input)
        results.append([*by_parameter.values(), by_input, twice, jacobian])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")  # torch's own forward derivatives
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_forward_derivatives_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4):
        input, tangent = some_input(kind), random(*some_input(kind).shape, seed=3)
        function = lambda x, module=module: first_output(module, x)  # noqa: E731
        with torch.autograd.forward_ad.dual_level():
            dual = function(torch.autograd.forward_ad.make_dual(input, tangent))
            forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
        results.append([*jvp(function, (input,), (tangent,)), forward, jacfwd(function)(input)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


# torch says of its own operators that a batching rule of theirs is slow.
slow_vmap = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@slow_vmap
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_of_many_cotangents_at_once_are_torchs(kind):
    results = []
    for module in twins(kind, 3, 4):
        output = first_output(module, some_input(kind))
        results.append(
            torch.autograd.grad(
                output,
                list(module.parameters()),
                random(3, *output.shape, seed=2),
                is_grads_batched=True,
            )
        )
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)


@slow_vmap
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_vmap_over_inputs_is_a_loop_over_them(kind):
    theirs, ours = twins(kind, 3, 4)
    inputs = random(6, *some_input(kind).shape)
    expected = torch.stack([first_output(theirs, input) for input in inputs])
    assert_close(vmap(lambda x: first_output(ours, x))(inputs), expected)


@slow_vmap
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_vmap_over_models_is_a_loop_over_them(kind):
    pairs = [twins(kind, 3, 4) for _ in range(3)]
    input = some_input(kind)
    expected = torch.stack([first_output(theirs, input) for theirs, _ in pairs])
    parameters, buffers = stack_module_state([ours for _, ours in pairs])
    ours = pairs[0][1]

    def call(parameters, buffers):
        returned = functional_call(ours, (parameters, buffers), (input,))
        return next(iter(flat_outputs(ours, returned).values()))

    assert_close(vmap(call)(parameters, buffers), expected)


@slow_vmap
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_gradients_per_sample_are_a_loop_over_samples(kind):
    theirs, ours = twins(kind, 3, 4)
    inputs = random(4, *some_input(kind).shape)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, input):
        returned = functional_call(ours, parameters, (input,))
        return next(iter(flat_outputs(ours, returned).values())).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    for name, parameter in theirs.named_parameters():
        one_by_one = [
            torch.autograd.grad(first_output(theirs, input).square().sum(), parameter)[0]
            for input in inputs
        ]
        assert_close(actual[name], torch.stack(one_by_one), name)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_an_exported_model_gives_the_right_numbers(kind):
    theirs, ours = models(kind)
    with warnings.catch_warnings():
        # Of the list of weights that torch.nn itself keeps on every recurrent module.
        warnings.filterwarnings("ignore", "The tensor attributes", UserWarning)
        exported = torch.export.export(ours, (random(5, 2, 3),))
    assert_close(exported.module()(random(5, 2, 3)), theirs(random(5, 2, 3)))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_module_frozen_after_its_forward_gives_the_gradient_of_its_input(kind):
    """As a gradient penalty does: a critic is frozen between its forward and the backward."""
    results = []
    for module in twins(kind, 3, 4):
        input = random(6, 2, 3).requires_grad_()
        output = first_output(module, input)
        module.requires_grad_(False)
        (slope,) = torch.autograd.grad(output.sum(), input, create_graph=True)
        slope.square().sum().backward()
        results.append((slope.detach(), input.grad))
    for theirs, ours in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["native", "torchscript"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru", "rnn_tanh_cell", "gru_cell"])
def test_what_no_gradient_reads_may_change_before_the_backward(kind, backend):
    """Of one step all weights, of more W_ih and the biases, where the input needs no gradient; the
    input, where no weight does."""
    steps = [(2, 3)] if kind in CELLS else [(1, 2, 3), (5, 2, 3)]
    for shape in steps:
        results = []
        for module in twins(kind, 3, 4):
            with triton_rnn.use_backend(backend):
                output = first_output(module, random(*shape))
                with torch.no_grad():
                    for name, weight in module.named_parameters():
                        if shape[0] != 5 or "weight_hh" not in name:
                            weight.add_(0.1)
                output.sum().backward()
            results.append([weight.grad for weight in module.parameters()])
        for theirs, ours in zip(*results, strict=True):
            assert_close(ours, theirs)
        if kind in CELLS:
            continue
        results = []
        for module in twins(kind, 3, 4):
            module.requires_grad_(False)
            input, hx = random(*shape), random_state(module, 2).requires_grad_()
            with triton_rnn.use_backend(backend):
                output = first_output(module, input, hx)
                input.add_(1.0)
                output.sum().backward()
            results.append(hx.grad)
        assert_close(results[1], results[0])


@pytest.mark.parametrize("which", ["input", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("backend", ["native", "torchscript"])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_gradient_reads_may_not_change_before_the_backward(kind, backend, which):
    _, module = twins(kind, 3, 4)
    input = random(5, 2, 3).requires_grad_()
    with triton_rnn.use_backend(backend):
        output = first_output(module, input)
    with torch.no_grad():
        (input if which == "input" else getattr(module, which)).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_what_changed_is_told_by_the_second_derivative_that_reads_it(kind):
    _, module = twins(kind, 3, 4)
    output = first_output(module, random(5, 2, 3))
    with torch.no_grad():
        module.weight_ih_l0.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), list(module.parameters()), create_graph=True)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_weights_made_in_inference_mode_have_torchs_error_when_trained(kind):
    name, options = LAYERS[kind]
    messages = []
    for library in (torch.nn, triton_rnn):
        with torch.inference_mode():
            module = getattr(library, name)(3, 4, **options)
        with pytest.raises(RuntimeError) as caught:
            module(torch.randn(5, 2, 3, requires_grad=True))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_packed_sequences_of_one_length_and_the_wrong_width_are_refused(backend):
    """By torch.nn.GRU and RNN too; torch.nn.LSTM's oneDNN reads beyond the weights."""
    packed = pack_sequence([torch.randn(2, 64), torch.randn(2, 64)])
    for name in ("RNN", "GRU", "LSTM"):
        for options in ({}, {"recompute": True}, {"zoneout": 0.1}):
            module = getattr(triton_rnn, name)(2, 3, **options)
            with triton_rnn.use_backend(backend), pytest.raises(RuntimeError) as caught:
                module(packed)
            assert str(caught.value) == (
                "input.size(-1) must be equal to input_size. Expected 2, got 64"
            )


@pytest.mark.parametrize("name", ["GRUCell", "RNNCell", "LSTMCell"])
def test_what_a_cell_said_of_its_biases_when_it_was_made_is_not_asked_again(name):
    theirs = getattr(torch.nn, name)(3, 3)
    ours = getattr(triton_rnn, name)(3, 3)
    ours.load_state_dict(theirs.state_dict())
    theirs.bias = ours.bias = False
    input = torch.randn(2, 3)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            for _ in range(4):
                assert_close(first_output(ours, input), first_output(theirs, input))
