"""The module inputs and error inputs that torch tests itself with, run against our classes.

They ship in the wheel, as `module_db` of torch/testing/_internal/common_modules.py.
"""

import copy
import pickle
import re

import pytest
import torch
from tolerances import TOLERANCES, assert_close, skip_unless_served
from torch.func import functional_call
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

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
ALL_FLOAT64 = [param for name in CLASSES for param in described(name, torch.float64)]


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


# --- The other checks that torch runs on its modules.


def floating(returned):
    """The tensors of numbers that a call returned; a PackedSequence has sizes and indices too."""
    leaves = [out for out in tree_leaves(returned) if isinstance(out, torch.Tensor)]
    return [out for out in leaves if out.is_floating_point()]


def wants_gradients(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.requires_grad


def as_function(module, args):
    """A function of all weights and all floating arguments, as torch's gradient checks call it."""
    names = [name for name, _ in module.named_parameters()]
    flat, spec = tree_flatten(args)
    places = [i for i, value in enumerate(flat) if wants_gradients(value)]

    def function(*tensors):
        weights = dict(zip(names, tensors, strict=False))
        values = list(flat)
        for place, tensor in zip(places, tensors[len(names) :], strict=True):
            values[place] = tensor
        returned = functional_call(module, weights, tree_unflatten(values, spec))
        return tuple(floating(returned))

    return function, [*module.parameters(), *(flat[place] for place in places)]


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_FLOAT64)
def test_gradcheck_and_gradgradcheck_of_torchs_module_inputs(name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    _, ours = both_modules(name, dtype, module_input)
    ours.train(index % 2 == 0)  # its dropout is 0, so the modes are to be the same
    function, tensors = as_function(ours, module_input.forward_input.args)
    # The fast way multiplies the Jacobian by a random vector instead of building it.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def strided(tensor):
    """The same numbers at every second place of another tensor."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return tensor
    spread = torch.stack([tensor, tensor], -1)[..., 0].detach()
    return spread.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_FLOAT64)
def test_tensors_and_weights_without_contiguous_memory_have_torchs_gradients(
    backend, name, dtype, index
):
    module_input = module_inputs(name, dtype)[index]
    theirs, ours = both_modules(name, dtype, module_input)
    for module in (theirs, ours):
        for parameter in module.parameters():
            parameter.data = strided(parameter.data)
    results = []
    for module in (theirs, ours):
        args = tree_map(strided, module_input.forward_input.args)
        outputs = floating(module(*args))
        grads = [
            strided(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)) for out in outputs
        ]
        leaves = [leaf for leaf in tree_leaves(args) if wants_gradients(leaf)]
        found = torch.autograd.grad(outputs, [*module.parameters(), *leaves], grads)
        results.append([outputs, found])
    assert_same_call(results[1], results[0])


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_FLOAT64)
def test_memory_formats_and_strides_of_results_are_torchs(backend, name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    strides = []
    for module in both_modules(name, dtype, module_input):
        module.to(memory_format=torch.channels_last)  # for weights of four dimensions: none here
        outputs = floating(module(*module_input.forward_input.args))
        strides.append([(out.shape, out.stride(), out.is_contiguous()) for out in outputs])
    assert strides[0] == strides[1]


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_FLOAT64)
def test_functional_call_with_other_weights_is_torchs(backend, name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    theirs, ours = both_modules(name, dtype, module_input)
    others = {key: value.detach() * 2 + 0.1 for key, value in theirs.named_parameters()}
    args = module_input.forward_input.args
    expected = tree_leaves(functional_call(theirs, others, args))
    actual = tree_leaves(functional_call(ours, others, args))
    assert_same_call([actual], [expected])


MOVES = {
    "float32": lambda m: m.to(torch.float32),
    "double": lambda m: m.float().double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to_empty": lambda m: refilled(m.to("meta").to_empty(device="cpu")),
    "cpu": lambda m: m.cpu().to("cpu", torch.float64, non_blocking=True),
}


def refilled(module):
    torch.manual_seed(1)
    module.reset_parameters()
    return module


@torch.no_grad()
def moved_and_loaded(module, args, move):
    """The results of a call after a move, and of one after loading a state_dict; or the error."""
    assert MOVES[move](module) is module
    dtype = next(module.parameters()).dtype
    args = tree_map(lambda value: value.detach().to(dtype), args)
    before = floating(module(*args))
    try:
        module.load_state_dict({key: value * 2 for key, value in module.state_dict().items()})
    except RuntimeError as error:
        return before, type(error), str(error)
    return before, floating(module(*args)), ""


@pytest.mark.parametrize("swapped", [False, True], ids=["in_place", "swapped"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", CLASSES)
def test_moves_of_device_and_dtype_are_torchs(backend, name, move, swapped):
    """By setting a parameter's data, and by swapping the parameter, which torch's layers refuse.

    They keep weak references to their weights.
    """
    if move in ("half", "bfloat16"):
        skip_unless_served(backend, torch.float16)
    module_input = module_inputs(name, torch.float64)[0]
    modules = both_modules(name, torch.float64, module_input)
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        theirs, ours = (
            moved_and_loaded(module, module_input.forward_input.args, move) for module in modules
        )
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_call([ours[0]], [theirs[0]])
    if theirs[2]:
        assert swapped
        assert ours[1:] == theirs[1:]
    else:
        assert not ours[2]
        assert_same_call([ours[1]], [theirs[1]])


@pytest.mark.parametrize(("name", "dtype", "index"), ALL_FLOAT64)
def test_train_and_eval_differ_by_dropout_alone(backend, name, dtype, index):
    module_input = module_inputs(name, dtype)[index]
    theirs, ours = both_modules(name, dtype, module_input)
    args = module_input.forward_input.args
    described = repr(ours)
    for training in (True, False, True):
        for module in (theirs, ours):
            module.train(training)
            if hasattr(module, "dropout") and module.num_layers > 1:
                module.dropout = 0.5
        outputs = []
        for module in (theirs, ours):
            torch.manual_seed(4)
            outputs.append(tree_leaves(module(*args)))
            assert module.training == training
        assert_same_call([outputs[1]], [outputs[0]])
    ours.dropout = theirs.dropout = 0.0
    trained = tree_leaves(ours.train()(*args))
    assert_same_call([tree_leaves(ours.eval()(*args))], [trained])
    assert repr(ours).startswith(described[:-1].split(", dropout")[0])
