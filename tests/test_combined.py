"""Lengths, resets and options together with layer sizes, residual, recompute and layer_norm."""

import own_cells
import pytest
import torch
from own_cells import MinimalGatedUnit, PeepholeLSTM
from test_extended import (
    BATCH,
    HIDDEN,
    INPUT,
    LENGTHS,
    STEPS,
    assert_same,
    by_episodes,
    outcome,
    tensors_of,
)
from tolerances import LAYERS, assert_close, assert_same_bits, leaf, random, random_state
from torch.nn.functional import dropout

import triton_rnn

OWN = [PeepholeLSTM, MinimalGatedUnit, own_cells.ThreeStates, triton_rnn.IndRNN]
DOUBLE = {"dtype": torch.float64}
AROUND = {"input_dropout": 0.3, "weight_dropout": 0.2}
INSIDE = {"recurrent_dropout": 0.4, "zoneout": 0.3, "clip_hidden": 0.6}
MASK = random(STEPS, BATCH, seed=4) > 0.5
MORE = {"lengths": torch.tensor([3, 0, 6, 2]), "reset_mask": MASK, "reset_to": "initial"}


def parted(module, sizes, kind, options):
    """The layers of a module as modules of their own, which share its parameters."""
    directions = 2 if module.bidirectional else 1
    found, width = [], INPUT
    names = module._flat_weights_names
    count = len(names) // len(sizes)
    for number, size in enumerate(sizes):
        one = getattr(triton_rnn, LAYERS[kind][0])(
            width, size, bidirectional=module.bidirectional, **DOUBLE, **LAYERS[kind][1], **options
        )
        for name in names[number * count : (number + 1) * count]:
            setattr(one, name.replace(f"_l{number}", "_l0"), getattr(module, name))
        found.append(one.train(module.training))
        width = directions * size
    return found


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5, 3), (4, 4)])
@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
def test_layers_of_any_sizes_take_lengths_resets_and_options(backend, batch_first, sizes, kind):
    """As one would write it: each layer a module, what is below it added, dropout between them."""
    options = AROUND | INSIDE
    module = getattr(triton_rnn, LAYERS[kind][0])(
        INPUT, list(sizes), bidirectional=True, residual=True, dropout=0.4,
        batch_first=batch_first, **DOUBLE, **LAYERS[kind][1], **options,
    )  # fmt: skip
    layers = parted(module, sizes, kind, options)
    found = []
    for whole in (True, False):
        torch.manual_seed(5)
        x = leaf(random(STEPS, BATCH, INPUT))
        states = [leaf(random(2, BATCH, size, seed=n)) for n, size in enumerate(sizes)]
        hx = (states, [2 * s for s in states]) if kind == "lstm" else states
        module.zero_grad()
        if whole:
            turn = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
            if len(set(sizes)) == 1:
                hx = tuple(map(torch.cat, hx)) if kind == "lstm" else torch.cat(hx)
            more = {**MORE, "reset_mask": turn(MASK)}
            with triton_rnn.use_backend(backend):
                output, finals, every = module(turn(x), hx, all_states=True, **more)
            assert every.outputs[-1] is output
            shown = [turn(t) for t in (*every.outputs, *every.cells)]
            finals = tensors_of(finals)
            if len(set(sizes)) == 1:
                finals = [part for state in finals for part in state.split(2)]
        else:
            shown, cells, h_n, c_n, y = [], [], [], [], x
            for number, one in enumerate(layers):
                given = (states[number], 2 * states[number]) if kind == "lstm" else states[number]
                below = y
                with triton_rnn.use_backend(backend):
                    entered = dropout(y, 0.4) if number else y
                    y, final, every = one(entered, given, all_states=True, **MORE)
                y = y + below if number and sizes[number] == sizes[number - 1] else y
                shown.append(y)
                cells += every.cells
                h_n.append(tensors_of(final)[0])
                c_n += tensors_of(final)[1:]
            shown, finals = shown + cells, h_n + c_n
        results = [*shown, *finals]
        torch.autograd.backward(results, [random(*t.shape, seed=9) for t in results])
        grads = [x.grad, *(s.grad for s in states), *(p.grad for p in module.parameters())]
        found.append(dict(enumerate([*(t.detach() for t in results), *grads])))
    assert_same_bits(*found) if backend == "reference" else assert_same(*found)


