"""The table of contract_rows.py holds, is told in the README, and can fail."""

from pathlib import Path

import contract_rows
import pytest
import torch
from contract_rows import ELSEWHERE, ROWS, verdict

import triton_rnn

ROOT = Path(__file__).parent.parent

pytestmark = [
    # Dynamo makes an instance of every autograd.Function that it traces, and hears from it.
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
    # torch's own forward derivatives use it, and its operators have slow batching rules.
    pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_row_holds(row):
    assert verdict(row) == ("better" if row.better else "same"), row.text


def test_the_readme_lists_what_is_better_and_no_more():
    text = (ROOT / "README.md").read_text()
    part = text.split("## What is better than in torch.nn")[1].split("\n## ")[0]
    listed = " ".join(part.split())
    better = [row.better for row in ROWS if row.better]
    for sentence in better:
        assert sentence.lower() in listed.lower()
    # One more is not to be tried beside torch.nn: it ends the process (test_fuzz.py).
    assert part.count("\n- ") == len(better) + 1


def test_rows_have_names_of_their_own_and_other_files_exist():
    assert len({row.name for row in ROWS}) == len({row.text for row in ROWS}) == len(ROWS)
    for _, text, where in ELSEWHERE:
        assert where == "needs a GPU" or (ROOT / where).is_file(), text


class Library:
    """triton_rnn with one thing wrong."""

    def __init__(self, wrong):
        for name in contract_rows.ALL:
            setattr(self, name, wrong(name, getattr(triton_rnn, name)))


def forgets_hx(name, kind):
    return type(name, (kind,), {"forward": lambda self, input, hx=None: kind.forward(self, input)})


def adds_little(name, kind):
    def forward(self, input, hx=None):
        returned = kind.forward(self, input, hx)
        if isinstance(returned, torch.Tensor):
            return returned + 1e-7
        return (returned[0] if isinstance(returned[0], tuple) else returned[0] + 1e-7, returned[1])

    return type(name, (kind,), {"forward": forward})


def says_otherwise(name, kind):
    def forward(self, input, hx=None):
        if not isinstance(input, (torch.Tensor, tuple)) or isinstance(hx, float):
            raise TypeError("no")
        return kind.forward(self, input, hx)

    return type(name, (kind,), {"forward": forward})


def raises(name, kind):
    def forward(self, input, hx=None):
        raise RuntimeError("no")

    return type(name, (kind,), {"forward": forward})


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (forgets_hx, "initial_states"),
        (forgets_hx, "unbatched"),
        (adds_little, "padded"),
        (adds_little, "gradients"),
        (says_otherwise, "layer_errors"),
        (raises, "cells"),
        (raises, "vmap_of_layers"),
        (raises, "dynamic_export"),
    ],
)
def test_what_is_wrong_differs(wrong, name):
    (row,) = [row for row in ROWS if row.name == name]
    assert verdict(row, Library(wrong)) == "differs"


def test_the_program_prints_every_row_and_tells_by_its_exit_code(monkeypatch, capsys):
    rows = [row for row in ROWS if row.name in ("arguments", "unbatched", "vmap_of_layers")]
    monkeypatch.setattr(contract_rows, "ROWS", rows)
    assert contract_rows.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("| same |") == 2
    assert printed.count("| better |") == 1
    monkeypatch.setattr(contract_rows, "verdict", lambda row: "differs")
    assert contract_rows.main() == 1
    assert capsys.readouterr().out.count("| differs |") == 3
