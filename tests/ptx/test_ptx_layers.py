"""Layers on the very code that a GPU is given, run on a machine that knows PTX.

The interpreter has no PTX, and the compiler only says that there is code: here the inline assembly,
the fragments of matrix instructions, the barriers and the exchange through memory are executed.
"""

import json
import re
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

import own_cells
import triton
from compare import each_state, exact_and_ours, input_and_hx, pack, run_on_kernels
from ptx_layers import forget_compiled, on_machine
from ptx_machine import FIRST_ADDRESS, Fault
from tolerances import TOLERANCES, assert_close, assert_same_bits, random, run

import triton_rnn
from bench import gpu_steps
from triton_rnn import extended, health
from triton_rnn.backends.triton import launch
from triton_rnn.backends.triton.launcher import Launcher
from triton_rnn.kernels.chips import CHIPS
from triton_rnn.kernels.plan import Shape
from triton_rnn.kernels.planner import plan

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def quiet_arithmetic():
    """What is masked is computed all the same; a GPU says nothing, numpy would warn."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Every empty floating tensor is full of NaN (see tests/test_poison.py)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_failures_left():
    """Each test begins and ends without a failed wait."""
    yield
    words = launch._error_words(torch.device("cpu"))
    left = words.tolist()
    words.zero_()
    assert not any(left), f"a wait failed and nobody asked: {left}"


def results(kind, chip, variant, sizes, *, dtype=F16, lengths=None, options=None, **how_run):
    """Results and gradients of a layer on the machine, and float64 torch's.

    Args:
        sizes: T, N, I, H. lengths: of a packed batch. options: of the layer. The others are for
            `on_machine`.
    """
    torch.manual_seed(0)
    seq_len, batch, input_size, hidden_size = sizes
    exact, ours = exact_and_ours(kind, input_size, hidden_size, dtype=dtype, **(options or {}))
    input, hx = input_and_hx(kind, ours, seq_len, batch, input_size, batch=batch)
    how = {} if lengths is None else {"prepare": pack(lengths)}
    expected = run(exact, input.double(), each_state(torch.Tensor.double, hx), **how)
    with on_machine(chip, variant=variant, **how_run) as seen:
        actual = run_on_kernels(ours, input, hx, **how)
    assert {plan.variant for plan in seen.plans} == {variant}
    assert len(seen.executed) >= 3, "projection, forward, backward"
    return actual, expected


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name].double(), value, name, tolerance)


# Kind, chip, variant, dtype, sizes. More sequences than a block has, where that is another way
# through the kernel; sizes that are no multiple of a block, where a plan takes them.
LAYERS = [
    ("lstm", "H200", "cluster", F16, (3, 11, 8, 64)),
    ("gru", "H200", "cluster", BF16, (3, 11, 8, 64)),
    ("rnn_tanh", "H200", "cluster", F16, (3, 11, 8, 64)),
    ("lstm", "H200", "cluster", BF16, (3, 3, 8, 128)),
    ("gru", "B200", "cluster", F16, (3, 3, 8, 40)),
    ("lstm", "H200", "cooperative", F16, (3, 11, 8, 64)),
    ("gru", "H200", "cooperative", BF16, (3, 11, 8, 72)),
    ("rnn_tanh", "A100", "cooperative", BF16, (3, 11, 8, 80)),
    ("lstm", "B200", "cooperative", F16, (3, 3, 8, 128)),
    ("gru", "H200", "streaming", F16, (2, 5, 8, 100)),
    ("lstm", "A100", "streaming", BF16, (3, 5, 8, 64)),
    ("lstm", "H200", "resident", F16, (4, 11, 8, 64)),
    ("gru", "H200", "resident", BF16, (4, 5, 8, 33)),
    ("rnn_tanh", "A100", "resident", F16, (4, 5, 8, 96)),
    ("lstm", "H200", "stepwise", F16, (3, 5, 8, 50)),
    ("gru", "H200", "stepwise", BF16, (3, 1, 8, 16)),
]


@pytest.mark.parametrize(
    ("kind", "chip", "variant", "dtype", "sizes"),
    LAYERS,
    ids=lambda value: str(value).removeprefix("torch.").replace(" ", ""),
)
def test_a_layer_is_torchs(kind, chip, variant, dtype, sizes):
    actual, expected = results(kind, chip, variant, sizes, dtype=dtype, seed=1)
    assert_near(actual, expected, TOLERANCES[dtype])


# A cluster's programs hold one copy of W_hh; full float32 takes two.
@pytest.mark.parametrize(
    ("kind", "variant", "size", "precision"),
    [
        ("lstm", "cluster", 32, "tf32"),
        ("gru", "cooperative", 36, "tf32"),
        ("gru", "cooperative", 36, "ieee"),
        ("rnn_tanh", "resident", 32, "tf32"),
        ("rnn_tanh", "resident", 32, "ieee"),
    ],
)
def test_float32_is_torchs(monkeypatch, kind, variant, size, precision):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    actual, expected = results(kind, "H200", variant, (3, 5, 8, size), dtype=F32, seed=2)
    # TF32 has as many bits as float16.
    like = F16 if precision == "tf32" else F32
    assert_near(actual, expected, TOLERANCES[like])


@pytest.mark.parametrize("variant", ["cluster", "cooperative", "streaming", "resident"])
def test_a_packed_batch_in_both_directions_is_torchs(variant):
    lengths = [4, 1, 3, 4, 2, 1, 1, 3, 2]
    actual, expected = results(
        "gru",
        "H200",
        variant,
        (4, 9, 8, 48),
        lengths=lengths,
        options={"bidirectional": True},
    )
    assert_near(actual, expected, TOLERANCES[F16])


@pytest.mark.parametrize("variant", ["cluster", "cooperative"])
def test_the_order_of_events_changes_no_bit(variant):
    """Programs hand each other what they computed: who is fast, what arrives first, and when one
    looks for it, must not matter."""
    layer = ("lstm", "H200", variant, (4, 10, 8, 32))
    found = [results(*layer, seed=seed)[0] for seed in range(3)]
    if variant == "cooperative":
        found.append(results(*layer, seed=3, pause=300)[0])
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("variant", ["cluster", "cooperative"])
def test_a_second_call_starts_what_the_first_one_found(monkeypatch, variant):
    """By the launcher's own way, which hands Triton's driver addresses alone."""
    layer = triton_rnn.LSTM(8, 32, dtype=F16)
    input = random(3, 5, 8, dtype=F16)
    layer.requires_grad_(False)
    with on_machine("H200", variant=variant) as seen, triton_rnn.use_backend("triton"):
        first, _ = layer(input)
        monkeypatch.delattr(Launcher, "_launch")
        monkeypatch.delattr(Launcher, "_launch_clusters")
        second, _ = layer(input)
    assert len(seen.executed) == 4
    assert torch.equal(first, second)


def test_a_users_cell_is_its_own_loop():
    exact = own_cells.PeepholeLSTM(8, 40, dtype=torch.float64)
    ours = own_cells.PeepholeLSTM(8, 40, dtype=F16)
    ours.load_state_dict(exact.state_dict())
    exact.load_state_dict(ours.state_dict())
    input = random(3, 5, 8, dtype=F16)
    found = []
    for module, x in ((exact, input.double()), (ours, input)):
        with on_machine("H200", variant="cluster") as seen:
            x = x.clone().requires_grad_()
            with triton_rnn.use_backend("triton" if module is ours else "reference"):
                output, _ = module(x)
                output.backward(random(*output.shape, seed=3, dtype=output.dtype))
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append({"output": output.detach(), "grad of input": x.grad, **grads})
    assert len(seen.executed) >= 3
    assert_near(found[1], found[0], TOLERANCES[F16])


@pytest.mark.parametrize("variant", ["cluster", "cooperative", "streaming", "resident"])
def test_a_modules_options_lengths_and_resets_are_those_of_the_plain_loop(monkeypatch, variant):
    torchs = extended.dropout

    def dropout(x, p, training):
        # torch draws other numbers for other dtypes.
        return x * torchs(torch.ones_like(x, dtype=torch.float64), p, training).to(x.dtype)

    monkeypatch.setattr(extended, "dropout", dropout)
    options = {"recurrent_dropout": 0.4, "zoneout": (0.3, 0.2), "clip_cell": 0.5}
    ours = triton_rnn.LSTM(8, 32, bidirectional=True, dtype=F16, **options)
    exact = triton_rnn.LSTM(8, 32, bidirectional=True, dtype=torch.float64, **options)
    exact.load_state_dict(ours.state_dict())
    starts = torch.zeros(4, 5, dtype=torch.bool)
    starts[2, ::2] = True
    lengths, input = torch.tensor([4, 3, 0, 4, 1]), random(4, 5, 8, dtype=F16)
    found = []
    for module, x in ((exact, input.double()), (ours, input)):
        with on_machine("H200", variant=variant, seed=4) as seen:
            x = x.clone().requires_grad_()
            torch.manual_seed(7)
            with triton_rnn.use_backend("triton" if module is ours else "reference"):
                output, _, every = module(x, lengths=lengths, reset_mask=starts, all_states=True)
                shown = torch.cat([output, *every.cells], -1)
                shown.backward(random(*shown.shape, seed=3, dtype=shown.dtype))
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append({"shown": shown.detach(), "grad of input": x.grad, **grads})
    assert {plan.variant for plan in seen.plans} == {variant}
    assert_near(found[1], found[0], TOLERANCES[F16])


@pytest.mark.parametrize("variant", ["cluster", "cooperative"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_no_step_waits_for_memory(kind, variant):
    """But the first ones: what a step loads, or watches, has been asked for some steps before. A
    trip beyond the L2 cache takes as long as a step."""
    found = []
    for seq_len in (6, 9):
        layer = getattr(triton_rnn, kind.upper())(8, 32, dtype=F16)
        with on_machine("H200", variant=variant) as seen, triton_rnn.use_backend("triton"):
            output, _ = layer(random(seq_len, 5, 8, dtype=F16))
            output.backward(random(*output.shape, seed=3, dtype=F16))
        found.append({name: cold for name, cold in seen.cold.items() if "recurrence" in name})
    assert len(found[0]) == 2
    assert found[0] == found[1]


def without(pattern, count=0):
    """Takes instructions out of a kernel."""
    return lambda text: re.sub(pattern, "", text, count=count)


RACE = r"since the last barrier|nobody has written"
SENT = r"@inside st\.relaxed\.cluster\.b\d+ [^;]*;"
UNWRITTEN = r"(@\w+ )?st\.shared\.v4\.b32 [^;]*\{none, none, none, none\};(?!\s*add)"


@pytest.mark.parametrize(
    ("variant", "edit", "found"),
    [
        ("cluster", without(r"bar\.sync\s+0;"), RACE),
        ("cluster", without(SENT, 1), "waited in vain"),
        ("cluster", without(UNWRITTEN), "is off by"),
        ("cooperative", without(r"bar\.sync\s+0;"), RACE),
        ("cooperative", without(r"@inside st\.relaxed\.gpu\.global[^;]*;", 1), "waited in vain"),
        ("streaming", lambda text: text.replace("gpu.release", "gpu.relaxed"), "is off by"),
        ("streaming", without(r"bar\.sync\s+0;"), RACE),
    ],
    ids=[
        "cluster-barrier", "cluster-send", "cluster-unwrite",
        "cooperative-barrier", "cooperative-send", "streaming-release", "streaming-barrier",
    ],
)  # fmt: skip
def test_what_is_left_out_is_missed(monkeypatch, variant, edit, found):
    """Each of these would hang a GPU, or give other numbers at times."""
    monkeypatch.setattr(health, "_failures", {})
    seen = set()
    for seed in range(9):
        try:
            actual, expected = results(
                "lstm", "H200", variant, (3, 3, 8, 24), seed=seed, edit=edit,
                polls=1024,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                launch.raise_failed_wait(torch.device("cpu"))
            assert_near(actual, expected, TOLERANCES[F16])
        except (Fault, RuntimeError, AssertionError) as error:
            seen.add(str(error))
            if re.search(found, str(error)):
                return
    pytest.fail(f"nobody missed it: {seen}")


@pytest.mark.parametrize("variant", ["cooperative", "cluster"])
def test_the_clocks_of_gpu_steps(variant, tmp_path, monkeypatch):
    """Kernels that take notes compute the same, and note every step of every warp in order."""
    T, N, H = 6, 11, 64
    notes = gpu_steps.Notes(torch.device("cpu"), warps=64, steps=T + 1)
    baked, there = str(notes.words.data_ptr()), str(FIRST_ADDRESS)
    # No kernel from before knows of notes, and none with notes may be found later.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    forget_compiled()
    try:
        with notes.taken():
            actual, expected = results(
                "lstm",
                "H200",
                variant,
                (T, N, 8, H),
                known=[notes.words],
                edit=lambda text: text.replace(baked, there),
            )
    finally:
        forget_compiled()
    assert_near(actual, expected, TOLERANCES[F16])
    # A cluster's backward waits in another way, so there the forward's notes are left.
    kernel = "forward" if variant == "cluster" else "backward"
    used = plan(Shape(kernel, 4, H, 1, N, 2), CHIPS["H200"], variant)
    # A backward has one step more than a forward, which belongs to no other warp's notes.
    assert not notes.words[:, T + 2].any()
    noted = notes.of(used, T)
    assert noted[..., 2].min() >= 1
    began, had, _, stored = noted.unbind(3)
    assert (had >= began).all() and (stored[..., 1:] >= had[..., :-1]).all()
    assert (began[..., 1:] >= stored[..., 1:]).all()
    monkeypatch.setattr(gpu_steps, "FIRST", 1)
    found = gpu_steps.summary(noted)
    assert found["step"] >= found["waiting_last_warp"] >= found["waiting_median_warp"] >= 0
    assert found["looks"] > 1 and 0 < found["in_vain"] <= 1 and found["work"] > 0


def test_gpu_steps_writes_what_it_finds_and_what_failed(tmp_path, monkeypatch):
    """As on a GPU, but that the machine is told where the notes are."""
    known, there = [], str(FIRST_ADDRESS)

    class Known(gpu_steps.Notes):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            known.append(self.words)

    def edit(text):
        return text.replace(str(known[0].data_ptr()), there)

    monkeypatch.setattr(gpu_steps, "Notes", Known)
    monkeypatch.setattr(gpu_steps, "FIRST", 1)
    monkeypatch.setattr(gpu_steps, "PAUSES", (0,))
    points = [
        gpu_steps.TuningPoint("gru", "float16", 16, 3, kernel, steps=4, saving=False)
        for kernel in ("forward", "backward")
    ]
    measure = gpu_steps.measure

    def failing(point, plan, *others):
        if plan.exchange == "cluster":
            raise RuntimeError("no such launch")
        return measure(point, plan, *others)

    monkeypatch.setattr(gpu_steps, "measure", failing)
    forget_compiled()
    try:
        with on_machine("H200", variant="cooperative", known=known, edit=edit):
            gpu_steps.run(points, torch.device("cpu"), tmp_path)
    finally:
        forget_compiled()
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "error"]
    assert all(row["cycles"]["step"] > 0 for row in rows[:2])
    written = (tmp_path / "steps.md").read_text().splitlines()
    assert len([line for line in written if line.startswith("| ")]) == 1 + len(rows)
    assert "no such launch" in written[-1]
