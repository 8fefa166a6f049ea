"""Cells that tests define as a user would, and each one's plain loop, written without the package.

Run as a program, random calls of the C loops beside the reference, for the sanitizers:

    python tests/own_cells.py CASES SEED
"""

import random
import sys

import torch
from torch.nn.functional import linear, softplus
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn.backends.native import rules


class PeepholeLSTM(triton_rnn.Recurrent, gates=4, states=2, unit_weights=3):
    """Gers & Schmidhuber 2000: the gates see the cell state."""

    @staticmethod
    def step(input, hidden, state, peephole):
        i, f, g, o = (a + b for a, b in zip(input, hidden, strict=True))
        _, c = state
        i = torch.sigmoid(i + peephole[0] * c)
        f = torch.sigmoid(f + peephole[1] * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + peephole[2] * c)
        return o * torch.tanh(c), c


class MinimalGatedUnit(triton_rnn.Recurrent, gates=2):
    """Zhou et al. 2016, with the gate after the recurrent product, as in cuDNN's GRU."""

    @staticmethod
    def step(input, hidden, state):
        (h,) = state
        f = torch.sigmoid(input[0] + hidden[0])
        n = torch.tanh(input[1] + f * hidden[1])
        return (1 - f) * h + f * n


class OwnLSTM(triton_rnn.Recurrent, gates=4, states=2):
    @staticmethod
    def step(input, hidden, state):
        i, f, g, o = (a + b for a, b in zip(input, hidden, strict=True))
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class OwnGRU(triton_rnn.Recurrent, gates=3):
    @staticmethod
    def step(input, hidden, state):
        r = torch.sigmoid(input[0] + hidden[0])
        z = torch.sigmoid(hidden[1] + input[1])
        n = torch.tanh(input[2] + r * hidden[2])
        return n - z * n + z * state[0]


class OwnRNN(triton_rnn.Recurrent, gates=1):
    @staticmethod
    def step(input, hidden, state):
        return torch.tanh(input[0] + hidden[0])


class ThreeStates(triton_rnn.Recurrent, gates=3, products=5, states=3, unit_weights=2):
    """No sense in it, but all that may be uneven: products beyond gates, gates used twice."""

    @staticmethod
    def step(input, hidden, state, unit):
        _, c, m = state
        a = torch.sigmoid(input[0] + hidden[0])
        new = torch.where(input[1] > hidden[1], input[1] * unit[0], torch.tanh(m))
        c = a * c + (1 - a) * new + 0.1 * hidden[4].sin()
        m = softplus(hidden[2] + unit[1]) * torch.exp(-m.abs()) - 0.3 * hidden[3]
        return torch.tanh(c) + 0.5 * torch.sigmoid(input[2] + input[0]), c, m


class Uneven(triton_rnn.Recurrent, gates=3, products=5, states=2, unit_weights=2):
    """ThreeStates with two, for kernels that carry no more; products and gates in no order."""

    @staticmethod
    def step(input, hidden, state, unit):
        _, c = state
        a = torch.sigmoid(input[1] + hidden[0])
        new = torch.where(input[0] > hidden[1], input[0] * unit[0], torch.tanh(c + hidden[4]))
        c = a * c + (1 - a) * new + 0.1 * hidden[3].sin()
        return torch.tanh(c) * softplus(unit[1] - hidden[2]) + 0.5 * torch.sigmoid(input[2]), c


def peephole_step(x, h, c, w):
    gates = linear(x, w["weight_ih"], w.get("bias_ih"))
    gates = gates + linear(h, w["weight_hh"], w.get("bias_hh"))
    i, f, g, o = gates.chunk(4, 1)
    p = w["weight_unit"]
    i, f = torch.sigmoid(i + p[0] * c), torch.sigmoid(f + p[1] * c)
    c = f * c + i * torch.tanh(g)
    return torch.sigmoid(o + p[2] * c) * torch.tanh(c), c


def minimal_step(x, h, c, w):
    input_f, input_n = linear(x, w["weight_ih"], w.get("bias_ih")).chunk(2, 1)
    hidden_f, hidden_n = linear(h, w["weight_hh"], w.get("bias_hh")).chunk(2, 1)
    f = torch.sigmoid(input_f + hidden_f)
    return (1 - f) * h + f * torch.tanh(input_n + f * hidden_n), c


def coupled_step(x, h, c, w):
    gates = linear(x, w["weight_ih"], w.get("bias_ih"))
    gates = gates + linear(h, w["weight_hh"], w.get("bias_hh"))
    i, g, o = gates.chunk(3, 1)
    i = torch.sigmoid(i)
    c = (1 - i) * c + i * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def independent_step(x, h, c, w):
    return torch.relu(linear(x, w["weight_ih"], w.get("bias_ih")) + w["weight_unit"][0] * h), c


