"""The C file's compilation and its cache: whatever is wrong there, nothing wrong is ever loaded."""

import ctypes
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triton_rnn.backends.native import build

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler on this machine")

SOURCE = "int answer(void) { return ANSWER; }"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file in a folder with a space, and an empty cache."""
    monkeypatch.setenv("TRITON_RNN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "a folder"
    folder.mkdir()
    path = folder / "source.c"
    path.write_text(f'__attribute__((visibility("default"))) {SOURCE}')
    return path


def answer(source, value=42):
    library = build.library(source, (f"-DANSWER={value}",))
    library.answer.restype = ctypes.c_int
    return library.answer()


def files(folder):
    return sorted(path for path in folder.iterdir())


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_compiles_once(source, tmp_path, monkeypatch):
    assert answer(source) == 42
    (first,) = files(tmp_path / "cache")

    def forbidden(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", forbidden)
    assert answer(source) == 42
    assert files(tmp_path / "cache") == [first]


def test_a_changed_header_beside_the_source_is_compiled_anew(source):
    header = source.with_name("answer.h")
    header.write_text("enum { MORE = 0 };\n")
    source.write_text(
        f'#include "answer.h"\n{source.read_text().replace("ANSWER", "ANSWER + MORE")}'
    )
    assert answer(source) == 42
    header.write_text("enum { MORE = 1 };\n")
    assert answer(source) == 43


def test_folder_and_file_are_the_users_alone(source, tmp_path):
    answer(source)
    folder = tmp_path / "cache"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(files(folder)[0].stat().st_mode) == 0o600


@pytest.mark.parametrize("what", ["source", "flags", "compiler", "processor"])
def test_what_the_code_depends_on_makes_another_library(source, tmp_path, monkeypatch, what):
    answer(source)
    value = 42
    if what == "source":
        source.write_text(source.read_text() + "\n/* changed */\n")
    elif what == "flags":
        value = 43
    elif what == "compiler":
        wrapper = script(tmp_path / "wrapper", f'exec {build.compiler()[0]} "$@"')
        monkeypatch.setenv("CC", wrapper)
    else:
        monkeypatch.setattr(build, "_processor", lambda: "another")
    assert answer(source, value) == value
    assert len(files(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "a bit"])
def test_damaged_files_are_never_loaded(source, tmp_path, damage):
    answer(source)
    (path,) = files(tmp_path / "cache")
    content = path.read_bytes()
    other = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "foreign": b"not a library",
        "a bit": content[:-1] + bytes([content[-1] ^ 1]),
    }
    # A file of its own: this process has the old one mapped, and would die of its truncation.
    path.unlink()
    path.write_bytes(other[damage])
    path.chmod(0o600)
    assert build._cached(tmp_path / "cache", path.name.partition("-")[0]) is None
    # In a process of its own: this one has the library mapped.
    code = (
        "import sys, pathlib; from triton_rnn.backends.native import build;"
        "print(build.library(pathlib.Path(sys.argv[1]), ('-DANSWER=42',)).answer())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "42", run.stderr


def test_a_file_that_others_may_write_is_not_loaded(source, tmp_path):
    answer(source)
    (path,) = files(tmp_path / "cache")
    key = path.name.partition("-")[0]
    assert build._cached(tmp_path / "cache", key) == path
    path.chmod(0o666)
    assert build._cached(tmp_path / "cache", key) is None


def test_a_folder_that_others_may_write_is_not_used(source, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    assert answer(source) == 42
    assert files(folder) == []


@pytest.mark.parametrize("obstacle", ["file", "no home"])
def test_without_a_folder_a_temporary_one_serves(source, tmp_path, monkeypatch, obstacle):
    if obstacle == "file":
        (tmp_path / "cache").write_text("in the way")
    else:
        monkeypatch.setenv("TRITON_RNN_CACHE", "/proc/nowhere/cache")
    assert answer(source) == 42


def test_a_full_disk_or_one_for_no_programs_is_survived(source, tmp_path, monkeypatch):
    real_store, real_load = build._store, ctypes.CDLL
    cache = tmp_path / "cache"
    full = lambda content, folder, name: (  # noqa: E731
        None if folder == cache else real_store(content, folder, name)
    )
    monkeypatch.setattr(build, "_store", full)
    assert answer(source) == 42
    assert files(cache) == []
    monkeypatch.setattr(build, "_store", real_store)

    def refusing(path):
        if path.startswith(os.fspath(cache)):
            raise OSError("failed to map segment from shared object")
        return real_load(path)

    monkeypatch.setattr(ctypes, "CDLL", refusing)
    assert answer(source) == 42
    assert len(files(cache)) == 1
    monkeypatch.setattr(build, "_store", lambda *_: None)
    with pytest.raises(build.BuildError, match="no space"):
        answer(source, 43)


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert build._usable(tmp_path) is None


def test_cache_folder_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("TRITON_RNN_CACHE", "/a/b")
    assert os.fspath(build.cache_folder()) == "/a/b"
    monkeypatch.delenv("TRITON_RNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert os.fspath(build.cache_folder()) == "/c/triton_rnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert os.fspath(build.cache_folder()) == "/home/somebody/.cache/triton_rnn"


def test_many_processes_start_at_once(source, tmp_path):
    code = (
        "import sys, pathlib; from triton_rnn.backends.native import build;"
        "print(build.library(pathlib.Path(sys.argv[1]), ('-DANSWER=7',)).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["7"] * 8
    assert all(path.suffix == ".so" for path in files(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 'source.c:1: error: out of luck' >&2; exit 1", "source.c:1: error: out of luck"),
        ("exit 3", "exit status 3"),
        ("exit 0", "it wrote nothing"),
        ("echo warning >&2; echo 'internal compiler error' >&2; exit 1", "internal compiler error"),
    ],
    ids=["error", "silent", "nothing", "second line"],
)
def test_a_compiler_that_fails_is_told_in_a_line(source, tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("CC", script(tmp_path / "failing", text))
    with pytest.raises(build.BuildError) as caught:
        answer(source)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert files(tmp_path / "cache") == []


def test_a_compiler_that_hangs_is_given_up(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path / "hanging", "exec sleep 100"))
    monkeypatch.setattr(build, "SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(build.BuildError, match="did not end"):
        answer(source)
    assert time.monotonic() - start < 20
    assert files(tmp_path / "cache") == []


def test_what_cannot_be_loaded_is_told(source, tmp_path, monkeypatch):
    writes = 'for last; do [ "$before" = -o ] && echo junk > "$last"; before="$last"; done'
    monkeypatch.setenv("CC", script(tmp_path / "junk", writes))
    with pytest.raises(build.BuildError, match="cannot be loaded"):
        answer(source)


def test_without_a_compiler(source, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(build.BuildError, match="CC=/nowhere/cc is not there"):
        answer(source)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="none of cc, gcc, clang is there"):
        answer(source)


def test_cc_may_hold_flags(source, monkeypatch):
    monkeypatch.setenv("CC", f"{build.compiler()[0]} -DANSWER=5")
    library = build.library(source)
    assert library.answer() == 5


def test_flags_for_this_processor_that_are_refused_are_left_out(source, monkeypatch):
    monkeypatch.setattr(build, "NATIVE_FLAGS", (("-march=no-such",), ("-mcpu=no-such",), ()))
    assert answer(source) == 42


def test_wrong_settings_are_told_in_a_line(source, tmp_path, monkeypatch):
    with pytest.raises(build.BuildError, match="cannot be read"):
        build.library(tmp_path / "missing.c")
    monkeypatch.setenv("TRITON_RNN_CFLAGS", "'")
    with pytest.raises(build.BuildError, match="TRITON_RNN_CFLAGS: No closing quotation"):
        answer(source)
    monkeypatch.setenv("CC", "'")
    with pytest.raises(build.BuildError, match="CC: No closing quotation"):
        answer(source)


def test_without_a_home_it_compiles(source, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build, "cache_folder", homeless)
    assert answer(source) == 42


def test_files_of_others_in_the_folder_are_left_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "KEPT_FILES", 1)
    answer(source)
    other = tmp_path / "cache" / "my-library.so"
    other.write_text("mine")
    os.utime(other, (1, 1))
    answer(source, 43)
    assert other.read_text() == "mine"
    assert len(files(tmp_path / "cache")) == 2


def test_old_libraries_are_forgotten(source, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "KEPT_FILES", 2)
    for value in range(4):
        assert answer(source, value) == value
        # Times of files may be coarse.
        for path in files(tmp_path / "cache"):
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
    assert len(files(tmp_path / "cache")) == 2


LATE = """
import atexit, sys, threading, time, torch, triton_rnn

