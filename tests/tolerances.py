"""When two numbers count as the same, and how ours is compared with its torch.nn twin.

`TOLERANCES` is the only table of tolerances of the suite. The rest of the file is what nearly every
test does: build a module and its twin with the same weights, run both forward and backward, compare
every output and every gradient by name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import triton_rnn

# The largest difference allowed, as a fraction of the largest number in the expected tensor.
# Of the largest, because every gradient of a weight is a sum whose terms cancel: an element near
# zero carries the rounding of its terms. The numbers are 5 to 20 times the worst that was measured
# over the cases of this suite: 5e-15, 2e-6, 3e-3 and 2e-2.
TOLERANCES = {
    # eps 2.2e-16. Only the order of the additions differs, over at most ~130 x 130 terms.
    torch.float64: 1e-13,
    # eps 1.2e-7. As above, and the rounding of a state travels through all later steps.
    torch.float32: 2e-5,
    # eps 9.8e-4. Every gate and every state of every step is rounded to 11 bits before the next.
    torch.float16: 2e-2,
    # eps 7.8e-3. The same with 8 bits: a state is good to two digits, a gradient of it to less.
    torch.bfloat16: 1e-1,
}

# Below this an expected tensor counts as being of this size: nothing cancels to exactly zero.
SMALLEST_SCALE = 1e-3

# Name in the test ids -> name of the class, and the options that make it this kind.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": 2}),
}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh_cell": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu_cell": ("RNNCell", {"nonlinearity": "relu"}),
    "gru_cell": ("GRUCell", {}),
    "lstm_cell": ("LSTMCell", {}),
}

# Every kind of layer with each of its outputs.
OUTPUTS = [
    (kind, name)
    for kind in LAYERS
    for name in ("output", "h_n", "c_n")
    if name != "c_n" or "lstm" in kind
]

Results = dict[str, torch.Tensor | None]
State = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


def twins(kind: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any):
    """A torch.nn module and ours of the same kind with the same weights: (theirs, ours)."""
    class_name, kind_options = {**LAYERS, **CELLS}[kind]
    options = {**kind_options, **options, "dtype": dtype}
    theirs = getattr(torch.nn, class_name)(*sizes, **options)
    ours = getattr(triton_rnn, class_name)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, for a shape and a seed the same in any dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_state(module: Any, batch: int | None, seed: int = 1) -> State:
    """A random hx for a layer or a cell; `batch` None makes it one of an unbatched input."""
    dtype = next(module.parameters()).dtype
    rows = () if batch is None else (batch,)
    if isinstance(module, torch.nn.RNNBase):
        rows = (module.num_layers * (2 if module.bidirectional else 1), *rows)
    proj_size = getattr(module, "proj_size", 0)
    hidden = random(*rows, proj_size or module.hidden_size, seed=seed, dtype=dtype)
    if not isinstance(module, torch.nn.LSTM | torch.nn.LSTMCell):
        return hidden
    return hidden, random(*rows, module.hidden_size, seed=seed + 1, dtype=dtype)


def flat_outputs(module: torch.nn.Module, returned: Any) -> dict[str, torch.Tensor]:
    """What a layer or a cell returned, by name: output, h_n, c_n (a cell has no output)."""
    if isinstance(module, torch.nn.LSTMCell):
        return dict(zip(("h_n", "c_n"), returned, strict=True))
    if isinstance(module, torch.nn.RNNCell | torch.nn.GRUCell):
        return {"h_n": returned}
    output, state = returned
    if isinstance(output, PackedSequence):
        output = output.data
    if isinstance(module, torch.nn.LSTM):
        return {"output": output, "h_n": state[0], "c_n": state[1]}
    return {"output": output, "h_n": state}


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that gathers a gradient."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def run(
    module: torch.nn.Module,
    input: torch.Tensor,
    hx: State = None,
    *,
    prepare: Callable[[torch.Tensor], Any] = lambda input: input,
    prepare_state: Callable[[torch.Tensor], torch.Tensor] = lambda state: state,
    prepare_grad: Callable[[torch.Tensor], torch.Tensor] = lambda grad: grad,
    used: Iterable[str] = ("output", "h_n", "c_n"),
    call: Callable[..., Any] | None = None,
) -> Results:
    """All outputs of a forward and all gradients of a backward, by name.

    The module is given `prepare(input)` and `prepare_state` of each state, of which the leaves'
    gradients are taken: so packing, expanding and striding are part of what is differentiated.
    `used` names the outputs that the loss depends on. `call` is called in place of the module, of
    which it must be another form.
    """
    call = module if call is None else call
    module.zero_grad(set_to_none=True)
    input = leaf(input)
    states = () if hx is None else tuple(leaf(s) for s in (hx if isinstance(hx, tuple) else (hx,)))
    if hx is None:
        returned = call(prepare(input))
    elif isinstance(hx, tuple):
        returned = call(prepare(input), tuple(prepare_state(state) for state in states))
    else:
        returned = call(prepare(input), prepare_state(states[0]))
    outputs = flat_outputs(module, returned)

    chosen = [outputs[name] for name in sorted(outputs) if name in used]
    torch.autograd.backward(
        chosen,
        [
            prepare_grad(random(*out.shape, seed=10 + i, dtype=out.dtype))
            for i, out in enumerate(chosen)
        ],
    )
    results: Results = {name: out.detach() for name, out in outputs.items()}
    results["grad of input"] = input.grad
    for name, state in zip(("h_0", "c_0"), states, strict=False):
        results[f"grad of {name}"] = state.grad
    for name, parameter in module.named_parameters():
        results[f"grad of {name}"] = parameter.grad
    return results


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a fraction of the largest expected number."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = max(expected.abs().max().item(), SMALLEST_SCALE)
    return ((actual - expected).abs().max() / scale).item()


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    name: str = "tensor",
    tolerance: float | None = None,
) -> None:
    """The same shape and dtype, and the same numbers by the table (or by `tolerance`)."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} is not {expected.dtype}"
    limit = TOLERANCES[expected.dtype] if tolerance is None else tolerance
    error = largest_error(actual, expected)
    # Written so that a NaN fails.
    assert error <= limit, f"{name} is off by {error:.2e} of its largest element, limit {limit:.0e}"


def assert_same_results(actual: Results, expected: Results, tolerance: float | None = None) -> None:
    """Every output and every gradient: the same names, the same ones None, the same numbers."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        if value is None or other is None:
            assert value is other, f"{name}: one is None"
        else:
            assert_close(other, value, name, tolerance)


def assert_same_bits(actual: Results, expected: Results) -> None:
    """As `assert_same_results`, to the last bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        other = actual[name]
        same = value is other if value is None or other is None else torch.equal(other, value)
        assert same, f"{name} differs"


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    """Skip what a backend refuses by name; that it does refuse it has a test of its own."""
    if backend == "native" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("the C loops are for float32 and float64 (test_native.py)")
