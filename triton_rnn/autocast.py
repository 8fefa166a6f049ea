"""Calls under a GPU's autocast: in float16, whatever autocast's own dtype is.

That is what torch makes of its recurrent layers there (aten/src/ATen/cudnn/AutocastRNN.cpp: input,
states and weights are cast to half), so results have torch.nn's dtype. The casts are operators, by
which gradients come back in the dtypes of what was cast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch, functional, obstacles
from triton_rnn.request import Call

CAST = (torch.float32, torch.float16, torch.bfloat16)
# Before, bfloat16 is none of cuDNN's dtypes, and torch's other kernels follow other rules.
_CUDNN_WITH_BFLOAT16 = 91300


def torch_casts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether autocast is on for a device, and torch's wrapper would cast such an input to half."""
    cudnn = torch.backends.cudnn
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda") or not cudnn.enabled:
        return False
    if dtype == torch.bfloat16 and torch.version.hip is None:
        return (cudnn.version() or 0) >= _CUDNN_WITH_BFLOAT16
    return dtype in CAST


def applies(module: torch.nn.RNNBase, input: Any) -> bool:
    """Whether a call is one in float16; else it is torch.nn's, or no call at all."""
    if not obstacles.autocast_anywhere():
        return False
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor) or not torch_casts(data.device, data.dtype):
        return False
    if getattr(module, "_normalized", False):
        # Refused, as torch has nothing to go by.
        return False
    # A parametrized weight is none of these: to ask for it would be to compute it.
    weights = (module._parameters.get(name) for name in module._flat_weights_names)
    return (
        all(weight is None or weight.dtype in CAST for weight in weights)
        and obstacles.obstacle(but_autocast=True) is None
    )


def _half(value: Any) -> Any:
    """Tensors of float32 and bfloat16 in float16, in the form in which they are given."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_half(value.data))
    if isinstance(value, Tensor):
        return value.to(torch.float16) if value.dtype in CAST else value
    if isinstance(value, list):
        return [_half(part) for part in value]
    if isinstance(value, tuple):
        # One of a kind of its own, too: its parts are what counts.
        return tuple(_half(part) for part in value)
    return value


def cast(module: Any, input: Any, hx: Any) -> tuple[Any, Any, Any]:
    """A module with its weights in float16, for one call, and input and state so."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    # Parametrized weights are no parameters; one that is in two places is cast once.
    given = {name: getattr(module, name) for name in module._flat_weights_names}
    done = {id(weight): weight for weight in given.values()}
    done = {key: _half(weight) for key, weight in done.items()}
    weights = {name: done[id(weight)] for name, weight in given.items()}
    twin.__dict__["_parameters"] = weights
    return twin, _half(input), _half(hx)


def off(input: Any) -> Any:
    """A context without autocast on an input's device."""
    data = input.data if isinstance(input, PackedSequence) else input
    return torch.autocast(data.device.type, enabled=False)


def prepare(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Call, dispatch.Choice] | None:
    """A call in float16 and its backend; None if torch.nn's own forward is to answer.

    Raises:
        BackendError: if the kernels were asked for by name and cannot run it.
    """
    wanted = dispatch.requested()
    if wanted not in ("auto", "triton") or not applies(module, input):
        return None
    with off(input):
        call = functional.prepare(*cast(module, input, hx))
        if call is None:
            return None
        choice = dispatch.choose(call.request, wanted)
    # cuDNN wants its weights in one block, which torch's wrapper fills as it casts.
    return (call, choice) if choice.backend == "triton" else None


def forward(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Any, Any] | None:
    """What `module(input, hx)` returns under a GPU's autocast; None as of `prepare`."""
    found = prepare(module, input, hx)
    if found is None:
        return None
    call, choice = found
    drop = module.dropout if module.training else 0.0
    with off(input):
        backend = dispatch.backend_module(choice.backend)
        output, *states = functional.stack(call, backend, module.num_layers, drop)
    return functional.in_callers_form(module, input, output, states)
