"""Swap the recurrent modules inside a model, there and back.

Our modules add no state to torch.nn's, so a swap is a change of class: the object stays, and
with it its parameters, buffers, hooks, mode, device and whatever else holds a reference to it.
"""

import functools
import logging
from typing import TypeVar

import torch

from triton_rnn import modules, normalized, options, stacking

_log = logging.getLogger("triton_rnn")
_Model = TypeVar("_Model", bound=torch.nn.Module)

_OURS: dict[type, type] = {
    torch.nn.RNN: modules.RNN,
    torch.nn.GRU: modules.GRU,
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNNCell: modules.RNNCell,
    torch.nn.GRUCell: modules.GRUCell,
    torch.nn.LSTMCell: modules.LSTMCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
# What ours keep of themselves, in the class until something is other than torch.nn's has it.
_PRIVATE = ("_options", "_stacking", "_residual", "_recompute", "_layered", "_normalized")
# What torch.nn's forward calls, and ours does not.
_CALLED = (
    "forward",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "permute_hidden",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
)


class _Unannounced:
    """Ahead of a user's class, whose `__init_subclass__` is not told of what is made here."""

    def __init_subclass__(cls) -> None:
        pass


class _Combined:
    """Marks a class made here of a user's subclass and one of our modules; pickles it as such."""

    _parts: tuple[type, type]

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _rebuild, self._parts, self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(user: type, ours: type) -> object:
    return object.__new__(_combine(user, ours))


@functools.cache
def _combine(user: type, ours: type) -> type:
    """A subclass of a user's class, whose forward is ours because the user's class has none."""
    return type(
        user.__name__,
        (_Unannounced, user, ours, _Combined),
        {"__module__": user.__module__, "__qualname__": user.__qualname__, "_parts": (user, ours)},
    )


def _is_parametrized(kind: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class, over its one base, for one module."""
    base = kind.__bases__[0]
    return len(kind.__bases__) == 1 and kind.__name__ == f"Parametrized{base.__name__}"


def _rebased(kind: type, base: type) -> type:
    """The class that parametrize made, over another base."""
    body = {k: v for k, v in kind.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(kind.__name__, (base,), body)


def _replaced(kind: type) -> type | None:
    """The class that takes the place of torch.nn's class `kind` or of a user's subclass of it.

    None if the class is ours already, or not a recurrent module, or does not go together with ours.
    """
    if kind in _OURS:
        return _OURS[kind]
    theirs = next((base for base in kind.__mro__ if base in _OURS), None)
    if theirs is None or _why_not(kind, theirs):
        return None
    if _is_parametrized(kind):
        base = _replaced(kind.__bases__[0])
        return None if base is None else _rebased(kind, base)
    return _combine(kind, _OURS[theirs])


def _why_not(kind: type, theirs: type) -> str:
    """What a user's subclass of torch.nn's has that ours would not have; "" where it can be ours.

    What a module is called with, its arguments and state, is ours to check; and what is kept under
    the names of `_PRIVATE` is ours.
    """
    for name in _CALLED:
        if getattr(kind, name, None) is not getattr(theirs, name, None):
            return f"overrides {name}"
    own = [each for each in kind.__mro__ if each not in theirs.__mro__]
    for name in _PRIVATE:
        if any(name in vars(each) for each in own):
            return f"has an attribute {name}"
    return ""


def _restored(kind: type) -> type | None:
    """The way back; None if the class did not come from `replace` or is not ours."""
    if kind in _THEIRS:
        return _THEIRS[kind]
    if issubclass(kind, _Combined) and "_parts" in kind.__dict__:
        return kind._parts[0]
    if _is_parametrized(kind):
        base = _restored(kind.__bases__[0])
        return None if base is None else _rebased(kind, base)
    return None


def replace(model: _Model) -> _Model:
    """Make every torch.nn recurrent module in a model, itself included, one of this package.

    The modules stay the same objects with the same Parameters, hooks, mode and device; only their
    class changes. A user's subclass that overrides `forward`, or a method that checks its
    arguments, is left alone, and a warning to the logger ``triton_rnn`` names it; so is one with an
    attribute under a name that ours keep for themselves. Any other is taken as well and stays an
    instance of its class, with its own attributes.

    Args:
        model: any module. It is changed in place.

    Returns:
        The same model.

    >>> model = triton_rnn.replace(model)
    """
    for name, module in model.named_modules():
        kind = type(module)
        theirs = next((base for base in kind.__mro__ if base in _OURS), None)
        if theirs is None or any(base in _THEIRS for base in kind.__mro__):
            continue
        own = vars(module)
        kept = [each for each in _PRIVATE if each in own]
        called = [each for each in _CALLED if each in own]
        reason = (
            f"has an attribute {kept[0]}" if kept else f"overrides {called[0]}" if called else ""
        )
        try:
            replaced = None if reason else _replaced(kind)
            reason = reason or _why_not(kind, theirs)
        except Exception as error:
            # A user's metaclass may raise anything.
            replaced, reason = None, f"has no subclass that is ours too: {error}"
        if replaced is None:
            _log.warning("left %s alone: %s %s", name or "the model", kind.__qualname__, reason)
        else:
            module.__class__ = replaced
            _log.info("replaced %s (%s)", name or "the model", kind.__name__)
    return model


def restore(model: _Model) -> _Model:
    """Make every module of this package in a model, itself included, the torch.nn module it was.

    The opposite of `replace`; a module that was built as one of ours becomes torch.nn's as well.
    With it ends `recompute`, which changes no results.

    Args:
        model: any module. It is changed in place.

    Returns:
        The same model.

    Raises:
        RuntimeError: if a module uses what torch.nn's does not have; then none is changed.
    """
    for module in model.modules():
        if _restored(type(module)) is not None:
            stacking.refuse_to_leave(module, "restore makes a module torch.nn's")
            options.refuse_to_leave(module, "restore makes a module torch.nn's")
            normalized.refuse_to_leave(module, "restore makes a module torch.nn's")
    for module in model.modules():
        restored = _restored(type(module))
        if restored is not None:
            module.__class__ = restored
            for name in _PRIVATE:
                # As it was by default, else it had been refused.
                module.__dict__.pop(name, None)
    return model
