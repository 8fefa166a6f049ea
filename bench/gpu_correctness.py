"""Checks one call of ours on a GPU against torch.nn in float64. Runs in a child process."""

from __future__ import annotations

import contextlib
import copy
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from bench import gpu_inside
from bench.gpu_checks import CELLS, EPISODES, EXTENDED_CELLS, CheckCase
from bench.gpu_workers import Result

# A repeated call ends after so many times or seconds.
REPEATS, REPEAT_SECONDS = 100, 6.0
# What relu's units are kept away from zero by: half of them are always on, half always off. A unit
# near zero would be turned by a rounding, and its gradient be off by all of its size.
RELU_BIAS = 3.0

Tensors = dict[str, Tensor]
Module = torch.nn.RNNBase | triton_rnn.Recurrent


@dataclass
class Data:
    """What a call is given, in the dtype of ours.

    Attributes:
        input: (T, N, I), or as the form of the case says.
        states: h_0[, c_0], or none.
        grads: of output (as the form says), h_n[, c_n], drawn when their shapes are known.
    """

    input: Tensor
    states: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Data:
        return Data(self.input.to(dtype), tuple(state.to(dtype) for state in self.states))


def modules(case: CheckCase, device: torch.device) -> tuple[Module, Module, Module]:
    """The same weights thrice: ours, torch.nn's in the same dtype, torch.nn's in float64.

    In the place of torch.nn's stands the plain loop of what torch.nn does not have.
    """
    own = gpu_inside.OWN.get(case.cell)
    name, options = {**CELLS, **EXTENDED_CELLS}.get(case.cell, ("", {}))
    torchs = triton_rnn if is_extended(case) else torch.nn
    if case.proj_size:
        options = {**options, "proj_size": case.proj_size}
    dtype = getattr(torch, case.dtype.split("_")[0])

    def build(package: Any, dtype: torch.dtype) -> Module:
        module: Module = (own or getattr(package, name))(
            case.width,
            case.hidden,
            case.layers,
            bias=case.bias,
            batch_first=case.form == "batch_first",
            bidirectional=case.directions == 2,
            dtype=dtype,
            device=device,
            **options,
        )
        return module

    ours = build(triton_rnn, dtype)
    if case.cell in ("rnn_relu", "ind_rnn"):
        with torch.no_grad():
            for key, parameter in ours.named_parameters():
                parameter.mul_(0.5)
                if key.startswith("bias_ih"):
                    parameter[::2] += RELU_BIAS
                    parameter[1::2] -= RELU_BIAS
    found = [ours, build(torchs, dtype), build(torchs, torch.float64)]
    for module in found[1:]:
        module.load_state_dict(ours.state_dict())
    for module in found:
        module.requires_grad_(case.training)
    return found[0], found[1], found[2]


def is_extended(case: CheckCase) -> bool:
    """Whether torch.nn has no such call."""
    return case.cell in EXTENDED_CELLS or case.form == EPISODES


def more_of(case: CheckCase, device: torch.device) -> dict[str, Any]:
    """What the call is given by keyword: lengths, none for one sequence, and resets."""
    if case.form != EPISODES:
        return {}
    lengths = torch.tensor(case.lengths())
    lengths[0] = 0
    generator = torch.Generator().manual_seed(case.batch)
    starts = torch.rand(case.steps, case.batch, generator=generator) < 0.2
    return {"lengths": lengths, "reset_mask": starts.to(device), "all_states": True}


