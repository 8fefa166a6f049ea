"""First and second derivatives against finite differences, and second ones against torch.nn."""

import pytest
import torch
from tolerances import CELLS, LAYERS, assert_close, flat_outputs, leaf, random, random_state, twins
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

FORMS = ("padded", "packed_unsorted")


def function_of_all(kind, form="padded", **options):
    """(a function of the input, the states and every parameter, those leaves)."""
    _, ours = twins(kind, 2, 3, **options)
    steps = () if kind in CELLS else (3,)
    input, hx = random(*steps, 2, 2), random_state(ours, 2)
    states = hx if isinstance(hx, tuple) else (hx,)
    names = [name for name, _ in ours.named_parameters()]
    leaves = [leaf(tensor) for tensor in (input, *states, *ours.parameters())]

    def function(input, *tensors):
        if form == "packed_unsorted":
            input = pack_padded_sequence(input, torch.tensor([2, 3]), enforce_sorted=False)
        hx, parameters = tensors[: len(states)], tensors[len(states) :]
        named = dict(zip(names, parameters, strict=True))
        returned = functional_call(ours, named, (input, hx if len(hx) == 2 else hx[0]))
        return tuple(flat_outputs(ours, returned).values())

    return function, leaves


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_finite_differences(backend, kind, form):
    assert gradcheck(*function_of_all(kind, form))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_through_two_layers_both_ways_are_those_of_finite_differences(backend, kind):
    function, leaves = function_of_all(kind, "packed_unsorted", num_layers=2, bidirectional=True)
    assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_a_cell_are_those_of_finite_differences(backend, kind, bias):
    assert gradcheck(*function_of_all(kind, bias=bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_are_those_of_finite_differences(backend, kind, form):
    function, leaves = function_of_all(kind, form)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_second_derivatives_of_every_element_are_those_of_finite_differences(kind):
    assert gradgradcheck(*function_of_all(kind))


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_through_two_layers_both_ways_are_those_of_finite_differences(
    backend, kind
):
    function, leaves = function_of_all(kind, num_layers=2, bidirectional=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_of_a_cell_are_those_of_finite_differences(backend, kind):
    assert gradgradcheck(*function_of_all(kind), fast_mode=True)


def penalised_gradients(module, input, hx, prepare, used):
    """Gradients of a loss plus the squared norm of its own gradient, as in a gradient penalty."""
    input = leaf(input)
    states = [leaf(state) for state in (hx if isinstance(hx, tuple) else (hx,))]
    returned = module(prepare(input), tuple(states) if len(states) == 2 else states[0])
    outputs = flat_outputs(module, returned)
    loss = sum(out.square().sum() for name, out in outputs.items() if name in used)
    leaves = [input, *states, *module.parameters()]
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    penalty = sum(gradient.square().sum() for gradient in first if gradient is not None)
    second = torch.autograd.grad(loss + penalty, leaves, allow_unused=True)
    return first, second


ALL = ("output", "h_n", "c_n")
PENALTIES = [
    (kind, form, used) for kind in LAYERS for form in FORMS for used in (ALL, ("h_n",), ("output",))
] + [(kind, "padded", ALL) for kind in CELLS]


@pytest.mark.parametrize(("kind", "form", "used"), PENALTIES)
def test_a_gradient_penalty_has_torchs_gradients(backend, kind, form, used):
    options = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
    theirs, ours = twins(kind, 3, 4, **options)
    input = random(3, 3) if kind in CELLS else random(4, 3, 3)
    hx = random_state(theirs, 3)

    def prepare(input):
        if form == "padded":
            return input
        return pack_padded_sequence(input, torch.tensor([2, 4, 1]), enforce_sorted=False)

    for expected, actual in zip(
        penalised_gradients(theirs, input, hx, prepare, used),
        penalised_gradients(ours, input, hx, prepare, used),
        strict=True,
    ):
        for theirs_gradient, ours_gradient in zip(expected, actual, strict=True):
            if theirs_gradient is None:
                assert ours_gradient is None or not ours_gradient.any()
            else:
                assert_close(ours_gradient, theirs_gradient, tolerance=1e-11)


def test_second_derivatives_in_float32_are_torchs(backend):
    """Compared with float64, where torch.nn's LSTM is loops and not oneDNN's primitive."""
    theirs, ours = twins("lstm", 3, 4)
    input, hx = random(4, 3, 3), random_state(theirs, 3)
    everything = (lambda input: input, ALL)
    _, expected = penalised_gradients(theirs, input, hx, *everything)
    low = tuple(state.float() for state in hx)
    _, actual = penalised_gradients(ours.float(), input.float(), low, *everything)
    for exact, single in zip(expected, actual, strict=True):
        assert_close(single, exact.float(), tolerance=1e-4)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_graph_made_by_create_graph_can_be_used_twice(backend, kind):
    _, ours = twins(kind, 3, 4)
    loss = ours(random(4, 2, 3))[0].square().sum()
    weights = list(ours.parameters())
    first = torch.autograd.grad(loss, weights, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    once = torch.autograd.grad(penalty, weights, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(penalty, weights, allow_unused=True)
    for one, two in zip(once, twice, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_the_first_gradient_is_the_same_with_and_without_create_graph(backend, kind):
    _, ours = twins(kind, 3, 4, num_layers=2, bidirectional=True)
    weights = list(ours.parameters())
    input = random(4, 2, 3)
    plain = torch.autograd.grad(ours(input)[0].square().sum(), weights)
    recorded = torch.autograd.grad(ours(input)[0].square().sum(), weights, create_graph=True)
    for one, two in zip(plain, recorded, strict=True):
        assert_close(two, one)
        assert two.requires_grad


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru"])
def test_a_hessian_is_torchs(backend, kind):
    theirs, ours = twins(kind, 2, 3)
    input = random(3, 2, 2)
    hessians = [
        torch.autograd.functional.hessian(lambda x, m=module: m(x)[0].square().sum(), input)
        for module in (theirs, ours)
    ]
    assert_close(hessians[1], hessians[0], tolerance=1e-11)


# The second derivative recomputes a layer from what was saved. Where one saved tensor is a function
# of another, or is the other, its gradient must still be counted once.


def gradients_of_penalty(loss, leaves):
    """First gradients, and those of the loss plus the squares of the first."""
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(loss + sum(g.square().sum() for g in first), leaves)
    return [*first, *second]


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_state_carried_between_calls_is_counted_once_in_second_derivatives(backend, kind):
    """h_0 of the second call is a function of the weights that the call also takes."""
    results = []
    for module in twins(kind, 3, 4):
        input = random(*(() if kind in CELLS else (4,)), 2, 3).requires_grad_()
        first = flat_outputs(module, module(input))
        state = tuple(first[name] for name in ("h_n", "c_n") if name in first)
        second = flat_outputs(module, module(input * 2, state if len(state) == 2 else state[0]))
        loss = sum(out.square().sum() for out in second.values())
        results.append(gradients_of_penalty(loss, [input, *module.parameters()]))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_an_input_made_of_the_state_is_counted_once_in_second_derivatives(backend, kind):
    results = []
    for module in twins(kind, 4, 4):
        state = random(1, 2, 4).requires_grad_()
        input = state.tanh().expand(3, 2, 4)
        hx = (state, state) if kind == "lstm" else state
        loss = module(input, hx)[0].square().sum()
        results.append(gradients_of_penalty(loss, [state, *module.parameters()]))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_tied_weights_are_counted_once_in_second_derivatives(backend, kind):
    results = []
    for module in twins(kind, 4, 4, num_layers=2, bidirectional=False):
        module.weight_hh_l0 = module.weight_ih_l0
        module.bias_hh_l0 = module.bias_ih_l0
        module.weight_ih_l1 = module.weight_ih_l0
        loss = module(random(3, 2, 4))[0].square().sum()
        results.append(gradients_of_penalty(loss, list(module.parameters())))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance=1e-11)
