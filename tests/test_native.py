"""The C loops: their arithmetic, their threads, their memory, and what happens without a compiler.

That they compute what the other backends do is in the tests that run under every backend.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import LAYERS, assert_same_results, random, random_state, run, twins
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn.backends import native
from triton_rnn.backends.native import build, parts, rules

ROOT = Path(__file__).parent.parent
FUNCTIONS = {"sigmoid": 0, "tanh": 1}
# In units of the last place of the result. Measured over these ranges: sigmoid 2.3 for float32 and
# 2.2 for float64, tanh 1.3 for both.
WORST_ULP = {"sigmoid": 2.5, "tanh": 1.5}

pytestmark = pytest.mark.skipif(
    isinstance(native.library(torch.float32, "lstm"), str), reason="the C loops do not compile here"
)


def pointwise(name, values):
    result = torch.empty_like(values)
    functions = native.library(values.dtype, "lstm")
    functions.pointwise(FUNCTIONS[name], values.numel(), values.data_ptr(), result.data_ptr())
    return result


def exact(name, values):
    """In 80-bit floating point, where there is one."""
    x = values.double().numpy().astype(np.longdouble)
    return np.tanh(x) if name == "tanh" else 1 / (1 + np.exp(-x))


def all_magnitudes(dtype):
    """Numbers of both signs with every exponent, thousands to each of those that matter."""
    generator = torch.Generator().manual_seed(0)
    largest = 88.0 if dtype == torch.float32 else 708.0
    dense = (torch.rand(400_000, generator=generator, dtype=torch.float64) * 2 - 1) * largest
    near = torch.randn(400_000, generator=generator, dtype=torch.float64)
    small = torch.logspace(-35, 0, 100_000, dtype=torch.float64)
    return torch.cat([dense, near, small, -small]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_pointwise_functions_are_good_to_the_last_places(name, dtype):
    if dtype == torch.float64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("nothing more exact than double to compare with here")
    values = all_magnitudes(dtype)
    expected = exact(name, values)
    rounded = expected.astype(values.numpy().dtype)
    ulp = np.spacing(np.abs(rounded)).astype(np.longdouble)
    error = np.abs(pointwise(name, values).numpy().astype(np.longdouble) - expected) / ulp
    # A sigmoid of less than the smallest normal number may be zero.
    normal = np.abs(rounded) >= np.finfo(rounded.dtype).tiny
    assert error[normal].max() <= WORST_ULP[name], float(error[normal].max())
    # e^x would overflow from here on, so the sigmoid of -x may be zero a little early.
    tiny = pointwise(name, values).numpy()[~normal]
    assert np.all(np.abs(tiny) <= 2 * np.finfo(rounded.dtype).tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pointwise_functions_at_the_ends(dtype):
    inf, nan = float("inf"), float("nan")
    largest = torch.finfo(dtype).max
    values = torch.tensor([inf, -inf, nan, -nan, 0.0, -0.0, largest, -largest], dtype=dtype)
    sigmoid, tanh = pointwise("sigmoid", values), pointwise("tanh", values)
    assert sigmoid[[0, 1, 4, 5, 6, 7]].tolist() == [1, 0, 0.5, 0.5, 1, 0]
    assert tanh[[0, 1, 4, 5, 6, 7]].tolist() == [1, -1, 0, 0, 1, -1]
    assert sigmoid[2:4].isnan().all()
    assert tanh[2:4].isnan().all()
    assert tanh[5].signbit()
    smallest = torch.tensor([1e-40 if dtype == torch.float32 else 1e-310], dtype=dtype)
    assert torch.equal(pointwise("tanh", smallest), smallest)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_nan_stays_in_its_own_sequence(kind):
    theirs, ours = twins(kind, 5, 17)
    input = random(6, 3, 5)
    input[2, 1, 3] = float("nan")
    for mode in ("training", "inference"):
        with triton_rnn.use_backend("native"), torch.set_grad_enabled(mode == "training"):
            found = ours(input)[0]
        expected = theirs(input)[0]
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_number_of_threads_gives_the_same_bits(monkeypatch, kind, packed):
    _, ours = twins(kind, 19, 75, bidirectional=True, dtype=torch.float32)
    input, hx = random(11, 5, 19, dtype=torch.float32), random_state(ours, 5)
    prepare = {}
    if packed:
        lengths = [11, 9, 9, 4, 1]
        prepare = {"prepare": lambda x: pack_padded_sequence(x, lengths)}
    results = []
    for threads in (1, 2, 3, 5, 16):
        monkeypatch.setattr(rules, "threads", lambda request, rows, n=threads: n)
        native._frame.cache_clear()
        with triton_rnn.use_backend("native"):
            results.append(run(ours, input, hx, **prepare))
    native._frame.cache_clear()
    for found in results[1:]:
        for name, value in results[0].items():
            assert value is None or torch.equal(found[name], value), name


def test_threads_follow_torchs_number_and_the_work(monkeypatch):
    # The least that fifty steps of sixteen sequences are: enough work for four.
    large = triton_rnn.explain(triton_rnn.GRU(8, 512), torch.zeros(9, 16, 8)).request
    small = triton_rnn.explain(triton_rnn.GRU(8, 16), torch.zeros(9, 1, 8)).request
    for available in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=available: n)
        assert rules.threads(large, 9 * 16) == available
        assert rules.threads(small, 9) == 1


def test_a_team_smaller_than_asked_for_does_all_the_work():
    code = """
