"""The rules of `auto` and the results of a GPU that they were made by."""

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the planner's cells need triton, which is for Linux alone")

ROOT = Path(__file__).parent.parent
sys.path.append(os.fspath(ROOT))

from bench import gpu_rules  # noqa: E402  (needs the path)
from bench.turns import geometric_mean  # noqa: E402
from triton_rnn.backends.triton import rules  # noqa: E402

KEPT = ROOT / "bench" / "results" / "gpu.json"


@pytest.fixture(scope="module")
def data():
    return json.loads(KEPT.read_text())


def test_the_rules_lose_nowhere_and_forgo_little(data):
    """Of the kept run's cases: a change to the planner's model or to a rule is seen here."""
    cases = gpu_rules.judged(data)
    assert len(cases) >= 97
    taken = [case for case in cases if not case.reason]
    assert 0 < len(taken) < len(cases)
    # What is off by a hundredth is the clock's.
    assert min(case.outcome for case in cases) > 0.98
    best = geometric_mean([case.best for case in cases])
    assert geometric_mean([case.outcome for case in cases]) > 0.97 * best


def test_rules_that_take_the_kernels_everywhere_are_seen_to_lose(data, monkeypatch, capsys):
    monkeypatch.setattr(rules, "slower_than_torch", lambda request: None)
    cases = gpu_rules.judged(data)
    assert not any(case.reason for case in cases)
    assert min(case.outcome for case in cases) < 0.5
    assert gpu_rules.main([os.fspath(KEPT)]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("  taken")]
    assert len(listed) >= 10


def test_rules_that_take_nothing_forgo_all(data, monkeypatch):
    monkeypatch.setattr(rules, "slower_than_torch", lambda request: "never")
    assert {case.outcome for case in gpu_rules.judged(data)} == {1.0}


def test_a_layer_above_sees_both_directions_below():
    case = gpu_rules.TimingCase("gru", "float16", True, 64, 3, 9, directions=2, layers=4)
    first, deeper = gpu_rules.requests_of(case)
    assert (first.input_size, deeper.input_size) == (64, 128)
    assert first.needs_grad and first.batch == 3 and first.seq_len == 9


def test_the_command_prints_a_summary_and_what_is_off(capsys, tmp_path):
    assert gpu_rules.main([os.fspath(KEPT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cases, the kernels taken in" in lines[0]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "by the rules",
        "the kernels alone",
        "the better one always",
    ]
    empty = tmp_path / "gpu.json"
    empty.write_text('{"timing": {"results": []}}')
    assert gpu_rules.main([os.fspath(empty)]) == 1
    assert "no case was timed" in capsys.readouterr().err
