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
