"""Which backend runs a call, and why."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

from triton_rnn import health
from triton_rnn.cells import RNN_TANH
from triton_rnn.request import Request

# In the order in which `auto` asks them.
BACKENDS = ("triton", "native", "torchscript", "aten", "reference")

# What our call costs beyond torch's (Python around the loops, an autograd node) is earned back step
# by step, by what a step costs less. So few steps are left to torch: from how many on ours is
# faster, per cell, with and without gradients. Measured on small sizes, where the call's cost is
# what counts.
MIN_STEPS = {
    ("rnn_tanh", False): 16,
    ("rnn_tanh", True): 8,
    ("rnn_relu", False): 16,
    ("rnn_relu", True): 8,
    ("gru", False): 14,
    ("gru", True): 4,
    ("lstm", False): 16,
    ("lstm", True): 5,
    ("lstm_projected", False): 16,
    ("lstm_projected", True): 5,
}

# The blocks of `use_backend` that this thread or task is in, the innermost last.
_requested: ContextVar[tuple[str, ...]] = ContextVar("triton_rnn_backend", default=())
_environment = os.environ.get("TRITON_RNN_BACKEND", "auto") or "auto"

# What `torch.backends.mkldnn.enabled` reads, without the descriptor around it.
_onednn_enabled = torch._C._get_mkldnn_enabled

_F = TypeVar("_F", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot do what it is asked; the message says why."""


class Choice(NamedTuple):
    """The backend of a request, and why each other one was not taken."""

    backend: str
    reasons: dict[str, str]


def check_name(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        names = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}{_by_whom(name)}; choose from {names}")
    return name


def _by_whom(name: str) -> str:
    """Where a backend was asked for, if the program does not say so."""
    set_there = name == _environment and not _requested.get()
    return " (of the variable TRITON_RNN_BACKEND)" if set_there else ""


class use_backend:  # noqa: N801 - used like a function, as torch.no_grad is
    """Run every recurrent module on one backend: a context manager and a decorator.

    >>> with triton_rnn.use_backend("torchscript"):
    ...     output, h_n = module(input)

    The choice holds for the current thread or asyncio task, and ends with the block. It stands
    above the environment variable ``TRITON_RNN_BACKEND``, which is read when the package is
    imported.

    Args:
        name: ``"auto"``, ``"triton"``, ``"native"``, ``"torchscript"``, ``"aten"`` or
            ``"reference"``.

    Raises:
        ValueError: at once, if there is no backend of that name.
        TypeError: at once, if it decorates a class or a generator.
        BackendError: from a module's call, if the backend cannot do that call.
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name)

    def __enter__(self) -> None:
        _requested.set((*_requested.get(), self.name))

    def __exit__(self, *exception: object) -> None:
        _requested.set(_requested.get()[:-1])

    def __call__(self, function: _F) -> _F:
        if inspect.isclass(function) or _is_generator(function):
            raise TypeError(
                f"use_backend is a decorator of functions that run when they are called, {function}"
                " is not one: use it as a context manager inside"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]


def _is_generator(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def requested() -> str:
    """The backend asked for: by `use_backend`, else by the environment, else ``"auto"``."""
    inside = _requested.get()
    return inside[-1] if inside else _environment


@functools.cache
def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"triton_rnn.backends.{name}")


def cannot_extend(name: str, request: Request) -> str | None:
    """Why a backend cannot give a request's steps what they are to be given; None when it can."""
    if not request.extras or hasattr(backend_module(name), "TAKES_EXTRAS"):
        return None
    reason: str | None = None
    if name == "triton" and "layer_norm" not in request.extras:
        # Its kernels are generated for the others, where it can run at all.
        reason = backend_module(name).cannot(request)
    return reason or f"its loops know nothing of {', '.join(request.extras)}"


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine at all; None when it can."""
    device = torch.device("cpu")
    if name == "triton":
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device is at hand"
        device = torch.device("cuda", torch.cuda.current_device())
    request = Request(RNN_TANH, device, torch.float32, 1, 1, 1, 1, 1, 1, True, False, False)
    return backend_module(name).supports(request)


def _slower_than_torch(request: Request, onednn: bool) -> str | None:
    """Why `auto` leaves a request that TorchScript could serve to torch's own kernels."""
    if (
        request.cell.name == "lstm"
        and request.dtype in (torch.float32, torch.bfloat16)
        and not request.packed
        and onednn
    ):
        return "torch runs this LSTM as one oneDNN primitive, which is faster"
    fewest = MIN_STEPS[request.cell.name, request.needs_grad]
    if request.seq_len < fewest:
        return f"with fewer than {fewest} steps a call costs more than its steps save"
    return None


def float32_precision() -> str:
    """What torch allows recurrent layers on a GPU to make of float32: "tf32", or another word."""
    precision: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return precision


def float32_switches() -> str:
    """All of torch's switches by which products of float32 are made on a GPU, in a short text."""
    others = torch.backends.cuda.matmul.fp32_precision
    return f"{float32_precision()} {others} {torch.are_deterministic_algorithms_enabled():d}"


def choose(request: Request, wanted: str) -> Choice:
    """The backend for a request.

    Raises:
        BackendError: if `wanted` names a backend that cannot serve the request.
    """
    if capturing(request.device):
        # Nothing can be tried out meanwhile, so what is found holds for this call alone.
        return _chosen(request, wanted, _onednn_enabled())
    # What may change between two calls: torch's switches, and a backend that has failed.
    switches = ""
    if request.dtype == torch.float32 and (request.device.type == "cuda" or wanted == "triton"):
        switches = float32_switches()
    return _choose(request, wanted, _onednn_enabled(), switches, health.failures())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the stream that a device's calls go to."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=4096)
def _choose(
    request: Request,
    wanted: str,
    onednn_enabled: bool,
    switches: str,
    failures: int,
) -> Choice:
    return _chosen(request, wanted, onednn_enabled)


def _chosen(request: Request, wanted: str, onednn_enabled: bool) -> Choice:
    check_name(wanted)
    if wanted != "auto":
        reason = cannot_extend(wanted, request) or backend_module(wanted).supports(request)
        if reason is not None:
            raise BackendError(
                f"backend {wanted!r}{_by_whom(wanted)} cannot run this call: {reason}"
            )
        return Choice(
            wanted, {name: f"{wanted} was asked for" for name in BACKENDS if name != wanted}
        )
    reasons: dict[str, str] = {}
    taken = ""
    for name in BACKENDS:
        if taken:
            reasons[name] = f"{taken} comes first"
            continue
        module = backend_module(name)
        if request.extras:
            # The choice is between those that can and the plain loops, which never pay.
            reason = cannot_extend(name, request) or module.supports(request)
        else:
            # A backend that knows when it does not pay says so.
            reason = getattr(module, "declines", module.supports)(request)
        if reason is None and name == "torchscript":
            onednn = onednn_enabled and torch.backends.mkldnn.is_available()
            reason = _slower_than_torch(request, onednn)
        if reason is None:
            taken = name
        else:
            reasons[name] = reason
    return Choice(taken, reasons)
