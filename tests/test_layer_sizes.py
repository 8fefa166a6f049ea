"""Hidden sizes per layer and residual connections: as modules of one layer, one on the other."""

import copy
import pickle

import pytest
import torch
from tolerances import assert_close, leaf, random, twins
from torch.autograd import gradcheck
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn

KINDS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
FORMS = ("time_first", "batch_first", "unbatched", "packed")
SIZES = {
    "narrower": ([7, 5, 3], False),
    "pairs": ([7, 7, 3, 3], True),
    "one_size": (6, True),
}


def built(kind, sizes, residual, **options):
    if isinstance(sizes, int):
        options["num_layers"] = 3
    return getattr(triton_rnn, KINDS[kind])(
        4, sizes, residual=residual, dtype=torch.float64, **options
    )


def sizes_of(module):
    size = module.hidden_size
    return [size] * module.num_layers if isinstance(size, int) else list(size)


def input_of(form):
    shapes = {"batch_first": (3, 6, 4), "unbatched": (6, 4)}
    input = leaf(random(*shapes.get(form, (6, 3, 4))))
    if form != "packed":
        return input, input
    lengths = torch.tensor([4, 6, 1])
    return input, pack_padded_sequence(input, lengths, enforce_sorted=False)


def states_of(module, batch):
    directions = 2 if module.bidirectional else 1
    rows = () if batch is None else (batch,)
    sizes = list(enumerate(sizes_of(module)))
    lists = [
        [leaf(random(directions, *rows, size, seed=9 * i + which)) for i, size in sizes]
        for which in range(2 if module.mode == "LSTM" else 1)
    ]
    leaves = [tensor for tensors in lists for tensor in tensors]
    if isinstance(module.hidden_size, int):
        lists = [torch.cat(tensors) for tensors in lists]
    return (tuple(lists) if len(lists) == 2 else lists[0]), leaves


def layered(module, sent, leaves, connected):
    """The same by torch.nn's modules of one layer, in plain Python."""
    directions = 2 if module.bidirectional else 1
    x, finals = sent, []
    width, sizes = module.input_size, sizes_of(module)
    for i, size in enumerate(sizes):
        one = getattr(torch.nn, type(module).__name__)(
            width, size, batch_first=module.batch_first, bidirectional=module.bidirectional,
            dtype=torch.float64,
        )  # fmt: skip
        own = {
            name.replace(f"_l{i}", "_l0"): parameter
            for name, parameter in module.named_parameters()
            if f"_l{i}" in name
        }
        hx = leaves[i] if module.mode != "LSTM" else (leaves[i], leaves[i + len(sizes)])
        below = x
        x, final = torch.func.functional_call(one, own, (x, hx))
        if i in connected:
            x = x._replace(data=x.data + below.data) if isinstance(x, PackedSequence) else x + below
        finals.append(final if isinstance(final, tuple) else (final,))
        width = directions * size
    return x, [state for states in zip(*finals, strict=True) for state in states]


def flat(state):
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state for tensor in flat(part)]


