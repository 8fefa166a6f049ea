"""A default device of torch's that is not the tensors': what we make for ourselves is not on it.

`torch.set_default_device("cuda")` is a user's way to have models and data on a GPU; sizes, orders
and tables of a call are on the CPU all the same. The meta device stands for it here: nothing that
is made on it has numbers.
"""

import pytest
import torch
from tolerances import LAYERS, assert_close, random_state, twins
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn

STEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
LENGTHS = torch.tensor([2, 6, 0])
STARTS = torch.zeros(STEPS, BATCH, dtype=torch.bool).index_fill(0, torch.tensor([3]), True)


def elsewhere():
    """A default device whose tensors have no numbers."""
    return torch.device("meta")


def data(form):
    input = torch.randn(STEPS, BATCH, INPUT)
    return input if form == "padded" else pack_padded_sequence(input, torch.tensor([6, 4, 1]))


def outcome(module, *arguments, **named):
    """Output and gradients of all parameters of a call, or what it was refused with."""
    torch.manual_seed(1)
    try:
        output, state, *_ = module(*arguments, **named)
    except triton_rnn.BackendError as error:
        return str(error)
    rows = output.data if isinstance(output, PackedSequence) else output
    h_n = state[0] if isinstance(state, tuple) else state
    loss = rows.square().mean() + h_n.sum()
    return [rows.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def assert_same(actual, expected, refused):
    """Bit for bit; or both refused, in the same words."""
    assert isinstance(expected, str) <= refused
    if isinstance(expected, str):
        assert actual == expected
    else:
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["native", "torchscript", "aten", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_as_torchs(kind, backend, form):
    theirs, ours = twins(kind, INPUT, HIDDEN, 2, dtype=torch.float32, bidirectional=True)
    input = data(form)
    hx = random_state(theirs, BATCH)
    expected = outcome(theirs, input, hx)
    with triton_rnn.use_backend(backend), elsewhere():
        actual = outcome(ours, input, hx)
    for ours_of, theirs_of in zip(actual, expected, strict=True):
        assert_close(ours_of, theirs_of)


CALLS = {
    "lengths": ({}, {"lengths": LENGTHS}),
    "resets": ({}, {"reset_mask": STARTS}),
    "both": ({}, {"lengths": LENGTHS, "reset_mask": STARTS, "reset_to": "initial"}),
    "all states": ({}, {"all_states": True}),
    "options": (
        {"recurrent_dropout": 0.3, "zoneout": 0.2, "input_dropout": 0.1, "weight_dropout": 0.1},
        {"lengths": LENGTHS},
    ),
    "recompute": ({"recompute": 2}, {}),
    "layer_norm": ({"layer_norm": True}, {"reset_mask": STARTS}),
}


@pytest.mark.parametrize("backend", ["auto", "torchscript", "aten", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_what_torch_does_not_have_is_what_it_is_without(name, backend):
    options, arguments = CALLS[name]
    module = triton_rnn.LSTM(INPUT, HIDDEN, bidirectional=True, **options)
    input = data("padded")
    with triton_rnn.use_backend(backend):
        expected = outcome(module, input, **arguments)
        with elsewhere():
            actual = outcome(module, input, **arguments)
    assert_same(actual, expected, refused=backend != "auto")


@pytest.mark.parametrize(
    "options",
    [{"recompute": 2}, {"zoneout": 0.2, "weight_dropout": 0.1}, {"input_dropout": 0.3}],
    ids=["recompute", "zoneout", "input_dropout"],
)
@pytest.mark.parametrize("backend", ["auto", "torchscript", "aten", "reference"])
def test_a_packed_batch_with_options_is_what_it_is_without(backend, options):
    module = triton_rnn.GRU(INPUT, HIDDEN, bidirectional=True, **options)
    input = data("packed")
    with triton_rnn.use_backend(backend):
        expected = outcome(module, input)
        with elsewhere():
            actual = outcome(module, input)
    assert_same(actual, expected, refused=backend != "auto")


def test_a_users_cell_and_a_stream_are_what_they_are_without():
    with elsewhere():

        class Gate(triton_rnn.Recurrent, gates=2):
            @staticmethod
            def step(input, hidden, state):
                (h,) = state
                f = torch.sigmoid(input[0] + hidden[0])
                return (1 - f) * h + f * torch.tanh(input[1] + hidden[1])

    input = torch.randn(STEPS, BATCH, INPUT)
    cell = Gate(INPUT, HIDDEN)
    lstm = triton_rnn.LSTM(INPUT, HIDDEN)
    expected = cell(input, lengths=LENGTHS)[0], lstm(input)[0]
    with elsewhere():
        stream = triton_rnn.Stream(lstm)
        streamed = torch.cat([stream(part) for part in input.split(2)])
        actual = cell(input, lengths=LENGTHS)[0], streamed
    assert all(map(torch.equal, actual, expected))
