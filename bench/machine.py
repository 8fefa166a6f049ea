"""What the numbers depend on: processor, versions, threads, switches."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import triton_rnn


class CommandError(Exception):
    """A request that cannot be met; the message is one line for the person who made it."""


def describe_machine() -> dict[str, str]:
    """What the numbers depend on."""
    versions = []
    for package in ("torch", "triton", "pytest-benchmark", "onnxruntime"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    facts = {
        "CPU": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "versions": f"triton_rnn {triton_rnn.__version__} ({_commit()}), {', '.join(versions)}, "
        f"Python {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load before": _load(),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        # Recurrent layers have a switch of their own: "tf32" or "ieee".
        precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
        facts["float32 in recurrent layers"] = precision
    return facts


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        # A virtual machine may hide the model's name, but not its numbers.
        numbers = f"family {fields.get('cpu family')} model {fields.get('model')}"
        return f"{fields.get('model name', platform.machine())} ({numbers})"
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return found.stdout.strip()


def _load() -> str:
    return f"{os.getloadavg()[0]:.2f}" if sys.platform != "win32" else "unknown"


def check_place(path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured for it.

    Raises:
        CommandError: it is a folder, or in one that is not there or not ours.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise CommandError(f"cannot write {path}")


def write(path: Path, text: str) -> None:
    """All of the text or none of it: who reads the file meanwhile never sees a half.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
