"""A stream is the whole sequence in chunks: the same numbers, whatever the cut."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
from tolerances import LAYERS, assert_close, random, random_state, twins
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn import Stream, dispatch, tbptt

CUTS = {
    "steps": [1] * 23,
    "uneven": [1, 7, 2, 13],
    "late_step": [22, 1],
    "whole": [23],
}
FORMS = ("time_first", "batch_first", "unbatched")
# Beside whole vectors and off them, for every kind of block that the C loops have.
SIZES = [(5, 7, 3), (16, 32, 8), (33, 70, 1)]


def module_of(kind, input_size, hidden_size, dtype=torch.float64, **options):
    return twins(kind, input_size, hidden_size, dtype=dtype, **options)[1]


def sequence_of(form, steps, batch, size, dtype=torch.float64):
    shapes = {
        "time_first": (steps, batch, size),
        "batch_first": (batch, steps, size),
        "unbatched": (steps, size),
    }
    return random(*shapes[form], dtype=dtype)


def run_chunks(stream, input, cut, form="time_first"):
    time = 1 if form == "batch_first" else 0
    outputs = [stream(chunk) for chunk in input.split(cut, time)]
    return torch.cat(outputs, time)


def tensors_of(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_any_cut_gives_the_bits_of_the_whole_sequence(kind, cut, sizes, dtype):
    """On native, where training and inference are the same numbers too."""
    input_size, hidden_size, batch = sizes
    module = module_of(kind, input_size, hidden_size, dtype, num_layers=2)
    input = sequence_of("time_first", 23, batch, input_size, dtype)
    with triton_rnn.use_backend("native"):
        output, state = module(input)
    for grad in (True, False):
        stream = Stream(module)
        with torch.set_grad_enabled(grad):
            assert torch.equal(run_chunks(stream, input, CUTS[cut]), output)
        assert stream.backend == "native"
        for ours, whole in zip(tensors_of(stream.state), tensors_of(state), strict=True):
            assert torch.equal(ours, whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_stream_is_laid_out_as_its_module(kind, form):
    module = module_of(kind, 5, 7, batch_first=form == "batch_first")
    input = sequence_of(form, 23, 3, 5)
    with triton_rnn.use_backend("native"):
        output, state = module(input)
    stream = Stream(module)
    assert torch.equal(run_chunks(stream, input, CUTS["uneven"], form), output)
    for ours, whole in zip(tensors_of(stream.state), tensors_of(state), strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_backend_streams_the_whole_sequence_with_its_gradients(backend, kind):
    module = module_of(kind, 5, 7, num_layers=2)
    input = random(23, 3, 5)
    found = []
    for chunked in (True, False):
        leaf = input.clone().requires_grad_()
        module.zero_grad()
        if chunked:
            output = run_chunks(Stream(module), leaf, CUTS["uneven"])
        else:
            output = module(leaf)[0]
        output.square().sum().backward()
        found.append([output.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, whole in zip(*found, strict=True):
        assert_close(ours, whole)


def test_the_backend_does_not_change_with_the_length_of_a_chunk():
    module = module_of("lstm", 64, 256, torch.float32)
    stream = Stream(module)
    taken = set()
    for steps in (1, 40, 2):
        stream(random(steps, 2, 64, dtype=torch.float32))
        taken.add(stream.backend)
    assert taken == {"native"}


def test_without_the_c_loops_a_stream_keeps_to_what_auto_takes_for_a_long_sequence(monkeypatch):
    native = dispatch.backend_module("native")
    monkeypatch.setattr(native, "supports", lambda request: "no compiler here")
    monkeypatch.setattr(native, "declines", lambda request: "no compiler here")
    dispatch._choose.cache_clear()
    try:
        module = module_of("gru", 5, 7)
        stream = Stream(module)
        input = random(23, 2, 5)
        assert_close(run_chunks(stream, input, CUTS["steps"]), module(input)[0])
        assert stream.backend == "torchscript"
    finally:
        dispatch._choose.cache_clear()


def test_a_stream_keeps_to_the_backend_it_began_on():
    stream = Stream(module_of("gru", 5, 7))
    with triton_rnn.use_backend("torchscript"):
        stream(random(2, 3, 5))
    stream(random(2, 3, 5))
    assert stream.backend == "torchscript"
    before = stream.state
    with (
        triton_rnn.use_backend("native"),
        pytest.raises(triton_rnn.BackendError, match="has begun on 'torchscript'"),
    ):
        stream(random(2, 3, 5))
    assert stream.state is before
    stream.reset()
    with triton_rnn.use_backend("native"):
        stream(random(2, 3, 5))
    assert stream.backend == "native"


def test_a_stream_under_autocast_is_torchs():
    module = module_of("gru", 5, 7, torch.float32)
    stream, input = Stream(module), random(6, 2, 5, dtype=torch.float32)
    with torch.autocast("cpu"):
        output = run_chunks(stream, input, [2, 4])
    assert stream.backend == "aten"
    with torch.autocast("cpu"):
        assert_close(output, module(input)[0], tolerance=1e-1)


def test_torchs_own_modules_can_be_streamed():
    theirs, _ = twins("lstm", 5, 7)
    input = random(23, 3, 5)
    assert_close(run_chunks(Stream(theirs), input, CUTS["uneven"]), theirs(input)[0])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize(
    "rows",
    [1, -2, [1], (1, 1), torch.tensor([1]), torch.tensor([False, True, False])],
    ids=["number", "negative", "list", "tuple", "tensor", "mask"],
)
def test_rows_that_are_reset_start_from_zeros_and_the_others_go_on(kind, rows):
    module = module_of(kind, 5, 7, num_layers=2)
    first, second = random(4, 3, 5), random(6, 3, 5, seed=9)
    stream = Stream(module)
    stream(first)
    held = tensors_of(stream.state)
    copies = [tensor.clone() for tensor in held]
    stream.reset(rows)
    output = stream(second)
    with triton_rnn.use_backend("native"):
        on = module(torch.cat([first, second]))[0][4:]
        anew = module(second)[0]
    assert torch.equal(output[:, [0, 2]], on[:, [0, 2]])
    assert torch.equal(output[:, 1], anew[:, 1])
    for tensor, before in zip(held, copies, strict=True):
        assert torch.equal(tensor, before)


def test_no_gradient_goes_past_a_reset():
    module = module_of("lstm", 5, 7)
    first, second = random(4, 3, 5).requires_grad_(), random(2, 3, 5)
    stream = Stream(module)
    stream(first)
    stream.reset([0, 2])
    stream(second).sum().backward()
    assert not first.grad[:, [0, 2]].any()
    assert first.grad[:, 1].abs().min() > 0


def test_a_reset_of_everything_lets_the_batch_change():
    stream = Stream(module_of("gru", 5, 7))
    stream(random(4, 3, 5))
    stream.reset()
    assert stream.state is None
    assert stream(random(4, 2, 5)).shape == (4, 2, 7)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (3, IndexError),
        ([0, -4], IndexError),
        (torch.tensor([True, False]), ValueError),
        (0.5, ValueError),
        ([[0]], ValueError),
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_refused_and_nothing_changes(rows, error):
    stream = Stream(module_of("gru", 5, 7))
    stream(random(4, 3, 5))
    before = stream.state
    with pytest.raises(error):
        stream.reset(rows)
    assert stream.state is before


def test_no_rows_is_no_reset():
    stream = Stream(module_of("gru", 5, 7))
    stream.reset([0])
    stream(random(4, 3, 5))
    before = stream.state.clone()
    stream.reset([])
    stream.reset(torch.zeros(3, dtype=torch.bool))
    assert torch.equal(stream.state, before)


def test_rows_of_an_unbatched_stream_are_refused():
    stream = Stream(module_of("gru", 5, 7))
    stream(random(4, 5))
    with pytest.raises(ValueError, match="unbatched"):
        stream.reset(0)


def test_a_bidirectional_module_is_refused():
    with pytest.raises(ValueError, match="bidirectional"):
        Stream(triton_rnn.GRU(5, 7, bidirectional=True))


@pytest.mark.parametrize("module", [torch.nn.Linear(2, 2), triton_rnn.GRUCell(2, 2)], ids=repr)
def test_a_module_that_is_no_layer_is_refused(module):
    with pytest.raises(TypeError, match="RNN, GRU or LSTM"):
        Stream(module)


def test_a_packed_chunk_is_refused():
    packed = pack_padded_sequence(random(4, 2, 5), torch.tensor([4, 3]))
    with pytest.raises(TypeError, match="packed"):
        Stream(module_of("gru", 5, 7))(packed)


def test_a_chunk_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="list"):
        Stream(module_of("gru", 5, 7))([1.0])


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 5), (4, 3, 6), (0, 3, 5)], ids=str)
def test_a_chunk_that_does_not_fit_changes_nothing(shape):
    stream = Stream(module_of("lstm", 5, 7))
    stream(random(4, 3, 5))
    before = stream.state
    with pytest.raises((RuntimeError, ValueError)):
        stream(random(*shape))
    assert stream.state is before


def test_the_state_can_be_given():
    module = module_of("lstm", 5, 7)
    hx = random_state(module, 3)
    stream = Stream(module)
    stream.state = hx
    with triton_rnn.use_backend("native"):
        expected = module(random(4, 3, 5), hx)[0]
    assert torch.equal(stream(random(4, 3, 5)), expected)


def test_a_state_of_a_named_tuple_is_one():
    pair = namedtuple("pair", ["h", "c"])
    module = module_of("lstm", 5, 7)
    hx = random_state(module, 3)
    stream, other = Stream(module), Stream(module)
    stream.state, other.state = hx, pair(*hx)
    stream.detach()
    other.detach()
    other.reset([1])
    stream.reset([1])
    assert torch.equal(stream(random(4, 3, 5)), other(random(4, 3, 5)))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_by_itself(copied):
    stream = Stream(module_of("lstm", 5, 7), truncate=True)
    stream(random(4, 3, 5))
    other = copied(stream)
    assert other.module is not stream.module and other.truncate and other.backend == "native"
    assert not any(tensor.requires_grad for tensor in tensors_of(other.state))
    chunk = random(4, 3, 5, seed=3)
    assert torch.equal(other(chunk), stream(chunk))
    other.reset()
    assert stream.state is not None


def test_detach_ends_the_gradient_and_keeps_the_numbers():
    stream, first = Stream(module_of("gru", 5, 7)), random(4, 3, 5).requires_grad_()
    stream(first)
    before = stream.state
    stream.detach()
    assert torch.equal(stream.state, before) and before.requires_grad
    stream(random(4, 3, 5)).sum().backward()
    assert first.grad is None


def test_truncate_ends_the_gradient_where_a_chunk_begins():
    stream = Stream(module_of("gru", 5, 7), truncate=True)
    first, second = random(4, 3, 5).requires_grad_(), random(4, 3, 5).requires_grad_()
    stream(first)
    stream(second).sum().backward()
    assert first.grad is None and second.grad.any()


def test_repr_names_the_module_and_the_state():
    stream = Stream(triton_rnn.GRU(5, 7), truncate=True)
    assert repr(stream) == "Stream(GRU(5, 7), truncate=True, state=None)"
    stream(torch.zeros(2, 3, 5))
    assert repr(stream) == "Stream(GRU(5, 7), truncate=True, state=[(1, 3, 7)])"


@pytest.mark.parametrize("form", FORMS)
def test_tbptt_is_the_loop_that_detaches_by_hand(form):
    module = module_of("lstm", 5, 7, batch_first=form == "batch_first")
    time = 1 if form == "batch_first" else 0
    input, target = sequence_of(form, 23, 3, 5), sequence_of(form, 23, 3, 7)
    criterion = torch.nn.functional.mse_loss
    losses = []
    for loss, output in tbptt(Stream(module), input, target, criterion, chunk=5):
        loss.backward()
        losses.append(loss.item())
        assert output.size(time) == (5 if len(losses) < 5 else 3)
    ours = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    state = None
    with triton_rnn.use_backend("native"):
        for number, begin in enumerate(range(0, 23, 5)):
            length = min(5, 23 - begin)
            output, state = module(input.narrow(time, begin, length), state)
            state = tuple(tensor.detach() for tensor in state)
            loss = criterion(output, target.narrow(time, begin, length))
            loss.backward()
            assert loss.item() == losses[number]
    for gradient, parameter in zip(ours, module.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_weights_may_be_stepped_between_chunks():
    module = module_of("gru", 5, 7)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    stream = Stream(module)
    criterion = torch.nn.functional.mse_loss
    for loss, _ in tbptt(stream, random(12, 3, 5), random(12, 3, 7), criterion, chunk=4):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    assert not stream.state.requires_grad


def test_what_tbptt_holds_does_not_grow_with_the_sequence():
    """Numbers that backward nodes save for themselves: each chunk's are freed with its node."""
    module = module_of("lstm", 5, 7)
    saved = []

    class Saved:
        """What a backward saved; counts as long as it is held."""

        def __init__(self, tensor):
            self.tensor = tensor
            saved.append(tensor.untyped_storage().nbytes())
            self.bytes = saved[-1]

        def __del__(self):
            saved.append(-self.bytes)

    def pack(tensor):
        return Saved(tensor)

    peaks = []
    for steps in (40, 400):
        saved.clear()
        input, target = random(steps, 3, 5), random(steps, 3, 7)
        peak = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            criterion = torch.nn.functional.mse_loss
            for loss, _ in tbptt(Stream(module), input, target, criterion, chunk=10):
                peak = max(peak, sum(saved))
                loss.backward()
        peaks.append(peak)
    # The whole sequence's storage is what a chunk of the input is a view of, so it is taken off.
    per_step = (3 * 5 + 3 * 7) * 8
    assert peaks[1] - 400 * per_step <= peaks[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"chunk": 0}, ValueError),
        ({"chunk": 2.0}, ValueError),
        ({"target": random(3, 2, 7)}, ValueError),
        ({"target": random(4)}, None),
        ({"input": [1]}, TypeError),
        ({"stream": triton_rnn.GRU(5, 7)}, TypeError),
    ],
    ids=["no_steps", "float", "other_steps", "one_dimension", "list", "module"],
)
def test_tbptt_refuses_at_once_what_it_cannot_cut(change, error):
    arguments = {
        "stream": Stream(module_of("gru", 5, 7)),
        "input": random(4, 2, 5),
        "target": random(4, 2, 7),
        "loss": torch.nn.functional.mse_loss,
        "chunk": 2,
        **change,
    }
    if error is None:
        assert next(tbptt(**{**arguments, "loss": lambda y, t: y.sum() + t.sum()}))
    else:
        with pytest.raises(error):
            tbptt(**arguments)


def test_a_stream_is_not_exported_for_its_state_is_outside():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = triton_rnn.GRU(3, 4)
            self.stream = Stream(self.layer)

        def forward(self, x):
            return self.stream(x)

    model = Model()
    for strict in (False, True):
        with pytest.raises(Exception, match="a stream keeps its state outside of a program"):
            torch.export.export(model, (torch.randn(5, 2, 3),), strict=strict)
        assert model.stream.state is None
