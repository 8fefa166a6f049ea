"""Random calls of the C loops beside the reference; a program, for test_native.py to run.

    python tests/native_fuzz.py CASES SEED

Run with the sanitizers it proves that no array is read or written outside: torch's tensors come
from malloc, so each ends where its last number ends.
"""

import random
import sys

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from triton_rnn.backends.native import rules

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 80)


def strided(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same numbers, dense or not."""
    kind = draw.randrange(4)
    if kind == 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 2:
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if kind == 3:
        return torch.cat([tensor, tensor], -1)[..., : tensor.size(-1)]
    return tensor


def one_step(name: str, values: torch.Tensor, hidden: int, draw: random.Random) -> None:
    """Run a cell on the rows of an input, whose state is its output, and no array of its own."""
    torch.manual_seed(3)
    cell = getattr(triton_rnn, f"{name}Cell")(values.size(-1), hidden, dtype=values.dtype)
    x = strided(values[0], draw)
    states = [torch.randn(len(x), hidden, dtype=values.dtype) for _ in range(2)]
    arguments = draw.choice([(), (tuple(states) if name == "LSTM" else states[0],)])
    with torch.no_grad():
        with triton_rnn.use_backend("reference"):
            expected = cell(x, *arguments)
        with triton_rnn.use_backend("native"):
            for _ in range(3):
                torch.testing.assert_close(cell(x, *arguments), expected, rtol=1e-4, atol=1e-5)


def one_case(draw: random.Random) -> str:
    """Run a random call on both; what was run. AssertionError if they differ."""
    name = draw.choice(("RNN", "GRU", "LSTM"))
    input_size, hidden, batch, steps = (draw.choice(SIZES) for _ in range(4))
    options = {
        "num_layers": draw.choice((1, 1, 2)),
        "bidirectional": draw.random() < 0.5,
        "bias": draw.random() < 0.7,
        "batch_first": draw.random() < 0.5,
        "dtype": draw.choice((torch.float32, torch.float64)),
    }
    if name == "RNN":
        options["nonlinearity"] = draw.choice(("tanh", "relu"))
    if name == "LSTM" and hidden > 1 and draw.random() < 0.5:
        options["proj_size"] = draw.randrange(1, hidden)
    elif name != "RNN" and draw.random() < 0.4:
        # Rounding grows with steps where deviations of a few numbers are divided by; of one number
        # it is all that the reference has for a gradient, which is zero.
        options["layer_norm"] = True
        steps, hidden = min(steps, 9), max(hidden, 2)
    threads, packed = draw.choice((1, 2, 3)), draw.random() < 0.4
    told = f"{name}({input_size}, {hidden}, {options}) batch {batch} steps {steps} packed {packed}"
    told += f" threads {threads}"

    torch.manual_seed(draw.randrange(10**6))
    module = getattr(triton_rnn, name)(input_size, hidden, **options)
    for weight_name, weight in module.named_parameters():
        if "_norm_" in weight_name:
            torch.nn.init.normal_(weight)
    shape = (batch, steps) if options["batch_first"] else (steps, batch)
    values = torch.randn(*shape, input_size, dtype=options["dtype"])
    lengths = torch.tensor([draw.randrange(1, steps + 1) for _ in range(batch)])
    given = draw.random() < 0.5
    extras: dict = {}
    if "layer_norm" not in options and draw.random() < 0.5:
        for option in ("input_dropout", "recurrent_dropout", "weight_dropout", "zoneout"):
            if draw.random() < 0.4:
                setattr(module, option, draw.choice((0.3, 1.0)))
        if draw.random() < 0.3:
            module.clip_hidden = 0.2
        if name == "LSTM" and draw.random() < 0.3:
            module.clip_cell = 0.2
        module.train(draw.random() < 0.7)
        if not packed and draw.random() < 0.6:
            extras["lengths"] = torch.tensor([draw.randrange(steps + 1) for _ in range(batch)])
        if not packed and draw.random() < 0.6:
            extras["reset_mask"] = strided(torch.rand(*shape) < 0.3, draw)
            extras["reset_to"] = draw.choice(("zeros", "initial"))
        extras["all_states"] = draw.random() < 0.3
        told += f" {module} training {module.training} {[*extras]}"
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    size = options.get("proj_size", hidden)
    states = [torch.randn(rows, batch, width, dtype=options["dtype"]) for width in (size, hidden)]
    wants_input = draw.random() < 0.7
    found = []
    for backend in ("native", "reference"):
        leaf = values.clone().requires_grad_(wants_input)
        input = strided(leaf, random.Random(len(told)))
        if packed:
            input = pack_padded_sequence(
                input, lengths, options["batch_first"], enforce_sorted=False
            )
        hx = [state.clone().requires_grad_() for state in states]
        arguments = [] if not given else [tuple(hx)] if name == "LSTM" else [hx[0]]
        module.zero_grad()
        rules.threads = lambda request, rows: threads
        torch.manual_seed(2)
        with triton_rnn.use_backend(backend):
            output, state, *every = module(input, *arguments, **extras)
        state = state if isinstance(state, tuple) else (state,)
        if every:
            state = (*state, *every[0].outputs, *every[0].cells)
        parts = (output, *state)
        output, *state = (p.data if isinstance(p, PackedSequence) else p for p in parts)
        torch.manual_seed(1)
        total = sum((part * torch.randn_like(part)).sum() for part in (output, *state))
        total.backward()
        grads = [p.grad.clone() for p in module.parameters()] + [s.grad for s in hx if given]
        found.append([output.detach(), *(s.detach() for s in state), leaf.grad, *grads])
    # Without a backward, and then as a call that is known.
    with torch.no_grad(), triton_rnn.use_backend("native"):
        for _ in range(3):
            torch.manual_seed(2)
            again = module(input, *arguments, **extras)[0]
            again = again.data if isinstance(again, PackedSequence) else again
            assert torch.equal(again, found[0][0]), told
    one_step(name, values, hidden, draw)
    tolerance = 5e-4 if options["dtype"] == torch.float32 else 1e-11
    tolerance *= 10 if "layer_norm" in options else 1
    for ours, theirs in zip(*found, strict=True):
        if theirs is None:
            # Of a state that a cell does not have, or an input that wants none.
            assert ours is None, told
            continue
        # Sums of many terms that cancel, over as many steps and layers as these sizes have.
        error = float((ours - theirs).abs().max()) / max(1e-2, float(theirs.abs().max()))
        assert error < tolerance, f"{told}: {error}"
    return told


def main() -> None:
    cases, seed = map(int, sys.argv[1:])
    draw = random.Random(seed)
    for _ in range(cases):
        one_case(draw)
    print(f"{cases} cases")


if __name__ == "__main__":
    main()
