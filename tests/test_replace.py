"""A model's recurrent modules become ours and torch's again, and stay the same objects."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import triton_rnn

X = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))


class Plain(nn.LSTM):
    """A user's subclass that leaves forward alone."""

    extra = "kept"


class Overriding(nn.GRU):
    """A user's subclass with a forward of its own."""

    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, nonlinearity="relu")
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.GRU(3, 4, 2, bidirectional=True))
        self.lstm = nn.LSTM(8, 4, batch_first=True)
        self.cells = nn.ModuleList([nn.RNNCell(3, 4), nn.GRUCell(3, 4), nn.LSTMCell(3, 4)])

    def forward(self, x):
        x, _ = self.rnn(x)
        x, _ = self.inner(x)
        x, (h, _) = self.lstm(x)
        return x.sum() + h.sum()


def test_every_recurrent_module_becomes_ours_with_the_same_parameters():
    net = Net().eval()
    before = dict(net.named_parameters())
    expected = net(X)
    assert triton_rnn.replace(net) is net
    assert type(net.rnn) is triton_rnn.RNN
    assert type(net.inner[1]) is triton_rnn.GRU
    assert type(net.lstm) is triton_rnn.LSTM
    ours = [triton_rnn.RNNCell, triton_rnn.GRUCell, triton_rnn.LSTMCell]
    assert [type(cell) for cell in net.cells] == ours
    for name, parameter in net.named_parameters():
        assert parameter is before[name]
    assert not any(module.training for module in net.modules())
    torch.testing.assert_close(net(X), expected)


def test_restore_goes_back():
    net = Net()
    kinds = [type(module) for module in net.modules()]
    assert triton_rnn.restore(triton_rnn.replace(net)) is net
    assert [type(module) for module in net.modules()] == kinds


def test_the_model_itself_is_replaced():
    module = nn.GRU(3, 4)
    assert triton_rnn.replace(module) is module
    assert type(module) is triton_rnn.GRU


def test_replacing_twice_changes_nothing_more():
    net = triton_rnn.replace(Net())
    kinds = [type(module) for module in net.modules()]
    triton_rnn.replace(net)
    assert [type(module) for module in net.modules()] == kinds


def test_hooks_still_fire():
    module = nn.GRU(3, 4)
    seen = []
    module.register_forward_hook(lambda *arguments: seen.append("after"))
    module.register_forward_pre_hook(lambda *arguments: seen.append("before"))
    triton_rnn.replace(module)(X)
    assert seen == ["before", "after"]


def test_a_subclass_that_overrides_forward_is_left_alone_and_named(caplog):
    net = nn.ModuleDict({"mine": Overriding(3, 4), "theirs": nn.GRU(3, 4)})
    with caplog.at_level(logging.WARNING, logger="triton_rnn"):
        triton_rnn.replace(net)
    assert type(net["mine"]) is Overriding
    assert type(net["theirs"]) is triton_rnn.GRU
    assert [record.getMessage() for record in caplog.records] == [
        "left mine alone: Overriding overrides forward"
    ]


def test_a_subclass_that_keeps_torchs_forward_becomes_ours_and_stays_its_own():
    module = Plain(3, 4)
    expected, _ = module(X)
    triton_rnn.replace(module)
    assert isinstance(module, Plain)
    assert isinstance(module, triton_rnn.LSTM)
    assert module.extra == "kept"
    with triton_rnn.use_backend("torchscript"):
        torch.testing.assert_close(module(X)[0], expected)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        torch.testing.assert_close(twin(X)[0], expected)
    assert type(triton_rnn.restore(module)) is Plain


def test_our_own_subclasses_are_not_called_strangers(caplog):
    class Ours(triton_rnn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

    module = Ours(3, 4)
    with caplog.at_level(logging.WARNING, logger="triton_rnn"):
        triton_rnn.replace(module)
    assert type(module) is Ours
    assert not caplog.records


def test_parametrized_modules_are_replaced_and_can_be_unparametrized():
    module = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    expected, _ = module(X)
    triton_rnn.replace(module)
    assert isinstance(module, triton_rnn.GRU)
    torch.testing.assert_close(module(X)[0], expected)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is triton_rnn.GRU
    torch.testing.assert_close(module(X)[0], expected)


def test_a_parametrized_module_is_restored():
    module = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    kind = type(module)
    triton_rnn.restore(triton_rnn.replace(module))
    assert type(module).__name__ == kind.__name__
    assert not isinstance(module, triton_rnn.GRU)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is nn.GRU


def test_a_replaced_model_trains_to_the_same_numbers():
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours)
    triton_rnn.replace(ours)
    losses = []
    for net in (theirs, ours):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        history = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = net(X) ** 2
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# torch.nn's own checks compare sizes, of which the tracer warns.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_model_with_ours_can_be_scripted_and_traced():
    net = triton_rnn.replace(nn.ModuleDict({"rnn": nn.GRU(3, 4)}))["rnn"]
    expected, _ = net(X)
    torch.testing.assert_close(torch.jit.script(nn.Sequential(net))(X)[0], expected)
    torch.testing.assert_close(torch.jit.trace(net, X)(X)[0], expected)


