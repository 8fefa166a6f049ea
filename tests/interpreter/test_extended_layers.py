"""Calls beyond torch.nn's on the kernels: lengths, resets, all states, regularization, clipping.

Held against the plain loops in float64, which are given the same masks.
"""

import copy

import pytest
import torch
from compare import (
    EXCHANGES,
    assert_as_expected,
    exact_and_ours,
    exchanging,
    hidden_size,
    input_and_hx,
    run_on_kernels,
)
from threads import Threads
from tolerances import LAYERS, run

import triton_rnn
from triton_rnn import extended

STEPS, BATCH = 5, 3
LENGTHS = torch.tensor([3, 0, 5])
STARTS = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()
EVERYTHING = {
    "input_dropout": 0.3,
    "recurrent_dropout": 0.4,
    "weight_dropout": 0.2,
    "zoneout": 0.3,
    "clip_hidden": 0.3,
}
PLAIN = [kind for kind in LAYERS if kind != "lstm_proj"]


@pytest.fixture(autouse=True)
def masks_of_every_dtype(monkeypatch):
    """torch draws other numbers for other dtypes."""
    torchs = extended.dropout

    def dropout(x, p, training):
        return x * torchs(torch.ones_like(x, dtype=torch.float64), p, training).to(x.dtype)

    monkeypatch.setattr(extended, "dropout", dropout)


def flat(returned):
    """All tensors in what a call returned, in order."""
    if isinstance(returned, torch.Tensor):
        return [returned]
    return [tensor for part in returned for tensor in flat(part)]


def everything(kind, **options):
    more = {"clip_cell": 0.25, "zoneout": (0.3, 0.2)} if "lstm" in kind else {}
    return {**EVERYTHING, **more, **options}


def both(kind, size, *, options, more, dtype=torch.float32, training=True, given=True, **layers):
    """Ours on the kernels, and the plain loops in float64: all results and gradients by name."""
    _, ours = exact_and_ours(kind, 5, size, dtype=dtype, **layers)
    for name, value in options.items():
        setattr(ours, name, value)
    ours.train(training)
    input, hx = input_and_hx(kind, ours, STEPS, BATCH, 5, batch=BATCH)
    exact = copy.deepcopy(ours).double()
    found = []
    for module, it_runs in ((exact, run), (ours, run_on_kernels)):
        dtype_of_it = next(module.parameters()).dtype
        own_hx = tuple(s.to(dtype_of_it) for s in flat(hx))
        own_hx = own_hx if len(own_hx) == 2 else own_hx[0]

        def call(*args, module=module):
            torch.manual_seed(7)
            output, states, *shown = module(*args, **more)
            # All that is shown beside each other, so that all of it has a gradient.
            return torch.cat([output, *(t for t in flat(shown) if t is not output)], -1), states

        with triton_rnn.use_backend("reference" if module is exact else "triton"):
            results = it_runs(module, input.to(dtype_of_it), own_hx if given else None, call=call)
        found.append(results)
    return found[1], found[0]


@pytest.mark.parametrize("kind", PLAIN)
def test_options_are_those_of_the_plain_loops(variant, kind):
    actual, expected = both(kind, 19, options=everything(kind), more={}, bidirectional=True)
    assert_as_expected(actual, expected, torch.float32)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_programs_that_exchange_send_what_is_multiplied(monkeypatch, kind, exchange):
    exchanging(monkeypatch, *EXCHANGES[exchange])
    Threads(monkeypatch)
    options = everything(kind, clip_hidden=None)
    actual, expected = both(
        kind,
        hidden_size(exchange),
        options=options,
        more={"lengths": LENGTHS, "reset_mask": STARTS, "all_states": True},
        bidirectional=True,
    )
    assert_as_expected(actual, expected, torch.float32)


