"""A GPU's autocast: calls in float16 on the kernels, as torch's wrapper of cuDNN makes them.

The interpreter's device is the CPU, so its autocast stands in the place of CUDA's.
"""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.utils.parametrize
from compare import each_state, pack
from tolerances import LAYERS, assert_same_bits, random, random_state, run, twins

import triton_rnn
from triton_rnn import autocast

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def of_the_cpu(monkeypatch):
    monkeypatch.setattr(autocast, "torch_casts", lambda device, dtype: dtype in autocast.CAST)


def both(module, input, hx=None, *, call=None, **how):
    """Under autocast, and a module in float16 that is given all of it: results by name."""
    half = copy.deepcopy(module).half()
    found = []
    for one, cast in ((module, True), (half, False)):

        def once(*args, one=one, cast=cast):
            with torch.autocast("cpu", BF16, enabled=cast), triton_rnn.use_backend("triton"):
                return (call or type(one).__call__)(one, *args)

        x = input if cast else input.half()
        given = hx if cast or hx is None else each_state(torch.Tensor.half, hx)
        found.append(run(one, x, given, call=once, **how))
    return found


def in_dtypes_of_their_own(cast, half):
    """Outputs are float16; gradients are of the dtype of what they belong to, and no less exact."""
    for name, value in cast.items():
        if not name.startswith("grad"):
            assert value.dtype == F16, name
        elif value is not None:
            half[name] = half[name].to(value.dtype)
    return cast, half


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_call_is_that_of_a_module_in_float16(kind, given, dtype):
    _, module = twins(kind, 5, 9, dtype=F32, num_layers=2, bidirectional=True)
    hx = each_state(lambda s: s.to(dtype), random_state(module, 3)) if given else None
    results = both(module, random(4, 3, 5, dtype=dtype), hx)
    assert results[0]["grad of input"].dtype == dtype
    assert results[0]["grad of weight_ih_l0"].dtype == F32
    assert_same_bits(*in_dtypes_of_their_own(*results))


def test_a_state_of_a_named_tuple_is_cast():
    pair = namedtuple("pair", ["h", "c"])
    _, module = twins("lstm", 5, 9, dtype=F32)
    hx = random_state(module, 3)
    with torch.no_grad():
        plain, named = (
            autocast.cast(module, random(4, 3, 5).float(), each) for each in (hx, pair(*hx))
        )
    assert [state.dtype for state in named[2]] == [F16, F16]
    assert all(map(torch.equal, named[2], plain[2]))


@pytest.mark.parametrize("form", ["packed", "unbatched", "batch_first"])
def test_every_form_of_input_is_cast(form):
    module = triton_rnn.GRU(5, 9, batch_first=form == "batch_first")
    input = random(*((4,) if form == "unbatched" else (4, 3)), 5, dtype=F32)
    how = {"prepare": pack([4, 2, 1])} if form == "packed" else {}
    assert_same_bits(*in_dtypes_of_their_own(*both(module, input, **how)))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"recurrent_dropout": 0.3, "zoneout": 0.2}, {}),
        ({"input_dropout": 0.3}, {"lengths": torch.tensor([4, 0, 2])}),
        ({"residual": True, "num_layers": 2}, {"lengths": torch.tensor([4, 0, 2])}),
        ({"recompute": 2}, {"lengths": torch.tensor([4, 0, 2])}),
        ({"residual": True, "num_layers": 2}, {}),
        ({"recompute": 2}, {}),
    ],
    ids=str,
)
def test_what_torch_does_not_have_is_cast_too(options, more):
    module = triton_rnn.GRU(5, 9, **options)

    def call(one, input):
        torch.manual_seed(3)
        return one(input, **more)

    results = both(module, random(4, 3, 5, dtype=F32), call=call)
    assert_same_bits(*in_dtypes_of_their_own(*results))


def test_tied_and_frozen_weights_are_cast_once_each(monkeypatch):
    module = triton_rnn.RNN(9, 9)
    module.weight_hh_l0 = module.weight_ih_l0
    module.bias_ih_l0.requires_grad_(False)
    cast = []
    half = autocast._half
    monkeypatch.setattr(autocast, "_half", lambda value: cast.append(value) or half(value))
    with torch.autocast("cpu", BF16), triton_rnn.use_backend("triton"):
        module(random(4, 3, 9, dtype=F32))[0].sum().backward()
    assert len([value for value in cast if isinstance(value, torch.nn.Parameter)]) == 3
    assert module.weight_ih_l0.grad.dtype == F32
    assert module.bias_ih_l0.grad is None
    assert {id(p) for p in module.parameters()} == {id(p) for p in module._parameters.values()}


@pytest.mark.parametrize("more", [{}, {"lengths": torch.tensor([4, 0, 2])}], ids=["plain", "more"])
def test_a_parametrized_weight_is_computed_once(more):
    class Doubled(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            Doubled.calls += 1
            return 2 * weight

    module = triton_rnn.GRU(5, 9)
    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    input = random(4, 3, 5, dtype=F32)
    Doubled.calls = 0
    with torch.autocast("cpu", BF16), triton_rnn.use_backend("triton"):
        output = module(input, **more)[0]
    assert Doubled.calls == 1
    assert output.dtype == F16
    output.sum().backward()
    assert module.parametrizations.weight_hh_l0.original.grad.dtype == F32


def test_explain_tells_of_it_and_other_backends_are_refused_as_ever():
    module, input = triton_rnn.GRU(5, 9), random(4, 3, 5, dtype=F32)
    with torch.autocast("cpu", BF16):
        with triton_rnn.use_backend("triton"):
            for more in ({}, {"lengths": torch.tensor([4, 0, 2])}):
                told = triton_rnn.explain(module, input, **more)
                assert (told.backend, told.request.dtype) == ("triton", F16)
            told = triton_rnn.explain(triton_rnn.GRU(5, 9, recompute=2), input)
            assert (told.backend, told.request.dtype) == ("triton", F16)
        with (
            triton_rnn.use_backend("reference"),
            pytest.raises(triton_rnn.BackendError, match="autocast is on"),
        ):
            module(input)
        # The interpreter is asked for by name alone; what is left is torch.nn's.
        assert module(input)[0].dtype == torch.nn.GRU(5, 9)(input)[0].dtype
        with pytest.raises(triton_rnn.BackendError, match="layer_norm: autocast is on"):
            triton_rnn.GRU(5, 9, layer_norm=True)(input)


def test_what_is_malformed_has_torchs_error_and_a_transform_torchs_way():
    module, input = triton_rnn.GRU(5, 9), random(4, 3, 5, dtype=F32)
    with torch.autocast("cpu", BF16):
        with pytest.raises(RuntimeError, match=r"input\.size"):
            module(input[..., 1:])
        torchs = copy.deepcopy(triton_rnn.restore(copy.deepcopy(module)))
        expected = torch.func.functional_call(torchs, dict(torchs.named_parameters()), (input,))[0]
        found = torch.func.functional_call(module, dict(module.named_parameters()), (input,))[0]
        assert torch.equal(found, expected)
