"""Compiles a C file into a shared library, once per machine, and loads it.

The library is kept in a folder of the user's: TRITON_RNN_CACHE, or `triton_rnn` in XDG_CACHE_HOME,
or in ~/.cache. What a file there was compiled from (source, compiler, flags, processor) and its own
content are both in its name, as hashes, and the content is checked before it is loaded: a file cut
short would kill the process when it is mapped. The folder and the file have to belong to this user
and be writable by nobody else; so between check and load only the user could exchange them. Where
there is no such folder to be had, or it is full or may not hold programs, a temporary file serves
this process.

CC names the compiler and TRITON_RNN_CFLAGS adds flags.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
)
# For this processor; how that is said depends on compiler and architecture.
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
# A compiler that takes longer has hung.
SECONDS = 60
# Libraries of other versions, machines and users' cells that share the folder; one version has
# thirty.
KEPT_FILES = 192
_OUR_NAME = re.compile(r"[0-9a-f]{24}-[0-9a-f]{32}\.so")


class BuildError(Exception):
    """There is no library; the message is one line and says why."""


def compiler() -> list[str] | None:
    """The command of the compiler: CC, which may hold flags, or the first that is there."""
    named = _words("CC")
    for command in [named] if named else [[name] for name in COMPILERS]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    return None


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}: {error}") from None


def cache_folder() -> Path:
    """Where libraries are kept."""
    if own := os.environ.get("TRITON_RNN_CACHE"):
        return Path(own).expanduser()
    if general := os.environ.get("XDG_CACHE_HOME"):
        return Path(general) / "triton_rnn"
    return Path("~/.cache/triton_rnn").expanduser()


def usable_folder() -> Path | None:
    """The folder that libraries are kept in; None where every process has to compile anew."""
    try:
        return _usable(cache_folder())
    except RuntimeError:
        # This user has no home.
        return None


def library(
    source: Path, extra: Sequence[str] = (), headers: Mapping[str, str] = MappingProxyType({})
) -> ctypes.CDLL:
    """The library that a C file compiles to, taken from the cache if it is there.

    Args:
        source: the file; of its own it includes headers beside it, and `headers`.
        extra: flags of the compiler.
        headers: texts of generated files that it includes, by their names.

    Raises:
        BuildError: no compiler, or it fails, or what it made cannot be loaded.
    """
    if os.name != "posix":
        raise BuildError(f"compiled loops are for POSIX systems, this is {platform.system()}")
    command = compiler()
    if command is None:
        asked = os.environ.get("CC")
        names = f"CC={asked} is not there" if asked else f"none of {', '.join(COMPILERS)} is there"
        raise BuildError(f"no C compiler: {names}")
    flags = [*FLAGS, *extra, *_words("TRITON_RNN_CFLAGS")]
    try:
        key = _key(source, command, flags, headers)
    except OSError as error:
        raise BuildError(f"cannot be read: {_first_line(str(error))}") from None
    folder = usable_folder()
    found = None if folder is None else _cached(folder, key)
    content = b""
    if found is None:
        content = _compile(source, command, flags, headers)
        if folder is not None:
            found = _store(content, folder, f"{key}-{_digest(content)}.so")
            _forget_old(folder)
    if found is not None:
        # A folder mounted noexec keeps a library and does not load it.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(os.fspath(found))
    try:
        with tempfile.TemporaryDirectory(prefix="triton_rnn-") as private:
            content = content or _compile(source, command, flags, headers)
            path = _store(content, Path(private), f"{key}.so")
            if path is None:
                raise BuildError(f"no space for the compiled loops, not in {private} either")
            # Once loaded it needs its name no more.
            return ctypes.CDLL(os.fspath(path))
    except OSError as error:
        reason = _first_line(str(error))
        raise BuildError(f"the compiled loops cannot be loaded: {reason}") from None


def _key(
    source: Path, command: Sequence[str], flags: Sequence[str], headers: Mapping[str, str]
) -> str:
    """A hash of all that the library depends on."""
    # Instead of asking a compiler for its version, which takes milliseconds at every start.
    found = os.stat(command[0])
    parts = [
        repr((found.st_size, found.st_mtime_ns)),
        *command,
        *flags,
        *(repr(header) for header in sorted(headers.items())),
        repr(NATIVE_FLAGS),
        sys.platform,
        platform.machine(),
        _processor(),
    ]
    content = "\0".join(parts).encode()
    for file in (source, *sorted(source.parent.glob("*.h"))):
        content += b"\0" + file.read_bytes()
    return hashlib.sha256(content).hexdigest()[:24]


def _processor() -> str:
    """What tells processors apart that need different code."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            # One processor's entry: the rest repeats it, hundreds of times on a large machine.
            entry = file.read(8192).split("\n\n")[0]
    except OSError:
        return platform.processor()
    changing = ("cpu MHz", "bogomips", "processor", "core id", "apicid", "initial apicid")
    lines = [line for line in entry.splitlines() if not line.startswith(changing)]
    return "\n".join(lines)


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _usable(folder: Path) -> Path | None:
    """The folder, made if need be; None if it cannot be written or is not this user's alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if not stat.S_ISDIR(found.st_mode) or not _is_private(found):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _cached(folder: Path, key: str) -> Path | None:
    """The library of this key if it is whole and nobody else could have written it."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno())
                whole = stat.S_ISREG(found.st_mode) and _is_private(found)
                whole = whole and _digest(file.read()) == path.stem.partition("-")[2]
        except OSError:
            continue
        if whole:
            # So that those in use are not the oldest.
            with contextlib.suppress(OSError):
                os.utime(path)
            return path
    return None


