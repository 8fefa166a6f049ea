"""A recurrent module's call under torch.compile and torch.export, as operators of `op`.

What is here is traced, so it is plainer than `functional`: a padded batch as one operator for each
layer, or None, and then torch.nn's own forward is traced, as it is without this package.
"""

import contextlib
import importlib
import operator
from collections.abc import Callable
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import dropout

from triton_rnn import dispatch, op, reference
from triton_rnn.cells import CELLS, LSTM_PROJECTED, MODES, Cell
from triton_rnn.request import Request


class allow_compile:  # noqa: N801 - used like a function, as torch.no_grad is
    """Let torch.compile take recurrent modules into its graphs: a call, and a context manager.

    Dynamo, the front of torch.compile, breaks its graph at every RNN, GRU and LSTM (torch.nn's and
    ours alike; cells it takes) unless its switch ``torch._dynamo.config.allow_rnn`` is on. Broken
    graphs give the right numbers, but ``fullgraph=True`` is refused. Here a layer is one operator
    in the graph, forward and backward, so that a graph does not grow with the sequence.

    >>> triton_rnn.allow_compile()                   # from now on
    >>> compiled = torch.compile(model, fullgraph=True)
    >>> with triton_rnn.allow_compile():             # for the block; compiling happens in the
    ...     output = compiled(input)                 # first call, not in torch.compile

    The switch holds for the current thread, as Dynamo's settings do.
    """

    def __init__(self) -> None:
        # Not at the top of the file, because it imports all of Dynamo.
        self._config = cast(Any, importlib.import_module("torch._dynamo.config"))
        self._before = self._config.allow_rnn
        self._config.allow_rnn = True

    def __enter__(self) -> None:
        self._config.allow_rnn = True

    def __exit__(self, *exception: object) -> None:
        self._config.allow_rnn = self._before


def leave_to_python(function: Callable[..., Any]) -> None:
    """Tell Dynamo not to look into calls of a function that it meets after a graph break.

    It would compile what it can of our checks, one function after the other. A function that is
    called inside a graph is traced all the same. The means are private to torch: without them
    Dynamo tries, and the numbers are right as well.
    """
    with contextlib.suppress(AttributeError, TypeError):
        private: Any = torch._C._dynamo.eval_frame
        skip = private._FrameAction.SKIP
        code: CodeType = function.__code__
        private.set_code_exec_strategy(code, private._FrameExecStrategy(skip, skip))


def _operator(
    device: str,
    dtype: torch.dtype,
    mode: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    bias: bool,
    needs_grad: bool,
) -> str:
    """What the operator of a module is told of a backend, or "" to trace torch.nn's forward.

    The sizes of the batch are not asked for: they may be any, so 16 sequences of 128 steps stand
    for them. Called while tracing, not traced itself.

    Raises:
        BackendError: if a backend was asked for that cannot be in a graph.
    """
    wanted = dispatch.requested()
    if wanted == "aten" or torch.onnx.is_in_onnx_export():
        return ""
    request = Request(
        LSTM_PROJECTED if proj_size else MODES[mode],
        torch.device(device),
        dtype,
        128,
        16,
        input_size,
        hidden_size,
        proj_size or hidden_size,
        directions,
        bias,
        False,
        needs_grad,
    )
    if wanted == "reference":
        return wanted
    if wanted == "triton" or (wanted == "auto" and request.device.type == "cuda"):
        triton = dispatch.backend_module("triton")
        if wanted == "triton":
            reason = triton.cannot(request)
            if reason is not None:
                raise dispatch.BackendError(f"backend 'triton' cannot run this call: {reason}")
            return "triton"
        if triton.cannot(request) or triton.slower_than_torch(request):
            return ""
        return f"{op.BY_AUTO}triton"
    if request.device.type != "cpu" or dtype not in op.CPU_DTYPES:
        if wanted != "auto":
            dispatch.choose(request, wanted)  # says why not
        return ""
    if wanted != "auto":
        return dispatch.choose(request, wanted).backend
    # What is exported runs elsewhere, where there may be no compiler: the operator chooses there.
    exporting = torch.compiler.is_exporting()
    native = dispatch.backend_module("native")
    if needs_grad and not exporting and native.supports(request) is None:
        return f"{op.BY_AUTO}native"
    return "auto"


# What torch.compiler.assume_constant_result does, which would import all of Dynamo.
_operator._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_half(device: str, dtype: torch.dtype) -> bool:
    """Whether autocast makes a call one in float16; called while tracing, not traced itself."""
    return bool(
        importlib.import_module("triton_rnn.autocast").torch_casts(torch.device(device), dtype)
    )