def random(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def data(case: CheckCase, device: torch.device, seed: int = 1) -> Data:
    dtype = getattr(torch, case.dtype.split("_")[0])
    shape = {
        "batch_first": (case.batch, case.steps, case.width),
        "unbatched": (case.steps, case.width),
        # Turned round by `prepared`, so that no stride is what a kernel may hope for.
        "strided": (case.width, case.batch, case.steps),
    }.get(case.form, (case.steps, case.batch, case.width))
    batch = () if case.form == "unbatched" else (case.batch,)
    states: tuple[Tensor, ...] = ()
    if case.hx:
        widths = [case.proj_size or case.hidden]
        widths += [case.hidden] if case.cell.startswith(("lstm", "peephole")) else []
        states = tuple(
            random((case.layers * case.directions, *batch, width), seed + 1 + i, device).to(dtype)
            for i, width in enumerate(widths)
        )
    return Data(random(shape, seed, device).to(dtype), states)


def prepared(case: CheckCase, leaf: Tensor) -> Any:
    """The module's input by the leaf that its gradient is taken of."""
    if case.form == "strided":
        return leaf.transpose(0, 2)
    if case.is_packed:
        lengths = torch.tensor(case.lengths())
        if case.form == "packed":
            lengths = lengths.sort(descending=True).values
        return pack_padded_sequence(leaf, lengths, enforce_sorted=case.form == "packed")
    return leaf


def hx_of(states: tuple[Tensor, ...]) -> Any:
    return (None, *states)[len(states)] if len(states) < 2 else states


def run(case: CheckCase, module: Module, given: Data) -> Tensors:
    """All outputs and, in training, all gradients of a call, by name."""
    more: dict[str, Any] = {}
    if is_extended(case):
        more = more_of(case, given.input.device)
        # Every call draws the same masks.
        torch.manual_seed(3)
    with gpu_inside.masks_of_every_dtype():
        output, state, *shown = module(prepared(case, given.input), hx_of(given.states), **more)
    if isinstance(output, PackedSequence):
        output = output.data
    states = state if isinstance(state, tuple) else (state,)
    outputs = dict(zip(("output", "h_n", "c_n"), (output, *states), strict=False))
    if shown:
        every = (*shown[0].outputs[:-1], *shown[0].cells)
        outputs |= {f"shown {number}": value for number, value in enumerate(every)}
    results = {name: value.detach() for name, value in outputs.items()}
    if not case.training:
        return results
    leaves = {"input": given.input}
    leaves |= dict(zip(("h_0", "c_0"), given.states, strict=False))
    leaves |= dict(module.named_parameters())
    grads = [_grad(case, value, seed) for seed, value in enumerate(outputs.values(), 10)]
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
    return results | {f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}


_grads: dict[Any, Tensor] = {}


def _grad(case: CheckCase, value: Tensor, seed: int) -> Tensor:
    """The gradient that an output is given; kept, so that a graph captures no copy from the CPU."""
    key = (case, tuple(value.shape), value.dtype, value.device, seed)
    if key not in _grads:
        # Rounded as the low dtype rounds it, on the float64 side too.
        dtype = getattr(torch, case.dtype.split("_")[0])
        grad = random(tuple(value.shape), seed, value.device).to(dtype).to(value.dtype)
        if case.form == "strided":
            grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
        _grads[key] = grad
    return _grads[key]


def leaves_of(case: CheckCase, given: Data) -> Data:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(case.training)

    return Data(leaf(given.input), tuple(map(leaf, given.states)))


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """The float64 side is to owe nothing to what ours is later measured against."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def exact_results(case: CheckCase, exact: Module, given: Data) -> Tensors:
    with _without_cudnn(), triton_rnn.use_backend("reference"):
        return run(case, exact, leaves_of(case, given.to(torch.float64)))


def our_results(case: CheckCase, ours: Module, given: Data) -> Tensors:
    with triton_rnn.use_backend("triton"):
        return run(case, ours, leaves_of(case, given))


def errors(actual: Tensors, expected: Tensors) -> dict[str, list[float]]:
    """Per result the norm of the difference and its peak, both relative (see `Tolerance`)."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"results {sorted(actual)} are not {sorted(expected)}")
    found = {}
    for name, value in expected.items():
        if actual[name].shape != value.shape:
            raise AssertionError(f"{name}: shape {actual[name].shape} is not {value.shape}")
        difference = actual[name].double() - value
        if value.numel() == 0:
            continue
        norm = max(float(value.norm()), 1e-30)
        peak = float(difference.abs().max()) * value.numel() ** 0.5
        found[name] = [float(difference.norm()) / norm, peak / norm]
    return found


def verdict(case: CheckCase, found: dict[str, list[float]], **more: Any) -> Result:
    """A result by its errors; written so that a NaN is wrong."""
    tolerance = case.tolerance
    wrong = [
        f"{name}: {norm:.1e} by norm, {peak:.1e} at the peak"
        for name, (norm, peak) in found.items()
        if not (norm <= tolerance.norm and peak <= tolerance.peak)
    ]
    name, worst = max(found.items(), key=lambda item: (item[1][0] != item[1][0], item[1][0]))
    status = "wrong" if wrong else "ok"
    return {
        "status": status,
        "error": "; ".join(wrong),
        "worst": {"name": name, "norm": worst[0], "peak": max(p for _, p in found.values())},
        "errors": found,
        **more,
    }


# The checks -------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A case made ready: modules, data and the device."""

    case: CheckCase
    device: torch.device
    ours: Module
    twin: Module
    exact: Module
    given: Data

    def our_errors(self, given: Data | None = None) -> dict[str, list[float]]:
        given = given or self.given
        expected = exact_results(self.case, self.exact, given)
        return errors(our_results(self.case, self.ours, given), expected)


def check_numbers(bench: Bench) -> Result:
    expected = exact_results(bench.case, bench.exact, bench.given)
    found = errors(our_results(bench.case, bench.ours, bench.given), expected)
    torchs: float | None
    try:
        # For the reader: how near torch.nn comes in the same dtype.
        with triton_rnn.use_backend("reference"):
            theirs = run(bench.case, bench.twin, leaves_of(bench.case, bench.given))
        torchs = max(norm for norm, _ in errors(theirs, expected).values())
    except (RuntimeError, NotImplementedError):
        torchs = None
    return verdict(bench.case, found, torch=torchs)


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.contiguous().view(integers)


class _Load:
    """Work on a stream of its own: none, products, copies, the checked call itself, in turn."""

    def __init__(self, device: torch.device, call: Callable[[], object]) -> None:
        self.call = call
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            self.matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
            self.source = torch.zeros(1 << 26, device=device)
            self.target = torch.empty_like(self.source)

    def start(self, turn: int) -> None:
        if self.stream is None:
            return
        with torch.cuda.stream(self.stream):
            if turn % 4 == 1:
                for _ in range(4):
                    self.matrix @ self.matrix
            if turn % 4 == 2:
                for _ in range(4):
                    self.target.copy_(self.source)
            if turn % 4 == 3:
                self.call()


def check_repeat(bench: Bench) -> Result:
    """The same bits at every repetition, and right ones."""
    first = our_results(bench.case, bench.ours, bench.given)
    found = errors(first, exact_results(bench.case, bench.exact, bench.given))
    load = _Load(bench.device, lambda: our_results(bench.case, bench.ours, bench.given))
    repeats = REPEATS if bench.device.type == "cuda" else 2
    differed = {name: torch.zeros((), dtype=torch.int64, device=bench.device) for name in first}
    begun, done = time.monotonic(), 0
    while done < repeats and time.monotonic() - begun < REPEAT_SECONDS:
        load.start(done)
        for name, value in our_results(bench.case, bench.ours, bench.given).items():
            differed[name] += (_bits(value) != _bits(first[name])).any()
        done += 1
        if done % 10 == 0:
            gpu_inside.raise_failed_wait(bench.device)
    counts = {name: int(count) for name, count in differed.items() if count}
    result = verdict(bench.case, found, repeats=done)
    if counts:
        said = f"of {done} repetitions other bits: {counts}"
        result.update(status="wrong", error=f"{said}; {result['error']}")
    return result


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """All unwritten memory is NaN: what torch hands out, and what lies in its cache."""
    if device.type == "cuda":
        blocks = [
            torch.full((1 << size,), torch.nan, device=device)
            for size in range(7, 25)
            for _ in range(6)
        ]
        del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_poison(bench: Bench) -> Result:
    expected = exact_results(bench.case, bench.exact, bench.given)
    # Once before: what is set up at a first call belongs to no other.
    our_results(bench.case, bench.ours, bench.given)
    with poisoned(bench.device):
        if not bool(torch.empty(3, device=bench.device).isnan().all()):
            return {"status": "error", "error": "empty memory is not poisoned"}
        found = errors(our_results(bench.case, bench.ours, bench.given), expected)
    return verdict(bench.case, found)


def check_graph(bench: Bench) -> Result:
    """Captured after a warm-up on a side stream, as torch's manual has it, and replayed."""
    if bench.device.type != "cuda":
        return {"status": "skipped", "error": "there are no CUDA graphs on a CPU"}
    case, leaves = bench.case, leaves_of(bench.case, bench.given)
    with triton_rnn.use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(case, bench.ours, leaves)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, bench.ours, leaves)
        other = data(case, bench.device, seed=5)
        with torch.no_grad():
            pairs = zip((leaves.input, *leaves.states), (other.input, *other.states), strict=True)
            for leaf, new in pairs:
                leaf.copy_(new)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        replayed = {name: value.clone() for name, value in captured.items()}
        eager = run(case, bench.ours, leaves)
    result = verdict(case, errors(replayed, exact_results(case, bench.exact, other)))
    differ = [name for name in eager if not torch.equal(_bits(eager[name]), _bits(replayed[name]))]
    if differ:
        result.update(
            status="wrong", error=f"bits of the replay differ: {differ}; {result['error']}"
        )
    return result


