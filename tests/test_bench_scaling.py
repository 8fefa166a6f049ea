"""``python -m bench scaling``: what is compared with what, what is kept, how it fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from processes import needs_gloo

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
pytest.importorskip("rich")

from bench import scaling
from bench.__main__ import main
from bench.cases import Size
from bench.report.load import ScalingRun, load

pytestmark = needs_gloo

TINY = scaling.Extent(Size(4, 3, 4, 4), 0.01, 1)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(scaling, "usable_cores", lambda: 2)
    monkeypatch.setattr(scaling, "QUICK", TINY)


def test_every_count_is_compared_with_one_process_of_as_many_threads():
    assert scaling.plan([1], 8) == [(1, 8)]
    assert scaling.plan([1, 2, 8], 8) == [(1, 8), (1, 4), (1, 1), (2, 4), (8, 1)]
    # Three processes on eight cores leave two idle.
    assert scaling.plan([3], 8) == [(1, 2), (3, 2)]
    assert scaling.plan([2], 1) == [(1, 1), (2, 1)]


def test_efficiency_is_of_samples_per_second_and_steps_are_medians_of_starts():
    # Two processes of one thread: strong 24 rows each, weak 48.
    taken = {
        (1, 2, 48): [0.06],
        (1, 1, 48): [0.1, 0.5, 0.09],
        (2, 1, 24): [0.0625],
        (2, 1, 48): [0.125],
    }
    found = {
        (row["mode"], row["processes"], row["threads_per_process"]): row
        for row in scaling.rows(taken, 48)
    }
    assert len(found) == 6
    for mode in ("strong", "weak"):
        assert found[mode, 1, 2]["samples_per_second"] == pytest.approx(800)
        assert found[mode, 1, 1]["seconds_per_step"] == 0.1
        assert found[mode, 1, 1]["efficiency"] == found[mode, 1, 2]["efficiency"] == 1
    strong, weak = found["strong", 2, 1], found["weak", 2, 1]
    assert strong["samples_per_second"] == pytest.approx(48 / 0.0625)
    assert strong["efficiency"] == pytest.approx(0.8)
    assert weak["samples_per_second"] == pytest.approx(96 / 0.125)
    assert weak["efficiency"] == pytest.approx(0.8)


def test_without_one_process_alone_there_is_no_efficiency():
    assert scaling.rows({(2, 1, 24): [0.1], (2, 1, 48): [0.2]}, 48) == []


def test_two_processes_are_measured_saved_and_shown_by_the_report(two_cores, tmp_path, capsys):
    path = tmp_path / "scaling.json"
    arguments = ["scaling", "--processes", "2,1", "--cell", "lstm", "--quick"]
    assert main([*arguments, "--save", str(path)]) == 0, capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["scaling.json"]
    document = json.loads(path.read_text())
    assert set(document) == {"kind", "schema", "machine", "model", "runs"}
    assert (document["kind"], document["schema"]) == ("scaling", 1)
    assert (document["model"]["cell"], document["model"]["batch"]) == ("lstm", 4)
    run = load(path, "kept")
    assert isinstance(run, ScalingRun)
    assert [(one.mode, one.processes, one.threads_per_process) for one in run.runs] == [
        (mode, *counts) for mode in ("strong", "weak") for counts in ((1, 2), (1, 1), (2, 1))
    ]
    for one in run.runs:
        rows = one.processes * (2 if (one.mode, one.processes) == ("strong", 2) else 4)
        assert one.samples_per_second == pytest.approx(rows / one.seconds_per_step)
    assert "efficiency" in capsys.readouterr().out
    out = tmp_path / "report"
    assert main(["report", str(path), "--out", str(out)]) == 0
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "Scaling over processes" in (out / "report.md").read_text()


def test_a_failed_start_is_told_and_the_others_are_kept(two_cores, monkeypatch, tmp_path, capsys):
    def start(cell, sizes, processes, threads, seconds):
        if processes == 2:
            raise RuntimeError("no luck")
        return {size.batch: 0.5 for size in sizes}

    monkeypatch.setattr(scaling, "start", start)
    path = tmp_path / "scaling.json"
    assert main(["scaling", "--quick", "--save", str(path)]) == 1
    assert "no luck\nfailed: processes 2, threads of each 1" in capsys.readouterr().err
    runs = json.loads(path.read_text())["runs"]
    assert {run["processes"] for run in runs} == {1}
    assert len(runs) == 4


def test_an_interruption_keeps_what_was_measured(two_cores, monkeypatch, tmp_path):
    def start(cell, sizes, processes, threads, seconds):
        if processes == 2:
            raise KeyboardInterrupt
        return {size.batch: 0.5 for size in sizes}

    monkeypatch.setattr(scaling, "start", start)
    path = tmp_path / "scaling.json"
    assert main(["scaling", "--quick", "--save", str(path)]) == 130
    assert [one.name for one in tmp_path.iterdir()] == ["scaling.json"]
    assert len(json.loads(path.read_text())["runs"]) == 4


def test_an_error_in_the_processes_reaches_the_one_who_asked():
    with pytest.raises(RuntimeError, match="has no attribute 'NOTHING'"):
        scaling.start("nothing", [TINY.size], 1, 1, 0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "0"], "'0' is not a whole number above 0"),
        (["--processes", "1,two"], "'two' is not a whole number above 0"),
        (["--processes", "1,,2"], "'' is not a whole number above 0"),
        (["--processes", "64"], "there are 8 cores"),
        (["--processes", "5"], "a batch of 48 cannot be divided so"),
        (["--save", "missing/scaling.json"], "cannot write missing/scaling.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_request_exits_with_2_and_a_line(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scaling, "usable_cores", lambda: 8)
    assert main(["scaling", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_an_unknown_cell_is_refused():
    with pytest.raises(SystemExit) as stopped:
        main(["scaling", "--cell", "qrnn"])
    assert stopped.value.code == 2


def test_the_model_scores_every_character():
    model = scaling.Model("gru", TINY.size)
    characters = torch.randint(scaling.VOCABULARY, (TINY.size.seq_len, TINY.size.batch))
    assert model(characters).shape == (3, 4, scaling.VOCABULARY)
