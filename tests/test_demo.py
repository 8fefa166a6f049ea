"""``python -m triton_rnn demo``: what it compares, what it writes, and how it fails."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import triton_rnn
from triton_rnn.__main__ import main
from triton_rnn.demo import report, series, text, training
from triton_rnn.demo.settings import DemoError, Settings, resolve_backend

SMALL = ["--hidden", "16", "--steps", "4", "--batch", "3", "--seq-len", "12", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small are slower on several threads, and very slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *arguments: str) -> dict:
    """Run a demo that must succeed, check its picture, return its numbers."""
    assert main(["demo", *arguments, "--out", str(folder)]) == 0
    name = "series" if "series" in arguments else "text"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    check_picture(folder / f"{name}.png")
    return json.loads((folder / f"{name}.json").read_text())


def check_picture(path: Path) -> None:
    image = pytest.importorskip("matplotlib.image").imread(path)
    height, width, _ = image.shape
    assert height > 400 and width > 800
    # A blank half would be one colour.
    for half in (image[:, : width // 2], image[:, width // 2 :]):
        assert half[..., :3].std() > 0.01


def small_settings(**changes: object) -> Settings:
    values: dict = {
        "demo": "text",
        "cell": "gru",
        "hidden": 16,
        "layers": 1,
        "steps": 5,
        "batch": 3,
        "seq_len": 12,
        "lr": 5e-3,
        "seed": 0,
        "device": torch.device("cpu"),
        "backend": "auto",
        "out": Path("unused"),
    }
    return Settings(**(values | changes))


@pytest.mark.parametrize("cell", ["rnn", "rnn-relu", "gru", "lstm"])
def test_both_libraries_train_to_the_same_losses(cell, tmp_path):
    numbers = run(tmp_path, *SMALL, "--cell", cell, "--layers", "2")
    assert numbers["same_initial_weights"] is True
    theirs, ours = numbers["losses"]["torch.nn"], numbers["losses"]["triton_rnn"]
    assert len(theirs) == len(ours) == 4
    assert theirs == pytest.approx(ours, abs=2e-6)
    difference = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    assert numbers["largest_loss_difference"] == difference


def test_numbers_hold_what_was_run_and_measured(tmp_path):
    numbers = run(tmp_path, *SMALL, "--seed", "7", "--lr", "0.002")
    asked = {"demo": "text", "cell": "gru", "hidden": 16, "steps": 4, "batch": 3, "seq_len": 12}
    asked |= {"layers": 1, "seed": 7, "lr": 0.002, "device": "cpu"}
    assert {name: numbers[name] for name in asked} == asked
    for name in ("torch.nn", "triton_rnn"):
        seconds = numbers["step_seconds"][name]
        assert len(seconds) == 4 and all(value > 0 for value in seconds)
        middle = sorted(seconds)[1:3]
        assert numbers["median_step_seconds"][name] == pytest.approx(sum(middle) / 2)
    median = numbers["median_step_seconds"]
    assert numbers["ratio"] == pytest.approx(median["torch.nn"] / median["triton_rnn"])
    assert numbers["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("backend", ["reference", "aten", "torchscript"])
def test_a_backend_that_is_asked_for_is_the_one_that_runs(backend, tmp_path):
    numbers = run(tmp_path, *SMALL, "--backend", backend)
    assert numbers["backend_asked"] == numbers["backend"] == backend
    assert numbers["largest_loss_difference"] < 2e-6


def test_a_wrong_layer_shows_as_a_difference_of_the_losses(tmp_path, monkeypatch):
    class WrongGRU(triton_rnn.GRU):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
            output, state = super().forward(input, hx)
            return 1.05 * output, state

    monkeypatch.setattr(triton_rnn, "GRU", WrongGRU)
    assert run(tmp_path, *SMALL)["largest_loss_difference"] > 1e-4


def test_the_second_model_is_ours_and_the_first_is_not():
    job = text.TextJob(small_settings())
    comparison = training.run_pair(
        job.settings, job.build, job.batch_at, job.loss, lambda progress: None
    )
    assert type(comparison.models["torch.nn"].recurrent) is nn.GRU
    assert type(comparison.models["triton_rnn"].recurrent) is triton_rnn.GRU


def test_steps_alternate_who_goes_first():
    job = text.TextJob(small_settings(steps=3))
    seen: list[str] = []
    training.run_pair(
        job.settings, job.build, job.batch_at, job.loss, lambda progress: seen.append(progress.name)
    )
    theirs, ours = training.NAMES
    assert seen == [theirs, ours, ours, theirs, theirs, ours]


def test_warm_up_leaves_the_run_and_the_callers_random_state_alone(monkeypatch):
    job = text.TextJob(small_settings())
    state = torch.get_rng_state()
    losses = []
    for warm_up in (0, 5):
        monkeypatch.setattr(training, "WARMUP_STEPS", warm_up)
        comparison = training.run_pair(
            job.settings, job.build, job.batch_at, job.loss, lambda progress: None
        )
        losses.append(comparison.losses)
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_text_model_learns(tmp_path):
    sizes = ["--hidden", "48", "--steps", "80", "--batch", "8", "--seq-len", "32", "--lr", "5e-3"]
    losses = run(tmp_path, *sizes, "--device", "cpu")["losses"]["triton_rnn"]
    # It starts by guessing evenly among some ninety characters, ln 90 = 4.5.
    assert 4.0 < losses[0] < 5.0
    assert sum(losses[-10:]) / 10 < 2.7


def test_losses_that_drift_apart_are_told_with_the_step():
    theirs = [4.0, 3.0, 2.0, 1.0]
    for ours, step, largest in (
        ([4.0, 3.0, 2.0, 1.0], None, "0"),
        ([4.0, 3.000001, 2.0, 1.0], None, "1.0e-06"),
        ([4.0, 3.0, 2.1, 1.5], 3, "5.0e-01"),
    ):
        losses = {"torch.nn": theirs, "triton_rnn": ours}
        comparison = training.Comparison({}, True, losses, losses, "auto")
        assert comparison.first_step_apart == step
        assert comparison.difference_text == largest


def test_one_seed_gives_one_sample_and_another_seed_another(tmp_path):
    samples = [
        run(tmp_path / folder, *SMALL, "--seed", seed)["sample"]
        for folder, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == text.SAMPLE_LENGTH
    assert samples[0].startswith(text.PROMPT)


def test_text_is_plain_prose_of_the_manual():
    whole = text.load_text()
    assert len(whole) > 100_000
    assert whole.isascii()
    assert not any(mark in whole for mark in ("::=", "****", "====", "\t", "  ", "\n\n"))
    assert text.plain_paragraphs(
        "The title\n*********\n\nA **short** sentence that\nis plainly prose, isn\u2019t it.\n\n"
        "   if x > 0:\n       y[0] = {x: (x + 1) / 2}; return.\n\n"
        "+---+---+\n| a | b |\n+---+---+\n\n* A point of a list is prose as well, of course."
    ) == [
        "A short sentence that is plainly prose, isn't it.",
        "A point of a list is prose as well, of course.",
    ]


def test_text_targets_are_the_next_characters():
    job = text.TextJob(small_settings())
    characters, following = job.batch_at(1)
    assert characters.shape == following.shape == (3, 12)
    assert torch.equal(characters[:, 1:], following[:, :-1])
    window = "".join(job.alphabet[int(number)] for number in characters[0])
    assert window in job.text
    assert not torch.equal(job.batch_at(0)[0], characters)


def test_series_forecast_beats_the_last_value(tmp_path):
    numbers = run(tmp_path, "series", "--device", "cpu", "--steps", "250")
    years, truth = numbers["years"], numbers["truth"]
    assert (years[0], years[-1], len(truth)) == (1932, 2008, 77)
    _, values = series.load_series()
    for name, forecast in numbers["forecasts"].items():
        squares = [(a - b) ** 2 for a, b in zip(forecast, values[-77:], strict=True)]
        assert numbers["rmse"][name] == pytest.approx(math.sqrt(sum(squares) / 77), rel=1e-4)
    assert numbers["forecasts"]["last value"] == pytest.approx(values[-78:-1])
    rmse = numbers["rmse"]
    assert rmse["triton_rnn"] < 0.8 * rmse["last value"]
    assert rmse["triton_rnn"] == pytest.approx(rmse["torch.nn"], rel=1e-2)


def test_series_learns_nothing_from_the_years_it_is_judged_on(monkeypatch):
    settings = small_settings(demo="series", seq_len=6, steps=50)
    job = series.SeriesJob(settings)
    years, values = series.load_series()
    changed = values[: job.split] + [value + 1000 for value in values[job.split :]]
    monkeypatch.setattr(series, "load_series", lambda: (years, changed))
    other = series.SeriesJob(settings)
    assert (other.mean, other.deviation) == (job.mean, job.deviation)
    for step in range(settings.steps):
        for one, two in zip(job.batch_at(step), other.batch_at(step), strict=True):
            assert torch.equal(one, two)
    # The change was a change: what is judged is not the same.
    assert not torch.equal(job.targets[job.training_windows :], other.targets[-77:])


def test_sunspots_are_the_published_ones():
    years, values = series.load_series()
    assert years == list(range(1700, 2009))
    by_year = dict(zip(years, values, strict=True))
    known = {1700: 5, 1711: 0, 1749: 80.9, 1816: 45.8, 1957: 190.2, 1989: 157.6, 2008: 2.9}
    assert {year: by_year[year] for year in known} == known
    header = (Path(series.__file__).parent / "sunspots.csv").read_text().split("year,")[0]
    assert "Source: NOAA" in header and "public domain" in header


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "-3"], "--hidden"),
        (["--hidden", "0"], "--hidden"),
        (["--steps", "many"], "--steps"),
        (["--batch", "1.5"], "--batch"),
        (["--layers", ""], "--layers"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-0.1"], "--lr"),
        (["--cell", "elman"], "--cell"),
        (["--device", "tpu"], "--device"),
        (["--backend", "cudnn"], "--backend"),
        (["--seq-len", "99999999"], "--seq-len"),
        (["series", "--seq-len", "231"], None),
        (["series", "--seq-len", "232"], "--seq-len"),
        (["poetry"], "poetry"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_in_one_line_before_any_training(
    arguments, message, tmp_path, monkeypatch, capsys
):
    def trained(*_: object) -> None:
        raise DemoError("training began", exit_code=77)

    monkeypatch.setattr(report, "run_pair", trained)
    folder = tmp_path / "out"
    code = exit_code(["demo", *arguments, "--device", "cpu", "--out", str(folder)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    if message is None:
        assert (code, "training began" in error) == (77, True)
    else:
        assert code == 2
        assert "error: " in error and message in error
    assert not folder.exists()


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_asking_for_a_gpu_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["demo", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "argument --device" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "further/down"])
def test_an_output_folder_that_is_a_file_is_an_error(below, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["demo", *SMALL, "--out", str(file / below)]) == 2
    assert "argument --out" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_backend_comes_from_the_option_before_the_environment(monkeypatch):
    with triton_rnn.use_backend("reference"):
        assert resolve_backend(None) == "reference"
        assert resolve_backend("aten") == "aten"
        assert resolve_backend("auto") == "auto"
    monkeypatch.setattr("triton_rnn.dispatch.requested", lambda: "cudnn")
    with pytest.raises(DemoError, match="TRITON_RNN_BACKEND: unknown backend 'cudnn'"):
        resolve_backend(None)


def test_a_backend_that_cannot_run_here_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr("triton_rnn.dispatch.unavailable", lambda name: f"no luck\nfor {name}")
    with pytest.raises(DemoError, match="--backend: aten cannot run here: no luck for aten"):
        resolve_backend("aten")


def test_a_backend_that_cannot_run_this_model_is_an_error(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise triton_rnn.BackendError("backend 'aten' cannot run this call: out of sorts")

    monkeypatch.setattr(triton_rnn.GRU, "forward", refuse)
    assert main(["demo", *SMALL, "--backend", "aten", "--out", str(tmp_path / "out")]) == 2
    assert "argument --backend: backend 'aten' cannot run this call" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_control_c_says_so_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run_pair", interrupted)
    assert main(["demo", *SMALL, "--out", str(tmp_path / "out")]) == 130
    assert (
        capsys.readouterr().err.strip() == "triton_rnn: interrupted; no file was left half written"
    )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_explodes_is_an_error_and_not_a_picture(tmp_path, capsys):
    arguments = [*SMALL, "--cell", "rnn-relu", "--lr", "1e30", "--steps", "20"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert "smaller --lr" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_written_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    missing_folder = tmp_path / "missing" / "b"
    with pytest.raises(OSError):
        report.write_together({tmp_path / "a": b"new", missing_folder: b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
    report.write_together({tmp_path / "a": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    find_spec = "triton_rnn.__main__.importlib.util.find_spec"
    monkeypatch.setattr(find_spec, lambda name: None if name == "rich" else object())
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "rich missing: pip install 'triton_rnn[demo]'" in error
    assert error.count("\n") == 1


def test_help_is_printed_without_loading_matplotlib_or_rich():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['triton_rnn', 'demo', '--help']\n"
        "try:\n"
        "    runpy.run_module('triton_rnn', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print(sorted({'matplotlib', 'rich', 'triton'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "default: 128 for text and 32 for series" in " ".join(printed.split())
    assert printed.strip().endswith("[]")


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"triton_rnn {triton_rnn.__version__}\n"
