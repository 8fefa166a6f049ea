"""Which backends have failed on which device: found out at run time, and remembered."""

import warnings

import torch

_failures: dict[tuple[str, torch.device], str] = {}


def report(backend: str, device: torch.device, reason: str) -> None:
    """Take a backend out of use on a device, with one warning."""
    if (backend, device) not in _failures:
        _failures[backend, device] = reason
        warnings.warn(
            f"triton_rnn: backend {backend!r} is not used any more on {device}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def failure(backend: str, device: torch.device) -> str | None:
    """Why a backend is out of use on a device, or None."""
    return _failures.get((backend, device))


def failures() -> int:
    """How many failures there are; a cached choice of backend is good until it changes."""
    return len(_failures)