@pytest.mark.parametrize("options", [{}, AROUND], ids=["plain", "dropout"])
@pytest.mark.parametrize("backend", ["native", "torchscript", "reference"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputing_takes_lengths_and_resets(backend, kind, options):
    module = getattr(triton_rnn, LAYERS[kind][0])(
        INPUT, HIDDEN, 2, bidirectional=True, dropout=0.4, **DOUBLE, **LAYERS[kind][1], **options
    )
    input, hx = random(STEPS, BATCH, INPUT), random_state(module, BATCH)
    more = MORE | ({} if "lstm" in kind else {"all_states": True})

    def call(input, hx):
        torch.manual_seed(6)
        return module(input, hx, **more)

    found = []
    with triton_rnn.use_backend(backend):
        for recompute in (False, 2):
            module.recompute = recompute
            found.append(outcome(module, call, input, hx))
        told = triton_rnn.explain(module, input, hx, **more)
    assert_same(*found)
    assert told.backend == backend
    assert "in segments of 2 steps" in str(told)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reset_to", ["zeros", "initial"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_layer_normalization_takes_lengths_and_resets(backend, kind, reset_to):
    """Each episode by itself."""
    torch.manual_seed(1)
    module = getattr(triton_rnn, kind)(INPUT, HIDDEN, bidirectional=True, layer_norm=True, **DOUBLE)
    input, hx = random(STEPS, BATCH, INPUT), random_state(module, BATCH)
    more = {"lengths": LENGTHS, "reset_mask": MASK, "reset_to": reset_to}
    with triton_rnn.use_backend(backend):
        expected = outcome(module, by_episodes(module, MASK, reset_to, LENGTHS), input, hx)
        found = outcome(module, lambda x, h: module(x, h, **more), input, hx)
        told = triton_rnn.explain(module, input, hx, **more)
    assert_same(found, expected)
    assert told.backend == backend


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_layer_normalization_takes_dropout_of_inputs_and_weights(kind):
    module = getattr(triton_rnn, kind)(INPUT, HIDDEN, 2, layer_norm=True, **AROUND, **DOUBLE)
    assert "layer_norm=True" in repr(module) and "weight_dropout=0.2" in repr(module)
    input, hx = random(STEPS, BATCH, INPUT), random_state(module, BATCH)

    def call(input, hx):
        torch.manual_seed(6)
        return module(input, hx, **MORE)

    found = []
    for backend in ("native", "reference"):
        with triton_rnn.use_backend(backend):
            found.append(outcome(module, call, input, hx))
    assert_same(*found)
    torch.manual_seed(6)
    drawn = module(input, hx)[0]
    module.eval()
    plain = module(input, hx)[0]
    assert not torch.allclose(drawn, plain)
    module.input_dropout = module.weight_dropout = 0.0
    assert_close(module(input, hx)[0], plain)


@pytest.mark.parametrize("how", [{"recompute": True}, {"layer_norm": True}], ids=str)
def test_a_batch_without_a_step_keeps_its_states(how):
    module = triton_rnn.LSTM(INPUT, HIDDEN, **how, **DOUBLE)
    input, hx = random(STEPS, BATCH, INPUT), random_state(module, BATCH)
    output, states = module(input, hx, lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert output.shape == (STEPS, BATCH, HIDDEN) and not output.any()
    assert all(map(torch.equal, states, hx))


@pytest.mark.parametrize("how", ["recompute", "layer_norm"])
@pytest.mark.parametrize("option", [*INSIDE, "all_states"])
def test_what_stands_in_the_steps_is_refused_around_a_backend(how, option):
    module = triton_rnn.LSTM(INPUT, HIDDEN, **{how: True})
    more = {"all_states": True} if option == "all_states" else {}
    if not more:
        setattr(module, option, 0.5)
    message = f"{how} does not go together with {option}"
    for asked in (module, lambda *args, **more: triton_rnn.explain(module, *args, **more)):
        with pytest.raises(triton_rnn.BackendError, match=message):
            asked(torch.zeros(STEPS, BATCH, INPUT), **more)


def test_recomputing_refuses_autocast_and_is_off_without_gradients():
    module = triton_rnn.GRU(INPUT, HIDDEN, recompute=True, zoneout=0.1)
    input = torch.zeros(STEPS, BATCH, INPUT)
    with torch.no_grad():
        assert module(input, lengths=LENGTHS)[0].shape == (STEPS, BATCH, HIDDEN)
    module.zoneout = 0.0
    with (
        torch.autocast("cpu"),
        pytest.raises(triton_rnn.BackendError, match="autocast is on"),
    ):
        module(input, lengths=LENGTHS)


@pytest.mark.parametrize("how", [{"recompute": True}, {"layer_norm": True}], ids=str)
def test_options_that_are_off_in_evaluation_leave_the_rest_as_it_is(how):
    module = triton_rnn.GRU(INPUT, HIDDEN, **how, **AROUND).eval()
    plain = triton_rnn.GRU(INPUT, HIDDEN, **how).eval()
    plain.load_state_dict(module.state_dict())
    input = torch.randn(STEPS, BATCH, INPUT)
    assert all(map(torch.equal, module(input), plain(input)))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("reset_to", ["zeros", "initial"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_users_cell_takes_lengths_and_resets(kind, backend, reset_to, lengths):
    """Each episode by itself; of one, two and three states, with and without a product."""
    torch.manual_seed(1)
    module = kind(INPUT, HIDDEN, bidirectional=True, **DOUBLE)
    input = random(STEPS, BATCH, INPUT)
    hx = tuple(random(2, BATCH, HIDDEN, seed=n) for n in range(module.cell.states))
    ends = torch.full((BATCH,), STEPS) if lengths is None else lengths
    more = {"lengths": lengths, "reset_mask": MASK, "reset_to": reset_to}
    with triton_rnn.use_backend(backend):
        expected = outcome(module, by_episodes(module, MASK, reset_to, ends), input, hx)
        found = outcome(module, lambda x, h: module(x, h, **more), input, hx)
        told = triton_rnn.explain(module, input, hx if len(hx) > 1 else hx[0], **more)
    assert_same(found, expected)
    assert told.backend == backend and "episodes side by side" in str(told)


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_users_cell_takes_a_batch_first_of_layers_and_one_without_a_step(kind):
    module = kind(INPUT, HIDDEN, 2, batch_first=True, **DOUBLE)
    input = random(BATCH, STEPS, INPUT)
    turned = kind(INPUT, HIDDEN, 2, **DOUBLE)
    turned.load_state_dict(module.state_dict())
    one = module(input, lengths=LENGTHS, reset_mask=MASK.t())
    other = turned(input.transpose(0, 1), lengths=LENGTHS, reset_mask=MASK)
    assert_close(one[0].transpose(0, 1), other[0])
    for mine, theirs in zip(tensors_of(one[1]), tensors_of(other[1]), strict=True):
        assert_close(mine, theirs)
    hx = tuple(random(2, BATCH, HIDDEN, seed=n) for n in range(module.cell.states))
    for given in (hx if len(hx) > 1 else hx[0], None):
        output, states = module(input, given, lengths=torch.zeros(BATCH, dtype=torch.int64))
        assert output.shape == (BATCH, STEPS, HIDDEN) and not output.any()
        assert len(tensors_of(states)) == len(hx)
        for state, initial in zip(tensors_of(states), hx, strict=True):
            assert torch.equal(state, torch.zeros_like(initial) if given is None else initial)
        output.sum().backward()
        assert not module.weight_ih_l0.grad.any()
    rows = torch.nn.utils.rnn.pack_sequence([input[0]])
    with pytest.raises(ValueError, match="has lengths already"):
        module(rows, lengths=LENGTHS)
    with pytest.raises(TypeError, match="takes no all_states"):
        triton_rnn.explain(module, input, all_states=True)