def check_compiled(bench: Bench) -> Result:
    """By torch.compile with CUDA graphs of its own: a call that warms up, one captured, replays."""
    case, found = bench.case, {}
    expected = exact_results(case, bench.exact, bench.given)
    with triton_rnn.allow_compile(), triton_rnn.use_backend("triton"):
        bench.ours.compile(mode="reduce-overhead", fullgraph=True)
        for turn in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            actual = run(case, bench.ours, leaves_of(case, bench.given))
            for name, error in errors(actual, expected).items():
                found[f"{name}, call {turn}"] = error
            # What a graph returned is overwritten by the next call.
            del actual
    return verdict(case, found)


# Sequences of a batch that are given a number that is none, and which.
NONFINITE = ((0, float("nan")), (1, float("inf")), (2, float("-inf")))


def check_nonfinite(bench: Bench) -> Result:
    """NaN and infinities where torch has them; other sequences and their gradients as ever."""
    case, given = bench.case, bench.given
    step = 0 if case.is_packed else case.steps // 3
    clean = exact_results(case, bench.exact, given)
    for sequence, value in NONFINITE:
        given.input[step, sequence, sequence % case.width] = value
    expected = exact_results(case, bench.exact, given)
    actual = our_results(case, bench.ours, given)
    gpu_inside.raise_failed_wait(bench.device)
    wrong, finite = [], {}
    for name in ("output", "h_n", "c_n"):
        if name not in expected:
            continue
        ours, theirs = actual[name].double(), expected[name]
        for kind, find in (
            ("NaN", torch.isnan),
            ("+inf", torch.isposinf),
            ("-inf", torch.isneginf),
        ):
            count = int((find(ours) != find(theirs)).sum())
            if count:
                wrong.append(f"{name}: {kind} in {count} places where torch has none, or without")
        both = ours.isfinite() & theirs.isfinite()
        finite[name] = errors({name: ours[both]}, {name: theirs[both]})[name]
    if case.training:
        name, others = "grad of input", slice(len(NONFINITE), None)
        ours, theirs = actual[name][:, others], clean[name][:, others]
        finite[name] = errors({name: ours}, {name: theirs})[name]
    result = verdict(case, finite)
    if wrong:
        result.update(status="wrong", error="; ".join([*wrong, result["error"]]))
    return result


