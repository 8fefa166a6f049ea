"""Keywords of RNN, GRU and LSTM that say how layers stand on each other and what they remember."""

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import autocast, compiled, dispatch, functional, recompute
from triton_rnn.options import of_layer, set_users, users
from triton_rnn.request import Request


def _checked_sizes(sizes: Sequence[Any], num_layers: int | None) -> tuple[int, ...]:
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"hidden_size is a positive number or one for each layer, not {list(sizes)!r}"
        )
    if num_layers is not None and num_layers != len(sizes):
        raise ValueError(f"num_layers={num_layers} and {len(sizes)} hidden sizes do not agree")
    return tuple(sizes)


class Stacking(torch.nn.RNNBase):
    """What the three classes have beyond torch.nn's; their `forward` asks for `_stacking` first.

    Args:
        hidden_size: a number, as torch.nn's, or a list or tuple of one for each layer. `num_layers`
            is then left out. Where the sizes differ, the module's `hidden_size` is a tuple, every
            layer's parameters start uniform in +-1/sqrt(its hidden size), and a state is a list
            with a tensor (D, N, H) for each layer (an LSTM's two such lists), in hx and in what is
            returned. A list of equal sizes is the same as a number and `num_layers`.
        residual: see `residual`.
        recompute: see `recompute`.

    Raises:
        ValueError: for sizes that are none or are not as many as `num_layers`; for several sizes
            together with `proj_size`; for `residual=True` where no layer can have a connection.
    """

    # Of the class, so that modules that torch.nn made and old pickles have them too. `_stacking`
    # is whether any is set, so that a plain call asks one question; `_layered`, whether the layers
    # are not those of torch.nn; `_normalized`, whether they are those of `triton_rnn.normalized`.
    _stacking = False
    _layered = False
    _normalized = False
    _recompute: bool | int = False
    _residual = False

    def __init__(
        self,
        *args: Any,
        recompute: bool | int = False,
        residual: bool = False,
        **kwargs: Any,
    ) -> None:
        hidden_size = args[1] if len(args) > 1 else kwargs.get("hidden_size")
        sizes: tuple[int, ...] = ()
        if isinstance(hidden_size, (list, tuple)):
            num_layers = args[2] if len(args) > 2 else kwargs.get("num_layers")
            sizes = _checked_sizes(hidden_size, num_layers)
            if len(args) > 1:
                args = (args[0], sizes[0], *args[2:])
            else:
                kwargs["hidden_size"] = sizes[0]
            if len(args) <= 2:
                kwargs["num_layers"] = len(sizes)
        super().__init__(*args, **kwargs)
        if len(set(sizes)) > 1:
            # Asked of the module, as an LSTM takes it by its place too.
            if self.proj_size:
                raise ValueError("proj_size is for layers of one hidden size")
            self._resize(sizes)
        if type(residual) is not bool:
            raise TypeError(f"residual is True or False, not {residual!r}")
        if residual:
            self._residual = True
            if not _connected(self):
                raise ValueError(
                    "residual=True has no layer to connect: a layer after the first is connected "
                    f"where it is as wide as the one below it, and hidden sizes are {hidden_size}"
                    f" in {self.num_layers} layer(s)"
                )
            self._layered = self._stacking = True
        if recompute is not False:
            self.recompute = recompute

    def _resize(self, sizes: tuple[int, ...]) -> None:
        """Give every layer its own hidden size, and new parameters."""
        first = self.hidden_size
        self._layered = self._stacking = True
        self.hidden_size = sizes  # type: ignore[assignment]
        directions = 2 if self.bidirectional else 1
        for number, names in enumerate(_names(self)):
            below = self.input_size if number == 0 else directions * sizes[number - 1]
            for name in names:
                old = getattr(self, name)
                shape = [old.size(0) // first * sizes[number]]
                if old.dim() == 2:
                    shape.append(below if name.startswith("weight_ih") else sizes[number])
                setattr(self, name, torch.nn.Parameter(old.new_empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as torch.nn's do, each layer's by its own hidden size."""
        if isinstance(self.hidden_size, int):
            super().reset_parameters()
            return
        for size, names in zip(self.hidden_size, _names(self), strict=True):
            for name in names:
                torch.nn.init.uniform_(
                    getattr(self, name), -1 / math.sqrt(size), 1 / math.sqrt(size)
                )

    def flatten_parameters(self) -> None:
        """As torch.nn's; nothing where hidden sizes differ: cuDNN's block is of layers of one."""
        if isinstance(self.hidden_size, int):
            super().flatten_parameters()

    @property
    def residual(self) -> bool:
        """Whether layers have residual connections: their input is added to their output.

        As in GNMT (Wu et al. 2016, eq. 6): of every layer but the first, whose input is data, where
        its output is as wide as its input; `residual_layers` are those. What is added comes from
        before the dropout between the layers.
        """
        return cast(bool, users(self, "residual", self._residual))

    @residual.setter
    def residual(self, value: Any) -> None:
        set_users(self, "residual", value)

    @property
    def residual_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have a residual connection."""
        return cast(tuple[int, ...], users(self, "residual_layers", _connected(self)))

    @residual_layers.setter
    def residual_layers(self, value: Any) -> None:
        set_users(self, "residual_layers", value)

    @property
    def recompute(self) -> bool | int:
        """Whether a backward goes forward again by segments, so that training takes less memory.

        False, True for segments of about the square root of the number of steps, or the number of
        steps of a segment. It may be set at any time. On the backend `native` outputs are the same
        bits, and so are the gradients of the input and the states of a module of one direction.
        Other gradients differ by the order in which those of segments, and of an input's two
        directions, are added; other backends' products by rounding. Any call without gradients is
        as without it. Backend `aten`, autocast on the CPU, tracing and torch.func are refused.

        Raises:
            ValueError: when it is set, for anything else, and on a module with layer_norm.
        """
        return cast(bool | int, users(self, "recompute", self._recompute))

    @recompute.setter
    def recompute(self, value: bool | int) -> None:
        if "recompute" in self.__dict__:
            self.__dict__["recompute"] = value
            return
        if type(value) not in (bool, int) or (type(value) is int and value < 1):
            raise ValueError(
                f"recompute is True, False or a number of steps, at least 1, not {value!r}"
            )
        if value is not False and self._normalized:
            raise ValueError("recompute does not go together with layer_norm")
        self._recompute = value
        self._stacking = value is not False or self._layered or self._normalized

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        shown += ", residual=True" if self._residual else ""
        return shown + (f", recompute={self._recompute}" if self._recompute else "")


def refuse_to_leave(module: Any, why: str) -> None:
    """Raise if torch.nn has no module with these layers.

    Raises:
        RuntimeError: with `why`, which says what needs one.
    """
    if getattr(module, "_layered", False):
        raise RuntimeError(
            f"{why}, which has neither hidden sizes per layer nor residual connections"
        )


def _connected(module: Any) -> tuple[int, ...]:
    """The numbers of the layers that have a residual connection."""
    if not module._residual:
        return ()
    sizes = _sizes(module)
    return tuple(i for i in range(1, len(sizes)) if sizes[i] == sizes[i - 1])


def _sizes(module: Any) -> tuple[int, ...]:
    size = module.hidden_size
    return (size,) * module.num_layers if isinstance(size, int) else size


def _names(module: torch.nn.RNNBase) -> list[list[str]]:
    """The names of each layer's parameters, in torch's order."""
    names = module._flat_weights_names
    count = len(names) // module.num_layers
    return [names[i * count : (i + 1) * count] for i in range(module.num_layers)]


def layer_of(module: Any, number: int) -> torch.nn.RNNBase:
    """A layer of a module as torch.nn's module of one layer, with the same parameters."""
    kind: type[torch.nn.RNNBase] = next(
        base for base in type(module).__mro__ if base.__module__ == torch.nn.RNNBase.__module__
    )
    sizes, names = _sizes(module), _names(module)[number]
    width = (2 if module.bidirectional else 1) * (module.proj_size or sizes[number - 1])
    weights = [getattr(module, name) for name in names]
    one: torch.nn.RNNBase = object.__new__(kind)
    one.__dict__.update(module.__dict__)
    one.__dict__.update(
        input_size=module.input_size if number == 0 else width,
        hidden_size=sizes[number],
        num_layers=1,
        dropout=0.0,
        # Beyond that it has the module's options, and goes forward again if the module does.
        _stacking=False,
        _layered=False,
        _options=of_layer(module._options, number),
        _flat_weights_names=names,
        _flat_weights=weights,
        _flat_weight_refs=[weakref.ref(weight) for weight in weights],
        # Parametrized weights are no parameters; the module's hooks are not the layer's.
        _parameters=dict(zip(names, weights, strict=True)),
    )
    return one


def _refuse_state(message: str) -> NoReturn:
    raise RuntimeError(message)


def states_by_layer(module: Any, hx: Any) -> list[Any]:
    """An hx as one for each layer.

    Raises:
        RuntimeError: if it is not of the layers' sizes.
    """
    layers, directions = module.num_layers, 2 if module.bidirectional else 1
    if hx is None:
        return [None] * layers
    sizes = _sizes(module)
    pair = module.mode == "LSTM"
    if pair and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        _refuse_state("hx of an LSTM is a pair: of h_0 and of c_0")
    split: list[list[Tensor]] = []
    for which, state in enumerate(hx if pair else (hx,)):
        if isinstance(module.hidden_size, int):
            if not isinstance(state, Tensor) or state.shape[:1] != (layers * directions,):
                shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                _refuse_state(f"hx has {layers * directions} layers and directions, not {shape}")
            split.append(list(state.split(directions)))
            continue
        if not isinstance(state, (tuple, list)) or len(state) != layers:
            _refuse_state(f"where hidden sizes differ, a state is a list of {layers} tensors")
        split.append(list(state))
        rows = state[0].shape[1:-1] if isinstance(state[0], Tensor) else ("N",)
        for number, (tensor, size) in enumerate(zip(state, sizes, strict=True)):
            expected = (directions, *rows, size)
            if not isinstance(tensor, Tensor) or tensor.shape != expected:
                _refuse_state(
                    f"Expected hidden[{which}] of layer {number} of size {expected}, got "
                    f"{list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor)}"
                )
    return list(zip(*split, strict=True)) if pair else split[0]


def requests(module: Any, input: Any, hx: Any) -> list[Request]:
    """What a call asks of a backend: of every layer, where they differ; none if it is malformed."""
    if not getattr(module, "_layered", False):
        call = functional.prepare(module, input, hx)
        return [] if call is None else [call.request]
    call = functional.prepare(layer_of(module, 0), input, states_by_layer(module, hx)[0])
    if call is None:
        return []
    found = [call.request]
    for number in range(1, module.num_layers):
        one = layer_of(module, number)
        sizes = one.input_size, one.hidden_size, one.proj_size or one.hidden_size
        found.append(
            call.request._replace(input_size=sizes[0], hidden_size=sizes[1], output_size=sizes[2])
        )
    return found


def _run(module: Any, one: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    wanted = module._recompute
    if wanted is False or not torch.is_grad_enabled():
        result = functional.forward(one, input, hx)
    else:
        result = recompute.forward(one, input, hx, 0 if wanted is True else wanted)
    # By its class: a call would run hooks.
    return type(one).forward(one, input, hx) if result is None else result


def _dropped(module: Any, x: Any) -> Any:
    """Dropout as torch draws it between layers, on the time-major tensor or the packed rows."""
    if not module.training or not module.dropout:
        return x
    if isinstance(x, PackedSequence):
        return x._replace(data=dropout(x.data, module.dropout, True))
    if module.batch_first and x.dim() == 3:
        return dropout(x.transpose(0, 1), module.dropout, True).transpose(0, 1)
    return dropout(x, module.dropout, True)


def _sum(x: Any, y: Any) -> Any:
    return x._replace(data=x.data + y.data) if isinstance(x, PackedSequence) else x + y


def forward(module: Any, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """The call of a module with any of the keywords; None if torch.nn's forward shall say why not.

    A layer is a call of its own, so every backend and everything that torch.nn's forward serves is
    there for hidden sizes per layer and residual connections too.

    Raises:
        BackendError: if the call cannot be made with them.
        RuntimeError: for a state that does not fit.
    """
    if torch.compiler.is_compiling():
        raise dispatch.BackendError(
            "hidden sizes per layer, residual and recompute are not taken into graphs of "
            "torch.compile and torch.export"
        )
    if autocast.applies(module, input):
        with autocast.off(input):
            return forward(*autocast.cast(module, input, hx))
    if not module._layered:
        wanted = module._recompute
        if not torch.is_grad_enabled():
            return functional.forward(module, input, hx)
        return recompute.forward(module, input, hx, 0 if wanted is True else wanted)
    run = functools.partial(_run, module)
    output, hidden, _ = each_layer(module, input, hx, run)
    return output, hidden


def each_layer(
    module: Any, input: Any, hx: Any, run: Callable[[torch.nn.RNNBase, Any, Any], tuple[Any, Any]]
) -> tuple[Any, Any, list[Any]]:
    """Layer by layer: the output, the final state as the module returns it, and all outputs.

    Args:
        run: the call of a layer, given the layer, its input and its state: output and final state.
    """
    connected = _connected(module)
    finals = []
    outputs: list[Any] = []
    x = input
    for number, state in enumerate(states_by_layer(module, hx)):
        below = x
        x, final = run(layer_of(module, number), _dropped(module, x) if number else x, state)
        if number in connected:
            x = _sum(x, below)
        outputs.append(x)
        finals.append(final)
    if module.mode == "LSTM":
        h_n, c_n = ([pair[i] for pair in finals] for i in range(2))
        if isinstance(module.hidden_size, int):
            return x, (torch.cat(h_n), torch.cat(c_n)), outputs
        return x, (h_n, c_n), outputs
    return x, torch.cat(finals) if isinstance(module.hidden_size, int) else finals, outputs


compiled.leave_to_python(forward)