class Encoder(nn.LSTM):
    """With attributes of its own under the names of options."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.input_dropout = nn.Dropout(0.3)
        self.zoneout = 0.1
        self.recompute = "never"
        self.register_buffer("weight_dropout", torch.ones(2))

    def encode(self, input):
        return self(self.input_dropout(input))


def test_a_users_own_attributes_under_names_of_ours_stay_the_users():
    theirs = Encoder(3, 4).eval()
    ours = triton_rnn.replace(copy.deepcopy(theirs))
    assert isinstance(ours, triton_rnn.LSTM)
    assert isinstance(ours.input_dropout, nn.Dropout)
    assert (ours.zoneout, ours.recompute) == (0.1, "never")
    torch.testing.assert_close(ours.encode(X)[0], theirs.encode(X)[0])
    ours.zoneout, ours.recompute = 0.5, "always"
    ours.input_dropout = nn.Dropout(0.4)
    ours.weight_dropout = torch.zeros(2)
    assert (ours.zoneout, ours.recompute, ours.input_dropout.p) == (0.5, "always", 0.4)
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])
    assert "zoneout" not in repr(ours)
    back = triton_rnn.restore(ours)
    assert type(back) is Encoder
    assert (back.zoneout, back.recompute) == (0.5, "always")
    assert torch.equal(back.weight_dropout, torch.zeros(2))
    # A name that the user has not taken is ours.
    again = triton_rnn.replace(back)
    again.recurrent_dropout = 0.5
    with pytest.raises(RuntimeError, match="recurrent_dropout"):
        triton_rnn.restore(again)


class Checked(nn.GRU):
    def check_forward_args(self, input, hidden, batch_sizes):
        raise ValueError("not today")


class Private(nn.GRU):
    _options = "its own"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Checked(3, 4), "Checked overrides check_forward_args"),
        (Private(3, 4), "Private has an attribute _options"),
    ],
    ids=["checks", "class"],
)
def test_what_does_not_go_together_with_ours_is_left_alone_and_named(module, reason, caplog):
    kind = type(module)
    with caplog.at_level(logging.WARNING, logger="triton_rnn"):
        triton_rnn.replace(nn.Sequential(module))
    assert type(module) is kind
    assert caplog.messages == [f"left 0 alone: {reason}"]


def test_an_attribute_of_one_module_under_a_private_name_is_seen_too(caplog):
    module = nn.GRU(3, 4)
    module._stacking = "mine"
    with caplog.at_level(logging.WARNING, logger="triton_rnn"):
        triton_rnn.replace(module)
    assert type(module) is nn.GRU
    assert "GRU has an attribute _stacking" in caplog.text


def test_restore_leaves_nothing_of_ours_and_replace_takes_the_module_again():
    module = triton_rnn.replace(nn.GRU(3, 4))
    before = set(vars(module))
    module.recompute, module.zoneout = True, 0.1
    module.recompute, module.zoneout = False, 0.0
    triton_rnn.restore(module)
    assert set(vars(module)) == before
    assert isinstance(triton_rnn.replace(module), triton_rnn.GRU)


def test_the_names_that_ours_keep_for_themselves_are_all_known():
    from triton_rnn.replace import _PRIVATE

    found = set()
    for ours, theirs in ((triton_rnn.LSTM, nn.LSTM), (triton_rnn.RNN, nn.RNN)):
        for kind in set(ours.__mro__) - set(theirs.__mro__):
            found |= {name for name in vars(kind) if name.startswith("_") and name[1] != "_"}
    functions = {name for name in found if callable(getattr(triton_rnn.LSTM, name))}
    assert found - functions - {"_abc_impl"} == set(_PRIVATE)


class Tagger(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        output = self.inner(x)
        output = output[0] if isinstance(self.inner, nn.RNNBase) else output
        return self.head(output)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell])
def test_fx_takes_a_replaced_module_as_a_leaf(kind):
    theirs = Tagger(kind(3, 4))
    ours = triton_rnn.replace(copy.deepcopy(theirs))
    input = X[0] if "Cell" in kind.__name__ else X
    expected, traced = torch.fx.symbolic_trace(theirs), torch.fx.symbolic_trace(ours)
    assert [(node.op, node.target) for node in traced.graph.nodes] == [
        (node.op, node.target) for node in expected.graph.nodes
    ]
    assert type(traced.get_submodule("inner")) is type(ours.inner)
    torch.testing.assert_close(traced(input), theirs(input))


def test_fx_keeps_what_torch_does_not_have():
    lengths = torch.tensor([7, 2])

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = triton_rnn.GRU(3, 4, layer_norm=True)
            self.cell = triton_rnn.IndRNN(4, 4)

        def forward(self, x, lengths):
            output, h_n = self.inner(x, lengths=lengths)
            return self.cell(output)[0], h_n

    module = Masked()
    traced = torch.fx.symbolic_trace(module)
    for actual, expected in zip(traced(X, lengths), module(X, lengths), strict=True):
        assert torch.equal(actual, expected)


class Stepping(nn.Module):
    """A model whose cell begins with a constant, and with a state that is traced."""

    def __init__(self, cell, layer):
        super().__init__()
        self.cell, self.layer = cell, layer

    def forward(self, x, h):
        h, c = self.cell(torch.zeros(2, 3), (h, h))
        return self.layer(x, h.unsqueeze(0))[0], c


def test_fx_takes_a_module_as_a_leaf_if_its_state_alone_is_traced():
    module = Stepping(triton_rnn.LSTMCell(3, 4), triton_rnn.GRU(3, 4))
    traced = torch.fx.symbolic_trace(module)
    h = torch.randn(2, 4)
    for actual, expected in zip(traced(X, h), module(X, h), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_fx_refuses_a_layer_whose_hooks_it_would_run_twice(hook):
    module = Stepping(triton_rnn.LSTMCell(3, 4), triton_rnn.GRU(3, 4))
    getattr(module.layer, hook)(lambda *given: None)
    with pytest.raises(RuntimeError, match=r"hooks of layer.*is_leaf_module"):
        torch.fx.symbolic_trace(module)


def test_fx_does_not_trace_a_layer_by_itself():
    for kind in (nn.GRU, triton_rnn.GRU):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(kind(3, 4))


registered: dict[str, type] = {}


class Registered(nn.GRU):
    """Subclasses are told of, by names that must be given, and must be new."""

    def __init_subclass__(cls, *, tag):
        if tag in registered:
            raise ValueError(tag)
        registered[tag] = cls


class First(Registered, tag="first"):
    pass


def test_users_subclasses_are_not_told_of_classes_made_here():
    model = nn.ModuleList([nn.GRU(3, 4), First(3, 4), nn.LSTM(3, 4)])
    expected = [module(X)[0] for module in model]
    triton_rnn.replace(model)
    assert registered == {"first": First}
    for module, output in zip(model, expected, strict=True):
        assert type(module).__mro__[-1] is object
        assert isinstance(module, (triton_rnn.GRU, triton_rnn.LSTM))
        torch.testing.assert_close(module(X)[0], output)
    assert isinstance(pickle.loads(pickle.dumps(model))[1], First)


class Unwilling(type):
    def __new__(cls, name, bases, body):
        if len(bases) > 1:
            raise TypeError("one base")
        return super().__new__(cls, name, bases, body)


class Single(nn.GRU, metaclass=Unwilling):
    pass


def test_a_class_that_cannot_be_derived_from_is_left_alone(caplog):
    model = nn.ModuleList([nn.GRU(3, 4), Single(3, 4), nn.LSTM(3, 4)])
    triton_rnn.replace(model)
    assert [type(module) for module in model] == [triton_rnn.GRU, Single, triton_rnn.LSTM]
    assert "left 1 alone: Single has no subclass that is ours too: one base" in caplog.text


class Naming(nn.LSTM):
    """A user's subclass with names that ours has too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.residual, self.residual_layers = "mine", 3

    def _run(self):
        return "mine"


