"""Constructor keywords that torch.nn's modules do not have: regularization and clipping.

They are attributes of a module that may be set at any time, as `dropout` is. A module that uses
none has no attribute of its own for them: a state_dict, a pickle and a module that `replace` took
over know nothing of them.
"""

import math
from typing import Any, NamedTuple

from torch import nn


class Options(NamedTuple):
    """The options of a module; each field's default is off.

    Attributes:
        input_dropout: probability of locked (variational) dropout on every layer's input, one
            number or one for each layer: Gal & Ghahramani (2016), arXiv:1512.05287.
        recurrent_dropout: the same on h where W_hh multiplies it.
        weight_dropout: probability of dropout on the elements of W_hh (DropConnect): Merity et al.
            (2018), arXiv:1708.02182.
        zoneout: probability that an element of a state stays as it was before the step, one number
            or for an LSTM that of h and that of c: Krueger et al. (2017), arXiv:1606.01305.
        clip_hidden: the largest absolute value of h after a step, or None.
        clip_cell: the largest absolute value of an LSTM's c after a step, or None.
    """

    input_dropout: float | tuple[float, ...] = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    clip_hidden: float | None = None
    clip_cell: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are on."""
        return {
            name: value
            for name, value in self._asdict().items()
            if value is not None and (any(value) if isinstance(value, tuple) else value)
        }


OFF = Options()


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
    return float(value)


def _checked(module: nn.RNNBase, name: str, value: Any) -> Any:
    """The value of an option as it is kept.

    Raises:
        ValueError: if the module cannot have it.
    """
    has_c = module.mode == "LSTM"
    if name.startswith("clip"):
        if value is None:
            return None
        if name == "clip_cell" and not has_c:
            raise ValueError(f"clip_cell is for an LSTM, {module.mode} has no cell state")
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise ValueError(f"{name} should be a positive number or None, got {value!r}")
        return float(value)
    if isinstance(value, (tuple, list)):
        counts = {"input_dropout": module.num_layers, "zoneout": 2 if has_c else 1}
        if name not in counts:
            raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
        if len(value) != counts[name]:
            wanted = "layers" if name == "input_dropout" else "states"
            raise ValueError(f"{name} has {len(value)} numbers for {counts[name]} {wanted}")
        return tuple(_probability(name, each) for each in value)
    return _probability(name, value)


def users(module: Any, name: str, ours: Any) -> Any:
    """What a user's subclass, made ours by `replace`, has of its own under a name of ours."""
    for table in (module.__dict__, module._parameters, module._buffers, module._modules):
        if name in table:
            return table[name]
    return ours


def set_users(module: nn.Module, name: str, value: Any) -> None:
    """Keep what a user's subclass has of its own under a name of ours that cannot be set.

    Raises:
        AttributeError: if the module is no user's subclass.
    """
    if type(module).__module__ == "triton_rnn.modules":
        raise AttributeError(f"{name} cannot be set: it is of the module's construction")
    vars(module)[name] = value


class Option:
    """An attribute of a module that is a field of its `_options`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return getattr(OFF, self.name)
        return users(module, self.name, getattr(module._options or OFF, self.name))

    def __set__(self, module: Any, value: Any) -> None:
        if self.name in module.__dict__:
            module.__dict__[self.name] = value
            return
        value = _checked(module, self.name, value)
        options = (module._options or OFF)._replace(**{self.name: value})
        if options.given():
            module._options = options
        else:
            # The class's, which is None.
            module.__dict__.pop("_options", None)


def set_all(module: nn.RNNBase, **options: Any) -> None:
    """Set those options that are given: a probability other than 0, a bound other than None.

    Raises:
        ValueError: if the module cannot have one.
    """
    for name, value in options.items():
        default = getattr(OFF, name)
        # False is equal to 0, and neither a probability nor a bound.
        if value is not default and (type(value) not in (int, float) or value != default):
            setattr(module, name, value)


def of_layer(options: Options | None, number: int) -> Options | None:
    """A module's options as those of one of its layers by itself."""
    if options is None or not isinstance(options.input_dropout, tuple):
        return options
    return options._replace(input_dropout=options.input_dropout[number])


def shown(options: Options | None) -> str:
    """What a module's repr says of its options: those that are on."""
    given = {} if options is None else options.given()
    return "".join(f", {name}={value}" for name, value in given.items())


def refuse_to_leave(module: Any, why: str) -> None:
    """Refuse to make a module torch.nn's, which would leave out what it is told to do.

    Raises:
        RuntimeError: if an option of it is on.
    """
    given = (getattr(module, "_options", None) or OFF).given()
    if given:
        raise RuntimeError(f"{why}, which has no {', '.join(given)}; set it to its default first")
