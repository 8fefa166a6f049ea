"""What sends every call to torch.nn's own forward, whatever it is a call of."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from triton_rnn.profiling import ranges

peek_functorch = torch._C._functorch.peek_interpreter_stack
VMAP = torch._C._functorch.TransformType.Vmap
is_compiling = torch.compiler.is_compiling
# As `torch.is_autocast_enabled`, for any kind of device in one question.
autocast_anywhere = torch._C._is_any_autocast_enabled
_forward_ad = torch.autograd.forward_ad


def transforms() -> list[Any]:
    """The kinds of torch.func's transforms that are at work, from the outermost."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return [level.key() for level in levels]


def _forward_mode() -> bool:
    return _forward_ad._current_level >= 0


# Modes of `make_fx(pre_dispatch=True)` stand on a stack of their own; with any, this key is on.
_before_dispatch = functools.partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)

# What is asked, and what it means if the answer is not no.
_OBSTACLES: tuple[tuple[Callable[[], Any], str], ...] = (
    (autocast_anywhere, "autocast is on"),
    (peek_functorch, "a torch.func transform is at work"),
    (torch._C._len_torch_dispatch_stack, "a torch dispatch mode is at work"),
    (_before_dispatch, "a torch dispatch mode is at work ahead of autograd"),
    (is_compiling, "torch.compile is tracing the call"),
    (torch._C._get_tracing_state, "torch.jit.trace is tracing the call"),
    (_forward_mode, "forward-mode differentiation is at work"),
)

# Which must all answer no for a call to be as usual: besides an obstacle, a profiler that looks for
# ranges.
QUESTIONS = (*(ask for ask, _ in _OBSTACLES), ranges.on)


def obstacle(but_autocast: bool = False) -> str | None:
    """Why only torch.nn's own forward can serve a call here and now, or None."""
    for ask, reason in _OBSTACLES[1:] if but_autocast else _OBSTACLES:
        # functorch answers None or a level.
        if ask():
            return reason
    return None
