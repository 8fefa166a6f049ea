"""What a caller may do around a backward of the kernels, and what the kernels may not do."""

import pytest
import torch
from compare import (
    EXCHANGES,
    assert_torchs_numbers,
    each_state,
    exact_and_ours,
    exchanging,
    hidden_size,
    input_and_hx,
    pack,
    run_on_kernels,
)
from threads import Threads
from tolerances import LAYERS, assert_close, assert_same_bits, flat_outputs, random, run

import triton_rnn
from triton_rnn.backends.triton import launch

IN_PLACE = "modified by an inplace operation"
FORMS = {"padded": lambda input: input, "packed": pack([2, 3, 1])}


def bits(tensor):
    """A copy to compare to the last bit: NaN is equal to itself there."""
    return tensor.detach().clone().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@pytest.fixture(params=["resident", "stepwise", "flag", "streaming"])
def any_variant(request, monkeypatch):
    """Every variant, those that exchange with one thread per program."""
    if request.param in EXCHANGES:
        exchanging(monkeypatch, *EXCHANGES[request.param])
        Threads(monkeypatch)
    else:
        monkeypatch.setattr(launch, "variant", request.param)
    return request.param


@pytest.mark.parametrize(("form", "dtype"), [("padded", torch.float32), ("packed", torch.float16)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_callers_tensors_keep_every_bit(any_variant, kind, dtype, form):
    """float32 h_0 and c_0 are the ones at risk: no conversion makes a copy of them."""
    size = 16 if any_variant == "flag" else 9
    _, ours = exact_and_ours(kind, 5, size, dtype=dtype, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    states = list(hx) if isinstance(hx, tuple) else [hx]
    given = [input.requires_grad_(), *(s.requires_grad_() for s in states), *ours.parameters()]
    before = [(bits(tensor), tensor._version) for tensor in given]
    with triton_rnn.use_backend("triton"):
        outputs = list(flat_outputs(ours, ours(FORMS[form](input), hx)).values())
        grads = [random(*out.shape, seed=i, dtype=dtype) for i, out in enumerate(outputs)]
        given += [*grads, *outputs]
        before += [(bits(tensor), tensor._version) for tensor in (*grads, *outputs)]
        torch.autograd.backward(outputs, grads)
        with torch.no_grad():
            ours(FORMS[form](input), hx)
    for tensor, (copy, version) in zip(given, before, strict=True):
        assert tensor._version == version
        assert torch.equal(bits(tensor), copy)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_that_is_changed_in_place_is_no_other_ones(variant, kind):
    """The two biases' are the same numbers, but for a GRU: optimisers change each in place."""
    _, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 2, 5, batch=2)
    leaves = [input.requires_grad_(), *ours.parameters()]
    with triton_rnn.use_backend("triton"):
        ours(input, hx)[0].sum().backward()
    before = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.mul_(2)
    for leaf, once in zip(leaves, before, strict=True):
        assert torch.equal(leaf.grad, 2 * once)


@pytest.mark.parametrize("kind", LAYERS)
def test_results_share_no_memory_with_what_was_given(variant, kind):
    """One step, one row: where a state could be handed through instead of copied."""
    _, ours = exact_and_ours(kind, 5, 9)
    input, hx = input_and_hx(kind, ours, 1, 1, 5, batch=1)
    given = [input, *(hx if isinstance(hx, tuple) else (hx,)), *ours.parameters()]
    memory = {tensor.untyped_storage().data_ptr() for tensor in given}
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), triton_rnn.use_backend("triton"):
            outputs = flat_outputs(ours, ours(input, hx))
        with torch.no_grad():
            for name, out in outputs.items():
                assert out.untyped_storage().data_ptr() not in memory
                others = {other: o.clone() for other, o in outputs.items() if other != name}
                out.fill_(7.0)
                for other, value in others.items():
                    assert torch.equal(outputs[other], value), f"writing to {name} changed {other}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "lstm_proj"])
def test_an_output_changed_in_place_before_the_backward_is_refused(kind, form):
    """The backward reads the output. What a projected LSTM returns it does not read."""
    _, ours = exact_and_ours(kind, 5, 9)
    with triton_rnn.use_backend("triton"):
        output = ours(FORMS[form](random(3, 3, 5, dtype=torch.float32)))[0]
    output = output if form == "padded" else output.data
    output.mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        output.sum().backward()


@pytest.mark.parametrize("what", ["input", "h_0", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", LAYERS)
def test_changing_in_place_what_the_backward_reads_is_refused(kind, what):
    _, ours = exact_and_ours(kind, 5, 9)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    tensors = {"input": input, "h_0": hx[0] if isinstance(hx, tuple) else hx}
    with triton_rnn.use_backend("triton"):
        output = ours(input.requires_grad_(), hx)[0]
    with torch.no_grad():
        (tensors[what] if what in tensors else ours.get_parameter(what)).mul_(2)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        output.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_changed_in_place_leaves_the_gradients_right(kind, form):
    """The backward reads no final state; a projected LSTM's output it does not read either."""
    exact, ours = exact_and_ours(kind, 5, 9)
    input = random(3, 3, 5, dtype=torch.float32)
    found = []
    for module, backend in ((exact, "reference"), (ours, "triton")):
        given = input.to(next(module.parameters()).dtype).requires_grad_()
        with triton_rnn.use_backend(backend):
            outputs = flat_outputs(module, module(FORMS[form](given)))
        for name, out in outputs.items():
            if name != "output" or kind == "lstm_proj":
                # Not in place for torch.nn, whose LSTM may read what it returned.
                outputs[name] = out.mul_(2) if module is ours else out * 2
        loss = sum(out.square().sum() for out in outputs.values())
        found.append(torch.autograd.grad(loss, [given, *module.parameters()]))
    for expected, actual in zip(*found, strict=True):
        # The tolerance of float32, of numbers in float64.
        assert_close(actual.double(), expected, tolerance=2e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_frozen_weight_gets_no_gradient_and_the_rest_get_torchs(kind):
    names = [name for name, _ in exact_and_ours(kind, 5, 9)[1].named_parameters()]
    for frozen in (*[[name] for name in names], names[:2], names[2:], names):
        exact, ours = exact_and_ours(kind, 5, 9)
        for module in (exact, ours):
            for name in frozen:
                module.get_parameter(name).requires_grad_(False)
        input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)
        actual = assert_torchs_numbers(exact, ours, input, hx)
        assert all(actual[f"grad of {name}"] is None for name in frozen)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_input_that_needs_no_gradient_leaves_those_of_the_weights_right(kind):
    exact, ours = exact_and_ours(kind, 5, 9, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 2, 3, 5, batch=3)

    def detached(leaf):
        return leaf.detach()

    assert_torchs_numbers(exact, ours, input, hx, prepare=detached)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_are_torchs(kind, form):
    exact, ours = exact_and_ours(kind, 5, 9)
    found = []
    for module, backend in ((exact, "reference"), (ours, "triton")):
        dtype = next(module.parameters()).dtype
        input = random(3, 3, 5, dtype=torch.float32).to(dtype).requires_grad_()
        weights = list(module.parameters())
        with triton_rnn.use_backend(backend):
            outputs = flat_outputs(module, module(FORMS[form](input)))
            loss = sum(out.square().sum() for out in outputs.values())
            first = torch.autograd.grad(loss, [input, *weights], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [input, *weights])
        found.append([*first, *second])
    for expected, actual in zip(*found, strict=True):
        # Squares of gradients: twice the relative error of what is rounded to float32 once.
        assert_close(actual.double(), expected, tolerance=4e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_runs_and_a_second_backward_give_the_same_bits(variant, kind):
    _, ours = exact_and_ours(kind, 5, 19, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 17, 5, batch=17)
    assert_same_bits(run_on_kernels(ours, input, hx), run_on_kernels(ours, input, hx))
    with triton_rnn.use_backend("triton"):
        outputs = list(flat_outputs(ours, ours(input, hx)).values())
    ones = [torch.ones_like(out) for out in outputs]
    first = torch.autograd.grad(outputs, list(ours.parameters()), ones, retain_graph=True)
    kept = [bits(gradient) for gradient in first]
    second = torch.autograd.grad(outputs, list(ours.parameters()), ones)
    for one, two, before in zip(first, second, kept, strict=True):
        assert torch.equal(bits(two), before)
        assert torch.equal(bits(one), before), "the second backward wrote into the first's result"


@pytest.mark.parametrize(
    ("kind", "form", "dtype"),
    [
        (kind, *(("packed", torch.float32) if number % 2 else ("padded", torch.float16)))
        for number, kind in enumerate(LAYERS)
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_no_result_comes_from_unwritten_memory(any_variant, kind, form, dtype):
    assert torch.empty(3).isnan().all(), "the poison is not there"
    # A buffer of an earlier call that stands for an argument which is not read.
    launch.nothing.cache_clear()
    launch._ready.cache_clear()
    size = hidden_size(any_variant, dtype)
    exact, ours = exact_and_ours(kind, 5, size, dtype=dtype, bidirectional=True)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    assert_torchs_numbers(exact, ours, input, hx, prepare=FORMS[form])
    with torch.no_grad(), triton_rnn.use_backend("triton"):
        for out in flat_outputs(ours, ours(FORMS[form](input), hx)).values():
            assert out.isfinite().all()


SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def put(tensor, value):
    """One element, of the second step, sequence or unit."""
    tensor[(1, *[0] * (tensor.dim() - 1))] = value


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["input", "h_0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_nan_and_infinity_go_where_torch_lets_them_go(kind, where, form, special, monkeypatch):
    """In results; in gradients too, but for a NaN in W_hh: a step has no later one where torch
    multiplies nothing by W_hh, and the kernels zeros."""
    monkeypatch.setattr(launch, "variant", "resident" if form == "padded" else "stepwise")
    exact, ours = exact_and_ours(kind, 5, 9)
    input, hx = input_and_hx(kind, ours, 3, 3, 5, batch=3)
    if where == "input":
        put(input, SPECIAL[special])
    elif where == "h_0":
        put((hx[0] if isinstance(hx, tuple) else hx)[0], SPECIAL[special])
    else:
        with torch.no_grad():
            for module in (exact, ours):
                put(module.get_parameter(where), SPECIAL[special])
    expected = run(exact, input.double(), each_state(torch.Tensor.double, hx), prepare=FORMS[form])
    actual = run_on_kernels(ours, input, hx, prepare=FORMS[form])
    for name, value in expected.items():
        result = name in ("output", "h_n", "c_n")
        if result or (special == "nan" and where != "weight_hh_l0"):
            assert torch.equal(actual[name].isnan(), value.isnan()), f"NaN elsewhere in {name}"
            finite = value.isfinite()
            assert torch.equal(actual[name][~finite].isinf(), value[~finite].isinf())
            if finite.any():
                # The tolerance of float32, of numbers in float64.
                assert_close(actual[name].double()[finite], value[finite], name, tolerance=2e-5)
