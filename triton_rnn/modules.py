"""The modules: torch.nn's, with a forward of ours. They hold no arithmetic and no state.

Everything but `forward` is inherited, so construction, state_dict, repr and errors are torch's.
Where `triton_rnn.functional` returns None, torch.nn's own forward is called: for input that is
malformed, so that the error is torch's, and for calls that only torch.nn can serve.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_rnn import cell_call, extended, functional, normalized, options, stacking, symbolic
from triton_rnn.normalized import LayerNormalized
from triton_rnn.options import Option
from triton_rnn.stacking import Stacking


def _torch_twin(module: torch.nn.Module, ours: type, theirs: type) -> torch.nn.Module:
    """The torch.nn module that shares all of a module's attributes, for TorchScript to compile.

    A user's subclass of ours is left to itself: what it adds cannot be carried over.

    Raises:
        RuntimeError: if the module uses what torch.nn's does not have.
    """
    stacking.refuse_to_leave(module, "torch.jit.script compiles torch.nn's module")
    options.refuse_to_leave(module, "torch.jit.script compiles torch.nn's module")
    normalized.refuse_to_leave(module, "torch.jit.script compiles torch.nn's module")
    if type(module) is not ours:
        # Of a user's that `replace` took, the user's.
        theirs, _ = vars(type(module)).get("_parts", (None, ours))
        if theirs is None:
            return module
    twin: torch.nn.Module = object.__new__(theirs)
    twin.__dict__.update(module.__dict__)
    return twin


class _Extended(torch.nn.RNNBase):
    """What RNN, GRU and LSTM have beyond torch.nn's: see `options.Options`, `extended.forward`."""

    # None as long as none is on, also in a module that was made by torch.nn or is older than they.
    _options: options.Options | None = None
    input_dropout = Option()
    recurrent_dropout = Option()
    weight_dropout = Option()
    zoneout = Option()
    clip_hidden = Option()
    clip_cell = Option()

    def __init__(
        self,
        *args: Any,
        input_dropout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        clip_hidden: float | None = None,
        clip_cell: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        options.set_all(
            self,
            input_dropout=input_dropout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            clip_hidden=clip_hidden,
            clip_cell=clip_cell,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + options.shown(self._options)

    def _run(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | None,
        reset_mask: Tensor | None,
        reset_to: str,
        all_states: bool,
    ) -> Any:
        """A call; arguments as of `extended.forward`."""
        if (
            self._options is not None
            or lengths is not None
            or reset_mask is not None
            or all_states
            or reset_to != "zeros"
        ):
            tracer = symbolic.tracer_of(input, hx, lengths, reset_mask)
            if tracer is not None:
                more = {"lengths": lengths, "reset_mask": reset_mask, "reset_to": reset_to}
                return symbolic.leaf(tracer, self, input, hx, all_states=all_states, **more)
            return extended.forward(self, input, hx, lengths, reset_mask, reset_to, all_states)
        call: Callable[..., Any] = functional.forward
        if self._stacking and symbolic.tracer_of(input, hx) is None:
            call = normalized.forward if self._normalized else stacking.forward
        result = call(self, input, hx)
        if result is not None:
            return result
        tracer = symbolic.tracer_of(input, hx)
        if tracer is not None:
            return symbolic.leaf(tracer, self, input, hx)
        # torch's, whichever it is of: no class between has a forward.
        return super().forward(input, hx)


class RNN(_Extended, Stacking, torch.nn.RNN):
    """`torch.nn.RNN`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    Beyond torch's, in the constructor: a list for `hidden_size`, residual and recompute (see
    `stacking.Stacking`); input_dropout, recurrent_dropout, weight_dropout, zoneout, clip_hidden and
    clip_cell (see `options.Options`). In a call, by keyword: lengths (N,) int64, reset_mask (T, N)
    bool or (N, T) with batch_first, reset_to "zeros" or "initial", all_states; see `forward`.
    """

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_to: str = "zeros",
        all_states: bool = False,
    ) -> Any:
        return _Extended._run(self, input, hx, lengths, reset_mask, reset_to, all_states)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, RNN, torch.nn.RNN)


class GRU(LayerNormalized, _Extended, Stacking, torch.nn.GRU):
    """`torch.nn.GRU`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    Beyond torch's, in the constructor: a list for `hidden_size`, residual and recompute (see
    `stacking.Stacking`); layer_norm (see `normalized.LayerNormalized`); input_dropout,
    recurrent_dropout, weight_dropout, zoneout, clip_hidden and clip_cell (see `options.Options`).
    In a call, by keyword: lengths (N,) int64, reset_mask (T, N) bool or (N, T) with batch_first,
    reset_to "zeros" or "initial", all_states; see `forward`.
    """

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_to: str = "zeros",
        all_states: bool = False,
    ) -> Any:
        return _Extended._run(self, input, hx, lengths, reset_mask, reset_to, all_states)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, GRU, torch.nn.GRU)


class LSTM(LayerNormalized, _Extended, Stacking, torch.nn.LSTM):
    """`torch.nn.LSTM`, faster. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    Beyond torch's, in the constructor: a list for `hidden_size`, residual and recompute (see
    `stacking.Stacking`); layer_norm (see `normalized.LayerNormalized`); input_dropout,
    recurrent_dropout, weight_dropout, zoneout, clip_hidden and clip_cell (see `options.Options`).
    In a call, by keyword: lengths (N,) int64, reset_mask (T, N) bool or (N, T) with batch_first,
    reset_to "zeros" or "initial", all_states; see `forward`.
    """

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_to: str = "zeros",
        all_states: bool = False,
    ) -> Any:
        return _Extended._run(self, input, hx, lengths, reset_mask, reset_to, all_states)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, LSTM, torch.nn.LSTM)


for _layer in (RNN, GRU, LSTM):
    _layer.forward.__doc__ = extended.forward.__doc__


class RNNCell(torch.nn.RNNCell):
    """`torch.nn.RNNCell`: one step of an RNN. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = cell_call.forward(self, input, hx)
        if result is not None:
            return result[0]
        tracer = symbolic.tracer_of(input, hx)
        return (
            super().forward(input, hx) if tracer is None else symbolic.leaf(tracer, self, input, hx)
        )

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, RNNCell, torch.nn.RNNCell)


class GRUCell(torch.nn.GRUCell):
    """`torch.nn.GRUCell`: one step of a GRU. Arguments, shapes, errors and state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = cell_call.forward(self, input, hx)
        if result is not None:
            return result[0]
        tracer = symbolic.tracer_of(input, hx)
        return (
            super().forward(input, hx) if tracer is None else symbolic.leaf(tracer, self, input, hx)
        )

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, GRUCell, torch.nn.GRUCell)


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell`: one step of an LSTM. Arguments, shapes, errors, state_dict are torch's.

    Formula and contract: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        result = cell_call.forward(self, input, hx)
        if result is not None:
            return result[0], result[1]
        tracer = symbolic.tracer_of(input, hx)
        return (
            super().forward(input, hx) if tracer is None else symbolic.leaf(tracer, self, input, hx)
        )

    def __prepare_scriptable__(self) -> torch.nn.Module:
        return _torch_twin(self, LSTMCell, torch.nn.LSTMCell)
