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
    for package in ("torch", "triton", "pytest-benchmark"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return {
        "CPU": f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "versions": f"triton_rnn {triton_rnn.__version__} ({_commit()}), {', '.join(versions)}, "
        f"Python {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load before": _load(),
    }


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