def test_a_users_names_stay_the_users():
    module = Naming(3, 4, 2)
    expected = module(X)[0]
    triton_rnn.replace(module)
    torch.testing.assert_close(module(X)[0], expected)
    assert (module.residual, module.residual_layers, module._run()) == ("mine", 3, "mine")
    module.residual = "other"
    assert module.residual == "other"

    class Swapped(triton_rnn.LSTM):
        def __init__(self, *args):
            super().__init__(*args)
            self.residual = "mine"

    assert Swapped(3, 4).residual == "mine"
    with pytest.raises(AttributeError, match="residual cannot be set"):
        triton_rnn.LSTM(3, 4).residual = True


@pytest.mark.parametrize("name", ["forward", "permute_hidden", "check_forward_args"])
def test_a_module_with_methods_of_its_own_is_left_alone(name, caplog):
    module = nn.GRU(3, 4)
    setattr(module, name, getattr(module, name))
    triton_rnn.replace(module)
    assert type(module) is nn.GRU
    assert f"GRU overrides {name}" in caplog.text


class UsersCell(nn.GRUCell):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_script_takes_a_users_cell_that_was_replaced():
    module = UsersCell(3, 4)
    expected = module(X[0])
    scripted = torch.jit.script(triton_rnn.replace(module))
    torch.testing.assert_close(scripted(X[0]), expected)
