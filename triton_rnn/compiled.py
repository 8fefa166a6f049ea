"""A recurrent module's call under torch.compile and torch.export, as operators of `op`.

What is here is traced, so it is plainer than `functional`: a padded batch on the Triton kernels, or
None, and then torch.nn's own forward is traced, as it is without this package.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from triton_rnn import dispatch, op
from triton_rnn.cells import LSTM_PROJECTED, MODES
from triton_rnn.request import Request


def _reason_against(
    device: str,
    dtype: torch.dtype,
    mode: str,
    hidden_size: int,
    proj_size: int,
    directions: int,
    needs_grad: bool,
) -> str | None:
    """Why the kernels do not serve a module, as far as that is known while it is traced.

    The batch is not: it may be any. Called while tracing, not traced itself.
    """
    wanted = dispatch.requested()
    if wanted not in ("auto", "triton"):
        return f"{wanted} was asked for"
    cell = LSTM_PROJECTED if proj_size else MODES[mode]
    output_size = proj_size or hidden_size
    request = Request(
        cell,
        torch.device(device),
        dtype,
        128,
        16,
        output_size,
        hidden_size,
        output_size,
        directions,
        True,
        False,
        needs_grad,
    )
    triton = dispatch.backend_module("triton")
    return triton.cannot(request) or (
        triton.slower_than_torch(request) if wanted == "auto" else None
    )


# What torch.compiler.assume_constant_result does, which would import all of Dynamo.
_reason_against._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns; None if torch.nn's own forward is to be traced instead."""
    if not isinstance(input, Tensor) or input.dim() != 3 or input.size(2) != module.input_size:
        return None
    if torch.is_autocast_enabled(input.device.type):
        return None
    directions = 2 if module.bidirectional else 1
    weights: list[Tensor] = [getattr(module, name) for name in module._flat_weights_names]
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad or any(weight.requires_grad for weight in weights)
    )
    device = str(input.device)
    reason = _reason_against(
        device,
        input.dtype,
        module.mode,
        module.hidden_size,
        module.proj_size,
        directions,
        needs_grad,
    )
    if reason is not None or any(weight.dtype != input.dtype for weight in weights):
        return None
    layers, output_size = module.num_layers, module.proj_size or module.hidden_size
    x = input.transpose(0, 1) if module.batch_first else input
    batch = x.size(1)
    has_c = module.mode == "LSTM"
    c_0: Tensor | None = None
    if hx is None:
        h_0 = x.new_zeros(layers * directions, batch, output_size)
        if has_c:
            c_0 = x.new_zeros(layers * directions, batch, module.hidden_size)
    elif has_c:
        h_0, c_0 = hx
    else:
        h_0 = hx
    if h_0.shape != (layers * directions, batch, output_size) or h_0.dtype != x.dtype:
        return None
    if c_0 is not None and (
        c_0.shape != (layers * directions, batch, module.hidden_size) or c_0.dtype != x.dtype
    ):
        return None

    cell = "lstm_projected" if module.proj_size else MODES[module.mode].name
    count = len(weights) // layers
    needs_grad = needs_grad or (
        torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in (h_0, c_0))
    )
    finals: list[list[Tensor]] = []
    for number in range(layers):
        own = slice(number * directions, (number + 1) * directions)
        results = op.layer(
            x,
            h_0[own],
            None if c_0 is None else c_0[own],
            weights[number * count : (number + 1) * count],
            cell,
            bool(module.bias),
            needs_grad,
            "triton",
        )
        x = results[0]
        finals.append(results[1 : 3 if has_c else 2])
        if module.dropout > 0 and module.training and number + 1 < layers:
            x = dropout(x, module.dropout, True)
    states = [torch.cat([final[i] for final in finals]) for i in range(2 if has_c else 1)]
    output = x.transpose(0, 1) if module.batch_first else x
    return output, (tuple(states) if has_c else states[0])
