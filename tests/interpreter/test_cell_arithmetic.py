"""The pointwise arithmetic: of the cells' own functions, and of a single step of every cell."""

import pytest
import torch
import triton
import triton.language as tl
from compare import each_state, exact_and_ours
from tolerances import OUTPUTS, assert_close, flat_outputs, random, random_state

import triton_rnn
from triton_rnn.kernels.cells import tanh


@triton.jit
def apply_tanh(x_ptr, y_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, tanh(tl.load(x_ptr + offsets)))


def kernels_tanh(x):
    padded = torch.zeros(1 << (x.numel() - 1).bit_length())
    padded[: x.numel()] = x
    y = torch.full_like(padded, float("nan"))
    apply_tanh[(1,)](padded, y, padded.numel())
    return y[: x.numel()]


def test_tanh_is_exact_to_the_last_digits_at_every_size_of_number():
    magnitudes = torch.cat(
        [
            torch.logspace(-30, 2, 4000),
            # Around 0.25 the series ends, and around 9 tanh becomes 1.
            torch.linspace(0.2, 0.3, 500),
            torch.linspace(8, 10, 500),
        ]
    )
    x = torch.cat([magnitudes, -magnitudes])
    expected = x.double().tanh()
    error = ((kernels_tanh(x).double() - expected) / expected).abs()
    # eps is 1.2e-7. Where the series ends, 1 - 2 / (exp(2x) + 1) cancels to a quarter of its terms,
    # each rounded two or three times.
    assert error.max() <= 1e-6, f"off by {error.max():.1e} at {x[error.argmax()]}"


def test_tanh_of_a_tiny_number_is_that_number():
    """The smallest normal and subnormal numbers, and the largest whose cube is lost."""
    x = torch.tensor([1.2e-38, 1e-40, 1e-20, 1e-5, 3e-5])
    assert torch.equal(kernels_tanh(torch.cat([x, -x])), torch.cat([x, -x]))


def test_tanh_of_what_is_no_number_or_none_that_is_finite():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 88.0, -89.0, 3e38])
    actual = kernels_tanh(x)
    expected = torch.tensor([1.0, -1.0, float("nan"), 0.0, -0.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_tanh_is_odd_and_grows():
    x = torch.linspace(0, 10, 4001)
    y = kernels_tanh(x)
    assert torch.equal(kernels_tanh(-x), -y)
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
