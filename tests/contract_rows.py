"""The contract of torch.nn's recurrent modules, row by row, with torch.nn as the oracle.

    python tests/contract_rows.py

prints the table: each row `same`, `better` or `differs`; the exit code is 1 if one differs.

A row is a function that is given a library, torch.nn or triton_rnn, and does with it what the row
speaks of. What it returns (numbers, gradients, strides, texts, errors, warnings) is its outcome.
`same`: both libraries have the same one. `better`: they have not, and ours is what it should be by
another way (`torchs_way`).
"""

import copy
import functools
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import TOLERANCES, flat_outputs, largest_error, random, random_state, run
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn

F64 = torch.float64
LAYERS = {"RNN": {}, "GRU": {}, "LSTM": {}}
PROJECTED = {"proj_size": 2}
CELLS = ("RNNCell", "GRUCell", "LSTMCell")
ALL = (*LAYERS, *CELLS)


@dataclass(frozen=True)
class Row:
    """A row of the contract.

    Attributes:
        part: the heading that it stands under. text: what is promised.
        outcome: of a library.
        better: what ours does that torch.nn does not; "" where they are to be the same.
        torchs_way: the outcome that ours must then have.
    """

    part: str
    text: str
    outcome: Callable[[Any], Any]
    better: str = ""
    torchs_way: Callable[[], Any] | None = None

    @property
    def name(self) -> str:
        return self.outcome.__name__


ROWS: list[Row] = []


def row(part: str, text: str, better: str = "", torchs_way: Callable[[], Any] | None = None):
    def add(outcome):
        ROWS.append(Row(part, text, outcome, better, torchs_way))
        return outcome

    return add


