"""The products outside the recurrence against torch in float64: strides, directions, parts."""

import dataclasses

import pytest
import torch
from tolerances import TOLERANCES, assert_close, random

from triton_rnn.backends.triton import products
from triton_rnn.kernels.chips import INTERPRETER

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _poison(poisoned):
    """What is not written is NaN, so that a part of a result that is left out is seen."""


def assert_is(actual, expected, dtype):
    assert actual.dtype == dtype
    assert_close(actual.double(), expected, tolerance=TOLERANCES[dtype])


# How an input (T, N, K) or (R, K) lies in memory.
INPUTS = {
    "contiguous": lambda T, N, K, dtype: random(T, N, K, dtype=dtype),
    "batch_first": lambda T, N, K, dtype: random(N, T, K, dtype=dtype).transpose(0, 1),
    "features_first": lambda T, N, K, dtype: random(K, T, N, dtype=dtype).permute(1, 2, 0),
    "strided": lambda T, N, K, dtype: random(2 * T, N + 1, 3 * K, dtype=dtype)[::2, 1:, ::3],
    "expanded": lambda T, N, K, dtype: random(T, 1, K, dtype=dtype).expand(T, N, K),
    "one_number": lambda T, N, K, dtype: random(1, dtype=dtype).expand(T, N, K),
    "rows": lambda T, N, K, dtype: random(T * N, K, dtype=dtype),
    "rows_strided": lambda T, N, K, dtype: random(K, T * N + 1, dtype=dtype).t()[1:],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lies", INPUTS)
def test_the_projection_reads_the_input_where_it_lies(lies, dtype):
    T, N, K, columns = 5, 17, 40, 33
    input = INPUTS[lies](T, N, K, dtype)
    before = input.clone()
    weight, bias = random(columns, K, seed=1, dtype=dtype), random(columns, seed=2, dtype=dtype)
    gates = torch.empty(T * N, 1, columns, dtype=dtype)
    products.project(input, [weight], [bias], [None], 0, gates)
    expected = input.double().reshape(T * N, K) @ weight.double().t() + bias.double()
    assert_is(gates[:, 0], expected, dtype)
    assert torch.equal(input, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates_and_width", [(1, 1), (3, 3), (3, 4), (4, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("size", [1, 19, 65])
def test_the_projection_writes_its_columns_of_each_direction_alone(gates_and_width, size, dtype):
    """A GRU that will be differentiated has a block to the left that is not the projection's, a
    cell with masks some to the right; of a GRU's second bias only the first two gates' are added
    here."""
    gates, width = gates_and_width
    T, N, K = 2, 3, 7
    fold = (2 if gates == 3 else gates) * size
    input = random(T, N, K, dtype=dtype)
    weights = [random(gates * size, K, seed=1 + d, dtype=dtype) for d in range(2)]
    bias_ih = [random(gates * size, seed=3 + d, dtype=dtype) for d in range(2)]
    bias_hh = [random(gates * size, seed=5 + d, dtype=dtype) for d in range(2)]
    whole = torch.empty(T * N, 2, width * size, dtype=dtype)
    # Of six blocks the four in the middle.
    right = (width - gates) // 2 * size
    first = (width - gates) * size - right
    out = whole[:, :, first : first + gates * size]
    products.project(input, weights, bias_ih, bias_hh, fold, out)
    for d in range(2):
        expected = input.double().reshape(T * N, K) @ weights[d].double().t()
        expected += bias_ih[d].double()
        expected[:, :fold] += bias_hh[d][:fold].double()
        assert_is(out[:, d], expected, dtype)
    others = torch.cat([whole[:, :, :first], whole[:, :, first + gates * size :]], -1)
    assert others.isnan().all(), "wrote to columns that are another's"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 600])
