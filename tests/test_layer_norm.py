"""Layer normalization of GRU and LSTM, beside a loop of torch's layer_norm that is written here.

Random calls under the sanitizers are in native_fuzz.py, which test_native.py runs.
"""

import copy
import io
import itertools
import pickle

import pytest
import torch
from tolerances import (
    assert_close,
    assert_same_bits,
    assert_same_results,
    leaf,
    random,
    random_state,
    run,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import layer_norm, linear
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn.backends import native
from triton_rnn.backends.native import rules

KINDS = ("GRU", "LSTM")
HAS_C = not isinstance(native.library(torch.float32, "lstm_normalized"), str)
# A normalization divides by a deviation, which may be as small as the root of its eps, so that
# rounding grows from step to step where a few units of c are close to each other. Measured over the
# cases here: 2e-14 and 2e-5.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-4}


@pytest.fixture(params=["native", "reference"])
def capable(request):
    """A backend that has layer normalization."""
    if request.param == "native" and not HAS_C:
        pytest.skip("the C loops do not compile here")
    with triton_rnn.use_backend(request.param):
        yield request.param


def normalized(kind, *sizes, dtype=torch.float64, **options):
    """A module whose gains and shifts are not those it starts with."""
    module = getattr(triton_rnn, kind)(*sizes, layer_norm=True, dtype=dtype, **options)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(module.named_parameters()):
            if "_norm_" in name:
                parameter.add_(0.3 * random(*parameter.shape, seed=50 + seed, dtype=dtype))
    return module


def lstm_step(a, h, c, w):
    size = h.size(-1)
    b = layer_norm(linear(h, w["weight_hh"]), (4 * size,), w["weight_norm_hh"])
    i, f, g, o = (a + b + w.get("bias_hh", 0)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    shown = layer_norm(c, (size,), w["weight_norm_c"], w.get("bias_norm_c"))
    return o.sigmoid() * shown.tanh(), c


def gru_step(a, h, c, w):
    size = h.size(-1)
    b = linear(h, w["weight_hh"])
    gain, bias = w["weight_norm_hh"], w.get("bias_hh", h.new_zeros(3 * size))
    rz = layer_norm(b[:, : 2 * size], (2 * size,), gain[: 2 * size]) + bias[: 2 * size]
    n = layer_norm(b[:, 2 * size :], (size,), gain[2 * size :]) + bias[2 * size :]
    r, z = (a[:, : 2 * size] + rz).sigmoid().chunk(2, -1)
    new = torch.tanh(a[:, 2 * size :] + r * n)
    return (1 - z) * new + z * h, c


def input_preacts(kind, x, w):
    a, gain = linear(x, w["weight_ih"]), w["weight_norm_ih"]
    if kind == "LSTM":
        a = layer_norm(a, a.shape[-1:], gain)
    else:
        two = a.size(-1) // 3 * 2
        parts = layer_norm(a[..., :two], (two,), gain[:two])
        a = torch.cat([parts, layer_norm(a[..., two:], (two // 2,), gain[two:])], -1)
    return a + w.get("bias_ih", 0)


def by_hand(module, lengths=None):
    """The module as a plain loop, of a padded batch whose sequences have `lengths`."""
    kind = "LSTM" if isinstance(module, torch.nn.LSTM) else "GRU"
    step = lstm_step if kind == "LSTM" else gru_step
    directions = 2 if module.bidirectional else 1

    def call(x, hx=None):
        x = x.transpose(0, 1) if module.batch_first else x
        steps, batch, _ = x.shape
        zeros = x.new_zeros(module.num_layers * directions, batch, module.hidden_size)
        h_0, c_0 = hx if isinstance(hx, tuple) else (zeros if hx is None else hx, zeros)
        ends = torch.full((batch,), steps) if lengths is None else lengths
        finals = []
        for layer, d in itertools.product(range(module.num_layers), range(directions)):
            tail = f"_l{layer}{'_reverse' if d else ''}"
            w = {n.removesuffix(tail): p for n, p in module.named_parameters() if n.endswith(tail)}
            if d == 0:
                below, sides = x, []
            a = input_preacts(kind, below, w)
            h, c = (state[layer * directions + d] for state in (h_0, c_0))
            outputs = [None] * steps
            for t in range(steps - 1, -1, -1) if d else range(steps):
                runs = (ends > t).unsqueeze(1)
                new = step(a[t], h, c, w)
                outputs[t] = torch.where(runs, new[0], torch.zeros_like(h))
                h, c = (torch.where(runs, *pair) for pair in zip(new, (h, c), strict=True))
            sides.append(torch.stack(outputs))
            finals.append((h, c))
            x = torch.cat(sides, -1)
        h_n, c_n = (torch.stack(states) for states in zip(*finals, strict=True))
        x = x.transpose(0, 1) if module.batch_first else x
        return x, ((h_n, c_n) if kind == "LSTM" else h_n)

    return call


# Steps, batch, input size, hidden size: less than a vector, uneven, whole vectors.
SIZES = [(4, 2, 3, 5), (3, 1, 2, 3), (6, 5, 9, 33), (5, 4, 16, 32)]
FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers both ways": {"num_layers": 2, "bidirectional": True},
    "no bias both ways, batch first": {"bias": False, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_a_plain_loop(capable, kind, dtype, sizes, form):
    steps, batch, input_size, hidden = sizes
    module = normalized(kind, input_size, hidden, dtype=dtype, **FORMS[form])
    shape = (batch, steps) if module.batch_first else (steps, batch)
    x, hx = random(*shape, input_size, dtype=dtype), random_state(module, batch)
    expected = run(module, x, hx, call=by_hand(module))
    assert_same_results(run(module, x, hx), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both ways"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_is_a_padded_one_whose_sequences_end(capable, kind, bidirectional):
    lengths = torch.tensor([3, 6, 1, 4])
    module = normalized(kind, 3, 7, num_layers=2, bidirectional=bidirectional)
    x, hx = random(6, 4, 3), random_state(module, 4)
    hand = by_hand(module, lengths)

    def packed_by_hand(x, hx):
        output, states = hand(x, hx)
        return pack_padded_sequence(output, lengths, enforce_sorted=False), states

    found = run(
        module, x, hx, prepare=lambda x: pack_padded_sequence(x, lengths, enforce_sorted=False)
    )
    expected = run(module, x, hx, call=packed_by_hand)
    assert_same_results(found, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch_and_without_states(capable, kind):
    module = normalized(kind, 3, 7)
    x = random(6, 3)
    expected = run(module, x.unsqueeze(1), call=by_hand(module))
    found = run(module, x)
    for name, value in expected.items():
        value = value.squeeze(1) if found[name].dim() < value.dim() else value
        assert_close(found[name], value, name, TOLERANCES[torch.float64])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_goes_through_the_preactivations_in_pieces(capable, kind):
    module = normalized(kind, 3, 40, bidirectional=True)
    x = random(90, 4, 3)
    expected = run(module, x, call=by_hand(module))
    assert_same_results(run(module, x), expected, TOLERANCES[torch.float64])


@pytest.mark.skipif(not HAS_C, reason="the C loops do not compile here")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_threads_gives_the_same_bits(monkeypatch, kind, packed):
    module = normalized(kind, 19, 75, bidirectional=True, dtype=torch.float32)
    x, hx = random(11, 5, 19, dtype=torch.float32), random_state(module, 5)
    prepare = {}
    if packed:
        prepare = {"prepare": lambda x: pack_padded_sequence(x, [11, 9, 9, 4, 1])}
    results = []
    for threads in (1, 2, 3, 16, 2):
        monkeypatch.setattr(rules, "threads", lambda request, rows, n=threads: n)
        with triton_rnn.use_backend("native"):
            results.append(run(module, x, hx, **prepare))
    for found in results[1:]:
        assert_same_bits(found, results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_finite_differences(capable, kind):
    module = normalized(kind, 2, 3)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *others):
        states, weights = others[: 1 + (kind == "LSTM")], others[1 + (kind == "LSTM") :]
        parameters = dict(zip(names, weights, strict=True))
        hx = states if kind == "LSTM" else states[0]
        output, final = torch.func.functional_call(module, parameters, (x, hx))
        return output, *(final if isinstance(final, tuple) else (final,))

    hx = random_state(module, 2)
    leaves = [random(2, 2, 2), *(hx if isinstance(hx, tuple) else (hx,)), *module.parameters()]
    leaves = [leaf(tensor) for tensor in leaves]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_computed(capable, kind):
    module = normalized(kind, 3, 5)
    kept = {"weight_norm_hh_l0", "weight_ih_l0"}
    expected = run(module, random(4, 2, 3))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in kept)
    found = run(module, random(4, 2, 3))
    for name, _ in module.named_parameters():
        value = found[f"grad of {name}"]
        assert (
            value is None if name not in kept else torch.equal(value, expected[f"grad of {name}"])
        )
    # Gradients of a parameter that torch.nn does not have are reason enough for a backward.
    module.weight_ih_l0.requires_grad_(False)
    module(random(4, 2, 3))[0].sum().backward()
    assert module.weight_norm_hh_l0.grad is not None
    with torch.no_grad():
        assert torch.equal(module(random(4, 2, 3))[0], found["output"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_preactivation_is_normalized_to_zero(capable, kind):
    """A variance of zero: eps alone is divided by, and nothing is infinite."""
    module = normalized(kind, 3, 5)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.zero_()
    x = random(4, 2, 3)
    expected = run(module, x, call=by_hand(module))
    assert all(value.isfinite().all() for value in expected.values())
    assert_same_results(run(module, x), expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("kind", KINDS)
def test_large_means_do_not_cost_the_deviations(capable, kind):
    """Statistics in two passes: preactivations around 100, float32, beside float64."""
    module = normalized(kind, 4, 24, dtype=torch.float32)
    with torch.no_grad():
        module.weight_ih_l0.mul_(0.1).add_(25.0)
    exact = copy.deepcopy(module).double()
    x = torch.ones(3, 2, 4) + 0.01 * random(3, 2, 4, dtype=torch.float32)
    assert_close(module(x)[0].double(), by_hand(exact)(x.double())[0], tolerance=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_in_its_own_sequence(capable, kind):
    module = normalized(kind, 3, 5)
    x = random(4, 3, 3)
    expected = module(x)[0]
    x[2, 1, 0] = float("nan")
    found = module(x)[0]
    assert found[2:, 1].isnan().all()
    others = torch.ones(4, 3, dtype=torch.bool)
    others[2:, 1] = False
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(capable, kind):
    module = normalized(kind, 3, 5)
    output, _ = module(torch.zeros(4, 0, 3, dtype=torch.float64))
    output.sum().backward()
    assert output.shape == (4, 0, 5)
    assert all(parameter.grad.count_nonzero() == 0 for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers_is_torchs(capable, kind):
    module = normalized(kind, 3, 8, num_layers=2, dropout=0.5)
    x = random(4, 2, 3)
    torch.manual_seed(5)
    found = module(x)[0]
    lower, upper = (normalized(kind, size, 8) for size in (3, 8))
    for number, one in enumerate((lower, upper)):
        for name, parameter in one.named_parameters():
            parameter.data = getattr(module, name.replace("l0", f"l{number}")).data
    torch.manual_seed(5)
    between = torch.nn.functional.dropout(by_hand(lower)(x)[0], 0.5)
    assert_close(found, by_hand(upper)(between)[0], tolerance=TOLERANCES[torch.float64])
    assert not torch.equal(module.eval()(x)[0], found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_parameters_come_first_and_start_as_torch_draws_them(kind, form):
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(3, 5, **FORMS[form])
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = getattr(triton_rnn, kind)(3, 5, layer_norm=True, **FORMS[form])
    assert torch.equal(torch.rand(1), after)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert [*state][: len(expected)] == [*expected]
    for name, value in expected.items():
        assert torch.equal(state.pop(name), value)
    gates, per = (3, 2) if kind == "GRU" else (4, 3 + ours.bias)
    assert len(state) == per * ours.num_layers * (1 + ours.bidirectional)
    for name, value in state.items():
        assert value.shape == (5 if "_c_" in name else 5 * gates,)
        assert torch.equal(value, torch.full_like(value, float("bias" not in name)))
    assert ours.all_weights[0][0] is ours.weight_ih_l0

    torch.manual_seed(4)
    theirs.reset_parameters()
    after = torch.rand(1)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(7.0)
    ours.reset_parameters()
    assert torch.equal(torch.rand(1), after)
    for name, value in ours.state_dict().items():
        if name in expected:
            assert torch.equal(value, theirs.state_dict()[name])
        else:
            assert torch.equal(value, torch.full_like(value, float("bias" not in name)))


def test_names_are_those_of_the_documentation():
    names = dict(triton_rnn.LSTM(3, 5, 2, bidirectional=True, layer_norm=True).named_parameters())
    for end in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for kind in ("weight_norm_ih", "weight_norm_hh", "weight_norm_c", "bias_norm_c"):
            assert names.pop(f"{kind}_{end}") is not None
    assert names.keys() == torch.nn.LSTM(3, 5, 2, bidirectional=True).state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_without_it_is_what_it_was(kind):
    plain, theirs = getattr(triton_rnn, kind)(3, 5), getattr(torch.nn, kind)(3, 5)
    assert plain.state_dict().keys() == theirs.state_dict().keys()
    assert vars(plain).keys() == vars(theirs).keys()
    assert repr(plain) == repr(theirs)
    assert type(triton_rnn.restore(plain)) is type(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_state_dicts_have_it(capable, kind):
    module = normalized(kind, 3, 5, num_layers=2, bias=False)
    assert repr(module).endswith("layer_norm=True)")
    x = random(4, 2, 3)
    expected = module(x)[0]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = getattr(triton_rnn, kind)(3, 5, 2, bias=False, layer_norm=True, dtype=torch.float64)
    other.load_state_dict(torch.load(file))
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(same(x)[0], expected)
        same.recompute = False
        assert torch.equal(same(x)[0], expected)
    assert module.float()(x.float())[0].dtype == torch.float32


REFUSED = [
    ("LSTM", {"proj_size": 2}, ValueError, "proj_size"),
    ("LSTM", {"layer_norm": 1}, TypeError, "True or False"),
    ("GRU", {"recompute": True}, ValueError, "recompute"),
    ("GRU", {"num_layers": 2, "residual": True}, ValueError, "residual"),
    ("GRU", {"hidden_size": [4, 5]}, ValueError, "hidden sizes per layer"),
    ("LSTM", {"zoneout": 0.1}, ValueError, "zoneout and clipping"),
    ("LSTM", {"clip_cell": 1.0}, ValueError, "clipping"),
    ("RNN", {}, TypeError, "layer_norm"),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_at_construction(kind, options, error, message):
    arguments = {"input_size": 3, "hidden_size": 5, "layer_norm": True} | options
    with pytest.raises(error, match=message):
        getattr(triton_rnn, kind)(**arguments)


def test_what_does_not_go_together_is_refused_before_anything_runs():
    module = normalized("LSTM", 3, 5)
    with pytest.raises(ValueError, match="recompute does not go together with layer_norm"):
        module.recompute = True
    assert module(random(4, 2, 3))[0].shape == (4, 2, 5)


@pytest.mark.parametrize("name", ["triton", "torchscript", "aten"])
def test_other_backends_are_refused_with_the_reason(name):
    module = normalized("GRU", 3, 5)
    with (
        triton_rnn.use_backend(name),
        pytest.raises(triton_rnn.BackendError, match="know nothing of layer_norm"),
    ):
        module(random(4, 2, 3))


def test_torch_has_no_module_for_it():
    module = normalized("GRU", 3, 5)
    with pytest.raises(RuntimeError, match=r"restore .*, which has no layer_norm"):
        triton_rnn.restore(torch.nn.Sequential(torch.nn.Linear(2, 2), module))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script"):
        torch.jit.script(module)
    assert type(module) is triton_rnn.GRU


def test_autocast_is_refused():
    module = normalized("GRU", 3, 5)
    with (
        torch.autocast("cpu"),
        pytest.raises(triton_rnn.BackendError, match="layer_norm: autocast is on"),
    ):
        module(random(4, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_calls_have_torchs_own_errors(kind):
    module = normalized(kind, 3, 5)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        module(random(4, 2, 4))
    state = random_state(module, 3)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        module(random(4, 2, 3), state)
    module.weight_norm_ih_l0 = torch.nn.Parameter(random(2))
    with pytest.raises(triton_rnn.BackendError, match="out of the ordinary"):
        module(random(4, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_take_the_plain_loops(kind):
    module = normalized(kind, 3, 5)
    x = random(6, 4, 2, 3)
    expected = torch.stack([by_hand(module)(one)[0] for one in x])
    found = torch.func.vmap(lambda one: module(one)[0])(x)
    assert_close(found, expected, tolerance=TOLERANCES[torch.float64])

    def loss(one):
        return module(one)[0].square().sum()

    one = leaf(x[0])
    by_hand(module)(one)[0].square().sum().backward()
    found = torch.func.grad(loss)(x[0])
    assert_close(found, one.grad, tolerance=TOLERANCES[torch.float64])


def test_a_compiled_model_breaks_its_graph_there_and_has_the_same_numbers():
    module = normalized("LSTM", 3, 5)
    x = random(4, 2, 3)
    compiled = torch.compile(lambda x: module(x * 1.0)[0] + 1.0, backend="eager")
    assert torch.equal(compiled(x), module(x)[0] + 1.0)


def test_parametrized_weights_are_heeded(capable):
    module = normalized("LSTM", 3, 5)
    x = random(4, 2, 3)
    doubled = copy.deepcopy(module)
    doubled.weight_norm_hh_l0.data.mul_(2)

    class Double(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(module, "weight_norm_hh_l0", Double())
    assert_close(module(x)[0], doubled(x)[0])


def test_a_stream_is_the_whole_sequence(capable):
    module = normalized("LSTM", 3, 9, dtype=torch.float32)
    x = random(12, 2, 3, dtype=torch.float32)
    stream = triton_rnn.Stream(module)
    found = torch.cat([stream(chunk) for chunk in x.split([1, 5, 2, 4])])
    expected, (h_n, c_n) = module(x)
    if capable == "native":
        assert torch.equal(found, expected)
        assert torch.equal(stream.state[0], h_n)
        assert torch.equal(stream.state[1], c_n)
    assert_close(found, expected, tolerance=TOLERANCES[torch.float32])


def test_training_over_chunks(capable):
    module = normalized("GRU", 3, 5)
    x = random(12, 2, 3)
    stream = triton_rnn.Stream(module)
    losses = []
    for loss, _ in triton_rnn.tbptt(stream, x, x, lambda out, y: out.square().mean(), chunk=4):
        loss.backward()
        losses.append(loss.detach())
    assert_close(torch.stack(losses).mean(), by_hand(module)(x)[0].square().mean())
    assert stream.backend == capable


def test_explanations_and_profiles_know_it(capable):
    module = normalized("LSTM", 3, 5, num_layers=2)
    x = random(4, 2, 3)
    explanation = triton_rnn.explain(module, x)
    assert explanation.backend == capable
    assert explanation.request.extras == ("layer_norm",)
    with triton_rnn.profile() as session:
        module(x)[0].sum().backward()
    assert any("lstm_normalized" in phase.name for phase in session.phases)


def test_auto_takes_the_c_loops_and_says_why_not_the_others():
    explanation = triton_rnn.explain(normalized("GRU", 3, 5), random(4, 2, 3))
    assert explanation.backend == ("native" if HAS_C else "reference")
    assert "know nothing of layer_norm" in explanation.reasons["triton"]


def test_nothing_of_the_callers_is_written_to(capable):
    module = normalized("LSTM", 3, 9, num_layers=2, bidirectional=True)
    x, hx = random(4, 2, 3), random_state(module, 2)
    given = [x, *hx, *module.parameters()]
    before = [tensor.detach().clone() for tensor in given]
    module(x, hx)[0].sum().backward()
    assert all(map(torch.equal, given, before))


def test_whether_a_module_has_it_can_be_read_and_not_be_set():
    for kind in (triton_rnn.GRU, triton_rnn.LSTM):
        for has in (False, True):
            module = kind(3, 4, layer_norm=has)
            assert module.layer_norm is has
            with pytest.raises(AttributeError, match="layer_norm cannot be set"):
                module.layer_norm = not has
