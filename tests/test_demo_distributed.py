"""The demo under torchrun: two processes train as one does, and one of them shows it."""

from __future__ import annotations

import json

import pytest
import torch
from processes import needs_gloo, torchrun

from triton_rnn.__main__ import main
from triton_rnn.demo import distributed, training
from triton_rnn.demo.text import TextJob

pytestmark = needs_gloo

# Five sequences: the two shares are unequal.
SMALL = ["--hidden", "16", "--steps", "6", "--batch", "5", "--seq-len", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """As each of the two processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("demo", ["text", "series"])
def test_two_processes_train_to_the_losses_of_one(demo, tmp_path, capsys):
    arguments = ["demo", demo, *SMALL, "--seq-len", "6"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    code, output, errors = torchrun("-m", "triton_rnn", *arguments, "--out", str(together))
    assert code == 0, f"{output}\n{errors}"
    assert main([*arguments, "--out", str(alone)]) == 0
    for folder in (together, alone):
        assert sorted(path.name for path in folder.iterdir()) == [f"{demo}.json", f"{demo}.png"]
    found, expected = (
        json.loads((folder / f"{demo}.json").read_text()) for folder in (together, alone)
    )
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert (found["batch"], found["backend"]) == (expected["batch"], expected["backend"])
    for name in training.NAMES:
        assert len(found["losses"][name]) == 6
        # float32 losses of up to 5, summed in another order and that over six steps: 1e-6 was seen.
        assert found["losses"][name] == pytest.approx(expected["losses"][name], abs=5e-6)
    # Only the first process prints.
    assert output.count("initial weights") == output.count(f"{demo}.json") == 1
    assert "batch 5 over 2 processes" in " ".join(output.split())


def test_an_error_in_one_process_ends_all_and_leaves_no_file(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from triton_rnn.__main__ import main\n"
        "from triton_rnn.demo import training\n"
        "real, calls = training._training_step, []\n"
        "def step(*arguments):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 14:\n"
        "        raise RuntimeError('the second process gave up')\n"
        "    return real(*arguments)\n"
        "training._training_step = step\n"
        "sys.exit(main())\n"
    )
    out = tmp_path / "out"
    code, output, errors = torchrun(str(program), "demo", *SMALL, "--out", str(out))
    assert code != 0
    assert "the second process gave up" in errors
    assert "initial weights" not in output
    assert not out.exists()


def test_a_batch_smaller_than_the_processes_is_told_in_a_line(tmp_path):
    arguments = ["demo", *SMALL, "--batch", "1", "--out", str(tmp_path / "out")]
    code, _, errors = torchrun("-m", "triton_rnn", *arguments)
    assert code != 0
    assert "argument --batch: 1 leaves some of the 2 processes idle" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "count"), [(4, 2), (5, 2), (7, 3), (3, 3)])
def test_shares_make_up_the_batch_and_their_losses_its_loss(rows, count, monkeypatch):
    output, target = torch.randn(rows, 6, 9), torch.randint(9, (rows, 6))
    monkeypatch.setattr(distributed, "processes", lambda: count)
    shares = []
    for number in range(count):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        shares.append(distributed.share((output, target)))
    assert torch.equal(torch.cat([one for one, _ in shares]), output)
    assert torch.equal(torch.cat([one for _, one in shares]), target)
    loss = distributed.shared_loss(TextJob.loss, rows)
    mean = sum(float(loss(*share)) for share in shares) / count
    assert mean == pytest.approx(float(TextJob.loss(output, target)), rel=1e-5)


def test_a_stray_rank_in_the_environment_starts_no_group(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.processes(), distributed.rank()) == (1, 0)
    model = torch.nn.Linear(1, 1)
    assert distributed.parallel(model) is model