PLAIN = {
    PeepholeLSTM: peephole_step,
    MinimalGatedUnit: minimal_step,
    triton_rnn.CoupledLSTM: coupled_step,
    triton_rnn.IndRNN: independent_step,
}


def plain_loop(module, x, lengths, hx):
    """A sequence at a time, a step at a time: output (T, N, D * H), zeros behind a sequence's end.

    hx: h_0, or (h_0, c_0), or None.
    """
    step, parameters = PLAIN[type(module)], dict(module.named_parameters())
    directions = 2 if module.bidirectional else 1
    zeros = x.new_zeros(module.num_layers * directions, x.size(1), module.hidden_size)
    states = (zeros, zeros) if hx is None else hx if isinstance(hx, tuple) else (hx, zeros)
    finals_h, finals_c = [], []
    for layer in range(module.num_layers):
        sides = []
        for d, end in enumerate(("", "_reverse")[:directions]):
            tail = f"_l{layer}{end}"
            own = {
                name.removesuffix(tail): p for name, p in parameters.items() if name.endswith(tail)
            }
            columns, last_h, last_c = [], [], []
            for n, length in enumerate(lengths):
                h, c = (state[layer * directions + d, n : n + 1] for state in states)
                rows = [x.new_zeros(1, module.hidden_size)] * x.size(0)
                order = range(int(length))
                for t in reversed(order) if d else order:
                    h, c = step(x[t, n : n + 1], h, c, own)
                    rows[t] = h
                columns.append(torch.cat(rows))
                last_h.append(h)
                last_c.append(c)
            sides.append(torch.stack(columns, 1))
            finals_h.append(torch.cat(last_h))
            finals_c.append(torch.cat(last_c))
        x = torch.cat(sides, -1)
    return x, torch.stack(finals_h), torch.stack(finals_c)


ALL = (*PLAIN, OwnLSTM, OwnGRU, OwnRNN, ThreeStates, Uneven)
SIZES = (1, 2, 3, 7, 8, 9, 16, 17, 33, 65)


def one_case(draw: random.Random) -> None:
    """Run a random call on both backends. AssertionError if they differ."""
    kind = draw.choice((PeepholeLSTM, triton_rnn.IndRNN, ThreeStates))
    dtype = draw.choice((torch.float32, torch.float64))
    input_size, hidden, batch, steps = (draw.choice(SIZES) for _ in range(4))
    options = {
        "num_layers": draw.choice((1, 1, 2)),
        "bidirectional": draw.random() < 0.5,
        "bias": draw.random() < 0.7,
        "dtype": dtype,
    }
    threads, packed = draw.choice((1, 2, 3)), draw.random() < 0.4
    told = f"{kind.__name__}({input_size}, {hidden}, {options}) {batch=} {steps=} {packed=}"
    torch.manual_seed(draw.randrange(10**6))
    module = kind(input_size, hidden, **options)
    x = torch.randn(steps, batch, input_size, dtype=dtype)
    lengths = torch.tensor([draw.randrange(1, steps + 1) for _ in range(batch)])
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    given = [torch.randn(rows, batch, hidden, dtype=dtype) for _ in range(kind.cell.states)]
    found = []
    for backend in ("native", "reference"):
        leaf = x.clone().requires_grad_()
        input = pack_padded_sequence(leaf, lengths, enforce_sorted=False) if packed else leaf
        hx = [state.clone().requires_grad_() for state in given]
        module.zero_grad()
        rules.threads = lambda request, rows: threads
        with triton_rnn.use_backend(backend):
            output, state = module(input, hx[0] if len(hx) == 1 else tuple(hx))
        results = [output.data if packed else output]
        results += [state] if len(hx) == 1 else list(state)
        torch.manual_seed(1)
        sum((part * torch.randn_like(part)).sum() for part in results).backward()
        grads = [leaf.grad, *(s.grad for s in hx), *(p.grad for p in module.parameters())]
        found.append([*(result.detach() for result in results), *grads])
    tolerance = 1e-3 if dtype == torch.float32 else 1e-11
    for ours, theirs in zip(*found, strict=True):
        error = float((ours - theirs).abs().max()) / max(1e-2, float(theirs.abs().max()))
        assert error < tolerance, f"{told}: {error}"


def main() -> None:
    cases, seed = map(int, sys.argv[1:])
    draw = random.Random(seed)
    for _ in range(cases):
        one_case(draw)
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