_is_half._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unrolled(
    cell: Cell, x: Tensor, h_0: Tensor, c_0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """A layer by the reference, every step of which is traced."""
    steps, batch, size = x.shape
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    rows = x.reshape(steps * batch, size)
    output, *states = reference.layer(cell, rows, [batch] * steps, h_0, c_0, weights)
    return (output.view(steps, batch, -1), *states)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns; None if torch.nn's own forward is to be traced instead."""
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return None
    if input.size(-1) != module.input_size:
        return None
    casts = torch.is_autocast_enabled(input.device.type)
    if casts and not _is_half(str(input.device), input.dtype):
        return None
    kinds = type(module.bidirectional), type(module.bias), type(module.num_layers)
    if kinds != (bool, bool, int):
        return None
    directions = 2 if module.bidirectional else 1
    weights: list[Any] = [getattr(module, name) for name in module._flat_weights_names]
    others = any(map(operator.is_not, weights, module._flat_weights))
    if others and not module._weights_have_changed():
        # As `functional.weights_of`.
        weights = list(module._flat_weights)
    has_c = module.mode == "LSTM"
    states: tuple[Tensor, ...] = () if hx is None else hx if has_c else (hx,)
    if casts:
        if any(tensor is None or tensor.dtype == torch.float64 for tensor in (*weights, *states)):
            return None
        input = input.to(torch.float16)
        weights = [weight.to(torch.float16) for weight in weights]
        states = tuple(state.to(torch.float16) for state in states)
        # Its own dtype, which may be another one, has no part in what follows.
        with torch.autocast(input.device.type, enabled=False):
            return _stack(module, input, states, weights, directions)
    return _stack(module, input, states, weights, directions)


def _stack(
    module: torch.nn.RNNBase,
    input: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    directions: int,
) -> tuple[Any, Any] | None:
    """All layers, of tensors of one dtype; None as of `forward`."""
    has_c = module.mode == "LSTM"
    for weight in weights:
        if weight is None or weight.dtype != input.dtype or weight.device != input.device:
            return None
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad
        or any(weight.requires_grad for weight in weights)
        or any(state.requires_grad for state in states)
    )
    backend = _operator(
        str(input.device),
        input.dtype,
        module.mode,
        module.input_size,
        module.hidden_size,
        module.proj_size,
        directions,
        module.bias,
        needs_grad,
    )
    if backend == "":
        return None
    layers, output_size = module.num_layers, module.proj_size or module.hidden_size
    unbatched = input.dim() == 2
    if unbatched:
        x = input.unsqueeze(1)
    else:
        x = input.transpose(0, 1) if module.batch_first else input
    batch = x.size(1)
    c_0: Tensor | None = None
    if not states:
        h_0 = x.new_zeros(layers * directions, batch, output_size)
        if has_c:
            c_0 = x.new_zeros(layers * directions, batch, module.hidden_size)
    else:
        rows = (layers * directions,) if unbatched else (layers * directions, batch)
        h_0 = states[0]
        if h_0.shape != (*rows, output_size) or h_0.dtype != x.dtype or h_0.device != x.device:
            return None
        if has_c:
            c_0 = states[1]
            if (
                c_0.shape != (*rows, module.hidden_size)
                or c_0.dtype != x.dtype
                or c_0.device != x.device
            ):
                return None
        if unbatched:
            h_0 = h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)

    cell = "lstm_projected" if module.proj_size else MODES[module.mode].name
    count = len(weights) // layers
    finals: list[list[Tensor]] = []
    for number in range(layers):
        own = slice(number * directions, (number + 1) * directions)
        h, c = h_0[own], None if c_0 is None else c_0[own]
        own_weights = weights[number * count : (number + 1) * count]
        if backend == "reference":
            results = list(_unrolled(CELLS[cell], x, h, c, own_weights))
        else:
            results = op.layer(
                x, h, c, own_weights, cell, module.bias, needs_grad, backend, op.LAYOUT
            )
        x = results[0]
        finals.append(results[1 : 3 if has_c else 2])
        if module.dropout > 0 and module.training and number + 1 < layers:
            x = dropout(x, module.dropout, True)
    last = [torch.cat([final[i] for final in finals]) for i in range(2 if has_c else 1)]
    if unbatched:
        x = x.squeeze(1)
        last = [state.squeeze(1) for state in last]
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, (tuple(last) if has_c else last[0])
