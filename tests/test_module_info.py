"""The module inputs and error inputs that torch tests itself with, run against our classes.

They ship in the wheel, as `module_db` of torch/testing/_internal/common_modules.py.
"""

import copy
import pickle
import re

import pytest
import torch
from tolerances import TOLERANCES, assert_close
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_leaves, tree_map

import triton_rnn

CLASSES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = {
    name: info
    for name in CLASSES
    for info in module_db
    if info.module_cls is getattr(torch.nn, name)
}
DTYPES = (torch.float64, torch.float32)


def module_inputs(name, dtype, requires_grad=True, **options):
    """The inputs of one class; of RNN and GRU with the packed ones, which torch asks for apart."""
    if name in ("RNN", "GRU"):
        options["with_packed_sequence"] = True
    torch.manual_seed(0)
    return INFOS[name].module_inputs_func(
        INFOS[name],
        device="cpu",
        dtype=dtype,
        requires_grad=requires_grad,
        training=True,
        **options,
    )


def described(name, dtype):
    """Parameters for pytest: one for each module input."""
    return [
        pytest.param(
            name, dtype, index, id=f"{name}-{dtype}-{index}-{module_input.constructor_input.kwargs}"
        )
        for index, module_input in enumerate(module_inputs(name, dtype))
    ]


ALL_INPUTS = [param for name in CLASSES for dtype in DTYPES for param in described(name, dtype)]


def both_modules(name, dtype, module_input):
    """torch.nn's module and ours with the same weights, made as torch's tests make them."""
    made = module_input.constructor_input
    theirs = getattr(torch.nn, name)(*made.args, **made.kwargs).to(dtype)
    ours = getattr(triton_rnn, name)(*made.args, **made.kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def call(module, forward_input):
    """The output leaves, and all gradients, of a call with copies of the arguments."""

    def fresh(value):
        return value.detach().clone().requires_grad_(value.requires_grad)

    args = tree_map(lambda v: fresh(v) if isinstance(v, torch.Tensor) else v, forward_input.args)
    module.zero_grad()
    outputs = [out for out in tree_leaves(module(*args)) if isinstance(out, torch.Tensor)]
    floating = [out for out in outputs if out.is_floating_point()]
    sum((out * (1 + i)).square().sum() for i, out in enumerate(floating)).backward()
    gradients = [leaf.grad for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    return outputs, gradients + [parameter.grad for parameter in module.parameters()]


def assert_same_call(actual, expected):
    """Outputs and gradients, the integer ones exactly."""
    for mine, torchs in zip(actual, expected, strict=True):
        for value, other in zip(torchs, mine, strict=True):
            if value is None or not value.is_floating_point():
                assert other is value or torch.equal(other, value)
            else:
                assert_close(other, value)


def test_every_class_has_module_inputs_and_error_inputs():
    assert set(INFOS) == set(CLASSES)
    assert all(len(module_inputs(name, torch.float64)) >= 2 for name in CLASSES)
    assert all(INFOS[name].module_error_inputs_func for name in CLASSES)


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_INPUTS)
def test_forward_and_gradients_of_torchs_module_inputs_are_torchs(backend, name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    theirs, ours = both_modules(name, dtype, module_input)
    forward_input = module_input.forward_input
    assert_same_call(call(ours, forward_input), call(theirs, forward_input))


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_INPUTS)
def test_torchs_own_reference_function_agrees(name, dtype, index):
    """It runs an unbatched input as a batch of one."""
    module_input = module_inputs(name, dtype, requires_grad=False)[index]
    _, ours = both_modules(name, dtype, module_input)
    args = module_input.forward_input.args
    if isinstance(args[0], torch.nn.utils.rnn.PackedSequence):
        assert ours(*args)[0].data.isfinite().all()  # torch's reference takes no packed input
        return
    expected = tree_leaves(module_input.reference_fn(ours, *args))
    for value, actual in zip(expected, tree_leaves(ours(*args)), strict=True):
        assert_close(actual, value)


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_INPUTS)
def test_copies_repr_and_state_dict_are_torchs(name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    theirs, ours = both_modules(name, dtype, module_input)
    assert repr(ours) == repr(theirs)
    assert str(ours) == str(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = call(ours, module_input.forward_input)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert_same_call(call(other, module_input.forward_input), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_made_on_the_device_and_in_the_dtype_asked_for(name):
    module_input = module_inputs(name, torch.float64)[0]
    made = module_input.constructor_input
    for options in ({"device": "meta"}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}):
        for parameter in getattr(triton_rnn, name)(
            *made.args, **made.kwargs, **options
        ).parameters():
            assert parameter.device.type == options.get("device", "cpu")
            assert parameter.dtype == options.get("dtype", torch.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_results_without_contiguous_memory_are_the_same(backend, name):
    """As torch's test of them: every argument is every second element of another tensor."""
    for module_input in module_inputs(name, torch.float64):
        args = module_input.forward_input.args
        if isinstance(args[0], torch.nn.utils.rnn.PackedSequence):
            continue
        _, ours = both_modules(name, torch.float64, module_input)

        def strided(tensor):
            return torch.stack([tensor, tensor], -1)[..., 0]

        expected = tree_leaves(ours(*args))
        for value, actual in zip(
            expected, tree_leaves(ours(*tree_map(strided, args))), strict=True
        ):
            assert_close(actual, value, tolerance=TOLERANCES[torch.float64])


def error_inputs(name, dtype):
    """torch's list of what must be refused."""
    return INFOS[name].module_error_inputs_func(
        INFOS[name], device="cpu", dtype=dtype, requires_grad=False, training=True
    )


ALL_ERRORS = [
    pytest.param(name, dtype, index, id=f"{name}-{dtype}-{index}-{error.error_regex[:40]}")
    for name in CLASSES
    for dtype in DTYPES
    for index, error in enumerate(error_inputs(name, dtype))
]


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_ERRORS)
def test_torchs_error_inputs_are_refused_in_torchs_words(backend, name, dtype, index):
    error = error_inputs(name, dtype)[index]
    made = error.module_error_input.constructor_input
    given = error.module_error_input.forward_input
    texts = []
    for lib in (torch.nn, triton_rnn):
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                getattr(lib, name)(*made.args, **made.kwargs)
        else:
            module = getattr(lib, name)(*made.args, **{"dtype": dtype, **made.kwargs})
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                module(*given.args, **given.kwargs)
        assert caught.type is error.error_type
        texts.append(re.sub(r"0x[0-9a-f]+", "0x", str(caught.value)))
    assert texts[0] == texts[1]