def _compile(
    source: Path, command: Sequence[str], flags: Sequence[str], headers: Mapping[str, str]
) -> bytes:
    """The library that a source compiles to."""
    try:
        with tempfile.TemporaryDirectory(prefix="triton_rnn-") as folder:
            made = Path(folder) / "library.so"
            for name, text in headers.items():
                (Path(folder) / name).write_text(text, encoding="ascii")
            found_in = ["-I", folder] if headers else []
            for native in NATIVE_FLAGS:
                files = [os.fspath(source.absolute()), "-o", os.fspath(made), "-lm"]
                reason = _run([*command, *flags, *native, *found_in, *files])
                if not reason:
                    break
            content = b"" if reason or not made.exists() else made.read_bytes()
    except OSError as error:
        raise BuildError(f"cannot compile the loops: {_first_line(str(error))}") from None
    if not content:
        raise BuildError(f"{command[0]} cannot compile the loops: {reason or 'it wrote nothing'}")
    return content


def _store(content: bytes, folder: Path, name: str) -> Path | None:
    """Write a file that is there whole or not at all; None if it cannot be written."""
    unfinished = None
    try:
        # Mode 0600.
        handle, unfinished = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, folder / name)
        return folder / name
    except OSError:
        return None
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


def _run(command: Sequence[str]) -> str:
    """Run a compiler: "" or why it failed.

    Raises:
        BuildError: it cannot be started, or does not end.
    """
    try:
        # In the C locale, so that an error can be found by its English name; and without what is
        # loaded into this process, a sanitizer or another malloc.
        environment = {**os.environ, "LC_ALL": "C"}
        environment.pop("LD_PRELOAD", None)
        # Into a file: a child of a compiler that was killed would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
                env=environment,
            )
            output.seek(0)
            told = output.read().decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not end within {SECONDS} seconds") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {_first_line(str(error))}") from None
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {done.returncode}"])[0]


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _forget_old(folder: Path) -> None:
    """Remove all but the newest libraries; another process may be at it too."""

    def age(path: Path) -> float:
        try:
            return -path.stat().st_mtime
        except OSError:
            return 0.0

    # Nothing but what this file names so: TRITON_RNN_CACHE may hold anything.
    ours = [path for path in folder.glob("*.so") if _OUR_NAME.fullmatch(path.name)]
    for path in sorted(ours, key=age)[KEPT_FILES:]:
        with contextlib.suppress(OSError):
            path.unlink()
