"""``python -m triton_rnn info``: true, complete, and printable everywhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_rnn
from triton_rnn import dispatch, info
from triton_rnn.__main__ import main


@pytest.fixture
def nothing_set(monkeypatch):
    for name in info.SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_json_tells_what_is_installed_and_what_runs(nothing_set, capsys):
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"]["triton_rnn"] == triton_rnn.__version__
    assert told["versions"]["python"].split()[0] == sys.version.split()[0]
    assert told["cpu"]["model"]
    assert 1 <= told["cpu"]["usable_cores"] <= told["cpu"]["cores"] == os.cpu_count()
    assert told["cpu"]["torch_threads"] == torch.get_num_threads()
    assert told["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(told["gpu"]["devices"]) == torch.cuda.device_count()
    backends = [name for name in dispatch.BACKENDS if name != "auto"]
    assert told["backends"] == {name: dispatch.unavailable(name) for name in backends}
    assert told["backends"]["reference"] is None
    assert told["torchscript"]["compiles"] is True
    assert told["torchscript"]["detail"]
    assert 0 <= told["torchscript"]["seconds"] < 60
    assert told["settings"] == dict.fromkeys(info.SETTINGS)


def test_every_setting_of_the_package_is_told():
    package = Path(triton_rnn.__file__).parent
    named = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"TRITON_RNN_[A-Z]+", path.read_text("utf-8"))
    }
    assert named == set(info.SETTINGS)


def test_where_the_compiled_loops_come_from(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.touch(mode=0o700)
    monkeypatch.setenv("CC", f"{compiler} -m64")
    monkeypatch.setenv("TRITON_RNN_CACHE", str(tmp_path))
    told = info.collect()
    assert told["native"] == {"compiler": f"{compiler} -m64", "kept_in": str(tmp_path)}
    monkeypatch.setenv("CC", "'not closed")
    words = info._in_words(info.collect())
    assert words["native"] == {"compiler": "none", "libraries are kept in": str(tmp_path)}
    assert words["settings"]["TRITON_RNN_CACHE"] == str(tmp_path)


def test_a_folder_that_keeps_no_libraries_is_not_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_RNN_CACHE", str(tmp_path / "file"))
    words = info._in_words(info.collect())
    assert words["native"]["libraries are kept in"].startswith("no folder: there is none to be had")


@pytest.mark.parametrize("with_rich", [True, False], ids=["table", "plain"])
def test_print_for_people_gives_reasons_in_full(with_rich, nothing_set, monkeypatch, capsys):
    reason = "needs [a GPU] that nobody has put into this machine yet"
    monkeypatch.setattr(dispatch, "unavailable", lambda name: reason if name == "triton" else None)
    if with_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "140")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("reference" in line and "runs" in line for line in lines)
    assert any("triton" in line and f"cannot run: {reason}" in line for line in lines)
    assert any("TRITON_RNN_BACKEND" in line and "not set: auto" in line for line in lines)
    assert any(torch.__version__ in line for line in lines)
    if not with_rich:
        assert any("absent: not installed" in line for line in lines)
        assert all(line.isascii() for line in lines)


@pytest.mark.parametrize(
    ("value", "told"), [("reference", "reference"), ("cudnn", "'cudnn' is no backend: auto, ")]
)
def test_the_backend_setting_is_told_as_it_is(value, told, monkeypatch):
    monkeypatch.setenv("TRITON_RNN_BACKEND", value)
    words = info._in_words(info.collect())
    assert words["settings"]["TRITON_RNN_BACKEND"].startswith(told)


def test_torchscript_that_does_not_compile_is_told_with_its_reason(monkeypatch):
    answer = "triton_rnn.backends.torchscript.compile_check"
    monkeypatch.setattr(answer, lambda: (False, "switched off by PYTORCH_JIT=0"))
    words = info._in_words(info.collect())
    assert words["torchscript"]["compiles"].startswith("no, ")
    assert words["torchscript"]["detail"] == "switched off by PYTORCH_JIT=0"


def test_info_runs_as_a_program():
    command = [sys.executable, "-m", "triton_rnn", "info", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout)["versions"]["torch"] == torch.__version__
    assert printed.stderr == ""
