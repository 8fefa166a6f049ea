"""The loops give torch.nn's numbers however they are cut into blocks, and whatever multiplies."""

import pytest
import torch
from tolerances import LAYERS, assert_same_results, random, random_state, run, twins
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn.backends import torchscript
from triton_rnn.backends.torchscript import rules


@pytest.fixture
def rule(monkeypatch):
    """Set one rule of the CPU backend for the length of a test."""

    def set_rule(name: str, value: float) -> None:
        monkeypatch.setattr(rules, name, value)
        torchscript._plan.cache_clear()

    yield set_rule
    torchscript._plan.cache_clear()


def _pack(input: torch.Tensor):
    return pack_padded_sequence(input, [9, 7, 7, 2])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("min_rows", [1, 5, 10], ids=lambda rows: f"blocks_of_{rows}_rows")
@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_do_not_change_the_numbers(rule, kind, min_rows, packed):
    rule("BLOCK_BYTES", 1)
    rule("BLOCK_MIN_ROWS", min_rows)
    theirs, ours = twins(kind, 3, 5, 2, bidirectional=True)
    input, hx = random(9, 4, 3), random_state(theirs, 4)
    prepare = {"prepare": _pack} if packed else {}
    expected = run(theirs, input, hx, **prepare)
    with triton_rnn.use_backend("torchscript"):
        assert_same_results(run(ours, input, hx, **prepare), expected)
        with torch.no_grad():
            given = _pack(input) if packed else input
            output = ours(given, hx)[0]
    output = output.data if packed else output
    torch.testing.assert_close(output, expected["output"])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_onednn_and_blas_give_the_same_numbers(rule, monkeypatch, kind, packed):
    monkeypatch.setattr(rules, "blas_is_slow_here", lambda: torchscript.rules.HAS_ONEDNN_LINEAR)
    rule("BLOCK_MIN_ROWS", 10)
    rule("BLOCK_BYTES", 1)
    rule("ONEDNN_MIN_FLOPS", 0)
    theirs, ours = twins(kind, 3, 5, 2, bidirectional=True, dtype=torch.float32)
    input = random(9, 4, 3, dtype=torch.float32)
    hx = random_state(theirs, 4)
    prepare = {"prepare": _pack} if packed else {}
    expected = run(theirs, input, hx, **prepare)
    with triton_rnn.use_backend("torchscript"):
        for copies_from in (1, 1000):
            rule("COPY_MIN_STEPS", copies_from)
            assert_same_results(run(ours, input, hx, **prepare), expected)


def test_a_packed_batch_of_equal_lengths_is_run_as_a_padded_one():
    lstm = triton_rnn.LSTM(3, 600).bfloat16()
    input = torch.randn(9, 2, 3, dtype=torch.bfloat16)
    apart, packed = (pack_padded_sequence(input, lengths) for lengths in ([9, 8], [9, 9]))
    assert triton_rnn.explain(lstm, apart).backend != "aten"
    assert triton_rnn.explain(lstm, packed).backend == "aten"
    output, _ = lstm(packed)
    assert output.data.shape == (18, 600)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
