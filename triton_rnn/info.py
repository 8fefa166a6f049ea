"""``python -m triton_rnn info``: what is installed, what this machine has, and what runs on it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from triton_rnn import dispatch
from triton_rnn.backends.native import build
from triton_rnn.version import __version__

# Every environment variable of the package's own, and what holds where it is not set.
SETTINGS = {
    "TRITON_RNN_BACKEND": "auto",
    "TRITON_RNN_CACHE": "the user's cache folder",
    "TRITON_RNN_CFLAGS": "no more flags",
    "TRITON_RNN_CHECK": "kernels are tried out before use",
    "TRITON_RNN_VARIANT": "plans of any variant",
    "TRITON_RNN_NVTX": "no NVTX ranges",
}


def collect() -> dict[str, Any]:
    """Everything ``info`` knows, as JSON values. Compiles one small script with TorchScript."""
    return {
        "versions": {
            "triton_rnn": __version__,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": platform.platform(),
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": {"torch_built_for": _accelerator_of_this_build(), "devices": _gpus()},
        # A reason why not, or null for a backend that runs.
        "backends": {name: dispatch.unavailable(name) for name in dispatch.BACKENDS},
        "native": _native(),
        "torchscript": _torchscript(),
        "settings": {name: os.environ.get(name) for name in SETTINGS},
    }


def show(as_json: bool = False) -> None:
    """Print ``collect()``: as JSON, as a table where rich is installed, else as plain lines."""
    information = collect()
    if as_json:
        print(json.dumps(information, indent=2))
    elif importlib.util.find_spec("rich") is None:
        print(_plain_text(_in_words(information)))
    else:
        _print_table(_in_words(information))


def _triton_version() -> str | None:
    # Not imported: that takes as long as the rest of this command. Whether it works is for the
    # backend to tell.
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        if importlib.util.find_spec("triton") is not None:
            try:
                return importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    # A container may hold the process to fewer cores than the machine has; not every system tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _accelerator_of_this_build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "the CPU only"


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
        for properties in every
    ]


def _native() -> dict[str, str | None]:
    """Where the compiled loops come from; why there are none is for the backend to tell."""
    try:
        command = build.compiler()
    except build.BuildError:
        command = None
    folder = build.usable_folder()
    return {
        "compiler": None if command is None else shlex.join(command),
        "kept_in": None if folder is None else os.fspath(folder),
    }


def _torchscript() -> dict[str, Any]:
    # Imported here and not above: only this command has to wait for it.
    from triton_rnn.backends import torchscript

    start = time.perf_counter()
    compiles, sentence = torchscript.compile_check()
    seconds = time.perf_counter() - start
    return {"compiles": compiles, "detail": sentence, "seconds": round(seconds, 4)}


def _in_words(information: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The sections as a person reads them."""
    versions = dict(information["versions"])
    if versions["triton"] is None:
        wheels = "" if sys.platform == "linux" else f", there is none for {platform.system()}"
        versions["triton"] = f"absent: not installed{wheels}"
    cpu = information["cpu"]
    gpu = information["gpu"]
    devices = {
        f"device {index}": (
            f"{device['name']}, {device['memory_gib']} GiB, {device['multiprocessors']}"
            f" multiprocessors, capability {device['capability']}"
        )
        for index, device in enumerate(gpu["devices"])
    }
    script = information["torchscript"]
    compiles = "yes" if script["compiles"] else "no"
    return {
        "versions": versions,
        "cpu": {
            "model": cpu["model"],
            "cores": f"{cpu['cores']}, of which this process may use {cpu['usable_cores']}",
            "threads torch uses": str(cpu["torch_threads"]),
            "instructions torch uses": cpu["capability"],
        },
        "gpu": {"torch is built for": gpu["torch_built_for"], **(devices or {"devices": "none"})},
        "backends": {
            name: "runs" if reason is None else f"cannot run: {reason}"
            for name, reason in information["backends"].items()
        },
        "native": {
            "compiler": information["native"]["compiler"] or "none",
            "libraries are kept in": information["native"]["kept_in"]
            or "no folder: there is none to be had, every process compiles anew",
        },
        "torchscript": {
            "compiles": f"{compiles}, {1000 * script['seconds']:.0f} ms",
            "detail": script["detail"],
        },
        "settings": {
            name: _setting_in_words(name, value, information["backends"])
            for name, value in information["settings"].items()
        },
    }


def _setting_in_words(name: str, value: str | None, backends: Mapping[str, Any]) -> str:
    if not value:
        return f"not set: {SETTINGS[name]}"
    known = ("auto", *backends)
    if name == "TRITON_RNN_BACKEND" and value not in known:
        return f"{value!r} is no backend: {', '.join(known)}"
    return value


def _plain_text(sections: Mapping[str, Mapping[str, str]]) -> str:
    width = max(len(name) for section in sections.values() for name in section)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in section.items())])
        for title, section in sections.items()
    )


def _print_table(sections: Mapping[str, Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for title, section in sections.items():
        table.add_row(Text(title, style="bold"), "")
        for name, value in section.items():
            # Text and not str: a reason may hold brackets, which rich would take for markup.
            table.add_row(f"  {name}", Text(value))
        table.add_section()
    Console(highlight=False).print(table)
