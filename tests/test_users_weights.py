"""What a module multiplies by is what torch.nn's would, whatever users have done to its weights.

And what a backward is given is what was saved, whatever hooks of saved tensors return.
"""

import gc
import weakref

import pytest
import torch
from tolerances import assert_close, random, twins
from torch.nn.functional import dropout

import triton_rnn

X = random(6, 2, 3)
CELLS = {
    "rnn": (torch.nn.RNNCell, triton_rnn.RNNCell),
    "gru": (torch.nn.GRUCell, triton_rnn.GRUCell),
    "lstm": (torch.nn.LSTMCell, triton_rnn.LSTMCell),
}


def first(result):
    return result[0] if isinstance(result, tuple) else result


def assert_same_calls(ours, theirs, x, others=()):
    """Of several calls, so that the last ones are known; and their gradients."""
    wanted = [*(p for p in ours.parameters() if p.requires_grad), *others]
    theirs_wanted = [*(p for p in theirs.parameters() if p.requires_grad), *others]
    for _ in range(3):
        with torch.no_grad():
            assert_close(first(ours(x)), first(theirs(x)))
        if wanted:
            found = torch.autograd.grad(first(ours(x)).square().sum(), wanted, allow_unused=True)
            expected = torch.autograd.grad(
                first(theirs(x)).square().sum(), theirs_wanted, allow_unused=True
            )
            for actual, right in zip(found, expected, strict=True):
                assert (actual is None) == (right is None)
                if right is not None:
                    assert_close(actual, right)


def cells(kind, **options):
    theirs, ours = (each(3, 4, dtype=torch.float64, **options) for each in CELLS[kind])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_adds_the_one_bias_that_is_left(kind, gone, frozen):
    theirs, ours = cells(kind)
    for module in (theirs, ours):
        setattr(module, gone, None)
        module.requires_grad_(not frozen)
    assert_same_calls(ours, theirs, X[0])


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_without_an_attribute_for_a_bias_raises_as_torchs(kind):
    theirs, ours = cells(kind)
    for module in (theirs, ours):
        del module.bias_ih, module.bias_hh
        with pytest.raises(AttributeError):
            module(X[0])


def hide(module, name, value, emptied):
    """Under the name of a parameter an attribute that hides it."""
    if emptied:
        module._parameters[name] = None
    object.__setattr__(module, name, value)


@pytest.mark.parametrize("emptied", [False, True], ids=["parameter_there", "parameter_none"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["weight_hh", "bias_ih"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", *CELLS])
def test_an_attribute_hides_a_parameter_of_its_name(kind, name, frozen, emptied):
    if kind in CELLS:
        theirs, ours = cells(kind)
        x = X[0]
    else:
        theirs, ours = twins(kind, 3, 4)
        name, x = f"{name}_l0", X
    value = random(*getattr(ours, name).shape, seed=7).requires_grad_(not frozen)
    for module in (theirs, ours):
        module.requires_grad_(not frozen)
        # It is known what to do for such a call.
        for _ in range(2):
            module(x)
        hide(module, name, value, emptied)
    assert_same_calls(ours, theirs, x, () if frozen else (value,))


def dropping(base):
    """A module that drops recurrent weights as it is often written (DropConnect)."""

    class Dropping(base):
        def forward(self, input, hx=None):
            whole = self._flat_weights
            pairs = zip(whole, self._flat_weights_names, strict=True)
            self._flat_weights = [
                dropout(weight, 0.5) if name.startswith("weight_hh") else weight
                for weight, name in pairs
            ]
            result = super().forward(input, hx)
            self._flat_weights = whole
            return result

    return Dropping


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_users_flat_weights_are_multiplied_by(kind, compiled):
    theirs, ours = (
        dropping(getattr(package, kind))(3, 4, 2, dtype=torch.float64)
        for package in (torch.nn, triton_rnn)
    )
    ours.load_state_dict(theirs.state_dict())
    run = ours
    if compiled:
        run = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        outputs = []
        for module in (run, theirs):
            torch.manual_seed(seed)
            with triton_rnn.allow_compile():
                outputs.append(module(X)[0])
        assert_close(*(output.detach() for output in outputs))
        grads = [
            torch.autograd.grad(output.sum(), list(module.parameters()))
            for output, module in zip(outputs, (ours, theirs), strict=True)
        ]
        for actual, expected in zip(*grads, strict=True):
            assert_close(actual, expected)


def test_parameters_that_were_exchanged_count_though_the_flat_weights_are_old():
    theirs, ours = twins("gru", 3, 4)
    for module in (theirs, ours):
        module(X)
        module._parameters["weight_hh_l0"] = torch.nn.Parameter(random(12, 4, seed=5))
    assert_same_calls(ours, theirs, X)


# Hooks of saved tensors ---------------------------------------------------------------------------

KINDS = {
    "rnn": (triton_rnn.RNN, {}),
    "gru": (triton_rnn.GRU, {}),
    "lstm": (triton_rnn.LSTM, {}),
    "norm": (triton_rnn.GRU, {"layer_norm": True}),
    "zoneout": (triton_rnn.LSTM, {"zoneout": 0.3}),
    "residual": (triton_rnn.LSTM, {"num_layers": 2, "residual": True}),
    "recompute": (triton_rnn.LSTM, {"recompute": True}),
    "own": (triton_rnn.IndRNN, {}),
    "cell": (triton_rnn.GRUCell, {}),
}
hooks = torch.autograd.graph.saved_tensors_hooks


def made(kind):
    cls, options = KINDS[kind]
    module = cls(3, 4, **options).double()
    x = (X[0] if kind == "cell" else X).clone().requires_grad_()

    def run():
        torch.manual_seed(3)
        return first(module(x)).square().sum()

    return run, [x, *module.parameters()]


def with_gaps(tensor):
    """The same numbers, apart from each other in memory."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_may_come_back_with_gaps(kind):
    run, wanted = made(kind)
    expected = torch.autograd.grad(run(), wanted)
    with hooks(lambda tensor: tensor, with_gaps):
        loss = run()
    for actual, right in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        assert_close(actual, right)


CHANGES = {
    "dtype": lambda tensor: tensor.half(),
    "shape": lambda tensor: tensor.flatten()[:1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_as_another_tensor_is_refused(kind, change):
    run, wanted = made(kind)
    with hooks(CHANGES[change], lambda tensor: tensor):
        loss = run()
    with pytest.raises(RuntimeError, match="a hook of saved tensors returned"):
        torch.autograd.grad(loss, wanted)


def test_an_input_is_let_go_after_the_backward_where_no_gradient_reads_it():
    layer = triton_rnn.GRU(3, 4).requires_grad_(False)
    x, h_0 = torch.randn(5, 2, 3), torch.zeros(1, 2, 4, requires_grad=True)
    there = weakref.ref(x)
    loss = layer(x, h_0)[0].sum()
    del x
    loss.backward(retain_graph=True)
    assert there() is not None
    loss.backward()
    gc.collect()
    assert there() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
