"""Calls beyond torch.nn's: lengths, resets, all states, regularization and clipping.

Compared with packing, with episodes run one by one, and with a loop of steps written here; the
backends among themselves by the random calls of native_fuzz.py too.
"""

import copy
import pickle

import pytest
import torch
from tolerances import LAYERS, assert_close, assert_same_bits, leaf, random, random_state, twins
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import triton_rnn
from triton_rnn import dispatch, episodes, route
from triton_rnn.extras import Extras

STEPS, BATCH, INPUT, HIDDEN = 6, 4, 3, 5
EVERYTHING = {
    "input_dropout": 0.3,
    "recurrent_dropout": 0.4,
    "weight_dropout": 0.2,
    "zoneout": 0.3,
    "clip_hidden": 0.3,
}
LENGTHS = torch.tensor([3, 6, 1, 4])
FORMS = [(1, False, False), (2, True, True), (2, True, False)]


@pytest.fixture(params=["native", "reference"])
def capable(request):
    """A backend that takes extras."""
    with triton_rnn.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["native", "torchscript", "aten", "reference"])
def any_backend(request):
    """One that takes extras, or is given a packed batch of episodes instead."""
    with triton_rnn.use_backend(request.param):
        yield request.param


def pair(kind, layers=1, bidirectional=False, batch_first=False, **options):
    """(torch's module, ours with options and the same weights, an input, a state)."""
    theirs, ours = twins(
        kind,
        INPUT,
        HIDDEN,
        num_layers=layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
    )
    for name, value in options.items():
        setattr(ours, name, value)
    shape = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    return theirs, ours, random(*shape, INPUT), random_state(ours, BATCH)


def tensors_of(returned):
    """All tensors in what a call returned, in order."""
    if isinstance(returned, torch.Tensor):
        return [returned]
    if isinstance(returned, torch.nn.utils.rnn.PackedSequence):
        return [returned.data]
    return [tensor for part in returned for tensor in tensors_of(part)]


def outcome(module, call, input, hx):
    """Every result of `call(input, hx)` and every gradient, by a number."""
    module.zero_grad()
    input = leaf(input)
    states = [leaf(state) for state in tensors_of(hx)]
    results = tensors_of(call(input, tuple(states) if len(states) > 1 else states[0]))
    grads = [random(*result.shape, seed=10 + i) for i, result in enumerate(results)]
    torch.autograd.backward(results, grads)
    found = [result.detach() for result in results]
    found += [leaf_.grad for leaf_ in (input, *states, *module.parameters())]
    return dict(enumerate(found))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        zeros = torch.zeros_like(value if value is not None else actual[name])
        # A gradient of nothing may be none.
        assert_close(
            zeros if actual[name] is None else actual[name],
            zeros if value is None else value,
            str(name),
            tolerance=1e-12,
        )