def said(call: Callable[[], Any]) -> tuple[str, str]:
    """The type and the text of a call's error; ("", "") without one."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, re.sub(r"0x[0-9a-f]+", "0x", str(error))
    return "", ""


def built(lib: Any, name: str, *sizes: int, **options: Any) -> torch.nn.Module:
    """A module of a library; the same weights in both, float64 unless told otherwise."""
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(lib, name)(*(sizes or (3, 4)), **{"dtype": F64, **options})


def of_all(part: Callable[..., Any], names=ALL) -> dict[str, Any]:
    return {name: part(name) for name in names}


def input_of(name: str, *shape: int) -> torch.Tensor:
    """(2, 3) for a cell, (5, 2, 3) for a layer."""
    return random(*(shape or ((2, 3) if name in CELLS else (5, 2, 3))))


def first(module: torch.nn.Module, *args: Any) -> torch.Tensor:
    return next(iter(flat_outputs(module, module(*args)).values()))


def packed(data: torch.Tensor, *lengths: int, **options: Any) -> PackedSequence:
    return pack_padded_sequence(data, torch.tensor(lengths), enforce_sorted=False, **options)


# --- Construction.


@row("construction", "arguments, by place and by name, and their defaults")
def arguments(lib):
    modules = [
        lib.RNN(3, 4, 2, "relu", False, True, 0.5, True),
        lib.RNN(input_size=3, hidden_size=4, nonlinearity="tanh"),
        lib.GRU(3, 4, 2, False, True, 0.5, True),
        lib.LSTM(3, 4, 2, True, True, 0.5, True, 2),
        lib.RNNCell(3, 4, False, "relu"),
        lib.GRUCell(3, 4, bias=False, dtype=F64),
        lib.LSTMCell(3, 4, device="meta", dtype=torch.float16),
    ]
    return [
        (repr(m), [(n, tuple(p.shape), str(p.dtype)) for n, p in m.named_parameters()])
        for m in modules
    ]


@row("construction", "errors, word for word")
def construction_errors(lib):
    wrong = [
        {"hidden_size": 0},
        {"hidden_size": "4"},
        {"num_layers": 0},
        {"dropout": 1.5},
        {"dropout": True},
        {"proj_size": 4},
        {"proj_size": -1},
        {"nonlinearity": "sine"},
        {"colour": "red"},
        {"dtype": torch.int64},
    ]
    return of_all(
        lambda name: [
            said(lambda o=o: getattr(lib, name)(**{"input_size": 3, "hidden_size": 4, **o}))
            for o in wrong
        ]
    )


@row("construction", "the warning of dropout with one layer")
def dropout_warning(lib):
    def texts(name):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            getattr(lib, name)(3, 4, dropout=0.5)
        return [str(warning.message) for warning in record]

    return of_all(texts, LAYERS)


@row("construction", "the same seed gives the same initial parameters, and draws as many numbers")
def initial_parameters(lib):
    def parameters(name):
        module = built(lib, name)
        return [*module.state_dict().items(), torch.get_rng_state()]

    return of_all(parameters)


@row("construction", "a subclass's reset_parameters is called")
def overridden_reset(lib):
    def weights(name):
        def reset(module):
            for parameter in module.parameters():
                torch.nn.init.constant_(parameter, 0.25)

        kind = type("Own", (getattr(lib, name),), {"reset_parameters": reset})
        return list(kind(3, 4).parameters())

    return of_all(weights)


@row(
    "construction", "cells check nothing: no hidden unit works, a bad nonlinearity fails at forward"
)
def lenient_cells(lib):
    zero = of_all(lambda name: run(built(lib, name, 3, 0), input_of(name)), CELLS)
    sine = built(lib, "RNNCell", nonlinearity="sine")
    return zero, said(lambda: sine(random(2, 3)))


@row("construction", "repr, mode, nonlinearity, dropout, all_weights, _flat_weights")
def attributes(lib):
    def of(name):
        m = built(lib, name, 3, 4, 2, bidirectional=True, dropout=0.25)
        return [
            repr(m),
            str(torch.nn.ModuleList([m])),
            m.mode,
            getattr(m, "nonlinearity", None),
            m.dropout,
            m._flat_weights_names,
            m.all_weights,
            m._flat_weights,
            m.flatten_parameters(),
            sorted(set(vars(m)) - {"_parameters"}),
        ]

    return of_all(of, LAYERS)


# --- Forward.


@row("forward", "unbatched input: h_n is (L*D, H), batch_first is ignored")
def unbatched(lib):
    def of(name):
        modules = [
            built(lib, name, 3, 4, 2, bidirectional=True, batch_first=b) for b in (False, True)
        ]
        return [run(m, random(5, 3), random_state(m, None)) for m in modules]

    return of_all(of, LAYERS)


@row("forward", "batched input in both layouts; output and states have torch's strides")
def padded(lib):
    def of(name):
        results = []
        for batch_first in (False, True):
            module = built(lib, name, 3, 4, 2, bidirectional=True, batch_first=batch_first)
            outputs = flat_outputs(module, module(random(5, 2, 3)))
            results.append([(out, out.stride()) for out in outputs.values()])
        return results

    return of_all(of, LAYERS)


@row("forward", "packed input, sorted or not: hx and h_n in the caller's order, indices kept")
def packed_input(lib):
    def of(name):
        module = built(lib, name, 3, 4, 2, bidirectional=True)
        results = []
        for lengths in ((5, 4, 1), (1, 5, 4)):
            given = packed(random(5, 3, 3), *lengths)
            output, state = module(given, random_state(module, 3))
            results.append([*output, state])
        return results

    return of_all(of, LAYERS)


@row("forward", "hx absent, given, expanded, strided; batch_first never applies to it")
def initial_states(lib):
    def of(name):
        layer = name in LAYERS
        module = built(lib, name, **({"batch_first": True} if layer else {}))
        input = random(2, 5, 3) if layer else random(2, 3)
        hx = random_state(module, 2)
        views = (
            lambda s: s,
            lambda s: s[..., :1, :].expand_as(s),
            lambda s: s.repeat_interleave(2, -1)[..., ::2],
        )
        return [run(module, input)] + [run(module, input, hx, prepare_state=v) for v in views]

    return of_all(of)


@row("forward", "errors of malformed calls of a layer, type and text")
def layer_errors(lib):
    def of(name):
        m = built(lib, name, 3, 4, 2)
        hx = functools.partial(random_state, m)

        def narrow(state):
            return tuple(s[..., :1] for s in state) if isinstance(state, tuple) else state[..., :1]

        calls = [
            lambda: m(),
            lambda: m(None),
            lambda: m(random(3)),
            lambda: m(random(5, 2, 1, 3)),
            lambda: m(random(5, 2, 4)),
            lambda: m(random(5, 4)),
            lambda: m(random(5, 2, 3).float()),
            lambda: m(torch.ones(5, 2, 3, dtype=torch.int64)),
            lambda: m(random(5, 2, 3).to("meta")),
            lambda: m(random(0, 2, 3)),
            lambda: m(random(0, 3)),
            lambda: m(random(5, 2, 3), hx(3)),
            lambda: m(random(5, 2, 3), hx(None)),
            lambda: m(random(5, 3), hx(1)),
            lambda: m(random(5, 2, 3), narrow(hx(2))),
            lambda: m(random(5, 2, 3), 0.0),
            lambda: m(packed(random(5, 2, 4), 5, 3)),
            lambda: m(packed(random(5, 2, 3), 5, 3), hx(3)),
            lambda: m(packed(random(5, 2, 3), 5, 3), hx(None)),
        ]
        return [said(call) for call in calls]

    return of_all(of, LAYERS)


@row("forward", "an empty batch works, and its backward")
def empty_batch(lib):
    return of_all(lambda name: run(built(lib, name), input_of(name)[..., :0, :]))


@row("forward", "h_n is before dropout, of the reverse direction at t=0, packed at each one's end")
def final_states(lib):
    def of(name):
        module = built(lib, name, 3, 4, 2, bidirectional=True, dropout=0.5)
        torch.manual_seed(1)
        return [
            flat_outputs(module, module(x))
            for x in (random(5, 2, 3), packed(random(5, 2, 3), 2, 5))
        ]

    return of_all(of, LAYERS)


@row("forward", "dropout: the same random stream, p=1, off in eval, m.dropout may be changed")
def dropout(lib):
    def of(name):
        module = built(lib, name, 3, 4, 3, bidirectional=True, batch_first=True)
        results = []
        for p, training in ((0.3, True), (1.0, True), (0.3, False), (0, True)):
            module.dropout = p
            module.train(training)
            torch.manual_seed(2)
            results += [run(module, random(2, 5, 3)), torch.get_rng_state()]
        return results

    return of_all(of, LAYERS)


@row("forward", "proj_size: h is smaller than c, weight_hr, later layers take D*proj_size")
def projection(lib):
    module = built(lib, "LSTM", 3, 4, 2, bidirectional=True, **PROJECTED)
    hx = random_state(module, 2)
    return run(module, random(5, 2, 3), hx), run(module, packed(random(5, 2, 3), 2, 5).data, None)


@row(
    "forward",
    "both biases are kept; GRU's b_hn stays inside the reset product; none with bias=False",
)
def biases(lib):
    def of(name):
        module, without = built(lib, name), built(lib, name, bias=False)
        suffix = "_l0" if name in LAYERS else ""
        with torch.no_grad():
            getattr(module, f"bias_ih{suffix}").fill_(0.5)
            getattr(module, f"bias_hh{suffix}").copy_(
                random(*getattr(module, f"bias_hh{suffix}").shape)
            )
        return run(module, input_of(name)), run(without, input_of(name))

    return of_all(of)


@row("forward", "float64, float32, float16, bfloat16")
def dtypes(lib):
    def of(name):
        results = []
        for dtype in (F64, torch.float32, torch.float16, torch.bfloat16):
            module = built(lib, name, dtype=dtype)
            results.append(run(module, input_of(name).to(dtype)))
        return results

    return of_all(of)


@row("forward", "autocast on the CPU: weights cast, the output in the low precision")
def autocast(lib):
    def of(name):
        module = built(lib, name, dtype=torch.float32)

        def cast(dtype):
            with torch.autocast("cpu", dtype=dtype):
                return flat_outputs(module, module(input_of(name).float()))

        # Not every processor has the instructions that torch's LSTM asks for.
        def numbers_or_error(dtype):
            error = said(lambda: cast(dtype))
            return error if any(error) else cast(dtype)

        return numbers_or_error(torch.bfloat16), numbers_or_error(torch.float16)

    return of_all(of)


@row("forward", "cells: 1-D and 2-D input, with and without hx")
def cells(lib):
    def of(name):
        m = built(lib, name)
        return [run(m, random(3)), run(m, random(3), random_state(m, None)), run(m, random(2, 3))]

    return of_all(of, CELLS)


@row("forward", "errors of malformed calls of a cell, type and text")
def cell_errors(lib):
    def of(name):
        m = built(lib, name)
        calls = [
            lambda: m(),
            lambda: m(random(5, 2, 3)),
            lambda: m(random(2, 4)),
            lambda: m(random(2, 3).float()),
            lambda: m(random(2, 3), random_state(m, 3)),
            lambda: m(random(2, 3), random_state(m, None)),
            lambda: m(random(3), random_state(m, 1)),
        ]
        return [said(call) for call in calls]

    return of_all(of, CELLS)


# --- Gradients.


@row("gradients", "to input, h_0, c_0 and every parameter, padded and packed")
def gradients(lib):
    def of(name):
        if name in CELLS:
            m = built(lib, name)
            return run(m, input_of(name), random_state(m, 2))
        m = built(lib, name, 3, 4, 2, bidirectional=True)
        pack = functools.partial(pack_padded_sequence, lengths=[5, 3])
        return [run(m, random(5, 2, 3), random_state(m, 2), prepare=p) for p in (lambda x: x, pack)]

    return of_all(of)


@row("gradients", "only output, only h_n, only c_n used")
def one_output_used(lib):
    def of(name):
        m = built(lib, name, 3, 4, 2)
        names = ("output", "h_n", "c_n")[: 3 if name == "LSTM" else 2]
        return [run(m, random(5, 2, 3), random_state(m, 2), used=[used]) for used in names]

    return of_all(of, LAYERS)


@row("gradients", "several backward passes with retain_graph; without it the graph is freed")
def retain_graph(lib):
    def of(name):
        m = built(lib, name)
        loss = first(m, input_of(name)).square().sum()
        weights = list(m.parameters())
        twice = [torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2)]
        torch.autograd.grad(loss, weights)
        return twice, said(lambda: torch.autograd.grad(loss, weights))

    return of_all(of)


@row("gradients", "frozen weights get none, tied weights sum")
def frozen_and_tied(lib):
    def of(name):
        results = []
        for index in range(4):
            m = built(lib, name)
            list(m.parameters())[index].requires_grad_(False)
            results.append(run(m, input_of(name)))
        if name in LAYERS:
            m = built(lib, name, 4, 4, 2)
            m.weight_hh_l1 = m.weight_hh_l0
            results.append(run(m, random(5, 2, 4)))
        return results

    return of_all(of)


@row("gradients", "non-contiguous and expanded grad_output")
def strided_gradients(lib):
    def of(name):
        m = built(lib, name)
        views = (
            lambda g: g[..., :1].expand_as(g),
            lambda g: g.repeat_interleave(2, -1)[..., ::2],
            lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
        )
        return [run(m, input_of(name), prepare_grad=view) for view in views]

    return of_all(of)


@row("gradients", "in eval mode")
def eval_backward(lib):
    return of_all(lambda name: run(built(lib, name).eval(), input_of(name)))


@row("gradients", "twice: a gradient penalty, a Hessian")
def double_backward(lib):
    def of(name):
        m, input = built(lib, name), input_of(name).requires_grad_()
        out = first(m, input).square().sum()
        (slope,) = torch.autograd.grad(out, input, create_graph=True)
        return slope, torch.autograd.grad(slope.square().sum(), list(m.parameters()))

    return of_all(of)


@row("gradients", "gradcheck and gradgradcheck in float64")
def finite_differences(lib):
    def of(name):
        m, input = built(lib, name, 2, 2), input_of(name)[..., :2].requires_grad_()
        call = lambda x: first(m, x)  # noqa: E731
        return [
            torch.autograd.gradcheck(call, (input,), fast_mode=True),
            torch.autograd.gradgradcheck(call, (input,), fast_mode=True),
        ]

    return of_all(of)


@row("gradients", "changing in place what the backward needs is detected")
def in_place(lib):
    def of(name):
        suffix = "_l0" if name in LAYERS else ""
        results = []
        for what in ("input", f"weight_ih{suffix}", f"weight_hh{suffix}"):
            m, input = built(lib, name), input_of(name).requires_grad_()
            given = input * 1
            loss = first(m, given).square().sum()
            with torch.no_grad():
                (given if what == "input" else getattr(m, what)).add_(1)
            kind, text = said(loss.backward)
            results.append((kind, text.split(":")[0]))
        return results

    return of_all(of)


# --- Life of a module.


@row("life", "state_dict both ways, strict; load_state_dict(assign=True)")
def state_dicts(lib):
    def of(name):
        m, other = built(lib, name), built(torch.nn, name)
        values = {key: value + 1 for key, value in other.state_dict().items()}
        m.load_state_dict(values, strict=True)
        other.load_state_dict(m.state_dict(), strict=True)
        m.load_state_dict({k: v + 1 for k, v in values.items()}, assign=True)
        wrong = said(lambda: m.load_state_dict({**values, "extra": values[next(iter(values))]}))
        return list(m.state_dict()), first(m, input_of(name)), first(other, input_of(name)), wrong

    return of_all(of)


@row("life", "deepcopy, pickle, torch.save of a module, weights_only loading of its state_dict")
def copies(lib):
    def saved(value, weights_only):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=weights_only)

    def of(name):
        m = built(lib, name)
        others = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), saved(m, False)]
        return [first(other, input_of(name)) for other in others], saved(m.state_dict(), True)

    return of_all(of)


@row("life", "weights are read at every call: norms, pruning, .data, functional_call, reassignment")
def weights_read_anew(lib):
    def of(name):
        weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
        changes = [
            lambda m: parametrizations.weight_norm(m, weight),
            lambda m: parametrizations.spectral_norm(m, weight).eval(),
            lambda m: prune.l1_unstructured(m, weight, amount=0.5),
            lambda m: getattr(m, weight).data.mul_(2),
            lambda m: setattr(m, weight, torch.nn.Parameter(getattr(m, weight).detach() * 3)),
            lambda m: (delattr(m, weight), setattr(m, weight, random(*shape(m)))),
        ]

        def shape(m):
            return (m.hidden_size * (1, 3, 4)[ALL.index(name) % 3], m.hidden_size)

        results = []
        for change in changes:
            m = built(lib, name)
            m(input_of(name))
            torch.manual_seed(4)
            change(m)
            results.append(first(m, input_of(name)))
        m = built(lib, name)
        others = {key: value + 1 for key, value in m.named_parameters()}
        called = next(iter(flat_outputs(m, functional_call(m, others, (input_of(name),))).values()))
        return [*results, called, first(m, input_of(name))]

    return of_all(of)


class Counting(torch.nn.Module):
    """A parametrization that counts how often its weight is computed."""

    calls = 0

    def forward(self, weight):
        Counting.calls += 1
        return weight * 2


@row(
    "life",
    "a parametrized weight of a layer is computed when it is used",
    "a parametrized weight of a layer is computed once a call",
    lambda: dict.fromkeys(LAYERS, 3),
)
def parametrized_once(lib):
    def of(name):
        m = built(lib, name)
        parametrize.register_parametrization(m, "weight_hh_l0", Counting())
        Counting.calls = 0
        for _ in range(3):
            m(random(20, 2, 3))
        return Counting.calls

    return of_all(of, LAYERS)


@row("life", "isinstance of torch's class; subclasses, with multiple inheritance too")
def subclasses(lib):
    def of(name):
        class Mixin:
            def __init__(self, *args, label="", **options):
                super().__init__(*args, **options)
                self.label = label

        kind = type("Mixed", (Mixin, getattr(lib, name)), {})
        torch.manual_seed(11)
        m = kind(3, 4, label="a", dtype=F64)
        return isinstance(m, getattr(torch.nn, name)), m.label, repr(m), first(m, input_of(name))

    return of_all(of)


@row("life", "hooks: forward, pre-forward, full backward, on tensors, on state_dict")
def hooks(lib):
    def of(name):
        m, seen = built(lib, name), []
        m.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        m.register_forward_hook(lambda m, args, out: seen.append(len(args)))
        m.register_full_backward_pre_hook(lambda m, grads: seen.append(len(grads)))
        m.register_full_backward_hook(lambda m, gi, go: seen.append((len(gi), len(go))))
        m.register_state_dict_post_hook(lambda m, state, *_: seen.append(sorted(state)))
        for parameter in m.parameters():
            parameter.register_hook(lambda g: seen.append(tuple(g.shape)) or 2 * g)
        input = input_of(name).requires_grad_()
        first(m, input).sum().backward()
        m.state_dict()
        # Each weight has an accumulator of its own, and no order is promised among them.
        return sorted(map(str, seen)), input.grad, [p.grad for p in m.parameters()]

    return of_all(of)


@row("life", ".to(), .half(), .to_empty(), .share_memory(), .requires_grad_()")
def moves(lib):
    def of(name):
        half = first(built(lib, name).half(), input_of(name).half())
        back = first(built(lib, name).to(torch.float32).double(), input_of(name))
        m = built(lib, name).to("meta").to_empty(device="cpu")
        torch.manual_seed(6)
        m.reset_parameters()
        m.share_memory().requires_grad_(False)
        out = first(m, input_of(name))
        return half, back, out, out.requires_grad, next(m.parameters()).is_shared()

    return of_all(of)


@row("life", "replicas as DataParallel makes them")
def replicas(lib):
    def of(name):
        m = built(lib, name)
        replica = m._replicate_for_data_parallel()
        for key, parameter in m.named_parameters():
            setattr(replica, key, parameter * 2)
        return first(replica, input_of(name)), [type(replica).__name__, len(replica._parameters)]

    return of_all(of)


def through_compile(lib, name, dtype, steps=5, **options):
    """Numbers, gradients and the sizes of the graphs of a compiled module, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    torch._dynamo.reset()
    sizes = []

    def measured(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return nop(graph, inputs)

    m = built(lib, name, dtype=dtype)
    compiled = torch.compile(m, backend=aot_autograd(fw_compiler=measured), **options)
    return run(m, random(steps, 2, 3, dtype=dtype), call=compiled), sizes


@row("life", "torch.compile without Dynamo's switch: the graph breaks, the numbers are right")
def compile_with_a_break(lib):
    return of_all(lambda name: through_compile(lib, name, F64)[0], LAYERS)


def in_one_graph(lib):
    with triton_rnn.allow_compile():
        return of_all(lambda n: through_compile(lib, n, F64, fullgraph=True)[0], LAYERS)


@row("life", "torch.compile with it: fullgraph=True")
def compile_in_one_graph(lib):
    return in_one_graph(lib)


@row(
    "life",
    "torch.compile: the graph does not grow with the sequence",
    "under `torch.compile` the graph does not grow with the length of the sequence",
    lambda: dict.fromkeys(LAYERS, True),
)
def graph_size(lib):
    def of(name):
        with triton_rnn.allow_compile():
            sizes = [through_compile(lib, name, F64, steps, fullgraph=True)[1] for steps in (3, 9)]
        return sizes[0] == sizes[1]

    return of_all(of, LAYERS)


def weight_gradients(call, module):
    output = call(random(5, 2, 3).float())[0]
    return output, torch.autograd.grad(output.square().sum(), list(module.parameters()))


def plain_lstm():
    module = built(torch.nn, "LSTM", dtype=torch.float32)
    return weight_gradients(module, module)


@row(
    "life",
    "torch.compile of a float32 LSTM in training, whose input needs no gradient",
    "a float32 LSTM trains under `torch.compile`",
    plain_lstm,
)
def compile_float32_lstm(lib):
    torch._dynamo.reset()
    module = built(lib, "LSTM", dtype=torch.float32)
    with triton_rnn.allow_compile():
        return weight_gradients(torch.compile(module, backend="aot_eager"), module)


@row(
    "life",
    "torch.compile: other lengths and batches are not compiled again",
    "with `dynamic=True` no other length or batch is compiled again",
    lambda: dict.fromkeys(LAYERS, 1),
)
def compile_once(lib):
    def of(name):
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        counter = CompileCounter()
        m = built(lib, name)
        compiled = torch.compile(m, backend=counter, fullgraph=True, dynamic=True)
        with triton_rnn.allow_compile():
            for steps, batch in ((4, 5), (7, 2), (9, 6)):
                compiled(random(steps, batch, 3))
        return counter.frame_count

    return of_all(of, LAYERS)


def exported(lib, dynamic):
    def of(name):
        m = built(lib, name)
        sizes = {0: torch.export.Dim("steps", min=2), 1: torch.export.Dim("batch", min=2)}
        program = torch.export.export(
            m, (random(4, 5, 3),), dynamic_shapes={"input": sizes} if dynamic else None
        )
        return flat_outputs(m, program.module()(random(7, 2, 3) if dynamic else random(4, 5, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of_all(of, LAYERS)


@row("life", "torch.export")
def export(lib):
    return exported(lib, False)


@row(
    "life",
    "torch.export with dynamic length and batch",
    "`torch.export` takes a dynamic length",
    lambda: of_all(
        lambda name: flat_outputs(m := built(torch.nn, name), m(random(7, 2, 3))), LAYERS
    ),
)
def dynamic_export(lib):
    return exported(lib, True)


@row("life", "meta and fake tensors")
def meta_and_fake(lib):
    def of(name):
        m = built(lib, name).to("meta")
        outputs = list(flat_outputs(m, m(input_of(name).to("meta"))).values())
        with torch._subclasses.FakeTensorMode():
            m = built(lib, name)
            outputs += flat_outputs(m, m(torch.empty_like(input_of(name)))).values()
        return [(tuple(o.shape), str(o.dtype), str(o.device), o.stride()) for o in outputs]

    return of_all(of)


@row("life", "torch.func: functional_call, grad, jacrev, hessian, jvp")
def transforms(lib):
    def of(name):
        m, input = built(lib, name, 3, 2), input_of(name)
        weights = {key: value.detach() for key, value in m.named_parameters()}

        def loss(weights, input):
            returned = functional_call(m, weights, (input,))
            return next(iter(flat_outputs(m, returned).values())).square().sum()

        return [
            grad(loss, argnums=(0, 1))(weights, input),
            jacrev(loss, argnums=1)(weights, input),
            hessian(loss, argnums=1)(weights, input),
            jvp(lambda x: loss(weights, x), (input,), (input,)),
        ]

    return of_all(of)


def looped(names):
    """What vmap stands for: a loop."""

    def of(name):
        m, inputs = built(torch.nn, name), random(3, *input_of(name).shape)
        each = torch.stack([first(m, input) for input in inputs])
        return each, torch.stack([first(m, inputs[0])] * 2)

    return of_all(of, names)


def vmapped(lib, names):
    def of(name):
        m, inputs = built(lib, name), random(3, *input_of(name).shape)
        stacked = stack_module_state([m, built(lib, name)])

        def call(weights, buffers):
            returned = functional_call(m, (weights, buffers), (inputs[0],))
            return next(iter(flat_outputs(m, returned).values()))

        return vmap(lambda x: first(m, x))(inputs), vmap(call)(*stacked)

    return of_all(of, names)


@row("life", "torch.vmap over inputs and over stacked parameters of RNNCell and GRUCell")
def vmap_of_cells(lib):
    return vmapped(lib, CELLS[:2])


@row(
    "life",
    "torch.vmap over inputs and over stacked parameters of layers and LSTMCell",
    "`torch.vmap` over inputs and over stacked parameters works for RNN, GRU, LSTM and LSTMCell",
    lambda: looped((*LAYERS, "LSTMCell")),
)
def vmap_of_layers(lib):
    return vmapped(lib, (*LAYERS, "LSTMCell"))


@row("life", "torch.jit.script and torch.jit.trace of a model that holds one")
def scripted(lib):
    class Model(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input):
            return self.inner(input)

    def of(name):
        model = Model(built(lib, name))
        by_script, by_trace = torch.jit.script(model), torch.jit.trace(model, input_of(name))
        return [first_of(by_script(input_of(name))), first_of(by_trace(input_of(name)))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of_all(of)


def first_of(returned):
    return returned[0] if isinstance(returned, tuple) else returned


@row("life", "activation checkpointing, saved-tensor hooks, anomaly mode")
def recomputing(lib):
    def of(name):
        m = built(lib, name)
        weights = list(m.parameters())
        checkpointed = torch.utils.checkpoint.checkpoint(
            lambda x: first(m, x), input_of(name), use_reentrant=False
        )
        results = [torch.autograd.grad(checkpointed.sum(), weights)]
        with torch.autograd.graph.save_on_cpu():
            results.append(torch.autograd.grad(first(m, input_of(name)).sum(), weights))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.detect_anomaly():
                results.append(torch.autograd.grad(first(m, input_of(name)).sum(), weights))
        return results

    return of_all(of)


# What the rows say of devices that are not there, or in files of their own.
ELSEWHERE = [
    ("gradients", "eval-mode and double backward on a GPU (cuDNN refuses both)", "needs a GPU"),
    ("forward", "autocast on a GPU; TF32", "needs a GPU"),
    ("life", "CUDA streams, CUDA graph capture, several GPUs", "needs a GPU"),
    ("life", "DDP and FSDP2 over two processes", "tests/test_distributed.py"),
    ("life", "threads, forked and spawned workers, interrupts", "tests/test_mutation.py"),
    ("forward", "any arguments and calls, well and badly formed", "tests/test_fuzz.py"),
]


# --- The verdict.


def same(actual: Any, expected: Any) -> bool:
    """Whether two outcomes are the same: numbers by the table of tolerances, all else exactly."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
            return False
        if actual.dtype != expected.dtype or actual.device != expected.device:
            return False
        if not expected.is_floating_point():
            return torch.equal(actual, expected)
        # 1e-10 for derivatives of derivatives, whose terms are larger than their sum.
        limit = max(TOLERANCES[expected.dtype], 1e-10)
        return largest_error(actual, expected) <= limit
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and actual.keys() == expected.keys()
            and all(same(actual[key], value) for key, value in expected.items())
        )
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(actual, (list, tuple))
            and len(actual) == len(expected)
            and all(map(same, actual, expected))
        )
    return actual == expected


@dataclass(frozen=True)
class Raised:
    """The outcome of a row that let an error through: what it speaks of does not work."""

    error: str


def outcome(row: Row, lib: Any) -> Any:
    try:
        return row.outcome(lib)
    except Exception as error:
        return Raised(f"{type(error).__name__}: {error}")


def verdict(row: Row, ours: Any = triton_rnn) -> str:
    """`same`, `better` or `differs`; what works in neither library is no row, so it differs too."""
    theirs, mine = outcome(row, torch.nn), outcome(row, ours)
    if isinstance(mine, Raised):
        return "differs"
    if row.torchs_way is None:
        return "same" if same(mine, theirs) else "differs"
    if not same(mine, row.torchs_way()):
        return "differs"
    return "same" if same(mine, theirs) else "better"


def main() -> int:
    warnings.simplefilter("ignore")
    verdicts = [(row, verdict(row)) for row in ROWS]
    print("| part | row | verdict |\n|---|---|---|")
    for row, word in verdicts:
        print(f"| {row.part} | {row.text} | {word} |")
    for part, text, where in ELSEWHERE:
        print(f"| {part} | {text} | {where} |")
    return int(any(word == "differs" for _, word in verdicts))


if __name__ == "__main__":
    sys.exit(main())
