"""Layer normalization of GRU and LSTM: the keyword of the constructor, and the module's call.

A door of its own beside `functional.forward`, which knows nothing of it. A layer is one of another
cell (`cells.NORMALIZED`) with a fifth weight, made of the parameters that torch.nn does not have;
so layers, directions, packing and second derivatives are those of all cells.
"""

import functools
import math
from typing import Any, cast

import torch
from torch import Tensor

from triton_rnn import compiled, dispatch, functional, malformed, route
from triton_rnn.cells import NORMALIZED
from triton_rnn.options import OFF, set_users, users
from triton_rnn.profiling import ranges
from triton_rnn.request import Call


@functools.lru_cache(maxsize=1024)
def _names(
    mode: str, layers: int, bidirectional: bool, bias: bool
) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Names and lengths (in hidden sizes) of the parameters of each layer and direction."""
    gates = NORMALIZED[mode].gates
    found = []
    for number in range(layers):
        for end in ("", "_reverse")[: 1 + bidirectional]:
            kinds = {"weight_norm_ih": gates, "weight_norm_hh": gates}
            if mode == "LSTM":
                kinds |= {"weight_norm_c": 1} | ({"bias_norm_c": 1} if bias else {})
            found.append(tuple((f"{kind}_l{number}{end}", n) for kind, n in kinds.items()))
    return tuple(found)


class LayerNormalized(torch.nn.RNNBase):
    r"""What GRU and LSTM have beyond torch.nn's: layer normalization of the preactivations.

    Ba, Kiros & Hinton 2016, "Layer Normalization" (arXiv:1607.06450), LN being that of
    `torch.nn.functional.layer_norm` with its eps of 1e-5:

    * LSTM (eq. 20 to 22): the gates i, f, g, o are made of LN(W_ih x) + b_ih + LN(W_hh h) + b_hh,
      each LN over all 4 H numbers, and h = o tanh(LN(c)). The c that is carried, and returned, is
      not normalized, as in the paper; the LayerNormLSTM of torch's benchmarks/fastrnns carries the
      normalized one.
    * GRU (supplement): n = tanh(LN(W_in x) + b_in + r (LN(W_hn h) + b_hn)); r and z likewise by
      sums. LN is over the 2 H numbers of r and z together, and over the H of n by themselves.

    Backends: "native" and "reference". Any other asked for by name, autocast and tracing are
    refused with a BackendError; torch.func and its transforms take the reference, and torch.compile
    breaks its graph. Recurrent dropout, zoneout, clipping and an LSTM's `all_states` are refused
    with a BackendError, `restore` and torch.jit.script with a RuntimeError.

    Args:
        layer_norm: whether the module has it. Its parameters stand behind torch's, whose seeds and
            names stay; a module without it has none of them.

    Attributes:
        weight_norm_ih_l[k], weight_norm_hh_l[k]: (G * H,), the gains of W_ih x and of W_hh h, ones
            at first. Of the reverse direction with the suffix ``_reverse``. Their shifts are
            bias_ih and bias_hh.
        weight_norm_c_l[k], bias_norm_c_l[k]: (H,), gain and shift of an LSTM's c, ones and zeros at
            first. With ``bias=False`` there is no shift.

    Raises:
        TypeError: if it is not a bool.
        ValueError: together with `proj_size`, several hidden sizes, `residual`, `recompute`,
            recurrent dropout, zoneout or clipping.
    """

    def __init__(self, *args: Any, layer_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(layer_norm) is not bool:
            raise TypeError(f"layer_norm is True or False, not {layer_norm!r}")
        if not layer_norm:
            return
        module: Any = self
        if self.proj_size:
            raise ValueError(
                "layer_norm does not go together with proj_size: the paper has no projection, and "
                "what of it to normalize is not agreed upon"
            )
        inside = {*(module._options or OFF).given()} - {"input_dropout", "weight_dropout"}
        if module._stacking or inside:
            raise ValueError(
                "layer_norm does not go together with hidden sizes per layer, residual, recompute, "
                "recurrent dropout, zoneout and clipping"
            )
        module._normalized = module._stacking = True
        like = module.weight_ih_l0
        for names in _names(self.mode, self.num_layers, self.bidirectional, self.bias):
            for name, length in names:
                empty = like.new_empty(length * self.hidden_size)
                self.register_parameter(name, torch.nn.Parameter(empty))
        self._reset_norms()

    @property
    def layer_norm(self) -> bool:
        """Whether the module has it."""
        return cast(bool, users(self, "layer_norm", cast(Any, self)._normalized))

    @layer_norm.setter
    def layer_norm(self, value: Any) -> None:
        set_users(self, "layer_norm", value)

    def _reset_norms(self) -> None:
        for names in _names(self.mode, self.num_layers, self.bidirectional, self.bias):
            for name, _ in names:
                start = 0.0 if name.startswith("bias") else 1.0
                torch.nn.init.constant_(getattr(self, name), start)

    def reset_parameters(self) -> None:
        """Draw torch's parameters anew as torch does; gains are then 1 and shifts 0."""
        module: Any = self
        if not module._normalized:
            super().reset_parameters()
            return
        bound = 1 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if "_norm_" not in name:
                torch.nn.init.uniform_(weight, -bound, bound)
        self._reset_norms()

    def extra_repr(self) -> str:
        module: Any = self
        return super().extra_repr() + (", layer_norm=True" if module._normalized else "")