@pytest.mark.parametrize(("layers", "bidirectional", "batch_first"), FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_give_what_packing_gives(any_backend, kind, layers, bidirectional, batch_first):
    theirs, ours, input, hx = pair(kind, layers, bidirectional, batch_first)

    def packed(input, hx):
        rows = pack_padded_sequence(input, LENGTHS, batch_first, enforce_sorted=False)
        output, states = theirs(rows, hx)
        return pad_packed_sequence(output, batch_first, total_length=STEPS)[0], states

    expected = outcome(theirs, packed, input, hx)
    assert_same(outcome(ours, lambda x, h: ours(x, h, lengths=LENGTHS), input, hx), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_sequence_of_no_steps_keeps_its_state(any_backend, kind):
    _, ours, input, hx = pair(kind, 2, True)
    output, states = ours(input, hx, lengths=torch.tensor([2, 0, 0, 6]))
    assert not output[:, 1:3].any()
    for state, initial in zip(tensors_of(states), tensors_of(hx), strict=True):
        assert torch.equal(state[:, 1:3], initial[:, 1:3])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_the_order_of_a_batch_does_not_matter(any_backend, kind):
    _, ours, input, _ = pair(kind, 1, True)
    order = torch.tensor([2, 0, 3, 1])
    straight = ours(input, lengths=LENGTHS)
    mixed = ours(input[:, order], lengths=LENGTHS[order])
    for one, other in zip(tensors_of(straight), tensors_of(mixed), strict=True):
        assert_close(one[:, order], other)


def test_what_lies_beyond_the_ends_has_no_part_in_anything(any_backend):
    _, ours, input, hx = pair("lstm", 2, True)
    poisoned = input.clone()
    for n, length in enumerate(LENGTHS):
        poisoned[length:, n] = float("nan")
    expected = outcome(ours, lambda x, h: ours(x, h, lengths=LENGTHS), input, hx)
    if any_backend != "reference":
        found = outcome(ours, lambda x, h: ours(x, h, lengths=LENGTHS), poisoned, hx)
        assert_same_bits(found, expected)
    else:
        # The plain loops make steps for all, and take those that count: only gradients mix them.
        for ours_, theirs_ in zip(
            tensors_of(ours(poisoned, hx, lengths=LENGTHS)),
            tensors_of(ours(input, hx, lengths=LENGTHS)),
            strict=True,
        ):
            assert torch.equal(ours_, theirs_)


def by_episodes(theirs, mask, reset_to, lengths):
    """A call that runs every episode by itself, with torch's module of one layer."""

    def call(input, hx):
        states = list(hx) if isinstance(hx, tuple) else [hx]
        directions = 2 if theirs.bidirectional else 1
        outputs, finals = [], []
        for n in range(BATCH):
            end = int(lengths[n])
            cuts = [t for t in range(1, end) if mask[t, n]]
            bounds = list(zip([0, *cuts], [*cuts, end], strict=True))
            rows = torch.zeros(STEPS, 0)
            own = [state[:, n : n + 1] for state in states]
            fresh = own if reset_to == "initial" else [torch.zeros_like(state) for state in own]
            parts, first, last = [], None, None
            for index, (begin, stop) in enumerate(bounds):
                start = []
                for given, new in zip(own, fresh, strict=True):
                    forward = given if index == 0 and not mask[0, n] else new
                    reverse = given if index == len(bounds) - 1 else new
                    start.append(torch.cat([forward[:1], reverse[1:]]))
                hx_ = tuple(start) if len(start) > 1 else start[0]
                output, final = theirs(input[begin:stop, n : n + 1], hx_)
                final = list(final) if isinstance(final, tuple) else [final]
                parts.append(output)
                first = final if first is None else first
                last = final
            rows = torch.cat(parts)
            rows = torch.cat([rows, rows.new_zeros(STEPS - end, 1, rows.size(-1))])
            outputs.append(rows)
            finals.append(
                [
                    torch.cat([b[:1], a[1:]] if directions == 2 else [b])
                    for a, b in zip(first, last, strict=True)
                ]
            )
        ends = [torch.cat(each, 1) for each in zip(*finals, strict=True)]
        return torch.cat(outputs, 1), tuple(ends)

    return call


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both_ways"])
@pytest.mark.parametrize("reset_to", ["zeros", "initial"])
@pytest.mark.parametrize("kind", LAYERS)
def test_resets_give_what_each_episode_gives_by_itself(
    any_backend, kind, reset_to, bidirectional, lengths
):
    theirs, ours, input, hx = pair(kind, 1, bidirectional)
    mask = random(STEPS, BATCH, seed=4) > 0.5
    mask[0] = torch.tensor([True, False, False, True])
    ends = torch.full((BATCH,), STEPS) if lengths is None else lengths
    expected = outcome(theirs, by_episodes(theirs, mask, reset_to, ends), input, hx)

    def call(input, hx):
        return ours(input, hx, lengths=lengths, reset_mask=mask, reset_to=reset_to)

    assert_same(outcome(ours, call, input, hx), expected)


def by_steps(module, options, masks, training):
    """One layer, one direction, step by step: every option, with masks that were drawn before."""

    def call(input, hx):
        states = list(hx) if isinstance(hx, tuple) else [hx]
        h, c = states[0][0], states[1][0] if len(states) == 2 else None
        weights = [getattr(module, name) for name in module._flat_weights_names]
        w_ih, w_hh, b_ih, b_hh, *w_hr = weights
        outputs = []
        for t in range(STEPS):
            x, masked, w = input[t], h, w_hh
            if training:
                x, masked, w = x * masks["x"], h * masks["h"], w_hh * masks["w"]
            a, b = linear(x, w_ih, b_ih), linear(masked, w, b_hh)
            new_c = c
            if module.mode == "GRU":
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                r, z = torch.sigmoid(ar + br), torch.sigmoid(az + bz)
                new = (1 - z) * torch.tanh(an + r * bn) + z * h
            elif module.mode == "LSTM":
                i, f, g, o = (a + b).chunk(4, 1)
                new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                new_c = new_c.clamp(-options["clip_cell"], options["clip_cell"])
                new = torch.sigmoid(o) * torch.tanh(new_c)
                new = linear(new, w_hr[0]) if w_hr else new
            else:
                new = torch.tanh(a + b) if module.mode == "RNN_TANH" else torch.relu(a + b)
            new = new.clamp(-options["clip_hidden"], options["clip_hidden"])
            if training:
                kept = [masks["zh"][t], masks["zc"][t] if c is not None else None]
            else:
                kept = [options["zoneout"]] * 2
            h = new * (1.0 - kept[0]) + h * kept[0]
            if c is not None:
                c = new_c * (1.0 - kept[1]) + c * kept[1]
            outputs.append(h)
        ends = [h.unsqueeze(0)] + ([] if c is None else [c.unsqueeze(0)])
        return torch.stack(outputs), tuple(ends)

    return call


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", LAYERS)
def test_options_are_those_of_a_loop_of_steps(capable, kind, training):
    options = EVERYTHING | ({"clip_cell": 0.25} if "lstm" in kind else {})
    _, ours, input, hx = pair(kind, **options)
    ours.train(training)
    size, double = ours.proj_size or HIDDEN, torch.float64
    torch.manual_seed(5)
    masks = {}
    if training:
        masks["x"] = dropout(torch.ones(BATCH, INPUT, dtype=double), 0.3)
        masks["w"] = dropout(torch.ones_like(ours.weight_hh_l0), 0.2)
        masks["h"] = dropout(torch.ones(1, BATCH, size, dtype=double), 0.4)[0]
        masks["zh"] = torch.empty(STEPS, BATCH, size, dtype=torch.bool).bernoulli_(0.3).double()
        if "lstm" in kind:
            shape = (STEPS, BATCH, HIDDEN)
            masks["zc"] = torch.empty(shape, dtype=torch.bool).bernoulli_(0.3).double()
    expected = outcome(ours, by_steps(ours, options, masks, training), input, hx)
    torch.manual_seed(5)
    assert_same(outcome(ours, ours, input, hx), expected)


@pytest.mark.parametrize(("layers", "bidirectional", "batch_first"), FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_everything_at_once_is_one_on_both_backends(kind, layers, bidirectional, batch_first):
    options = EVERYTHING | ({"clip_cell": 0.25, "zoneout": (0.3, 0.2)} if "lstm" in kind else {})
    _, ours, input, hx = pair(kind, layers, bidirectional, batch_first, **options)
    mask = random(*input.shape[:2], seed=4) > 0.5
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(6)
        with triton_rnn.use_backend(backend):
            found.append(
                outcome(
                    ours,
                    lambda x, h: ours(
                        x,
                        h,
                        lengths=torch.tensor([3, 0, 6, 2]),
                        reset_mask=mask,
                        reset_to="initial",
                        all_states=True,
                    ),
                    input,
                    hx,
                )
            )
    assert_same(*found)


@pytest.mark.parametrize("backend", ["torchscript", "aten"])
@pytest.mark.parametrize(("layers", "bidirectional", "batch_first"), FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_done_around_the_loops_is_one_with_what_they_do(
    backend, kind, layers, bidirectional, batch_first
):
    """The same masks, too, of the batch as it was given."""
    options = {"input_dropout": 0.3, "weight_dropout": 0.2, "dropout": 0.4 * (layers > 1)}
    _, ours, input, hx = pair(kind, layers, bidirectional, batch_first, **options)
    mask = random(*input.shape[:2], seed=4) > 0.5
    more = {"lengths": torch.tensor([3, 0, 6, 2]), "reset_mask": mask, "reset_to": "initial"}
    if "lstm" not in kind:
        more["all_states"] = True
    found = []
    for name in ("native", backend):
        torch.manual_seed(6)
        with triton_rnn.use_backend(name):
            found.append(outcome(ours, lambda x, h: ours(x, h, **more), input, hx))
    assert_same(*found)


@pytest.mark.parametrize("backend", ["torchscript", "aten"])
@pytest.mark.parametrize("form", ["packed", "unbatched", "alone", "without a state"])
def test_other_forms_of_a_call_are_done_around_the_loops_too(backend, form):
    _, ours, input, _ = pair("gru", 2, True, input_dropout=0.3, weight_dropout=0.2)
    more = {"reset_mask": torch.tensor([[0, 1, 0, 0, 0, 1]]).t().bool()}
    if form == "packed":
        input, more = pack_padded_sequence(input, LENGTHS, enforce_sorted=False), {}
    elif form == "unbatched":
        input, more = input[:, 0], {"reset_mask": more["reset_mask"][:, 0]}
    elif form == "alone":
        input = input[:, :1]
    else:
        more = {"reset_mask": more["reset_mask"].expand(STEPS, BATCH), "reset_to": "initial"}
    found = []
    for name in ("native", backend):
        torch.manual_seed(6)
        with triton_rnn.use_backend(name):
            found.append(tensors_of(ours(input, **more)))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, tolerance=1e-12)


def test_a_batch_without_a_step_is_all_zeros_and_the_states_it_was_given(any_backend):
    _, ours, input, hx = pair("lstm", 2, True)
    output, states = ours(input, hx, lengths=torch.zeros(BATCH, dtype=torch.int64))
    assert output.shape == (STEPS, BATCH, 2 * HIDDEN)
    assert not output.any()
    assert all(map(torch.equal, states, hx))


def test_episodes_run_side_by_side_where_loops_do_not_know_of_resets(monkeypatch):
    """As long as the longest one, with the same results in either layout of memory."""
    _, ours, input, hx = pair("gru", batch_first=True)
    mask = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    mask[:, 2::2] = True
    given = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *args: given.append(args[0]) or choose(*args))
    with triton_rnn.use_backend("torchscript"):
        one = ours(input, hx, reset_mask=mask)
        other = ours(input.transpose(0, 1).contiguous().transpose(0, 1), hx, reset_mask=mask)
        told = triton_rnn.explain(ours, input, hx, reset_mask=mask)
    assert [(each.seq_len, each.batch, each.packed) for each in given] == [(2, 12, True)] * 3
    assert all(map(torch.equal, one, other))
    assert told.backend == "torchscript"
    assert told.request.extras == ("reset_mask",)
    assert "12 episodes side by side, the longest of 2 steps" in str(told)


def test_what_says_where_episodes_lie_goes_to_the_inputs_device():
    """By one copy, of which the parts have their shapes and dtypes again."""
    mask = random(STEPS, BATCH, seed=4) > 0.5
    given = STEPS, BATCH, Extras(torch.tensor([3, 0, 6, 2]), mask)
    here = episodes.episodes_of(*given, torch.device("cpu"))
    there = episodes.episodes_of(*given, torch.device("meta"))
    for name, part in here._asdict().items():
        other = getattr(there, name)
        if isinstance(part, torch.Tensor):
            assert other.is_meta
            assert (other.shape, other.dtype) == (part.shape, part.dtype), name
        else:
            assert other == part


def test_a_cuda_graph_that_would_keep_the_episodes_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        episodes.episodes_of(STEPS, BATCH, Extras(LENGTHS), torch.device("cuda"))


@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_proj"])
def test_a_packed_batch_takes_options(kind):
    _, ours, input, hx = pair(kind, 2, True, **EVERYTHING)
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(6)

        def call(input, hx):
            rows = pack_padded_sequence(input, LENGTHS, enforce_sorted=False)
            return ours(rows, hx, all_states=True)

        with triton_rnn.use_backend(backend):
            found.append(outcome(ours, call, input, hx))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_proj"])
def test_all_states_are_those_after_each_step(capable, kind):
    theirs, ours, input, hx = pair(kind, 2)
    output, _, every = ours(input, hx, all_states=True)
    assert torch.equal(every.outputs[-1], output)
    assert len(every.outputs) == 2
    assert len(every.cells) == (2 if "lstm" in kind else 0)
    for t in range(STEPS):
        _, states = theirs(input[: t + 1], hx)
        h, *c = states if isinstance(states, tuple) else (states,)
        for number in range(2):
            assert_close(every.outputs[number][t], h[number])
            if c:
                assert_close(every.cells[number][t], c[0][number])


@pytest.mark.parametrize("kind", LAYERS)
def test_first_and_second_derivatives_are_those_of_finite_differences(capable, kind):
    # Clipping has corners, which finite differences may step over.
    _, ours, input, hx = pair(kind, **{**EVERYTHING, "clip_hidden": None})
    mask = random(STEPS, BATCH, seed=4) > 0.7

    def function(input, *states):
        torch.manual_seed(7)
        hx = states if len(states) == 2 else states[0]
        extras = {"lengths": LENGTHS, "reset_mask": mask, "reset_to": "initial"}
        return tuple(tensors_of(ours(input, hx, all_states=True, **extras)))

    leaves = [leaf(input), *(leaf(state) for state in tensors_of(hx))]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_a_seed_repeats_a_call_and_evaluation_draws_nothing(capable):
    _, ours, input, _ = pair("lstm", 2, True, **EVERYTHING)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(input)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    ours.eval()
    before = torch.get_rng_state()
    ours(input)
    assert torch.equal(before, torch.get_rng_state())


REFUSED = {
    "packed": ({"lengths": LENGTHS}, ValueError, "has lengths already"),
    "a list": ({"lengths": [1, 2, 3, 4]}, TypeError, "should be a Tensor"),
    "int32": ({"lengths": LENGTHS.int()}, ValueError, "int64"),
    "too few": ({"lengths": LENGTHS[1:]}, ValueError, r"shape \(4,\)"),
    "too long": ({"lengths": LENGTHS + 1}, ValueError, "from 0 to 6, got 2 to 7"),
    "negative": ({"lengths": LENGTHS - 2}, ValueError, "from 0 to 6, got -1 to 4"),
    "no bool": ({"reset_mask": torch.zeros(STEPS, BATCH)}, ValueError, "should be bool"),
    "turned": ({"reset_mask": torch.zeros(BATCH, STEPS).bool()}, ValueError, r"shape \(6, 4\)"),
    "no such start": (
        {"reset_mask": torch.zeros(STEPS, BATCH).bool(), "reset_to": "ones"},
        ValueError,
        "reset_to should be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case):
    _, ours, input, _ = pair("gru")
    arguments, kind, message = REFUSED[case]
    if case == "packed":
        input = pack_padded_sequence(input, LENGTHS, enforce_sorted=False)
    with pytest.raises(kind, match=message):
        ours(input, **arguments)


@pytest.mark.parametrize("backend_name", ["torchscript", "aten"])
def test_a_backend_that_cannot_is_refused_with_the_reason(backend_name):
    _, ours, input, _ = pair("gru", zoneout=0.1)
    with (
        triton_rnn.use_backend(backend_name),
        pytest.raises(triton_rnn.BackendError, match="know nothing of zoneout"),
    ):
        ours(input, lengths=LENGTHS)
    _, ours, input, _ = pair("lstm")
    with (
        triton_rnn.use_backend(backend_name),
        pytest.raises(triton_rnn.BackendError, match="know nothing of all_states"),
    ):
        ours(input, all_states=True)


def test_autocast_is_refused_with_the_reason():
    _, ours, input, _ = pair("gru")
    with (
        torch.autocast("cpu"),
        pytest.raises(triton_rnn.BackendError, match="lengths: autocast is on"),
    ):
        ours(input, lengths=LENGTHS)


def test_a_malformed_input_has_torchs_own_error():
    _, ours, input, _ = pair("gru")
    with pytest.raises(RuntimeError, match=r"input\.size"):
        ours(input[..., 1:], lengths=LENGTHS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gru", {"zoneout": 1.5}),
        ("gru", {"zoneout": (0.1, 0.1)}),
        ("gru", {"clip_cell": 1.0}),
        ("lstm", {"clip_hidden": -1.0}),
        ("lstm", {"input_dropout": [0.1, 0.2]}),
        ("lstm", {"recurrent_dropout": True}),
        # Equal to 0, and no numbers, or no bounds.
        ("lstm", {"clip_hidden": 0}),
        ("lstm", {"clip_cell": 0.0}),
        ("lstm", {"clip_cell": False}),
        ("gru", {"zoneout": False}),
        ("gru", {"weight_dropout": None}),
    ],
)
def test_options_that_a_module_cannot_have_are_refused(kind, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(triton_rnn, LAYERS[kind][0])(INPUT, HIDDEN, **options)


def test_options_are_no_state_and_are_carried_by_copies_and_pickles():
    module = triton_rnn.LSTM(INPUT, HIDDEN, zoneout=(0.1, 0.2), weight_dropout=0.5)
    assert module.state_dict().keys() == torch.nn.LSTM(INPUT, HIDDEN).state_dict().keys()
    assert repr(module) == "LSTM(3, 5, weight_dropout=0.5, zoneout=(0.1, 0.2))"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.zoneout == (0.1, 0.2)
    module.zoneout, module.weight_dropout = 0.0, 0.0
    assert repr(module) == "LSTM(3, 5)"
    assert "_options" not in vars(module)


def test_a_replaced_module_has_options_and_does_not_lose_them_silently():
    module = triton_rnn.replace(torch.nn.GRU(INPUT, HIDDEN))
    module.zoneout = 0.1
    with pytest.raises(RuntimeError, match="no zoneout"):
        triton_rnn.restore(module)
    with pytest.raises(RuntimeError, match="no zoneout"):
        torch.jit.script(module)
    assert type(module) is triton_rnn.GRU
    module.zoneout = 0.0
    assert type(triton_rnn.restore(module)) is torch.nn.GRU


def test_a_transform_takes_the_plain_loops():
    _, ours, input, _ = pair("gru")

    def loss(input):
        return ours(input, lengths=LENGTHS)[0].square().sum()

    found = torch.func.grad(loss)(input)
    input = leaf(input)
    loss(input).backward()
    assert_close(found, input.grad)


def test_a_compiled_model_breaks_its_graph_there_and_has_the_same_numbers():
    _, ours, input, _ = pair("gru")
    expected = ours(input, lengths=LENGTHS)
    compiled = torch.compile(lambda x: ours(x * 1.0, lengths=LENGTHS), backend="eager")
    for one, other in zip(compiled(input), expected, strict=True):
        assert torch.equal(one, other)


def test_nothing_of_the_callers_is_written_to(capable):
    _, ours, input, hx = pair("lstm", 2, True, **EVERYTHING)
    mask = random(STEPS, BATCH, seed=4) > 0.5
    given = [input, *hx, LENGTHS, mask, *ours.parameters()]
    before = [tensor.detach().clone() for tensor in given]
    output, _ = ours(input, hx, lengths=LENGTHS, reset_mask=mask)
    output.sum().backward()
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize(
    ("size", "dtype", "backend"),
    [(1100, torch.float32, "native"), (6, torch.bfloat16, "reference")],
)
def test_explain_tells_of_a_modules_options(monkeypatch, size, dtype, backend):
    """It says what then runs."""
    module = triton_rnn.GRU(6, size, zoneout=0.1, dtype=dtype)
    input = torch.zeros(3, 2, 6, dtype=dtype)
    found = triton_rnn.explain(module, input)
    ran = []
    choose = route.choose
    monkeypatch.setattr(route, "choose", lambda request: ran.append(choose(request)) or ran[-1])
    module(input)
    assert found.backend == ran[0].backend == backend
    assert "zoneout" in found.request.extras


def test_explain_refuses_what_a_call_with_options_refuses():
    module = triton_rnn.GRU(6, 5, zoneout=0.1)
    input = torch.zeros(3, 2, 6)
    with triton_rnn.use_backend("torchscript"):
        with pytest.raises(triton_rnn.BackendError):
            module(input)
        with pytest.raises(triton_rnn.BackendError):
            triton_rnn.explain(module, input)


@pytest.mark.parametrize(
    "more",
    [
        {"lengths": torch.tensor([3, 1])},
        {"reset_mask": torch.zeros(3, 2, dtype=torch.bool), "reset_to": "initial"},
        {"all_states": True},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("size", [6, 1100])
def test_explain_tells_of_a_call_with_more(monkeypatch, more, size):
    """It says what then runs, for which torch.nn's own limits of size do not count."""
    module = triton_rnn.GRU(6, size, num_layers=2)
    input = torch.zeros(3, 2, 6)
    found = triton_rnn.explain(module, input, **more)
    ran = []
    choose = route.choose
    monkeypatch.setattr(route, "choose", lambda request: ran.append(choose(request)) or ran[-1])
    module(input, **more)
    assert found.backend == ran[0].backend == "native"
    assert found.request.extras == (next(iter(more)),)


def test_explain_refuses_what_a_call_with_more_refuses():
    module, input = triton_rnn.GRU(6, 5), torch.zeros(3, 2, 6)
    for more in ({"lengths": torch.tensor([4, 1])}, {"all_states": True, "reset_to": "one"}):
        with pytest.raises(ValueError) as refused:
            module(input, **more)
        with pytest.raises(ValueError) as told:
            triton_rnn.explain(module, input, **more)
        assert str(told.value) == str(refused.value)
    with pytest.raises(TypeError, match="GRUCell takes no lengths"):
        triton_rnn.explain(triton_rnn.GRUCell(6, 5), input[0], lengths=torch.tensor([3]))


@pytest.mark.parametrize("backend", ["native", "torchscript", "reference"])
@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm", "lstm_proj"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_beyond_an_end_has_no_part_in_anything(number, kind, backend):
    """Nor in any gradient, the second one included, whatever it is."""
    _, module = twins(kind, 3, 4, 2, bidirectional=True)
    lengths, found = torch.tensor([5, 3]), []
    for padding in (0.0, number):
        input = random(5, 2, 3)
        input[3:, 1] = padding
        input.requires_grad_()
        with triton_rnn.use_backend(backend):
            output, state = module(input, lengths=lengths)
            loss = output.square().sum() + flat_sum(state)
            arguments = [input, *module.parameters()]
            first = torch.autograd.grad(loss, arguments, retain_graph=True)
            (slope,) = torch.autograd.grad(loss, input, create_graph=True)
            second = torch.autograd.grad(slope.square().sum(), arguments, allow_unused=True)
        found.append([output, *first, *(part for part in second if part is not None)])
    assert len(found[0]) > len(list(module.parameters()))
    for actual, expected in zip(*found[::-1], strict=True):
        assert_close(actual, expected)


def flat_sum(state):
    return sum(part.sum() for part in (state if isinstance(state, tuple) else (state,)))


@pytest.mark.parametrize("arguments", [{}, {"all_states": True}, {"lengths": LENGTHS}])
def test_no_other_word_for_the_state_of_an_episode_is_taken(arguments):
    module = triton_rnn.GRU(INPUT, 5)
    with pytest.raises(ValueError, match="'zeros' or 'initial', got 'hx'"):
        module(torch.randn(STEPS, BATCH, INPUT), reset_to="hx", **arguments)
    with pytest.raises(ValueError, match="'zeros' or 'initial', got 'hx'"):
        triton_rnn.IndRNN(INPUT, 5)(torch.randn(STEPS, BATCH, INPUT), reset_to="hx")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zoneout_takes_an_empty_batch(backend):
    for kind in (triton_rnn.GRU, triton_rnn.LSTM):
        module = kind(4, 5, zoneout=0.1, bidirectional=True)
        input = torch.randn(6, 0, 4, requires_grad=True)
        with triton_rnn.use_backend(backend):
            output, _ = module(input)
            assert output.shape == (6, 0, 10)
            (slope,) = torch.autograd.grad(output.sum(), input, create_graph=True)
        assert slope.shape == input.shape