import torch, triton_rnn
from triton_rnn.backends.native import rules
torch.manual_seed(0)
gru, input = triton_rnn.GRU(128, 128), torch.randn(9, 16, 128)
with torch.no_grad(), triton_rnn.use_backend("native"):
    rules.threads = lambda request, rows: 3
    found = gru(input)[0]
    rules.threads = lambda request, rows: 1
    print(torch.equal(found, gru(input)[0]))
"""
    for limit in ("1", "2", "8"):
        environment = {**os.environ, "OMP_THREAD_LIMIT": limit, "OMP_DYNAMIC": "true"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "True", done.stderr


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have():
    code = """
import os, signal, torch, triton_rnn
from triton_rnn.backends.native import rules
torch.set_num_threads(2)
gru, input = triton_rnn.GRU(128, 128), torch.randn(9, 16, 128)
def call():
    with torch.no_grad(), triton_rnn.use_backend("native"):
        return gru(input)[0]
expected = call()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if torch.equal(call(), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_threads_of_python_share_a_module():
    theirs, ours = twins("gru", 16, 64)
    inputs = [random(30, 4, 16) for _ in range(4)]
    expected = [theirs(input)[0] for input in inputs]
    results: list[torch.Tensor | None] = [None] * 4

    def work(index):
        with triton_rnn.use_backend("native"):
            for _ in range(20):
                results[index] = ours(inputs[index])[0]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for found, value in zip(results, expected, strict=True):
        torch.testing.assert_close(found, value)


LAYOUTS = {
    "steps apart": lambda x: torch.cat([x, x], 0)[::2],
    "rows apart": lambda x: torch.cat([x, x], 1)[:, ::2],
    "numbers apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "upside down": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "one row for all": lambda x: x[:, :1].expand_as(x),
    "one step for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x[..., :1].expand_as(x),
    "one for all": lambda x: x[:1, :1, :1].expand_as(x),
    "negated lazily": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("size", [(7, 3, 16), (7, 1, 5), (1, 4, 5), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_of_any_layout(layout, size):
    theirs, ours = twins("lstm", size[-1], 9, bidirectional=True)
    input = LAYOUTS[layout](random(*size))
    before = input.clone()
    with triton_rnn.use_backend("native"):
        found = run(ours, input)
    assert_same_results(found, run(theirs, input))
    assert torch.equal(input, before)


def test_gradients_and_weights_of_any_layout():
    theirs, ours = twins("gru", 5, 9)
    for module in (theirs, ours):
        module.weight_hh_l0.data = module.weight_hh_l0.data.t().contiguous().t()
    input = random(7, 3, 5)
    found = []
    for module in (ours, theirs):
        leaf = input.clone().requires_grad_()
        with triton_rnn.use_backend("native"):
            output, h_n = module(leaf)
        # An expanded gradient, a strided one, and none for h_n.
        output.sum().backward(retain_graph=True)
        output.backward(random(9, 3, 7).permute(2, 1, 0))
        assert h_n.grad_fn is not None
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
    for ours_grad, theirs_grad in zip(*found, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize(
    "lengths",
    [[700, 699, 350, 2, 1], [5] * 150 + [3] * 100, [3] * 200 + [2] * 200 + [1] * 50],
    ids=["long", "a piece of two steps", "a step larger than a piece"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_sequences_are_worked_on_in_pieces(kind, lengths):
    """More steps than fit the buffers at once, forward and reverse, padded and packed."""
    theirs, ours = twins(kind, 3, 33, bidirectional=True)
    input = random(lengths[0], len(lengths), 3)
    with triton_rnn.use_backend("native"):
        assert_same_results(run(ours, input), run(theirs, input))
        prepare = {"prepare": lambda x: pack_padded_sequence(x, lengths)}
        assert_same_results(run(ours, input, **prepare), run(theirs, input, **prepare))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_has_the_bits_of_a_step_among_others(kind, batch, dtype):
    """Of one step the weights are laid out piece by piece, for they are used once."""
    _, ours = twins(kind, 70, 150, bidirectional=kind == "gru", dtype=dtype)
    hx = random_state(ours, batch)
    twice = [h.repeat(1, 2, 1) for h in (hx if isinstance(hx, tuple) else (hx,))]
    with triton_rnn.use_backend("native"), torch.no_grad():
        input = random(1, batch, 70, dtype=dtype)
        alone = ours(input, hx)[0]
        among = ours(torch.cat([input, input]), hx)[0][:1]
        wide = ours(input.repeat(1, 2, 1), twice[0] if len(twice) == 1 else tuple(twice))[0]
    # Backward in time the step would be the last of two.
    forward = among.size(-1) // (1 + ours.bidirectional)
    assert torch.equal(alone[..., :forward], among[..., :forward])
    assert torch.equal(alone, wide[:, :batch]) and torch.equal(alone, wide[:, batch:])


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch_is_torchs(kind):
    theirs, ours = twins(kind, 3, 4, bidirectional=True)
    with triton_rnn.use_backend("native"):
        found = run(ours, torch.empty(5, 0, 3, dtype=torch.float64))
    assert_same_results(found, run(theirs, torch.empty(5, 0, 3, dtype=torch.float64)))
    assert all(p.grad.count_nonzero() == 0 for p in ours.parameters())


def test_only_what_is_wanted_is_computed():
    _, ours = twins("lstm", 3, 4)
    ours.weight_ih_l0.requires_grad_(False)
    ours.bias_hh_l0.requires_grad_(False)
    with triton_rnn.use_backend("native"):
        ours(random(5, 2, 3))[0].sum().backward()
    assert ours.weight_ih_l0.grad is None
    assert ours.bias_hh_l0.grad is None
    assert ours.weight_hh_l0.grad is not None


@pytest.mark.parametrize("quick", [native._quick(), None], ids=["c", "python"])
def test_no_memory_raises(monkeypatch, quick):
    functions = native.library(torch.float64, "gru")
    failing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(lambda call: 1)
    monkeypatch.setattr(functions, "forward", parts.Function.of(failing, 1))
    monkeypatch.setattr(native, "_quick", lambda: quick)
    _, ours = twins("gru", 3, 4)
    with triton_rnn.use_backend("native"), pytest.raises(MemoryError, match="recurrent layer"):
        ours(random(5, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_refused_by_name(dtype):
    layer = triton_rnn.GRU(3, 4, dtype=dtype)
    with (
        triton_rnn.use_backend("native"),
        pytest.raises(triton_rnn.BackendError, match="not float32 or float64"),
    ):
        layer(torch.zeros(5, 2, 3, dtype=dtype))


WITHOUT_COMPILER = """
import torch, triton_rnn
gru, input = triton_rnn.GRU(3, 4), torch.randn(50, 2, 3)
explanation = triton_rnn.explain(gru, input)
print(explanation.backend, "|", explanation.reasons["native"])
gru(input)[0].sum().backward()
try:
    with triton_rnn.use_backend("native"):
        gru(input)
except triton_rnn.BackendError as error:
    print(error)
from triton_rnn import info
print(info.collect()["backends"]["native"])
"""


def test_without_a_compiler_torchscript_runs_and_everybody_is_told(tmp_path):
    environment = {**os.environ, "CC": "/nowhere/cc", "TRITON_RNN_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_COMPILER],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    reason = "no C compiler: CC=/nowhere/cc is not there"
    assert lines[0] == f"torchscript | {reason}"
    assert lines[1] == f"backend 'native' cannot run this call: {reason}"
    assert lines[2] == reason


def test_the_struct_of_call_h_is_what_python_packs():
    source = parts.SOURCE.with_name("call.h").read_text()
    body = re.search(r"typedef struct \{(?:(?!typedef).)*\} Call;", source, re.DOTALL).group()
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    fields = 0
    for line in body.replace("\n", " ").split(";")[:-2]:
        if "(*" in line:
            fields += 1
            continue
        for name in line.split("{")[-1].split(","):
            count = 1
            for length in re.findall(r"\[(\d+)\]", name):
                count *= int(length)
            fields += count
    packed = (native._SHARED, native._OWN, native._TEAM, native._BACKWARD)
    assert sum(one.size for one in packed) == 8 * fields


def twisted(tensor):
    """The same numbers with gaps between them."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.size(-1), dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def lazily_negative(tensor):
    """The same numbers, as a minus that is still to be done."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@pytest.mark.skipif(native._quick() is None, reason="torch has no exchange API, or C no such file")
@pytest.mark.parametrize("change", [None, twisted, lazily_negative], ids=str)
@pytest.mark.parametrize("form", ["padded", "batch_first", "packed", "unbatched", "one step"])
@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_are_put_together_alike_in_c_and_in_python(monkeypatch, kind, form, change):
    _, ours = twins(kind, 7, 9, bidirectional=True, batch_first=form == "batch_first")
    shape = {"unbatched": (6, 7), "one step": (1, 3, 7)}.get(form, (6, 3, 7))
    batch = {"unbatched": None, "batch_first": 6}.get(form, 3)
    input, hx = random(*shape), random_state(ours, batch)

    def prepare(x):
        x = x if change is None else change(x)
        return pack_padded_sequence(x, [6, 4, 1]) if form == "packed" else x

    if change is not None:
        ours.weight_hh_l0.data = change(ours.weight_hh_l0.data)
    quick, outcomes = native._quick(), []

    def counted(*arguments):
        outcomes.append(quick(*arguments))
        return outcomes[-1]

    found = []
    for function in (counted, None):
        monkeypatch.setattr(native, "_quick", lambda function=function: function)
        with triton_rnn.use_backend("native"):
            found.append(run(ours, input, hx, prepare=prepare))
    assert outcomes == [0 if change is None else native._UNUSUAL] * 2
    for name, value in found[0].items():
        assert value is None or torch.equal(found[1][name], value), name


def test_tensors_that_a_transform_has_left_behind_are_tensors():
    left = []
    torch.func.grad(lambda x: (left.append(2 * x), x.sum())[1])(torch.randn(9, 2, 5))
    theirs, ours = twins("gru", 5, 6, dtype=torch.float32)
    with triton_rnn.use_backend("native"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(ours(left[0])[0], theirs(left[0])[0], atol=1e-6)


def sanitizers():
    """What to load first so that a sanitized library can be loaded; "" if there is none."""
    command = build.compiler()
    found = []
    for name in ("libasan.so", "libubsan.so"):
        if command is not None and sys.platform == "linux":
            told = subprocess.run(
                [*command, f"-print-file-name={name}"], capture_output=True, text=True
            ).stdout.strip()
            if os.path.isabs(told) and os.path.exists(told):
                found.append(os.path.realpath(told))
    return " ".join(found) if len(found) == 2 else ""


def sanitized(tmp_path, source=None):
    """Forty random calls under the address and undefined-behaviour sanitizers."""
    preload = sanitizers()
    if not preload:
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers")
    environment = {
        **os.environ,
        "TRITON_RNN_CACHE": str(tmp_path),
        "TRITON_RNN_CFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -O0 -g",
        "LD_PRELOAD": preload,
        # Python itself does not free everything at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    program = ["tests/native_fuzz.py"]
    if source is not None:
        code = (
            "import pathlib, runpy; from triton_rnn.backends.native import parts;"
            f"parts.SOURCE = pathlib.Path({str(source)!r});"
            "runpy.run_path('tests/native_fuzz.py', run_name='__main__')"
        )
        program = ["-c", code]
    return subprocess.run(
        [sys.executable, *program, "40", "7"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_no_array_is_read_or_written_outside(tmp_path):
    done = sanitized(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "40 cases"


def test_the_sanitizers_would_see_a_store_beyond_a_row(tmp_path):
    """What the test above is worth: a whole vector stored at the end of a caller's row is seen."""
    copied = shutil.copytree(parts.SOURCE.parent, tmp_path / "native")
    header = copied / "vectors.h"
    text = header.read_text()
    right = "if (count >= LANES)\n        store(to, value);"
    assert right in text
    header.write_text(text.replace(right, "if (count >= 1)\n        store(to, value);"))
    done = sanitized(tmp_path, copied / parts.SOURCE.name)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr


def saved_by(module, input, hx=None):
    """How many numbers a call keeps for its backward, beside what the caller has."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(input, hx)
    callers = {
        tensor.data_ptr() for tensor in (input, hx, *module.parameters()) if tensor is not None
    }
    return sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in callers)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_rnn_keeps_each_state_once(bidirectional):
    """What one step has after it the next one has before it, and the first one is given."""
    module = triton_rnn.RNN(64, 64, bidirectional=bidirectional)
    input, hx = torch.randn(20, 3, 64), torch.randn(1 + bidirectional, 3, 64)
    states = 20 * 3 * 64 * (1 + bidirectional)
    with triton_rnn.use_backend("native"):
        for given in (None, hx):
            assert states <= saved_by(module, input, given) < 1.1 * states


@pytest.mark.parametrize("given", [True, False], ids=["given", "zeros"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_an_rnns_sequences_begin_with_gets_into_the_gradient_of_weight_hh(
    bidirectional, given
):
    """Also where they begin at different steps: packed, in the second direction."""
    theirs, ours = twins("rnn_tanh", 5, 9, bidirectional=bidirectional)
    input = random(7, 4, 5)
    hx = random(1 + bidirectional, 4, 9, seed=1) if given else None
    found = []
    for module in (theirs, ours):
        with triton_rnn.use_backend("native"):
            packed = pack_padded_sequence(input, [7, 5, 5, 1])
            output, h_n = module(packed, hx)
        (output.data.square().sum() + h_n.sum()).backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("which", ["input", "weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_storage_that_was_freed_is_torchs_error(kind, which):
    """As FSDP leaves a parameter's between uses. To read it would end the process."""
    _, ours = twins(kind, 3, 4)
    input = random(20, 2, 3).requires_grad_()
    freed = input if which == "input" else getattr(ours, which)
    output, _ = ours(input)
    freed.untyped_storage().resize_(0)
    with triton_rnn.use_backend("native"):
        with pytest.raises(RuntimeError, match="its data is not allocated yet"):
            output.sum().backward()
        for context in (torch.no_grad, torch.enable_grad):
            with context(), pytest.raises(RuntimeError, match="its data is not allocated yet"):
                ours(input)