def test_the_projection_without_bias_has_none(rows, dtype):
    """More rows than a group of eight blocks has, and one less and more than a block."""
    input, weight = random(rows, 5, dtype=dtype), random(70, 5, seed=1, dtype=dtype)
    gates = torch.empty(rows, 1, 70, dtype=dtype)
    products.project(input, [weight], [None], [None], 0, gates)
    assert_is(gates[:, 0], input.double() @ weight.double().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("gates_and_width", [(1, 1), (3, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("size", [1, 19, 65])
def test_the_gradient_of_the_input_adds_the_directions(size, gates_and_width, directions, dtype):
    gates, width = gates_and_width
    rows, K = 35, 40
    whole = random(rows, directions, width * size, dtype=dtype)
    preact = whole[:, :, (width - gates) * size :]
    weights = [random(gates * size, K, seed=1 + d, dtype=dtype) for d in range(directions)]
    actual = products.grad_input(preact, weights)
    expected = sum(preact[:, d].double() @ weights[d].double() for d in range(directions))
    assert_is(actual, expected, dtype)


@pytest.mark.parametrize("directions", [1, 2])
def test_a_large_gradient_of_the_input_reads_the_weights_transposed(monkeypatch, directions):
    rows, columns, size = 35, 57, 40
    preact = random(rows, directions, columns + 3, dtype=torch.float32)[:, :, 3:]
    weights = [random(columns, size, seed=1 + d, dtype=torch.float32) for d in range(directions)]
    read = []
    launch = products._launch

    def spy(a, b, *args, **kwargs):
        read.append([tuple(weight.shape) for weight in b])
        return launch(a, b, *args, **kwargs)

    monkeypatch.setattr(products, "_launch", spy)
    expected = sum(preact[:, d].double() @ weights[d].double() for d in range(directions))
    for least in (rows * columns * size + 1, rows * columns * size):
        monkeypatch.setattr(products, "_TURNED_PRODUCTS", least)
        assert_is(products.grad_input(preact, weights), expected, torch.float32)
    assert read == [[(columns, size)] * directions, [(size, columns)] * directions]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 1, 1), (35, 57, 40), (130, 33, 70)])
def test_the_gradient_of_a_weight_is_a_sum_over_all_rows(rows, columns, size, dtype):
    """Both factors are columns of something wider, as the recurrence leaves them."""
    grad = random(rows, 2, columns + 3, dtype=dtype)[:, 1, 3:]
    operand = random(rows, 2 * size, seed=1, dtype=dtype)[:, size:]
    assert_is(products.grad_weight(grad, operand), grad.double().t() @ operand.double(), dtype)


@pytest.mark.parametrize("operand_strided", [False, True])
@pytest.mark.parametrize(("rows", "splits"), [(1025, 2), (1600, 3), (2070, 4)])
def test_no_part_of_a_sum_over_rows_is_lost_or_added_twice(
    monkeypatch, rows, splits, operand_strided
):
    """On a device with many multiprocessors the rows are cut in parts; the last may be short."""
    chip = dataclasses.replace(INTERPRETER, multiprocessors=64)
    monkeypatch.setattr(products, "chip_of", lambda device: chip)
    blocks = products.matmul_blocks(4, 5, "ieee", chip)
    launched = []
    launch = products._launch

    def spy(*args, **kwargs):
        launched.append(kwargs["splits"])
        return launch(*args, **kwargs)

    monkeypatch.setattr(products, "_launch", spy)
    # Parts of the same number of rows, whatever the blocks are.
    rows = rows * blocks.k // 32
    grad = random(rows, 7, dtype=torch.float32)
    operand = random(rows, 5, seed=1, dtype=torch.float32)
    if operand_strided:
        operand = random(rows, 1, seed=1, dtype=torch.float32).expand(rows, 5)
    actual = products.grad_weight(grad, operand)
    assert_is(actual, grad.double().t() @ operand.double(), torch.float32)
    assert launched == [splits]
    assert torch.equal(products.grad_weight(grad, operand), actual), "the order of additions varies"