def first_calls():
    time.sleep(0.3)  # the main thread has ended by then
    output, _ = triton_rnn.GRU(3, 4)(torch.randn(5, 2, 3))
    output.sum().backward()
    print("trained")

if sys.argv[1] == "thread":
    threading.Thread(target=first_calls).start()
else:
    atexit.register(first_calls)
"""


@pytest.mark.parametrize("when", ["thread", "atexit"])
@pytest.mark.parametrize("warm", [False, True], ids=["compiling", "cached"])
def test_a_first_call_may_come_when_the_interpreter_ends(when, warm, tmp_path):
    """No thread can be begun then, so the parts are made one after the other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not warm:
        environment["TRITON_RNN_CACHE"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LATE, when],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("trained\n", 0), done.stderr


INTERRUPTED = """
import os, signal, sys, threading, time, torch, triton_rnn
from triton_rnn.backends.native import build

made, slowly = triton_rnn.LSTM(3, 4), build.library
x, done = torch.randn(5, 2, 3), []

def library(*given):
    begun.set()
    time.sleep(1.0)
    return slowly(*given)

begun, build.library = threading.Event(), library
if sys.argv[1] == "fork":
    thread = threading.Thread(target=lambda: made(x))
    thread.start()
    begun.wait()
    child = os.fork()
    if child == 0:
        triton_rnn.LSTM(3, 4)(x)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
else:
    signal.signal(signal.SIGALRM, lambda *_: done.append(made(x)[0].shape))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    made(x)
    assert done == [(5, 2, 4)]
print("done")
"""


@pytest.mark.parametrize("by", ["fork", "signal"])
def test_what_comes_while_loops_are_compiled_does_not_wait_for_ever(by, tmp_path):
    """A child has not got the thread that compiles; a handler runs in the very thread."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERRUPTED, by],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_RNN_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_the_cache_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("TRITON_RNN_CACHE", "~/somewhere")
    assert build.cache_folder() == Path.home() / "somewhere"