def check_autocast(bench: Bench) -> Result:
    """By the dtypes that autocast may have: torch.nn's dtypes, and numbers as of float16."""
    case = bench.case
    if bench.device.type != "cuda":
        return {"status": "skipped", "error": "a CPU's autocast is torch.nn's"}
    expected, found = exact_results(case, bench.exact, bench.given), {}
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            actual = our_results(case, bench.ours, bench.given)
            theirs = run(case, bench.twin, leaves_of(case, bench.given))
        differ = [name for name in theirs if actual[name].dtype != theirs[name].dtype]
        if differ:
            return {"status": "wrong", "error": f"{dtype}: not torch.nn's dtypes: {differ}"}
        for name, (norm, peak) in errors(actual, expected).items():
            found[f"{name}, {dtype}"] = [norm, peak]
    return verdict(case, found)


def check_devices(bench: Bench) -> Result:
    """On every GPU, while another one is current: right, the same bits, one by one and together.

    Together means launched in turn before anything is waited for, and then by a thread for each.
    """
    case, is_gpu = bench.case, bench.device.type == "cuda"
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if is_gpu and len(devices) < 2:
        return {"status": "skipped", "error": "there is one GPU"}
    if not is_gpu:
        # A rehearsal.
        devices = [bench.device] * 2
    modules = [copy.deepcopy(bench.ours).to(device) for device in devices]
    given = [
        Data(bench.given.input.to(device), tuple(s.to(device) for s in bench.given.states))
        for device in devices
    ]

    def call(number: int) -> Tensors:
        return our_results(case, modules[number], given[number])

    expected = exact_results(case, bench.exact, bench.given)
    numbers = range(len(devices))
    with torch.cuda.device(bench.device) if is_gpu else contextlib.nullcontext():
        every = [call(number) for number in numbers]
        rounds = [call(number) for _ in range(REPEATS // 10 if is_gpu else 1) for number in numbers]
        if is_gpu:
            # Triton's interpreter is of one thread.
            with ThreadPoolExecutor(len(devices)) as pool:
                rounds += pool.map(call, [*numbers] * (REPEATS // 10))
    for device in devices:
        gpu_inside.raise_failed_wait(device)
    home = [{name: value.to(bench.device) for name, value in one.items()} for one in every]
    found = errors(home[0], expected)
    for one in home[1:]:
        for name, (norm, peak) in errors(one, expected).items():
            found[name] = [max(found[name][0], norm), max(found[name][1], peak)]
    differ = sorted(
        name
        for number, one in enumerate(rounds)
        for name, value in one.items()
        if not torch.equal(_bits(value), _bits(every[number % len(devices)][name]))
    )
    result = verdict(case, found, devices=len(devices))
    if differ:
        said = f"other bits beside other GPUs: {dict(Counter(differ))}"
        result.update(status="wrong", error=f"{said}; {result['error']}")
    return result


CHECKS: dict[str, Callable[[Bench], Result]] = {
    "numbers": check_numbers,
    "repeat": check_repeat,
    "poison": check_poison,
    "graph": check_graph,
    "compiled": check_compiled,
    "nonfinite": check_nonfinite,
    "autocast": check_autocast,
    "devices": check_devices,
}


def check(case: CheckCase, device: torch.device) -> Result:
    """Check one case; what it raises is the caller's to note."""
    begun = time.monotonic()
    torch.manual_seed(zlib.crc32(case.id.encode()))
    gpu_inside.set_tf32(case.dtype != "float32")
    _grads.clear()
    ours, twin, exact = modules(case, device)
    given = data(case, device)
    with gpu_inside.forced(case.variant):
        leaves = leaves_of(case, given)
        more = more_of(case, device)
        plans = gpu_inside.plans_of(
            ours, prepared(case, leaves.input), hx_of(leaves.states), **more
        )
        if any(plan is None for plan in plans):
            return {"status": "skipped", "error": "no plan of this variant fits"}
        result = CHECKS[case.check](Bench(case, device, ours, twin, exact, given))
        gpu_inside.raise_failed_wait(device)
    result["plan"] = [str(plan) for plan in plans]
    result["seconds"] = round(time.monotonic() - begun, 2)
    return result
