"""The pointwise arithmetic: of the cells' own functions, and of a single step of every cell."""

import pytest
import torch
import triton
import triton.language as tl
from compare import each_state, exact_and_ours
from tolerances import OUTPUTS, assert_close, flat_outputs, random, random_state

import triton_rnn
from triton_rnn.kernels import functions


@triton.jit
def apply(x_ptr, y_ptr, FUNCTION: tl.constexpr, PTX: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets), PTX))


def of_the_kernels(function, ptx, x):
    padded = torch.zeros(1 << (x.numel() - 1).bit_length())
    padded[: x.numel()] = x
    y = torch.full_like(padded, float("nan"))
    apply[(1,)](padded, y, function, ptx, padded.numel())
    return y[: x.numel()]


def both_signs(x):
    return torch.cat([x, -x])


MAGNITUDES = torch.cat(
    [
        torch.logspace(-30, 2, 4000),
        # Around 0.25 tanh's series ends, around 1 expm1's, and around 9 tanh becomes 1.
        torch.linspace(0.2, 0.3, 500),
        torch.linspace(0.9, 1.1, 500),
        torch.linspace(8, 10, 500),
    ]
)
EXACT = ["", "float32"]
ALL = [*EXACT, "float16", "bfloat16"]


# eps is 1.2e-7. exp's argument is rounded after it was multiplied, which at 88 is 127 of those
# roundings; tanh, where the series ends, cancels to a quarter of its terms, each rounded thrice.
@pytest.mark.parametrize(
    ("function", "reference", "tolerance"),
    [
        (functions.tanh, torch.tanh, 1e-6),
        (functions.expm1, torch.expm1, 1e-5),
        (functions.exp, torch.exp, 1e-5),
        (functions.sigmoid, torch.sigmoid, 1e-5),
    ],
    ids=["tanh", "expm1", "exp", "sigmoid"],
)
@pytest.mark.parametrize("ptx", EXACT)
def test_a_function_is_exact_to_the_last_digits_at_every_size_of_number(
    function, reference, tolerance, ptx
):
    x = both_signs(MAGNITUDES[MAGNITUDES < 80])
    expected = reference(x.double())
    error = ((of_the_kernels(function, ptx, x).double() - expected) / expected).abs()
    assert error.max() <= tolerance, f"off by {error.max():.1e} at {x[error.argmax()]}"


@pytest.mark.parametrize("ptx", ALL)
def test_log1p_is_exact_to_the_last_digits(ptx):
    x = torch.cat([MAGNITUDES, -MAGNITUDES[MAGNITUDES < 0.99]])
    expected = x.double().log1p()
    error = ((of_the_kernels(log1p_of, ptx, x).double() - expected) / expected).abs()
    assert error.max() <= 1e-6, f"off by {error.max():.1e} at {x[error.argmax()]}"


@triton.jit
def log1p_of(x, PTX: tl.constexpr):
    return functions.log1p(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("function", "reference"),
    [(functions.tanh, torch.tanh), (functions.sigmoid, torch.sigmoid)],
    ids=["tanh", "sigmoid"],
)
def test_16_bits_lose_nothing_by_the_shorter_formulas(function, reference, dtype):
    """Rounded, all but two results in a hundred are torch's, and those the number beside it.

    Most of those are of float16 near 1e-4, where its numbers are 6e-8 apart, as float32's near 1.
    The interpreter takes numpy's exp for `ex2.approx`, which is good to 2^-22, and 1 / x for
    `rcp.approx`; for `tanh.approx` it takes the formula of float16.
    """
    x = both_signs(MAGNITUDES[(MAGNITUDES > 1e-4) & (MAGNITUDES < 20)])
    name = str(dtype).removeprefix("torch.")
    actual = of_the_kernels(function, name, x).to(dtype)
    expected = reference(x.double()).to(dtype)
    # Neighbours in the order of floating numbers of one sign are neighbours as integers.
    apart = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 2e-2


@pytest.mark.parametrize("ptx", EXACT)
def test_tanh_of_a_tiny_number_is_that_number(ptx):
    """The smallest normal and subnormal numbers, and the largest whose cube is lost."""
    x = both_signs(torch.tensor([1.2e-38, 1e-40, 1e-20, 1e-5, 3e-5]))
    assert torch.equal(of_the_kernels(functions.tanh, ptx, x), x)


