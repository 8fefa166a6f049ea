"""The machine that the numbers belong to. Runs in a child process; changes no setting."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
import time
from collections.abc import Callable

import torch
import triton

import triton_rnn
from bench.gpu_workers import Result

QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "persistence_mode",
)


def describe(device: torch.device) -> dict[str, str]:
    """Names, versions and switches, as found."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "triton_rnn": triton_rnn.__version__,
        "TF32 switch of recurrent layers": torch.backends.cudnn.rnn.fp32_precision,
        "cuDNN": str(torch.backends.cudnn.version()),
        "CUDA of torch": str(torch.version.cuda),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    if device.type != "cuda":
        return {
            "GPU": "none: a rehearsal on Triton's interpreter, no number means anything",
            **found,
        }
    properties = torch.cuda.get_device_properties(device)
    found = {
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "SMs": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
        **found,
    }
    return found | _smi(device)


def _smi(device: torch.device) -> dict[str, str]:
    """What nvidia-smi tells; nothing where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"nvidia-smi": "not found"}
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    command += ["-i", str(device.index or 0)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"failed: {error}"}
    return dict(zip(QUERY, map(str.strip, said.stdout.split(",")), strict=False))


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured: GB/s of a copy on the device, TFLOP/s of a bfloat16 product of random numbers."""
    if device.type != "cuda":
        return {}
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source))
    size = 8192
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product = _best_seconds(lambda: a @ b)
    one = torch.zeros(1, device=device)
    launch = _best_seconds(lambda: [one.add_(1) for _ in range(1000)]) / 1000
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
        "bfloat16_product_tflops": 2 * size**3 / product / 1e12,
        "launch_of_a_torch_operation_us": launch * 1e6,
    }


def _best_seconds(function: Callable[[], object], repeats: int = 10) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(3):
        function()
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    times = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    return min(times) / 1e3


def machine(device: torch.device) -> Result:
    return {"status": "ok", "machine": describe(device), "ceilings": ceilings(device)}