def gradients(module, output, finals, leaves):
    data = output.data if isinstance(output, PackedSequence) else output
    loss = sum((t * random(*t.shape, seed=5)).sum() for t in (data, *finals))
    # Both sides' packing is one node of the graph.
    return data, torch.autograd.grad(loss, [*leaves, *module.parameters()], retain_graph=True)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_layers_of_any_sizes_are_torchs_one_on_the_other(backend, kind, sizes, form, bidirectional):
    widths, residual = SIZES[sizes]
    module = built(
        kind, widths, residual, bidirectional=bidirectional, batch_first=form == "batch_first"
    )
    connected = {"narrower": (), "pairs": (1, 3), "one_size": (1, 2)}[sizes]
    assert module.residual_layers == connected
    input, sent = input_of(form)
    hx, leaves = states_of(module, None if form == "unbatched" else 3)
    output, finals = module(sent, hx)
    expected_output, expected_finals = layered(module, sent, leaves, connected)
    finals = flat(finals)
    if isinstance(module.hidden_size, int):
        finals = [part for state in finals for part in state.chunk(module.num_layers)]
    ours = gradients(module, output, finals, [input, *leaves])
    theirs = gradients(module, expected_output, expected_finals, [input, *leaves])
    for actual, expected in zip(
        (ours[0], *finals, *ours[1]), (theirs[0], *expected_finals, *theirs[1]), strict=True
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(backend, kind):
    module = built(kind, [3, 3, 2], True)
    assert gradcheck(lambda x: module(x)[0], leaf(random(3, 2, 4)), fast_mode=True)


@pytest.mark.parametrize("wanted", [True, 2])
def test_layers_of_any_sizes_recompute(wanted):
    module = built("lstm", [7, 7, 3], True)
    input = random(6, 3, 4)
    plain = torch.autograd.grad(module(input)[0].sum(), list(module.parameters()))
    module.recompute = wanted
    for ours, expected in zip(
        torch.autograd.grad(module(input)[0].sum(), list(module.parameters())), plain, strict=True
    ):
        assert_close(ours, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_any_sizes_stream_bit_for_bit(kind):
    module = built(kind, [7, 7, 3], True)
    input = random(6, 3, 4)
    with triton_rnn.use_backend("native"):
        output, state = module(input)
    stream = triton_rnn.Stream(module)
    assert torch.equal(torch.cat([stream(chunk) for chunk in input.split([1, 3, 2])]), output)
    for ours, whole in zip(flat(stream.state), flat(state), strict=True):
        assert torch.equal(ours, whole)
    stream.reset([1])
    assert all(not tensor[:, 1].any() and tensor[:, 0].any() for tensor in flat(stream.state))


@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_is_torchs_and_leaves_what_is_added_alone(batch_first):
    module = built("gru", [7, 7], True, dropout=0.5, batch_first=batch_first)
    input = random(3, 6, 4) if batch_first else random(6, 3, 4)
    torch.manual_seed(4)
    output = module(input)[0]
    below = built("gru", [7], False, batch_first=batch_first)
    above = triton_rnn.GRU(7, 7, batch_first=batch_first, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(below, f"{name}_l0", getattr(module, f"{name}_l0"))
        setattr(above, f"{name}_l0", getattr(module, f"{name}_l1"))
    middle = below(input)[0]
    torch.manual_seed(4)
    time_major = middle.transpose(0, 1) if batch_first else middle
    dropped = dropout(time_major, 0.5, True)
    dropped = dropped.transpose(0, 1) if batch_first else dropped
    assert_close(output, above(dropped)[0] + middle)
    module.eval()
    assert_close(module(input)[0], above(middle)[0] + middle)


def test_parameters_have_torchs_names_and_each_layer_its_own_range():
    torch.manual_seed(0)
    module = triton_rnn.LSTM(10, [64, 16], bidirectional=True)
    assert module.num_layers == 2 and module.hidden_size == (64, 16)
    state = module.state_dict()
    assert list(state) == list(torch.nn.LSTM(10, 4, 2, bidirectional=True).state_dict())
    assert state["weight_ih_l0"].shape == (256, 10)
    assert state["weight_ih_l1_reverse"].shape == (64, 128)
    assert state["weight_hh_l1"].shape == (64, 16) and state["bias_hh_l1"].shape == (64,)
    assert 0.12 < state["weight_hh_l0"].abs().max() <= 1 / 8
    assert 0.24 < state["weight_hh_l1"].abs().max() <= 1 / 4


def test_a_list_of_one_size_is_torchs_module():
    torch.manual_seed(0)
    ours = triton_rnn.GRU(5, [7, 7])
    torch.manual_seed(0)
    theirs = torch.nn.GRU(5, 7, 2)
    assert repr(ours) == repr(theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    input = torch.randn(4, 2, 5)
    assert_close(ours(input)[1], theirs(input)[1])
    assert isinstance(triton_rnn.restore(ours), torch.nn.GRU)


def test_residual_keeps_torchs_parameters_and_state():
    theirs, _ = twins("gru", 5, 7, num_layers=2)
    ours = triton_rnn.GRU(5, 7, 2, residual=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert ours(random(4, 3, 5))[1].shape == (2, 3, 7)
    assert repr(ours) == "GRU(5, 7, num_layers=2, residual=True)"


def test_the_layers_travel_with_the_module():
    module = built("lstm", [7, 7, 3], True)
    assert repr(module) == "LSTM(4, (7, 7, 3), num_layers=3, residual=True)"
    input = random(6, 3, 4)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(input)[0], module(input)[0])
    assert built("lstm", [7, 7, 3], True).float()(input.float())[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, []), {}, "one for each layer"),
        ((4, [3, 0]), {}, "one for each layer"),
        ((4, [3, 2.0]), {}, "one for each layer"),
        ((4, [3, True]), {}, "one for each layer"),
        ((4, [3, 2], 3), {}, "do not agree"),
        ((4, [3, 2]), {"num_layers": 1}, "do not agree"),
        ((4, [3, 2]), {"proj_size": 1}, "proj_size"),
        ((4, [3, 2], 2, True, False, 0.0, False, 1), {}, "proj_size"),
        ((4, [3, 2, 1]), {"residual": True}, "no layer to connect"),
        ((4, 3), {"residual": True}, "no layer to connect"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_are_refused_when_they_are_built(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        triton_rnn.LSTM(*arguments, **options)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_states_that_do_not_fit_are_refused(kind):
    module = built(kind, [3, 2], False)
    good = [random(1, 3, 3), random(1, 3, 2)]

    def hx(states):
        return (states, good) if kind == "lstm" else states

    assert module(random(6, 3, 4), hx(tuple(good) if kind == "gru" else good))
    bad = [good[0], [good[0]], [good[1], good[0]], [good[0], random(1, 2, 2)], [good[0], 1]]
    bad += [[None, good[1]], [torch.tensor(1.0), good[1]]]
    for states in bad:
        with pytest.raises(RuntimeError, match=r"list of 2 tensors|Expected hidden"):
            module(random(6, 3, 4), hx(states))


def test_an_input_that_does_not_fit_has_torchs_error():
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        built("gru", [3, 2], False)(random(6, 3, 5))


def test_torch_nn_and_torchscript_are_refused():
    module = triton_rnn.GRU(4, [3, 2])
    both = torch.nn.Sequential(triton_rnn.GRU(4, 4), module)
    with pytest.raises(RuntimeError, match="hidden sizes per layer"):
        triton_rnn.restore(both)
    assert type(both[0]) is triton_rnn.GRU
    with pytest.raises(RuntimeError, match="hidden sizes per layer"):
        torch.jit.script(module)


@pytest.mark.parametrize("of", [lambda module: module, copy.deepcopy, lambda m: m.to("cpu")])
@pytest.mark.parametrize("sizes", [(4, [3, 3, 2]), (4, 4, 3)])
def test_autocast_is_served_layer_by_layer(of, sizes):
    module = of(triton_rnn.GRU(*sizes, residual=True))
    with torch.autocast("cpu"):
        output = module(torch.randn(6, 3, 4))[0]
    assert output.shape[:2] == (6, 3) and torch.isfinite(output).all()


@pytest.mark.parametrize("sizes", [(4, [3, 3, 2]), (4, 4, 3)])
def test_torch_func_and_a_wrong_width_are_served_of_a_copy_too(sizes):
    module = copy.deepcopy(triton_rnn.GRU(*sizes, residual=True))
    input = torch.randn(6, 3, 4)
    _, tangent = torch.func.jvp(lambda x: module(x)[0], (input,), (torch.ones_like(input),))
    assert torch.isfinite(tangent).all()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        module(torch.randn(6, 3, 5))


def test_explain_tells_of_the_first_layer():
    found = triton_rnn.explain(triton_rnn.GRU(4, [3, 2]), torch.zeros(50, 3, 4))
    assert found.request.hidden_size == 3 and len(found.plan) == 1


def test_a_stacked_state_that_is_a_number_is_refused():
    module = built("gru", 6, True)
    with pytest.raises(RuntimeError, match="hx has 3 layers and directions"):
        module(random(6, 3, 4), torch.tensor(1.0))


def test_a_stream_keeps_to_one_backend_where_the_c_loops_cannot_run():
    module = triton_rnn.GRU(4, [3, 2]).bfloat16()
    stream = triton_rnn.Stream(module)
    stream(torch.zeros(1, 3, 4, dtype=torch.bfloat16))
    assert stream.backend == "torchscript"
