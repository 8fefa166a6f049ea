"""The five tutorial programs that this project grew from, with torch.nn and with ours.

Each is written once, over the library `nn` that it takes its recurrent modules from, and returns
what a reader of the tutorial would look at. The same seed must give the same numbers: in float64
to rounding, which shows that nothing but the order of additions differs, and in float32, as the
tutorials run, to what training makes of that rounding.
"""

import math

import pytest
import torch
from tolerances import largest_error
from torch import Tensor
from torch.nn import functional as F

import triton_rnn

# Hundreds of optimizer steps carry a difference of rounding along. Measured: 4e-15 and 5e-7; the
# limits leave room for a BLAS that adds in another order at every step.
AFTER_TRAINING = {torch.float64: 1e-11, torch.float32: 1e-3}


@pytest.fixture(
    params=[
        ("native", torch.float64),
        ("torchscript", torch.float64),
        ("reference", torch.float64),
        ("auto", torch.float32),
    ],
    ids=lambda setting: f"{setting[0]}-{setting[1]}",
)
def dtype(request):
    """The default dtype of all that a program makes; the backend that it runs on goes with it."""
    backend, dtype = request.param
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with triton_rnn.use_backend(backend):
        yield dtype
    torch.set_default_dtype(before)


def both(program, dtype):
    """Runs a program with each library from one seed and compares everything it returns."""
    returned = []
    for nn in (torch.nn, triton_rnn):
        torch.manual_seed(42)
        returned.append(program(nn))
    expected, actual = returned
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert actual[name].shape == value.shape, name
            error = largest_error(actual[name], value)
            assert error <= AFTER_TRAINING[dtype], f"{name} is off by {error:.1e}"
        else:
            assert actual[name] == value, name
    return actual


# --- (a) Shapes, a forward pass by hand, and a classifier on the last step.


def rnn_forward(input, weight_ih, weight_hh, bias_ih, bias_hh, h_prev):
    """A batch-first RNN of one direction, step by step as the textbook writes it."""
    batch, seq_len, _ = input.shape
    hidden_size = weight_ih.shape[0]
    h_out = torch.zeros(batch, seq_len, hidden_size)
    w_ih = weight_ih.unsqueeze(0).tile(batch, 1, 1)
    w_hh = weight_hh.unsqueeze(0).tile(batch, 1, 1)
    for t in range(seq_len):
        x = input[:, t, :].unsqueeze(2)
        w_times_x = torch.bmm(w_ih, x).squeeze(-1)
        w_times_h = torch.bmm(w_hh, h_prev.unsqueeze(2)).squeeze(-1)
        h_prev = torch.tanh(w_times_x + bias_ih + w_times_h + bias_hh)
        h_out[:, t, :] = h_prev
    return h_out, h_prev.unsqueeze(0)


def bidirectional_rnn_forward(rnn, input, h_prev):
    """Two passes by hand, the second over the flipped sequence, side by side."""
    forward = [getattr(rnn, f"{name}_l0") for name in WEIGHTS]
    reverse = [getattr(rnn, f"{name}_l0_reverse") for name in WEIGHTS]
    forward_out, forward_state = rnn_forward(input, *forward, h_prev[0])
    reverse_out, reverse_state = rnn_forward(input.flip(1), *reverse, h_prev[1])
    return torch.cat([forward_out, reverse_out.flip(1)], -1), torch.cat(
        [forward_state, reverse_state]
    )


WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def shapes_and_forward_by_hand(nn):
    single = nn.RNN(4, 3, 1, batch_first=True)
    double = nn.RNN(4, 3, 1, batch_first=True, bidirectional=True)
    input = torch.randn(1, 2, 4)
    output, state = single(input)
    both_output, both_state = double(input)
    batch = torch.randn(2, 3, 4)
    return {
        "output": output,
        "state": state,
        "bidirectional output": both_output,
        "bidirectional state": both_state,
        "by hand": rnn_forward(batch, *single.parameters(), torch.zeros(2, 3))[0],
        "by module": single(batch, torch.zeros(1, 2, 3))[0],
        "both by hand": bidirectional_rnn_forward(double, batch, torch.zeros(2, 2, 3))[0],
        "both by module": double(batch, torch.zeros(2, 2, 3))[0],
    }


