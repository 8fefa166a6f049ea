"""Every output and every gradient of the kernels against torch.nn in float64."""

import itertools

import pytest
import torch
from compare import (
    assert_torchs_numbers,
    exact_and_ours,
    input_and_hx,
    pack,
    run_on_kernels,
    tiled,
)
from tolerances import LAYERS, OUTPUTS, random, random_state, run

import triton_rnn

DTYPES = (torch.float32, torch.float16)


def as_it_is(input):
    return input


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_torchs(variant, kind, directions, form, dtype):
    exact, ours = exact_and_ours(kind, 5, 19, dtype=dtype, bidirectional=directions == 2)
    input, hx = input_and_hx(kind, ours, 5, 3, 5, batch=3)
    prepare = pack([3, 5, 1]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)


# T, N, I, H: one of each, odd ones, and more than one block of 16 or 32 of each.
SIZES = [
    (1, 1, 1, 1),
    (5, 3, 5, 1),
    (5, 1, 1, 3),
    (2, 17, 5, 3),
    (1, 3, 40, 19),
    (2, 3, 5, 33),
    (5, 17, 40, 33),
]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param(kind, sizes, id="{}-T{}-N{}-I{}-H{}".format(kind, *sizes))
        for kind, sizes in itertools.product(LAYERS, SIZES)
        # A projection is smaller than the hidden size.
        if kind != "lstm_proj" or sizes[-1] > 2
    ],
)
def test_odd_sizes_are_torchs(variant, kind, sizes):
    seq_len, batch, input_size, hidden_size = sizes
    exact, ours = exact_and_ours(kind, input_size, hidden_size, bidirectional=seq_len == 2)
    input, hx = input_and_hx(kind, ours, seq_len, batch, input_size, batch=batch)
    assert_torchs_numbers(exact, ours, input, hx)


# 35 sequences are three blocks of 16, of which sequences of one step fill the last.
TILES = {"padded": as_it_is, "packed": pack([1] * 16 + [2] * 17 + [3] * 2)}


@pytest.mark.parametrize("form", TILES)
@pytest.mark.parametrize(("slots", "at_once"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_program_with_several_batch_blocks_confuses_none(
    variant, monkeypatch, kind, slots, at_once, form
):
    tiled(monkeypatch, slots, at_once)
    exact, ours = exact_and_ours(kind, 5, 19, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 35, 5, batch=35)
    assert_torchs_numbers(exact, ours, input, hx, prepare=TILES[form])


@pytest.mark.parametrize("options", [{"bias": False}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_without_bias_or_state_and_on_top_of_others_are_torchs(
    variant, kind, given, options
):
    exact, ours = exact_and_ours(kind, 5, 19, bidirectional=True, **options)
    input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx if given else None)


@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_form_of_input_is_read_in_its_order(kind, batch_first, form):
    exact, ours = exact_and_ours(kind, 5, 19, batch_first=batch_first)
    shape = {"unbatched": (4,)}.get(form, (3, 4) if batch_first else (4, 3))
    input, hx = input_and_hx(kind, ours, *shape, 5, batch=None if form == "unbatched" else 3)
    prepare = pack([2, 4, 1], batch_first) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_between_layers_draws_torchs_numbers(kind, form):
    exact, ours = exact_and_ours(kind, 5, 19, num_layers=2, bidirectional=True, dropout=0.5)
    # The numbers drawn depend on the dtype: torch.nn in that of ours, as exact as it can be.
    theirs = exact.to(torch.float32)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    prepare = pack([3, 2, 2]) if form == "packed" else as_it_is
    results, states = [], []
    for run_it, module in ((run, theirs), (run_on_kernels, ours)):
        torch.manual_seed(7)
        results.append(run_it(module, input, hx, prepare=prepare))
        states.append(torch.get_rng_state())
    for name, value in results[0].items():
        # Both sides are float32: each may be off by the tolerance of float32.
        torch.testing.assert_close(
            results[1][name], value, rtol=0, atol=4e-5 * max(1.0, value.abs().max().item())
        )
    assert torch.equal(states[0], states[1]), "the generator is left in another state than torch's"


# What is done to a leaf before the module sees it -> the shape of the leaf, for an input (4, 3, 5).
STRIDES = {
    "transposed": ((3, 4, 5), lambda leaf: leaf.transpose(0, 1)),
    "features_first": ((5, 4, 3), lambda leaf: leaf.permute(1, 2, 0)),
    "every_other_step": ((8, 3, 5), lambda leaf: leaf[::2]),
    "every_other_feature": ((4, 3, 10), lambda leaf: leaf[..., ::2]),
    "inner_part": ((6, 5, 7), lambda leaf: leaf[1:5, 1:4, 1:6]),
    "expanded_batch": ((4, 1, 5), lambda leaf: leaf.expand(4, 3, 5)),
    "expanded_steps": ((1, 3, 5), lambda leaf: leaf.expand(4, 3, 5)),
    "expanded_features": ((4, 3, 1), lambda leaf: leaf.expand(4, 3, 5)),
    "one_number": ((1,), lambda leaf: leaf.expand(4, 3, 5)),
}


@pytest.mark.parametrize("view", STRIDES)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru"])
def test_strided_and_expanded_inputs_are_read_right(kind, view):
    shape, prepare = STRIDES[view]
    exact, ours = exact_and_ours(kind, 5, 9)
    assert_torchs_numbers(exact, ours, random(*shape, dtype=torch.float32), prepare=prepare)


@pytest.mark.parametrize(
    "prepare_state",
    [
        lambda state: state[:, :1].expand_as(state),
        lambda state: state[:1].expand_as(state),
        lambda state: state.transpose(0, 1).contiguous().transpose(0, 1),
        lambda state: torch.stack([state, state], -1)[..., 0],
    ],
    ids=["expanded_batch", "expanded_directions", "transposed", "strided"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_strided_and_expanded_states_are_read_right(variant, kind, prepare_state):
    exact, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx, prepare_state=prepare_state)


@pytest.mark.parametrize(
    "prepare_grad",
    [
        lambda grad: grad.flatten()[0].expand_as(grad),
        lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
        lambda grad: torch.stack([grad, grad], -1)[..., 0],
        torch.zeros_like,
    ],
    ids=["expanded", "transposed", "strided", "zero"],
)
@pytest.mark.parametrize("kind", ["gru", "lstm_proj"])
def test_strided_and_expanded_gradients_of_the_results_are_read_right(kind, prepare_grad):
    exact, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx, prepare_grad=prepare_grad)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize(("kind", "used"), OUTPUTS)
def test_a_loss_of_one_result_alone_has_torchs_gradients(variant, kind, used, form):
    exact, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    prepare = pack([1, 3, 2]) if form == "packed" else as_it_is
    assert_torchs_numbers(exact, ours, input, hx, prepare=prepare, used=[used])


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_gives_the_bits_of_training(variant, kind):
    _, ours = exact_and_ours(kind, 5, 19, bidirectional=True)
    input = random(3, 3, 5, dtype=torch.float32)
    for prepare in (as_it_is, pack([3, 1, 2])):
        found = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), triton_rnn.use_backend("triton"):
                output, state = ours(prepare(input), random_state(ours, 3))
            states = state if isinstance(state, tuple) else (state,)
            found.append((output if prepare is as_it_is else output.data, *states))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                assert torch.equal(a, b)
