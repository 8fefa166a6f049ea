"""What a demo was asked to do, checked against this machine before anything is trained."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_rnn import dispatch


class DemoError(Exception):
    """A demo cannot start or go on; the message is one line for the user.

    Args:
        message: what is wrong.
        exit_code: 2 when the request is at fault, 1 when the run went wrong.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Settings:
    """One demo run: sizes, length, seed and place. Sizes are counts, ``lr`` is Adam's step size."""

    demo: str
    cell: str
    hidden: int
    layers: int
    steps: int
    batch: int
    seq_len: int
    lr: float
    seed: int
    device: torch.device
    backend: str
    out: Path


def resolve_device(name: str) -> torch.device:
    """The device that ``cpu``, ``cuda`` or ``auto`` stands for here.

    Raises:
        DemoError: ``cuda`` was asked for and torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise DemoError("argument --device: cuda asked for, but torch sees no GPU on this machine")
    return torch.device("cuda" if name != "cpu" and has_gpu else "cpu")


def resolve_backend(name: str | None) -> str:
    """The backend to run on; without ``name``, the one that TRITON_RNN_BACKEND asks for.

    Raises:
        DemoError: no such backend, or it cannot run on this machine.
    """
    backend = name or dispatch.requested()
    origin = "argument --backend" if name else "TRITON_RNN_BACKEND"
    choices = ("auto", *(known for known in dispatch.BACKENDS if known != "auto"))
    if backend not in choices:
        raise DemoError(f"{origin}: unknown backend {backend!r} (choose from {', '.join(choices)})")
    reason = None if backend == "auto" else dispatch.unavailable(backend)
    if reason is not None:
        raise DemoError(f"{origin}: {backend} cannot run here: {' '.join(reason.split())}")
    return backend


def check_output_folder(folder: Path) -> None:
    """Raise DemoError unless ``folder`` can be created or written; creates nothing."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise DemoError(f"argument --out: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DemoError(f"argument --out: {nearest} is not writable")