def test_tutorial_a_shapes_and_a_forward_by_hand_are_those_of_the_module(dtype):
    found = both(shapes_and_forward_by_hand, dtype)
    assert found["output"].shape == (1, 2, 3)
    assert found["state"].shape == (1, 1, 3)
    assert found["bidirectional output"].shape == (1, 2, 6)
    assert found["bidirectional state"].shape == (2, 1, 3)
    assert largest_error(found["by module"], found["by hand"]) < 1e-5
    assert largest_error(found["both by module"], found["both by hand"]) < 1e-5


class LastStepClassifier(torch.nn.Module):
    """Two recurrent layers and a Linear on the last step."""

    def __init__(self, nn, input_size=8, hidden_size=16, num_layers=2, classes=3):
        super().__init__()
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self.rnn = nn.RNN(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = torch.nn.Linear(hidden_size, classes)

    def forward(self, x):
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size)
        out, _ = self.rnn(x, h0)
        return self.fc(out[:, -1, :])


def classify_on_the_last_step(nn):
    model = LastStepClassifier(nn)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    criterion = torch.nn.CrossEntropyLoss()
    data = torch.randn(30, 6, 8)
    labels = data[:, -1, :3].argmax(1)
    losses = []
    for _ in range(15):
        for batch in torch.arange(30).split(10):
            loss = criterion(model(data[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    predicted = model(data).argmax(1)
    return {
        "losses": torch.stack(losses),
        "predicted": predicted.tolist(),
        "accuracy": (predicted == labels).sum().item() / 30,
    }


def test_tutorial_a_a_classifier_on_the_last_step_learns_the_same(dtype):
    found = both(classify_on_the_last_step, dtype)
    assert found["accuracy"] > 0.9


# --- (b) The next character of "hello world" from two, and one step of a series from six values.


class NextCharacter(torch.nn.Module):
    """Unbatched 2-D input: a sequence is (steps, characters)."""

    def __init__(self, nn, characters, hidden_size=24):
        super().__init__()
        self.rnn = nn.RNN(characters, hidden_size)
        self.fc = torch.nn.Linear(hidden_size, characters)

    def forward(self, x, hidden=None):
        out, hidden = self.rnn(x, hidden)
        return self.fc(out[-1]), hidden


def next_character(nn):
    text = "hello world"
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}

    def one_hot(string):
        codes = torch.tensor([index[character] for character in string])
        return F.one_hot(codes, len(characters)).to(torch.get_default_dtype())

    pairs = [(text[i : i + 2], text[i + 2]) for i in range(len(text) - 2)]
    model = NextCharacter(nn, len(characters))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        total = 0.0
        for pair, following in pairs:
            optimizer.zero_grad()
            logits, _ = model(one_hot(pair))
            loss = F.cross_entropy(logits.unsqueeze(0), torch.tensor([index[following]]))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        losses.append(total)
    sample = "he"
    while len(sample) < len("hello w"):
        logits, hidden = model(one_hot(sample[-2:]))
        sample += characters[int(logits.argmax())]
    return {"losses": torch.stack(losses), "sample": sample, "hidden": hidden.detach()}


def test_tutorial_b_the_next_character_of_hello_world_is_learned_the_same(dtype):
    found = both(next_character, dtype)
    assert found["sample"] == "hello w"
    assert found["hidden"].shape == (1, 24)


def one_step_from_six(nn):
    series = torch.sin(torch.arange(60) / 4) + torch.arange(60) / 60
    windows = series.unfold(0, 7, 1)
    inputs, targets = windows[:, :6].unsqueeze(-1), windows[:, 6:]
    rnn = nn.RNN(1, 12, batch_first=True)
    head = torch.nn.Linear(12, 1)
    optimizer = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(80):
        output, _ = rnn(inputs)
        loss = F.mse_loss(head(output[:, -1]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        alone = head(rnn(series[-6:].unsqueeze(-1))[0][-1])
    return {"losses": torch.stack(losses), "forecast": alone}


def test_tutorial_b_one_step_of_a_series_from_six_values_is_learned_the_same(dtype):
    found = both(one_step_from_six, dtype)
    assert found["losses"][-1] < 0.1 * found["losses"][0]


# --- (c) A time-major two-layer net with normal(0, 0.001) initial weights and out.view(-1, hidden).


class TimeMajor(torch.nn.Module):
    """All steps through one Linear, by a view of the time-major output."""

    def __init__(self, nn, hidden_size=16):
        super().__init__()
        self.hidden_size = hidden_size
        self.rnn = nn.RNN(input_size=1, hidden_size=hidden_size, num_layers=2, batch_first=False)
        for parameter in self.rnn.parameters():
            torch.nn.init.normal_(parameter, mean=0.0, std=0.001)
        self.linear = torch.nn.Linear(hidden_size, 1)

    def forward(self, x, hidden_prev):
        out, hidden_prev = self.rnn(x, hidden_prev)
        steps, batch, _ = out.shape
        out = self.linear(out.view(-1, self.hidden_size))
        return out.view(steps, batch, 1), hidden_prev


def time_major(nn):
    model = TimeMajor(nn)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hidden = torch.zeros(2, 1, 16)
    losses = []
    for _ in range(120):
        start = torch.randint(3, (1,)).item()
        steps = torch.linspace(start, start + 10, 21)
        series = torch.sin(steps)
        output, hidden = model(series[:-1].view(20, 1, 1), hidden)
        hidden = hidden.detach()
        loss = F.mse_loss(output, series[1:].view(20, 1, 1))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        forecast, _ = model(torch.sin(torch.linspace(1, 11, 20)).view(20, 1, 1), hidden)
    return {"losses": torch.stack(losses), "forecast": forecast, "hidden": hidden}


def test_tutorial_c_a_time_major_net_with_tiny_weights_learns_the_same(dtype):
    found = both(time_major, dtype)
    assert found["losses"][-10:].mean() < 0.5 * found["losses"][:10].mean()


# --- (d) hello -> ohlol three ways.

HELLO, OHLOL = [1, 0, 2, 2, 3], [3, 1, 2, 3, 2]  # over "e h l o"


def spelled(logits):
    """The word that a tensor (steps, 4) of logits says."""
    return "".join("ehlo"[i] for i in logits.argmax(1))


def hello_by_cell(nn):
    cell = nn.RNNCell(input_size=4, hidden_size=4)
    optimizer = torch.optim.Adam(cell.parameters(), lr=0.1)
    inputs = F.one_hot(torch.tensor(HELLO), 4).to(torch.get_default_dtype()).view(-1, 1, 4)
    labels = torch.tensor(OHLOL).view(-1, 1)
    losses = []
    for _ in range(100):
        loss, steps = 0, []
        optimizer.zero_grad()
        hidden = torch.zeros(1, 4)
        for x, label in zip(inputs, labels, strict=True):
            hidden = cell(x, hidden)
            loss = loss + F.cross_entropy(hidden, label)
            steps.append(hidden)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "word": spelled(torch.cat(steps))}


def hello_by_rnn(nn):
    rnn = nn.RNN(input_size=4, hidden_size=4, num_layers=1)
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.05)
    inputs = F.one_hot(torch.tensor(HELLO), 4).to(torch.get_default_dtype()).view(-1, 1, 4)
    labels = torch.tensor(OHLOL)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        output, _ = rnn(inputs, torch.zeros(1, 1, 4))
        logits = output.view(-1, 4)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "word": spelled(logits)}


class EmbeddedHello(torch.nn.Module):
    """Embedding, two batch-first layers, Linear."""

    def __init__(self, nn):
        super().__init__()
        self.emb = torch.nn.Embedding(4, 10)
        self.rnn = nn.RNN(input_size=10, hidden_size=8, num_layers=2, batch_first=True)
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.zeros(2, x.size(0), 8)
        x, _ = self.rnn(self.emb(x), hidden)
        return self.fc(x).view(-1, 4)


def hello_by_embedding(nn):
    net = EmbeddedHello(nn)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        logits = net(torch.tensor([HELLO]))
        loss = F.cross_entropy(logits, torch.tensor(OHLOL))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "word": spelled(logits)}