@pytest.mark.parametrize("ptx", ALL)
@pytest.mark.parametrize(
    ("function", "reference"),
    [
        (functions.tanh, torch.tanh),
        (functions.sigmoid, torch.sigmoid),
        (functions.exp, torch.exp),
        (functions.expm1, torch.expm1),
    ],
    ids=["tanh", "sigmoid", "exp", "expm1"],
)
def test_a_function_of_what_is_no_number_or_none_that_is_finite(function, reference, ptx):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 100.0, -200.0, 3e38])
    actual = of_the_kernels(function, ptx, x)
    torch.testing.assert_close(actual, reference(x), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("ptx", EXACT)
def test_tanh_is_odd_and_grows(ptx):
    x = torch.linspace(0, 10, 4001)
    y = of_the_kernels(functions.tanh, ptx, x)
    assert torch.equal(of_the_kernels(functions.tanh, ptx, -x), -y)
    # A step of 1/400 is larger than any rounding until tanh is 1 to the last digit.
    assert (y.diff()[: 4001 // 2] > 0).all()
    assert y.max() <= 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids=["tiny", "middle", "saturated"])
@pytest.mark.parametrize(
    ("kind", "result"), [(kind, result) for kind, result in OUTPUTS if result != "output"]
)
def test_one_step_of_a_cell_and_its_gradients_are_the_references(variant, kind, result, scale):
    """All gates in their linear part, in their bend, and at their ends; each state by itself."""
    exact, ours = exact_and_ours(kind, 5, 9)
    names = ["input", "h_0", "c_0"][: 3 if "lstm" in kind else 2]
    found = []
    for module, backend in ((exact, "reference"), (ours, "triton")):
        dtype = next(module.parameters()).dtype
        input = scale * random(1, 3, 5, dtype=torch.float32)
        hx = random_state(ours, 3)
        leaves = [input, *(hx if isinstance(hx, tuple) else (hx,))]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        state = tuple(leaves[1:]) if len(leaves) == 3 else leaves[1]
        with triton_rnn.use_backend(backend):
            outputs = flat_outputs(module, module(leaves[0], state))
        weight = random(*outputs[result].shape, seed=8, dtype=torch.float32).to(dtype)
        parameters = dict(module.named_parameters())
        wanted = [*leaves, *parameters.values()]
        grads = torch.autograd.grad((outputs[result] * weight).sum(), wanted, allow_unused=True)
        grads = dict(zip([*names, *parameters], grads, strict=True))
        found.append((outputs[result].detach(), grads))
    (expected, expected_grads), (actual, actual_grads) = found
    # The tolerance of float32, of numbers in float64.
    assert_close(actual.double(), expected, tolerance=2e-5)
    for name, value in expected_grads.items():
        if value is None:
            assert actual_grads[name] is None or not actual_grads[name].any(), name
        else:
            assert_close(actual_grads[name].double(), value, name, tolerance=2e-5)


@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_each_gate_has_its_own_weights_biases_and_place(variant, kind):
    """Gates that differ in size by factors of two: two of them swapped are far apart."""
    exact, ours = exact_and_ours(kind, 1, 3)
    with torch.no_grad():
        for module in (exact, ours):
            for name, parameter in module.named_parameters():
                gates = parameter.size(0) // 3
                factors = 2.0 ** torch.arange(-1, gates - 1).repeat_interleave(3)
                sign = -1 if "hh" in name else 1
                parameter.copy_(
                    sign * factors.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter) / 3
                )
    input, hx = random(1, 2, 1, dtype=torch.float32), random_state(ours, 2)
    expected = exact(input.double(), each_state(torch.Tensor.double, hx))
    with triton_rnn.use_backend("triton"):
        actual = ours(input, hx)
    pairs = zip(
        flat_outputs(ours, actual).values(), flat_outputs(exact, expected).values(), strict=True
    )
    for mine, torchs in pairs:
        # The tolerance of float32, of numbers in float64.
        assert_close(mine.double(), torchs, tolerance=2e-5)
