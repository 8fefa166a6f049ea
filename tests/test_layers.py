"""Every output and every gradient of ours against torch.nn, over what a caller can combine.

torch.nn in float64 is the reference. In lower precisions both are compared with that reference, on
weights and inputs that are rounded first, so that only the arithmetic of the layer is judged.
"""

import copy
import itertools

import pytest
import torch
from tolerances import (
    CELLS,
    LAYERS,
    OUTPUTS,
    TOLERANCES,
    assert_close,
    assert_same_bits,
    assert_same_results,
    flat_outputs,
    largest_error,
    random,
    random_state,
    run,
    skip_unless_served,
    twins,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import triton_rnn

LENGTHS_SORTED = [5, 3, 1]
LENGTHS_UNSORTED = [3, 5, 1]
FORMS = ("padded", "unbatched", "packed", "packed_unsorted")
ODD_SIZES = (1, 2, 3, 7, 31, 33, 63, 65, 127)


def pack(lengths, batch_first=False):
    """How to make a padded input of these lengths a packed one."""
    return lambda input: pack_padded_sequence(
        input, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False
    )


def form_of_input(form, batch_first):
    """(batch size or None, shape without features, `prepare`) of 5 steps and 3 sequences."""
    if form == "unbatched":
        return None, (5,), lambda input: input
    shape = (3, 5) if batch_first else (5, 3)
    if form == "padded":
        return 3, shape, lambda input: input
    lengths = LENGTHS_SORTED if form == "packed" else LENGTHS_UNSORTED
    return 3, shape, pack(lengths, batch_first)


MATRIX = [
    pytest.param(
        kind,
        {
            "bidirectional": directions == 2,
            "num_layers": layers,
            "bias": bias,
            "batch_first": batch_first,
        },
        given,
        form,
        id=f"{kind}-{directions}dir-{layers}layer-{'bias' if bias else 'nobias'}"
        f"-{'batch_first' if batch_first else 'time_first'}-{'hx' if given else 'nohx'}-{form}",
    )
    for kind, directions, layers, bias, batch_first, given, form in itertools.product(
        LAYERS, (1, 2), (1, 2), (True, False), (False, True), (False, True), FORMS
    )
]


@pytest.mark.parametrize(("kind", "options", "given", "form"), MATRIX)
def test_outputs_and_gradients_are_torchs(backend, kind, options, given, form):
    theirs, ours = twins(kind, 3, 4, **options)
    batch, shape, prepare = form_of_input(form, options["batch_first"])
    input = random(*shape, 3)
    hx = random_state(theirs, batch) if given else None
    assert_same_results(
        run(ours, input, hx, prepare=prepare), run(theirs, input, hx, prepare=prepare)
    )


@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_three_layers_both_ways_are_torchs(backend, kind, form):
    theirs, ours = twins(kind, 3, 4, num_layers=3, bidirectional=True)
    batch, shape, prepare = form_of_input(form, False)
    input, hx = random(*shape, 3), random_state(theirs, batch)
    assert_same_results(
        run(ours, input, hx, prepare=prepare), run(theirs, input, hx, prepare=prepare)
    )


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cells_outputs_and_gradients_are_torchs(backend, kind, bias, given, batched):
    theirs, ours = twins(kind, 3, 4, bias=bias)
    input = random(*((2,) if batched else ()), 3)
    hx = random_state(theirs, 2 if batched else None) if given else None
    assert_same_results(run(ours, input, hx), run(theirs, input, hx))


ODD_SHAPES = (
    [(size, 2, 3, 5) for size in ODD_SIZES]
    + [(3, size, 3, 5) for size in ODD_SIZES]
    + [(3, 2, size, 5) for size in ODD_SIZES]
    + [(3, 2, 3, size) for size in ODD_SIZES]
    + [(3, 127, 7, 63), (2, 33, 65, 127), (7, 1, 31, 127), (31, 63, 1, 33), (2, 65, 127, 65)]
)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, id="{}-T{}-N{}-I{}-H{}".format(kind, *shape))
        for kind, shape in itertools.product(LAYERS, ODD_SHAPES)
        # A projection is smaller than the hidden size.
        if kind != "lstm_proj" or shape[-1] > 2
    ],
)
def test_odd_sizes_are_torchs(backend, kind, shape):
    seq_len, batch, input_size, hidden_size = shape
    theirs, ours = twins(kind, input_size, hidden_size, bidirectional=seq_len == 3)
    input, hx = random(seq_len, batch, input_size), random_state(theirs, batch)
    assert_same_results(run(ours, input, hx), run(theirs, input, hx))


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", CELLS)
def test_odd_sizes_of_a_cell_are_torchs(backend, kind, size):
    for batch, input_size, hidden_size in ((size, 3, 5), (2, size, 5), (2, 3, size)):
        theirs, ours = twins(kind, input_size, hidden_size)
        input, hx = random(batch, input_size), random_state(theirs, batch)
        assert_same_results(run(ours, input, hx), run(theirs, input, hx))


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_ragged_lengths_of_odd_sizes_are_torchs(backend, kind):
    lengths = [7, 65, 1, 33, 2, 31, 33]
    theirs, ours = twins(kind, 3, 5, bidirectional=True, num_layers=2)
    input, hx = random(65, 7, 3), random_state(theirs, 7)
    prepare = pack(lengths)
    assert_same_results(
        run(ours, input, hx, prepare=prepare), run(theirs, input, hx, prepare=prepare)
    )


LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


def low_and_exact(kind, dtype, **options):
    """Our module in a dtype and torch.nn's in float64 with the same, already rounded, weights.

    relu's slope jumps at 0, where rounding decides the side: its units are made to stay far from
    it, every other one above and the rest below.
    """
    _, ours = twins(kind, 7, 9, dtype=dtype, **options)
    if "relu" in kind:
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.abs_()
                if "bias_ih" in name:
                    parameter[::2] = -100
    exact, _ = twins(kind, 7, 9, **options)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def assert_as_good_as_its_rounding(ours, exact, input, hx, prepare=lambda input: input):
    """Every output and gradient in the dtype of `ours`, and as near float64 as the table says."""
    dtype = input.dtype
    input, hx = input.abs(), tuple(s.abs() for s in hx) if isinstance(hx, tuple) else hx.abs()
    exact_hx = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    actual = run(ours, input, hx, prepare=prepare)
    for name, value in run(exact, input.double(), exact_hx, prepare=prepare).items():
        assert actual[name].dtype == dtype
        assert_close(actual[name].double(), value, name, TOLERANCES[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["1", "2x2"]
)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_dtype_is_as_good_as_its_rounding(backend, kind, dtype, options, form):
    skip_unless_served(backend, dtype)
    ours, exact = low_and_exact(kind, dtype, **options)
    batch, shape, prepare = form_of_input(form, False)
    input, hx = random(*shape, 7, dtype=dtype), random_state(ours, batch)
    assert_as_good_as_its_rounding(ours, exact, input, hx, prepare)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_each_dtype_of_a_cell_is_as_good_as_its_rounding(backend, kind, dtype):
    skip_unless_served(backend, dtype)
    ours, exact = low_and_exact(kind, dtype)
    input, hx = random(3, 7, dtype=dtype), random_state(ours, 3)
    assert_as_good_as_its_rounding(ours, exact, input, hx)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_float32_of_a_middle_size_is_no_worse_than_torchs(backend, kind):
    exact, _ = twins(kind, 65, 127)
    theirs, ours = twins(kind, 65, 127, dtype=torch.float32)
    theirs.load_state_dict(exact.state_dict())
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(theirs.state_dict())
    input = random(63, 31, 65, dtype=torch.float32)
    expected, torchs, actual = run(exact, input.double()), run(theirs, input), run(ours, input)
    for name, value in expected.items():
        if value is not None:
            limit = max(2 * largest_error(torchs[name], value), TOLERANCES[torch.float32])
            assert_close(actual[name].double(), value, name, limit)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch_goes_forward_and_back(backend, kind, directions, batch_first):
    theirs, ours = twins(
        kind, 3, 4, num_layers=2, bidirectional=directions == 2, batch_first=batch_first
    )
    input = random(0, 5, 3) if batch_first else random(5, 0, 3)
    for hx in (None, random_state(theirs, 0)):
        assert_same_results(run(ours, input, hx), run(theirs, input, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_an_empty_batch_of_a_cell_goes_forward_and_back(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    for hx in (None, random_state(theirs, 0)):
        assert_same_results(run(ours, random(0, 3), hx), run(theirs, random(0, 3), hx))


# What is done to a leaf before the module sees it -> the shape of the leaf, for an input (5, 3, 4).
STRIDES = {
    "transposed": ((3, 5, 4), lambda leaf: leaf.transpose(0, 1)),
    "features_first": ((4, 5, 3), lambda leaf: leaf.permute(1, 2, 0)),
    "every_other_step": ((10, 3, 4), lambda leaf: leaf[::2]),
    "every_other_feature": ((5, 3, 8), lambda leaf: leaf[..., ::2]),
    "flipped": ((5, 3, 4), lambda leaf: leaf.flip(0)),
    "inner_part": ((7, 5, 6), lambda leaf: leaf[1:6, 1:4, 1:5]),
    "expanded_batch": ((5, 1, 4), lambda leaf: leaf.expand(5, 3, 4)),
    "expanded_steps": ((1, 3, 4), lambda leaf: leaf.expand(5, 3, 4)),
    "expanded_features": ((5, 3, 1), lambda leaf: leaf.expand(5, 3, 4)),
    "one_number": ((1,), lambda leaf: leaf.expand(5, 3, 4)),
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("view", STRIDES)
@pytest.mark.parametrize("kind", LAYERS)
def test_strided_and_expanded_inputs_are_read_right(backend, kind, view, batch_first):
    shape, prepare = STRIDES[view]
    theirs, ours = twins(kind, 4, 4, batch_first=batch_first, bidirectional=True)
    leaf = random(*shape)
    assert_same_results(run(ours, leaf, prepare=prepare), run(theirs, leaf, prepare=prepare))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "prepare_state",
    [
        lambda state: state[:, :1].expand_as(state),
        lambda state: state[:1].expand_as(state),
        lambda state: state.transpose(0, 1).contiguous().transpose(0, 1),
        lambda state: torch.stack([state, state], -1)[..., 0],
    ],
    ids=["expanded_batch", "expanded_layers", "transposed", "strided"],
)
@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
def test_strided_and_expanded_states_are_read_right(backend, kind, prepare_state, form):
    theirs, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    batch, shape, prepare = form_of_input(form, False)
    input, hx = random(*shape, 3), random_state(theirs, batch)
    with_views = {"prepare": prepare, "prepare_state": prepare_state}
    assert_same_results(run(ours, input, hx, **with_views), run(theirs, input, hx, **with_views))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
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
def test_strided_and_expanded_output_gradients_are_read_right(
    backend, kind, prepare_grad, batch_first
):
    theirs, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    input, hx = random(5, 3, 3), random_state(theirs, 5 if batch_first else 3)
    assert_same_results(
        run(ours, input, hx, prepare_grad=prepare_grad),
        run(theirs, input, hx, prepare_grad=prepare_grad),
    )


@pytest.mark.parametrize("kind", CELLS)
def test_strided_and_expanded_tensors_of_a_cell_are_read_right(backend, kind):
    theirs, ours = twins(kind, 4, 4)
    hx = random_state(theirs, 3)
    for shape, prepare in (
        ((4, 3), torch.t),
        ((1, 4), lambda leaf: leaf.expand(3, 4)),
        ((3, 8), lambda leaf: leaf[:, ::2]),
    ):
        views = {
            "prepare": prepare,
            "prepare_state": lambda state: state[:1].expand_as(state),
            "prepare_grad": lambda grad: grad[:1].expand_as(grad),
        }
        leaf = random(*shape)
        assert_same_results(run(ours, leaf, hx, **views), run(theirs, leaf, hx, **views))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "used"), OUTPUTS)
def test_a_loss_of_one_output_alone_has_torchs_gradients(backend, kind, used, form):
    theirs, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    batch, shape, prepare = form_of_input(form, False)
    input, hx = random(*shape, 3), random_state(theirs, batch)
    chosen = {"prepare": prepare, "used": [used]}
    actual, expected = run(ours, input, hx, **chosen), run(theirs, input, hx, **chosen)
    for name, value in expected.items():
        # An output gate that a loss of c_n cannot reach gets zeros from the one, None from the
        # other: which of the two is an accident of how torch.nn's loops are written.
        if value is None:
            assert actual[name] is None or not actual[name].any()
        else:
            assert_close(actual[name], value, name)


@pytest.mark.parametrize("used", ["h_n", "c_n"])
def test_a_loss_of_one_state_of_an_lstm_cell_has_torchs_gradients(backend, used):
    theirs, ours = twins("lstm_cell", 3, 4)
    input, hx = random(2, 3), random_state(theirs, 2)
    assert_same_results(run(ours, input, hx, used=[used]), run(theirs, input, hx, used=[used]))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_loss_of_one_step_has_torchs_gradients(backend, kind):
    gradients = []
    for module in twins(kind, 3, 4, bidirectional=True):
        output = module(random(5, 2, 3))[0]
        gradients.append(torch.autograd.grad(output[2, 1].sum(), list(module.parameters())))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_frozen_weight_gets_no_gradient_and_the_rest_get_torchs(backend, kind):
    steps = () if kind in CELLS else (5,)
    names = [name for name, _ in twins(kind, 3, 4)[0].named_parameters()]
    for frozen in (*[[name] for name in names], names[:2], names[2:], names):
        theirs, ours = twins(kind, 3, 4)
        for module in (theirs, ours):
            for name in frozen:
                module.get_parameter(name).requires_grad_(False)
        input, hx = random(*steps, 2, 3), random_state(theirs, 2)
        actual = run(ours, input, hx)
        assert_same_results(actual, run(theirs, input, hx))
        assert all(actual[f"grad of {name}"] is None for name in frozen)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_nothing_is_recorded_when_nothing_needs_a_gradient(backend, kind):
    _, ours = twins(kind, 3, 4)
    input = random(2, 3) if kind in CELLS else random(5, 2, 3)
    with torch.no_grad():
        for out in flat_outputs(ours, ours(input)).values():
            assert not out.requires_grad
    for out in flat_outputs(ours, ours(input)).values():
        assert out.requires_grad
    ours.requires_grad_(False)
    for out in flat_outputs(ours, ours(input)).values():
        assert not out.requires_grad
    with torch.inference_mode():
        for out in flat_outputs(ours, ours(input)).values():
            assert out.is_inference()


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_grad_modes_give_the_same_numbers(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    input = random(2, 3) if kind in CELLS else random(5, 2, 3)
    expected = flat_outputs(theirs, theirs(input))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for name, out in flat_outputs(ours, ours(input)).items():
                assert_close(out, expected[name], name)


@pytest.mark.parametrize("kind", LAYERS)
def test_eval_mode_has_gradients(backend, kind):
    theirs, ours = twins(kind, 3, 4, num_layers=2, dropout=0.5)
    theirs.eval()
    ours.eval()
    assert_same_results(run(ours, random(5, 2, 3)), run(theirs, random(5, 2, 3)))


@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_second_backward_gives_the_same_bits(backend, kind, form):
    _, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    _, shape, prepare = form_of_input(form, False)
    input = random(*shape, 3).requires_grad_()
    outputs = list(flat_outputs(ours, ours(prepare(input))).values())
    leaves = [input, *ours.parameters()]
    ones = [torch.ones_like(out) for out in outputs]
    first = torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(outputs, leaves, ones)
    for one, two, before in zip(first, second, kept, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, before), "the second backward wrote into the first one's result"


@pytest.mark.parametrize("kind", CELLS)
def test_a_second_backward_of_a_cell_gives_the_same_bits(backend, kind):
    _, ours = twins(kind, 3, 4)
    outputs = list(flat_outputs(ours, ours(random(2, 3))).values())
    ones = [torch.ones_like(out) for out in outputs]
    first = torch.autograd.grad(outputs, list(ours.parameters()), ones, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(outputs, list(ours.parameters()), ones)
    for one, two, before in zip(first, second, kept, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, before)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_backward_without_retain_graph_frees_the_graph_as_torch_does(backend, kind):
    _, ours = twins(kind, 3, 4)
    input = random(2, 3) if kind in CELLS else random(5, 2, 3)
    loss = sum(out.sum() for out in flat_outputs(ours, ours(input)).values())
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_gradients_accumulate(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    steps = () if kind in CELLS else (5,)
    for module in (theirs, ours):
        for seed in (1, 2):
            input = random(*steps, 2, 3, seed=seed)
            sum(out.sum() for out in flat_outputs(module, module(input)).values()).backward()
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_one_module_called_twice_sums_both_calls_gradients(backend, kind):
    theirs, ours = twins(kind, 3, 4)
    steps = () if kind in CELLS else (5,)
    for module in (theirs, ours):
        first = flat_outputs(module, module(random(*steps, 2, 3)))
        state = tuple(first[name] for name in ("h_n", "c_n") if name in first)
        second = flat_outputs(
            module, module(random(*steps, 2, 3, seed=5), state if len(state) == 2 else state[0])
        )
        sum((a * b).sum() for a, b in zip(first.values(), second.values(), strict=True)).backward()
    for expected, actual in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert_close(actual.grad, expected.grad)


def test_weights_tied_between_layers_sum_their_gradients(backend):
    theirs, ours = twins("gru", 4, 4, num_layers=2)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_hh_l0
    assert_same_results(run(ours, random(5, 2, 4)), run(theirs, random(5, 2, 4)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_callers_tensors_are_never_written_to(backend, kind, form):
    _, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    batch, shape, prepare = form_of_input(form, False)
    input = prepare(random(*shape, 3))
    hx = random_state(ours, batch)
    states = list(hx) if isinstance(hx, tuple) else [hx]
    given = [input.data if isinstance(input, PackedSequence) else input]
    if isinstance(input, PackedSequence):
        given += [part for part in input[1:] if part is not None]
    given += [*states, *(state.requires_grad_() for state in states), *ours.parameters()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in given]
    outputs = list(flat_outputs(ours, ours(input, hx)).values())
    grads = [random(*out.shape, seed=i) for i, out in enumerate(outputs)]
    given += grads
    before += [(grad.clone(), grad._version) for grad in grads]
    torch.autograd.backward(outputs, grads)
    with torch.no_grad():
        ours(input, hx)
    for tensor, (copy_before, version) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy_before)


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_never_writes_to_the_callers_tensors(backend, kind):
    _, ours = twins(kind, 3, 4)
    input, hx = random(2, 3), random_state(ours, 2)
    given = [input, *(hx if isinstance(hx, tuple) else (hx,)), *ours.parameters()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in given]
    outputs = flat_outputs(ours, ours(input, hx)).values()
    sum(out.sum() for out in outputs).backward()
    for tensor, (copy_before, version) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, copy_before)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_share_no_memory_with_what_was_given(backend, kind, grad):
    """One step, one row, one layer: where a state could be handed through instead of copied."""
    _, ours = twins(kind, 3, 4)
    input, hx = random(1, 1, 3), random_state(ours, 1)
    given = [input, *(hx if isinstance(hx, tuple) else (hx,)), *ours.parameters()]
    with torch.set_grad_enabled(grad):
        outputs = flat_outputs(ours, ours(input, hx))
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    for out in outputs.values():
        assert out.untyped_storage().data_ptr() not in memory
    with torch.no_grad():
        for name, out in outputs.items():
            others = {other: value.clone() for other, value in outputs.items() if other != name}
            out.fill_(7.0)
            for other, value in others.items():
                assert torch.equal(outputs[other], value), f"writing to {name} changed {other}"


IN_PLACE = "modified by an inplace operation"


@pytest.mark.parametrize("what", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "weight_hh_l1"])
@pytest.mark.parametrize("kind", LAYERS)
def test_changing_in_place_what_the_backward_needs_is_detected(backend, kind, what):
    _, ours = twins(kind, 3, 4, num_layers=2)
    input, hx = random(5, 2, 3).requires_grad_(), random_state(ours, 2)
    output = ours(input, hx)[0]
    tensors = {"input": input, "h_0": hx[0] if isinstance(hx, tuple) else hx}
    with torch.no_grad():
        (tensors[what] if what in tensors else ours.get_parameter(what)).mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        output.sum().backward()


@pytest.mark.parametrize("what", ["input", "h_0", "weight_ih", "weight_hh"])
@pytest.mark.parametrize("kind", CELLS)
def test_changing_in_place_what_a_cells_backward_needs_is_detected(backend, kind, what):
    _, ours = twins(kind, 3, 4)
    input, hx = random(2, 3).requires_grad_(), random_state(ours, 2)
    for state in hx if isinstance(hx, tuple) else (hx,):
        state.requires_grad_()
    loss = sum(out.sum() for out in flat_outputs(ours, ours(input, hx)).values())
    tensors = {"input": input, "h_0": hx[0] if isinstance(hx, tuple) else hx}
    with torch.no_grad():
        (tensors[what] if what in tensors else ours.get_parameter(what)).mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_changing_a_bias_in_place_before_the_backward_is_allowed_as_in_torch(backend, kind):
    gradients = []
    for module in twins(kind, 3, 4, num_layers=2):
        loss = module(random(5, 2, 3))[0].square().sum()
        with torch.no_grad():
            module.bias_ih_l0.add_(1)
            module.bias_hh_l1.add_(1)
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_single_step_from_no_state_lets_weight_hh_change_in_place_as_torch_does(backend, kind):
    """Nothing but the gradient of the state before the step would read it."""
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    gradients = []
    for module in twins(kind, 3, 4):
        input = random(2, 3) if kind in CELLS else random(1, 2, 3)
        loss = next(iter(flat_outputs(module, module(input)).values())).square().sum()
        with torch.no_grad():
            module.get_parameter(name).add_(1)
        gradients.append(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, torch.zeros_like(actual) if expected is None else expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changed", ["output", "h_n"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru"])
def test_a_result_may_be_changed_in_place_before_the_backward(
    backend, kind, batch_first, changed, form
):
    """As in `relu_(lstm_output)` or `output[:, -1] = 0`: torch.nn on the CPU allows it."""
    _, shape, prepare = form_of_input(form, batch_first)
    gradients = []
    for module in twins(kind, 3, 4, num_layers=2, bidirectional=True, batch_first=batch_first):
        input = random(*shape, 3).requires_grad_()
        outputs = flat_outputs(module, module(prepare(input)))
        outputs[changed].mul_(2)
        outputs[changed][0].fill_(0)
        loss = sum(out.square().sum() for out in outputs.values())
        gradients.append(torch.autograd.grad(loss, [input, *module.parameters()]))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kind", CELLS)
def test_changing_a_cells_result_in_place_never_gives_wrong_gradients(backend, kind):
    """torch.nn allows it for GRUCell and LSTMCell; for RNNCell a refusal is as good."""
    found = []
    for module in twins(kind, 3, 4):
        outputs = flat_outputs(module, module(random(2, 3)))
        weight = random(2, 4, seed=6)
        try:
            if isinstance(module, torch.nn.RNNCell) and not found:
                # torch.nn itself refuses: what the gradients are, without working in place.
                doubled = outputs["h_n"] * 2
            else:
                doubled = outputs["h_n"].mul_(2)
            loss = (doubled * weight).sum() + outputs.get("c_n", doubled).sum()
            found.append(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))
        except RuntimeError as error:
            if not isinstance(module, torch.nn.RNNCell) or IN_PLACE not in str(error):
                raise
            return
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_two_runs_give_the_same_bits(backend, kind, dtype, form):
    _, ours = twins(kind, 33, 31, dtype=dtype, bidirectional=True)
    batch, shape, prepare = form_of_input(form, False)
    input, hx = random(*shape, 33, dtype=dtype), random_state(ours, batch)
    first = run(ours, input, hx, prepare=prepare)
    for _ in range(2):
        assert_same_bits(run(copy.deepcopy(ours), input, hx, prepare=prepare), first)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_numbers(backend, kind, batch_first, form, p):
    theirs, ours = twins(
        kind, 3, 4, num_layers=3, bidirectional=True, batch_first=batch_first, dropout=p
    )
    batch, shape, prepare = form_of_input(form, batch_first)
    input, hx = random(*shape, 3), random_state(theirs, batch)
    results, states = [], []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(run(module, input, hx, prepare=prepare))
        states.append(torch.get_rng_state())
    assert_same_results(results[1], results[0])
    assert torch.equal(states[0], states[1]), "the generator is left in another state than torch's"


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_numbers_without_gradients_and_in_float32(backend, kind):
    theirs, ours = twins(kind, 3, 4, num_layers=2, dropout=0.5, dtype=torch.float32)
    outputs = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        with torch.no_grad():
            outputs.append(module(random(5, 3, 3, dtype=torch.float32))[0])
    assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_can_be_changed_on_the_module_and_is_off_in_eval(backend, kind):
    theirs, ours = twins(kind, 3, 4, num_layers=2, dropout=0.5)
    input = random(5, 3, 3)
    for p, training in ((0.9, True), (0.0, True), (0.5, False)):
        outputs = []
        for module in (theirs, ours):
            module.dropout = p
            module.train(training)
            torch.manual_seed(7)
            outputs.append(module(input)[0])
        assert_close(outputs[1], outputs[0])


def test_h_n_is_the_state_before_dropout(backend):
    _, ours = twins("gru", 3, 4, num_layers=2, dropout=1.0)
    _, without = twins("gru", 3, 4, num_layers=2)
    without.load_state_dict(ours.state_dict())
    input = random(5, 2, 3)
    assert_close(ours(input)[1][0], without(input)[1][0])
    assert ours(input)[1][0].abs().min() > 0


@pytest.mark.parametrize("kind", LAYERS)
def test_the_reverse_h_n_is_the_state_at_the_first_step(backend, kind):
    _, ours = twins(kind, 3, 4, bidirectional=True)
    outputs = flat_outputs(ours, ours(random(5, 2, 3)))
    width = outputs["output"].size(-1) // 2
    assert torch.equal(outputs["h_n"][0], outputs["output"][-1, :, :width])
    assert torch.equal(outputs["h_n"][1], outputs["output"][0, :, width:])


@pytest.mark.parametrize("lengths", [[5, 3, 1], [1, 5, 5, 2], [4, 4], [1, 1, 1], [7]], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_batch_is_each_of_its_sequences_alone(backend, kind, lengths):
    _, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    input, hx = random(max(lengths), len(lengths), 3), random_state(ours, len(lengths))
    packed, state = ours(pack(lengths)(input), hx)
    output, returned_lengths = pad_packed_sequence(packed)
    assert returned_lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        row_hx = tuple(s[:, row] for s in hx) if isinstance(hx, tuple) else hx[:, row]
        alone, alone_state = ours(input[:length, row], row_hx)
        assert_close(output[:length, row], alone)
        pairs = (
            zip(state, alone_state, strict=True)
            if isinstance(hx, tuple)
            else [(state, alone_state)]
        )
        for batched, single in pairs:
            assert_close(batched[:, row], single)


@pytest.mark.parametrize("form", ["packed", "packed_unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_packed_output_carries_the_inputs_sizes_and_indices(backend, kind, form):
    theirs, ours = twins(kind, 3, 4)
    _, shape, prepare = form_of_input(form, False)
    input = prepare(random(*shape, 3))
    expected, actual = theirs(input)[0], ours(input)[0]
    assert isinstance(actual, PackedSequence)
    for mine, torchs in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(mine, torchs)
    without = PackedSequence(input.data, input.batch_sizes)
    assert ours(without)[0].sorted_indices is None
    assert ours(without)[0].unsorted_indices is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_views_of_the_results_that_torch_allows_are_allowed(
    backend, kind, batch_first, form, dtype
):
    """Such as `output.view(-1, hidden)` of a time-major output: as strides allow it in torch.nn."""
    theirs, ours = twins(kind, 3, 4, num_layers=2, batch_first=batch_first, dtype=dtype)
    _, shape, prepare = form_of_input(form, batch_first)
    input = prepare(random(*shape, 3, dtype=dtype))
    expected, actual = flat_outputs(theirs, theirs(input)), flat_outputs(ours, ours(input))
    for name, value in expected.items():
        assert actual[name].stride() == value.stride(), name


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_carried_over_a_split_sequence_continues_it(backend, kind):
    _, ours = twins(kind, 3, 4, num_layers=2)
    input = random(7, 2, 3)
    whole, final = ours(input)
    first, state = ours(input[:3])
    second, state = ours(input[3:], state)
    assert_close(torch.cat([first, second]), whole)
    for part, all_at_once in zip(
        state if isinstance(state, tuple) else (state,),
        final if isinstance(final, tuple) else (final,),
        strict=True,
    ):
        assert_close(part, all_at_once)


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_over_a_cell_is_the_layer(backend, kind):
    _, cell = twins(kind, 3, 4)
    _, layer = twins(kind.removesuffix("_cell"), 3, 4)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    input, state, steps = random(5, 2, 3), None, []
    for step in input:
        state = cell(step, state)
        steps.append(state[0] if isinstance(state, tuple) else state)
    assert_close(torch.stack(steps), layer(input)[0])


def test_backends_agree_within_one_graph():
    """A model may change backend between two calls of one forward pass."""
    _, ours = twins("gru", 3, 4)
    input = random(5, 2, 3)
    expected = run(ours, input)
    for first, second in itertools.permutations(("native", "torchscript", "aten", "reference"), 2):
        with triton_rnn.use_backend(first):
            output, state = ours(input[:3])
        with triton_rnn.use_backend(second):
            rest, state = ours(input[3:], state)
        assert_close(torch.cat([output, rest]), expected["output"])
        ours.zero_grad()
        torch.cat([output, rest]).sum().backward()
        assert_close(ours.weight_hh_l0.grad, run_sum(ours, input))


def run_sum(module, input):
    """The gradient of weight_hh_l0 of the sum of the output."""
    (gradient,) = torch.autograd.grad(module(input)[0].sum(), [module.weight_hh_l0])
    return gradient