@pytest.mark.parametrize(
    "program", [hello_by_cell, hello_by_rnn, hello_by_embedding], ids=lambda f: f.__name__
)
def test_tutorial_d_hello_becomes_ohlol_the_same_way(dtype, program):
    assert both(program, dtype)["word"] == "ohlol"


# --- (e) Stacks of layers and of cells, and a sine forecast with a carried hidden state.


def layers_of_several_depths(nn):
    x = torch.randn(10, 3, 100)
    found = {}
    for depth in (1, 4):
        rnn = nn.RNN(input_size=100, hidden_size=20, num_layers=depth)
        output, state = rnn(x, torch.zeros(depth, 3, 20))
        lstm = nn.LSTM(input_size=100, hidden_size=20, num_layers=depth)
        lstm_output, (h, c) = lstm(x)
        found |= {
            f"RNN {depth}": output.detach(),
            f"RNN {depth} h": state.detach(),
            f"LSTM {depth}": lstm_output.detach(),
            f"LSTM {depth} h": h.detach(),
            f"LSTM {depth} c": c.detach(),
            f"names {depth}": [name for name, _ in lstm.named_parameters()],
        }
    return found


def test_tutorial_e_layers_of_several_depths_have_the_same_shapes_and_numbers(dtype):
    found = both(layers_of_several_depths, dtype)
    for depth in (1, 4):
        assert found[f"RNN {depth}"].shape == found[f"LSTM {depth}"].shape == (10, 3, 20)
        assert found[f"LSTM {depth} h"].shape == found[f"LSTM {depth} c"].shape == (depth, 3, 20)
        assert len(found[f"names {depth}"]) == 4 * depth