@pytest.mark.parametrize("reset_to", ["zeros", "initial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_resets_are_those_of_the_plain_loops(variant, kind, reset_to):
    """Of two layers with dropout between them; all states of cells without c."""
    more = {"lengths": LENGTHS, "reset_mask": STARTS, "reset_to": reset_to}
    if "lstm" not in kind:
        more["all_states"] = True
    options = {"input_dropout": 0.3, "weight_dropout": 0.2, "dropout": 0.4}
    actual, expected = both(kind, 9, options=options, more=more, bidirectional=True, num_layers=2)
    assert_as_expected(actual, expected, torch.float32)


@pytest.mark.parametrize("kind", PLAIN)
def test_everything_at_once_is_that_of_the_plain_loops(variant, kind):
    more = {"lengths": LENGTHS, "reset_mask": STARTS, "reset_to": "initial", "all_states": True}
    options = everything(kind, dropout=0.4)
    actual, expected = both(kind, 9, options=options, more=more, bidirectional=True, num_layers=2)
    assert_as_expected(actual, expected, torch.float32)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_half_precision_without_a_state_and_bias_is_as_near_as_ever(variant, kind, training):
    """In evaluation a zoneout is its expectation; clipping is there as ever."""
    actual, expected = both(
        kind,
        9,
        options=everything(kind, clip_hidden=0.5),
        more={"all_states": True},
        dtype=torch.float16,
        training=training,
        given=False,
        bias=False,
    )
    assert_as_expected(actual, expected, torch.float16)


@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout", "clip_hidden", "all_states"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
def test_each_by_itself_is_that_of_the_plain_loops(option, grad):
    """Without a backward too, where less is saved."""
    _, ours = exact_and_ours("lstm", 5, 9)
    more = {"all_states": True} if option == "all_states" else {}
    if not more:
        setattr(ours, option, 0.3)
    input, hx = input_and_hx("lstm", ours, STEPS, BATCH, 5, batch=BATCH)
    found = []
    for module, backend in ((copy.deepcopy(ours).double(), "reference"), (ours, "triton")):
        dtype = next(module.parameters()).dtype
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad), triton_rnn.use_backend(backend):
            results = flat(module(input.to(dtype), tuple(s.to(dtype) for s in hx), **more))
        found.append({str(number): tensor.detach() for number, tensor in enumerate(results)})
    assert_as_expected(found[1], found[0], torch.float32)


def test_second_derivatives_are_those_of_the_plain_loops():
    found = []
    _, ours = exact_and_ours("lstm", 3, 4)
    for name, value in everything("lstm", clip_hidden=None, clip_cell=None).items():
        setattr(ours, name, value)
    input, _ = input_and_hx("lstm", ours, STEPS, BATCH, 3, batch=BATCH)
    for backend in ("reference", "triton"):
        leaf = input.clone().requires_grad_()
        torch.manual_seed(7)
        with triton_rnn.use_backend(backend):
            output, _, every = ours(leaf, lengths=LENGTHS, reset_mask=STARTS, all_states=True)
            loss = output.square().sum() + every.cells[0].square().sum()
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), ours.weight_hh_l0)
        found.append({"first": grad.detach(), "second": second})
    assert_as_expected(found[1], {k: v.double() for k, v in found[0].items()}, torch.float32)


def test_a_projected_lstm_is_refused_what_its_kernels_cannot():
    module = triton_rnn.LSTM(5, 9, proj_size=2, recurrent_dropout=0.1, zoneout=0.1)
    message = "know nothing of recurrent_dropout, zoneout of a projected LSTM"
    with triton_rnn.use_backend("triton"):
        with pytest.raises(triton_rnn.BackendError, match=message):
            module(torch.zeros(STEPS, BATCH, 5))
        with pytest.raises(triton_rnn.BackendError, match=message):
            triton_rnn.explain(module, torch.zeros(STEPS, BATCH, 5))
        module.eval()
        module.zoneout = 0.0
        assert module(torch.zeros(STEPS, BATCH, 5))[0].shape == (STEPS, BATCH, 2)


def test_explain_tells_the_plan_of_what_then_runs():
    module = triton_rnn.GRU(5, 9, zoneout=0.1)
    with triton_rnn.use_backend("triton"):
        told = str(triton_rnn.explain(module, torch.zeros(STEPS, BATCH, 5), reset_mask=STARTS))
    assert "6 episodes side by side, the longest of 5 steps" in told
    assert "forward: " in told and "backward: " in told