def refuse_to_leave(module: Any, why: str) -> None:
    """Refuse to make a module torch.nn's, which would leave out the normalization.

    Raises:
        RuntimeError: if it has one.
    """
    if getattr(module, "_normalized", False):
        raise RuntimeError(f"{why}, which has no layer_norm")


def _fifth_weights(module: Any, like: Tensor) -> list[Tensor] | None:
    """The fifth weight of each layer and direction; None if a parameter is out of the ordinary."""
    size = module.hidden_size
    found = []
    for names in _names(module.mode, module.num_layers, module.bidirectional, module.bias):
        parts: list[Tensor] = []
        for name, length in names:
            weight: Any = getattr(module, name, None)
            if not functional.is_plain(weight, (length * size,), like.dtype, like.device):
                return None
            parts.append(weight)
        if module.mode == "LSTM" and not module.bias:
            parts.append(like.new_zeros(size))
        found.append(torch.cat(parts).view(-1, size))
    return found


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> Call | None:
    """Take a call of a module with layer normalization apart; None if it is malformed."""
    call = functional.prepare(module, input, hx)
    if call is None:
        return None
    norms = _fifth_weights(module, call.weights[0])
    if norms is None:
        return None
    count = len(call.weights) // len(norms)
    weights: list[Tensor] = []
    for number, norm in enumerate(norms):
        weights += [*call.weights[number * count : (number + 1) * count], norm]
    request = call.request._replace(
        cell=NORMALIZED[module.mode],
        needs_grad=call.request.needs_grad or any(norm.requires_grad for norm in norms),
        extras=("layer_norm",),
    )
    return call._replace(request=request, weights=weights)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any]:
    """What `module(input, hx)` returns, of a module with layer normalization.

    Raises:
        BackendError: if no backend, or not the one that was asked for, can run the call.
        RuntimeError: torch.nn's own errors for a malformed input or state.
    """
    if torch.compiler.is_compiling():
        # Dynamo cannot trace what follows; outside of a graph it runs as it does without Dynamo.
        torch._dynamo.graph_break()
    functional.refuse_unsafe(module, input, hx)
    call = prepare(module, input, hx)
    if call is None:
        malformed.refuse(module, input, hx, ("layer_norm",))
    backend = dispatch.backend_module(route.choose(call.request).backend)
    drop = module.dropout if module.training else 0.0
    with ranges.call(call.request.cell):
        output, *states = functional.stack(call, backend, module.num_layers, drop)
    return functional.in_callers_form(module, input, output, states)


compiled.leave_to_python(forward)