def stacks_of_cells(nn):
    x = torch.randn(10, 3, 100)
    alone, first, second = nn.RNNCell(100, 20), nn.RNNCell(100, 30), nn.RNNCell(30, 20)
    h, h1, h2 = torch.zeros(3, 20), torch.zeros(3, 30), torch.zeros(3, 20)
    for xt in x:
        h = alone(xt, h)
        h1 = first(xt, h1)
        h2 = second(h1, h2)
    lstm_alone = nn.LSTMCell(100, 20)
    lstm_first, lstm_second = nn.LSTMCell(100, 30), nn.LSTMCell(30, 20)
    state = (torch.zeros(3, 20), torch.zeros(3, 20))
    state1 = (torch.zeros(3, 30), torch.zeros(3, 30))
    state2 = (torch.zeros(3, 20), torch.zeros(3, 20))
    for xt in x:
        state = lstm_alone(xt, state)
        state1 = lstm_first(xt, state1)
        state2 = lstm_second(state1[0], state2)
    (h.sum() + h2.sum() + state[0].sum() + state2[0].sum()).backward()
    cells = {
        "RNNCell": alone,
        "first RNNCell": first,
        "second RNNCell": second,
        "LSTMCell": lstm_alone,
        "first LSTMCell": lstm_first,
        "second LSTMCell": lstm_second,
    }
    return {
        "h": h.detach(),
        "h1": h1.detach(),
        "h2": h2.detach(),
        "lstm h": state[0].detach(),
        "lstm c": state[1].detach(),
        "lstm h2": state2[0].detach(),
        "lstm c2": state2[1].detach(),
    } | {
        f"{label} {name}": parameter.grad
        for label, cell in cells.items()
        for name, parameter in cell.named_parameters()
    }


def test_tutorial_e_stacks_of_cells_of_different_widths_have_the_same_numbers(dtype):
    found = both(stacks_of_cells, dtype)
    assert found["h"].shape == found["h2"].shape == found["lstm c2"].shape == (3, 20)
    assert found["h1"].shape == (3, 30)


class SineNet(torch.nn.Module):
    """A batch-first layer that carries its hidden state from one window to the next."""

    def __init__(self, nn, hidden_size=16):
        super().__init__()
        self.hidden_size = hidden_size
        self.rnn = nn.RNN(input_size=1, hidden_size=hidden_size, num_layers=1, batch_first=True)
        for parameter in self.rnn.parameters():
            torch.nn.init.normal_(parameter, mean=0.0, std=0.001)
        self.linear = torch.nn.Linear(hidden_size, 1)

    def forward(self, x, hidden_prev):
        out, hidden_prev = self.rnn(x, hidden_prev)
        out = self.linear(out.reshape(-1, self.hidden_size))
        return out.unsqueeze(0), hidden_prev


def sine_forecast(nn):
    model = SineNet(nn)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hidden = torch.zeros(1, 1, 16)
    losses, norms = [], []
    for _ in range(150):
        start = 3 * torch.rand(1).item()
        series = torch.sin(torch.linspace(start, start + 10, 50)).view(1, 50, 1)
        output, hidden = model(series[:, :-1], hidden)
        hidden = hidden.detach()
        loss = F.mse_loss(output, series[:, 1:])
        model.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        losses.append(loss.detach())
    # One value at a time, each forecast the next input.
    value, forecast = series[:, :1], []
    with torch.no_grad():
        for _ in range(20):
            value, hidden = model(value, hidden)
            forecast.append(value.flatten())
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "forecast": torch.cat(forecast),
    }


def test_tutorial_e_a_sine_is_forecast_the_same_with_a_carried_state(dtype):
    found = both(sine_forecast, dtype)
    assert found["losses"][-1] < 0.2 * found["losses"][0]
    assert math.isfinite(found["norms"].max())
