"""README says what is true: its figures are those of the kept results, its commands those of CI."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from matplotlib import image as plt

ROOT = Path(__file__).parent.parent
sys.path.append(os.fspath(ROOT))

from bench.__main__ import main  # noqa: E402  (needs the path)
from bench.turns import geometric_mean  # noqa: E402

README = (ROOT / "README.md").read_text()
# As it reads, wherever its lines end.
READ = " ".join(README.split())
KEPT = {name: (ROOT / "bench" / "results" / f"{name}.md").read_text() for name in ("cpu", "small")}


@pytest.mark.parametrize(("name", "count"), [("cpu", 7), ("small", 6)])
def test_readmes_figures_are_those_of_the_kept_results(name, count):
    table = KEPT[name].split("**Ratios over torch.nn beside the targets")[1]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == count
    for row in rows:
        cell, padded, packed, both, _, worst, *_ = (
            part.strip() for part in row.strip("|").split("|")
        )
        cell = cell.removesuffix(", small")
        assert f"| {cell} | {padded} | {packed} | {both} | {worst} |" in README
    (line,) = (line for line in KEPT[name].splitlines() if line.startswith("As fast as onnx"))
    assert re.search(r"\d+ of \d+", line).group() in READ


def test_readmes_figures_without_avx512_are_those_of_the_kept_results():
    kept = (ROOT / "bench" / "results" / "cpu-avx2.md").read_text()
    rows = re.findall(r"^\| (\w+ \w+) \| \S+ \| \S+ \| (\S+) \|", kept, re.MULTILINE)
    both = dict(row for row in rows if row[0].split()[1] in ("inference", "training"))
    for cell, between in (("RNN", " in "), ("GRU", " "), ("LSTM", " ")):
        inference, training = both[f"{cell} inference"], both[f"{cell} training"]
        words = f"{cell} {inference}{'' if between == ' ' else ' in inference'} and {training}"
        assert words in READ
    assert re.search(r"triton_rnn 0.1.0 \((\w+)\)", kept)[1] in READ
    marked = re.search(r"(\d+) of 165 cases are marked", kept)[1]
    assert f"during {marked} of the 165" in READ


def test_readmes_figures_of_a_gpu_are_those_of_the_kept_results():
    kept = json.loads((ROOT / "bench" / "results" / "gpu.json").read_text())
    every = [row for row in kept["timing"]["results"] if row["status"] == "ok"]
    names = {"bfloat16": "bfloat16", "float16": "float16", "float32 (TF32)": "float32"}
    for name, dtype in (("all", ""), *names.items()):
        rows = [row for row in every if dtype in ("", row["case"]["dtype"])]
        kernels, auto = (
            geometric_mean([row[f"ratio_{side}"] for row in rows]) for side in ("triton", "auto")
        )
        assert f"| {name} | {len(rows)} | {kernels:.2f} | {auto:.2f} |" in README
    kernels = geometric_mean([row["ratio_triton"] for row in every])
    assert f"are {kernels:.1f} times as fast as cuDNN over {len(every)} cases" in READ
    right = [row for row in kept["correctness"]["results"] if row["status"] == "ok"]
    assert f"{len(right)} calls of every cell" in README
    machine = kept["machine"]
    name = machine["GPU"].removeprefix("NVIDIA ")
    assert f"On an {name} (torch 2.11, Triton 3.6, cuDNN 9.19)" in README
    assert (machine["torch"][:4], machine["triton"][:3]) == ("2.11", "3.6")
    assert machine["cuDNN"] == "91900"


def test_readme_names_the_machine_of_its_figures():
    for kept in KEPT.values():
        cpu = next(line for line in kept.splitlines() if line.startswith("- CPU: "))
        assert cpu.removeprefix("- CPU: ") in README
        versions = next(line for line in kept.splitlines() if line.startswith("- versions: "))
        ours, *others = versions.removeprefix("- versions: ").split(", ")
        assert re.search(r"\((\w+)\)", ours)[1] in README
        assert ", ".join(others) in README


def test_readmes_picture_is_that_of_the_kept_results(tmp_path):
    assert "![" in README
    kept = ROOT / "bench" / "results" / "overview.png"
    assert "bench/results/overview.png" in README
    arguments = ["report", str(ROOT / "bench" / "results" / "cpu.json"), "--out", str(tmp_path)]
    assert main(arguments) == 0
    # The same size, and the same but for what another version of the fonts may draw.
    fresh, stored = (plt.imread(path) for path in (tmp_path / "overview.png", kept))
    assert fresh.shape == stored.shape
    assert abs(fresh - stored).mean() < 0.01


def test_the_benchmarks_page_names_every_file_of_the_folder():
    bench = ROOT / "bench"
    told = (bench / "README.md").read_text() + (bench / "gpu_session.py").read_text()
    files = [path.stem for path in bench.glob("*.py") if not path.stem.startswith("__")]
    assert len(files) > 30
    assert [name for name in files if not re.search(rf"\b{name}\b", told)] == []
    # And no file that is not there.
    named = re.findall(r"`(\w+\.py)`", (bench / "README.md").read_text())
    assert [name for name in named if not (bench / name).exists()] == []


def test_readmes_two_commands_set_themselves_up_and_ci_runs_the_second():
    commands = [line for line in README.splitlines() if line.startswith("python3 ")]
    demo, tests = commands
    assert "triton_rnn demo" in demo
    assert "pytest" in tests
    for command in commands:
        assert "-m venv .venv" in command
        assert "-c constraints.txt" in command
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
