"""recompute=True: the same numbers from less memory."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tolerances import LAYERS, assert_close, leaf, random, random_state, twins
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from triton_rnn.backends.native import rules

FORMS = ("time_first", "batch_first", "unbatched", "packed", "packed_evenly")


def results_of(module, form, wanted, given_state=True):
    module.recompute = wanted
    module.zero_grad()
    torch.manual_seed(3)
    shapes = {"batch_first": (3, 11, 5), "unbatched": (11, 5)}
    input = leaf(random(*shapes.get(form, (11, 3, 5))))
    hx = random_state(module, None if form == "unbatched" else 3)
    states = [leaf(state) for state in (hx if isinstance(hx, tuple) else (hx,))]
    sent = input
    if form.startswith("packed"):
        lengths = [11, 11, 11] if form == "packed_evenly" else [4, 11, 6]
        sent = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False)
    arguments = (tuple(states) if len(states) == 2 else states[0],) if given_state else ()
    output, finals = module(sent, *arguments)
    if isinstance(output, PackedSequence):
        output = output.data
    finals = finals if isinstance(finals, tuple) else (finals,)
    loss = sum((out * random(*out.shape, seed=7)).sum() for out in (output, *finals))
    loss.backward()
    exact = {"output": output, "finals": torch.cat(finals, -1), "grad of input": input.grad}
    for number, state in enumerate(states if given_state else ()):
        exact[f"grad of state {number}"] = state.grad
    return exact, {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputing_gives_the_same_numbers(kind, form, bidirectional):
    """On native the same bits, but for the sums of the weights' gradients over segments."""
    _, module = twins(
        kind, 5, 7, num_layers=2, bidirectional=bidirectional, batch_first=form == "batch_first"
    )
    with triton_rnn.use_backend("native"):
        exact, weights = results_of(module, form, False)
        for wanted in (True, 5):
            ours, ours_weights = results_of(module, form, wanted)
            for name, expected in exact.items():
                if bidirectional and name.startswith("grad"):
                    # An input's is of both directions, here added after each has gone its way.
                    assert_close(ours[name], expected, name)
                else:
                    assert torch.equal(ours[name], expected), name
            for name, expected in weights.items():
                assert_close(ours_weights[name], expected, name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_backend_recomputes(backend, kind, form):
    _, module = twins(kind, 5, 7, bidirectional=True, batch_first=form == "batch_first")
    exact, weights = results_of(module, form, False, given_state=False)
    ours, ours_weights = results_of(module, form, 4, given_state=False)
    for name, expected in {**exact, **weights}.items():
        assert_close({**ours, **ours_weights}[name], expected, name)


@pytest.mark.parametrize("kind", LAYERS)
def test_derivatives_are_those_of_finite_differences(backend, kind):
    _, module = twins(kind, 2, 3)
    module.recompute = 2
    input, hx = random(5, 2, 2), random_state(module, 2)
    leaves = [leaf(tensor) for tensor in (input, *(hx if isinstance(hx, tuple) else (hx,)))]

    def function(input, *states):
        output, finals = module(input, states if len(states) == 2 else states[0])
        return (output, *(finals if isinstance(finals, tuple) else (finals,)))

    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_dropout_between_layers_is_drawn_once():
    _, module = twins("gru", 5, 7, num_layers=2, dropout=0.5)
    exact, _ = results_of(module, "time_first", False)
    ours, _ = results_of(module, "time_first", 4)
    for name, expected in exact.items():
        assert_close(ours[name], expected, name)


def test_only_what_needs_a_gradient_gets_one():
    _, module = twins("lstm", 5, 7)
    module.recompute = True
    module.weight_hh_l0.requires_grad_(False)
    module(random(11, 3, 5))[0].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None


def test_torchs_own_kernels_and_transforms_are_refused_with_a_reason():
    _, module = twins("gru", 5, 7)
    module.recompute = True
    input = random(11, 3, 5)
    with (
        triton_rnn.use_backend("aten"),
        pytest.raises(triton_rnn.BackendError, match="keep to themselves"),
    ):
        module(input)
    with torch.autocast("cpu"), pytest.raises(triton_rnn.BackendError, match="autocast is on"):
        module(input)


def test_a_malformed_call_has_torchs_error():
    theirs, ours = twins("gru", 5, 7)
    ours.recompute = True
    with pytest.raises(RuntimeError) as expected:
        theirs(random(11, 3, 6))
    with pytest.raises(RuntimeError) as actual:
        ours(random(11, 3, 6))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("wanted", [0, -1, 2.0, None, "yes"], ids=repr)
def test_a_number_of_steps_that_is_none_is_refused(wanted):
    with pytest.raises(ValueError, match="recompute is True, False or a number"):
        triton_rnn.GRU(5, 7, recompute=wanted)


def test_the_keyword_shows_only_where_it_is_set_and_travels_with_the_module():
    assert repr(triton_rnn.GRU(5, 7)) == repr(torch.nn.GRU(5, 7))
    module = triton_rnn.GRU(5, 7, recompute=8)
    assert repr(module) == "GRU(5, 7, recompute=8)"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.recompute == 8
    assert triton_rnn.GRU(5, 7, recompute=True).state_dict().keys() == (
        torch.nn.GRU(5, 7).state_dict().keys()
    )


def test_a_module_that_torch_made_can_be_told_to_recompute():
    module = triton_rnn.replace(torch.nn.GRU(5, 7))
    assert module.recompute is False
    module.recompute = True
    assert module(random(4, 2, 5).float())[0].shape == (4, 2, 7)
    assert triton_rnn.restore(module)(random(4, 2, 5).float())[0].shape == (4, 2, 7)


# Of the process's own memory: getrusage's high-water mark begins with that of the process that
# started it.
PEAK = """
import pathlib, sys, torch, triton_rnn
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(1)
module = triton_rnn.LSTM(64, 64)
module(torch.randn(8, 2, 64))[0].sum().backward()
module.recompute = sys.argv[1] == "True"
input = torch.randn(4000, 16, 64)
before = peak()
with triton_rnn.use_backend("native"):
    module(input)[0].sum().backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process's memory")
def test_recomputing_takes_a_third_of_the_memory_beside_the_output():
    """The growth of the resident peak in processes of their own, in KiB. Both have the output."""
    grown = [
        int(subprocess.run([sys.executable, "-c", PEAK, wanted], check=True, text=True,
                           stdout=subprocess.PIPE).stdout)
        for wanted in ("False", "True")
    ]  # fmt: skip
    output = 4000 * 16 * 64 * 4 // 1024
    assert 3 * (grown[1] - output) < grown[0] - output, grown


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
def test_a_batch_of_no_sequences_is_served_as_torchs(backend, bidirectional):
    theirs, ours = twins("lstm", 5, 7, bidirectional=bidirectional)
    ours.recompute = 3
    output, _ = ours(random(11, 0, 5))
    assert output.shape == theirs(random(11, 0, 5))[0].shape
    output.sum().backward()
    assert not ours.weight_hh_l0.grad.any()


@pytest.mark.parametrize("cut", ["rows", "size"])
def test_a_cell_state_that_torch_would_read_beyond_is_refused(cut):
    """Of a packed batch torch checks h_0 alone."""
    _, module = twins("lstm", 5, 7)
    module.recompute = True
    sent = pack_padded_sequence(random(6, 3, 5), torch.tensor([6, 4, 1]))
    c_0 = random(1, 1, 7) if cut == "rows" else random(1, 3, 1)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 7\)"):
        module(sent, (random(1, 3, 7), c_0))


def test_explain_names_the_backend_that_recomputes():
    """Few steps of a large layer `auto` leaves to torch's kernels, which cannot."""
    module = triton_rnn.GRU(5, rules.HIDDEN[True] + 1, recompute=True)
    input = torch.zeros(2, 3, 5)
    found = triton_rnn.explain(module, input)
    assert found.backend == "native" and "native" not in found.reasons
    assert "keep to themselves" in found.reasons["aten"]
    assert found.plan[-1].startswith("in segments of 2 steps")
    with torch.no_grad():
        assert triton_rnn.explain(module, input).backend == "aten"
    with torch.autocast("cpu"), pytest.raises(triton_rnn.BackendError, match="autocast is on"):
        triton_rnn.explain(module, input)


def test_a_stream_of_a_module_that_recomputes_begins_where_that_can_run():
    module = triton_rnn.LSTM(64, 512, recompute=True).bfloat16()
    stream = triton_rnn.Stream(module)
    stream(torch.zeros(5, 2, 64, dtype=torch.bfloat16))
    assert stream.backend == "torchscript"


def test_what_a_users_subclass_calls_by_the_keywords_names_stays_its_own():
    class Named(torch.nn.GRU):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.recompute = "never"
            self.residual = torch.nn.Linear(7, 7)

    module = triton_rnn.replace(Named(5, 7))
    assert module.recompute == "never" and isinstance(module.residual, torch.nn.Linear)
    assert module(random(4, 2, 5).float())[0].shape == (4, 2, 7)
    assert "recompute" not in repr(module).splitlines()[1]


@pytest.mark.parametrize("single", [False, True], ids=["steps", "one step"])
@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_hh_l0", "weight_hh_l0"])
def test_a_weight_that_was_changed_before_the_backward_is_told(name, single):
    """Going forward again reads all that going forward read."""
    module = triton_rnn.GRU(3, 4, recompute=True)
    output, _ = module(random(1 if single else 6, 2, 3).float())
    with torch.no_grad():
        getattr(module, name).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_may_be_changed_in_place(kind):
    _, ours = twins(kind, 3, 4, 2, bidirectional=True)
    input = random(6, 2, 3)
    found = []
    for recompute in (False, True):
        ours.recompute = recompute
        ours.zero_grad()
        output, _ = ours(input)
        output.relu_().sum().backward()
        found.append([output.detach(), *(weight.grad.clone() for weight in ours.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
