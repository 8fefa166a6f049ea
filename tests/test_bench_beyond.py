"""The pairs of `python -m bench beyond`: both sides do the same, and the command makes a table."""

import pytest
import torch

from bench import beyond
from bench.__main__ import main

# Either side draws its own random numbers.
RANDOM = "dropout"
# Training with and without recomputing, whose sides are one module's, and a thousand steps long.
LARGE = "recomputing"
PAIRS = [pair for source in beyond.SOURCES for pair in source() if LARGE not in pair[0]]


def test_every_pair_has_a_name_of_its_own():
    names = [pair[0] for source in beyond.SOURCES for pair in source()]
    assert len(set(names)) == len(names) > 20


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_both_sides_compute_the_same(pair):
    name, ours, theirs = pair
    found, expected = ours(), theirs()
    if RANDOM in name or found is None:
        assert (found is None) == (expected is None)
        return
    if isinstance(found, torch.Tensor):
        found, expected = [found], [expected]
    # float32, a hundred steps: sums of 800 rows in another order.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_the_command_prints_and_writes_a_table(tmp_path, capsys):
    path = tmp_path / "beyond.md"
    options = ["--case", "GRU stream, one step, H=32", "--quick", "--memory", "--save", str(path)]
    assert main(["beyond", *options]) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == "# Beyond torch.nn"
    (row,) = [line for line in lines if line.startswith("| GRU stream, one step, H=32 |")]
    assert row.count(" us |") == 2
    assert row.count(" MiB |") == 2
    printed = capsys.readouterr()
    assert "stream" in printed.out
    assert printed.err == "GRU stream, one step, H=32\n"


def test_a_case_that_is_not_there_is_said(capsys):
    assert main(["beyond", "--case", "nothing"]) != 0
    assert "--case nothing: there is none" in capsys.readouterr().err


def test_what_a_device_cannot_do_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["beyond", "--device", "cuda"]) != 0
    assert "torch sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["beyond", "--device", "cuda", "--memory"]) != 0
    assert "for the CPU alone" in capsys.readouterr().err
