"""Programs in several processes, started as users start them: with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
TIMEOUT = 240

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(),
    reason="this torch was built without torch.distributed or gloo",
)


def torchrun(*program: str, processes: int = 2) -> tuple[int, str, str]:
    """Exit code, output and errors of a program (``FILE ...`` or ``-m MODULE ...``)."""
    # --standalone finds a free port by itself.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # One thread each, and this checkout's package however the tests were started.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [*launcher, f"--nproc-per-node={processes}", *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = child.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # Not killed at once: torchrun ends its processes when it is asked to end.
        child.terminate()
        try:
            output, errors = child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
        pytest.fail(f"not done after {TIMEOUT} s\n{output}\n{errors}")
    return child.returncode, output, errors
