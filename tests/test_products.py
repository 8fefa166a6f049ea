"""Which projections are left to cuBLAS, and that they are the same numbers. No GPU is needed."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the products belong to the kernels, which need triton")

from triton_rnn.backends.triton import cublas, products
from triton_rnn.kernels.chips import CHIPS

LARGE = products._CUBLAS_PRODUCTS


CUDA = torch.device("cuda", 0)


@pytest.fixture
def switches(monkeypatch):
    """Set whether recurrent layers and whether cuBLAS may use TF32, on a GPU that is not there."""
    monkeypatch.setattr(products, "chip_of", lambda device: CHIPS["H200"])

    def set_switches(recurrent, matmul):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", recurrent)
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", matmul)

    return set_switches


def like_input(device=CUDA, dtype=torch.bfloat16, contiguous=True):
    return SimpleNamespace(device=device, dtype=dtype, is_contiguous=lambda: contiguous)


def test_only_large_products_that_lie_in_rows_are_left_to_cublas(switches):
    switches("tf32", "tf32")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert products._is_for_cublas(like_input(dtype=dtype), LARGE, True)
    for input, count, in_rows in (
        (like_input(), LARGE - 1, True),
        (like_input(), LARGE, False),
        (like_input(contiguous=False), LARGE, True),
        (like_input(device=torch.device("cpu")), LARGE, True),
    ):
        assert not products._is_for_cublas(input, count, in_rows)


@pytest.mark.parametrize("matmul", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("recurrent", ["ieee", "tf32"])
def test_float32_is_left_to_cublas_where_both_switches_say_the_same(switches, recurrent, matmul):
    switches(recurrent, matmul)
    same = (recurrent == "tf32") == (matmul == "tf32")
    assert products.cublas_agrees(CUDA, torch.float32) == same
    assert products._is_for_cublas(like_input(dtype=torch.float32), LARGE, True) == same
    assert products.cublas_agrees(CUDA, torch.float16)
    assert not products.cublas_agrees(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("fold", [0, 8, 12], ids=["none", "a GRU's", "all"])
@pytest.mark.parametrize("biased", [True, False])
def test_cublas_writes_what_the_kernel_would(biased, fold):
    """The hidden bias is added where it is not the cell's to add; weights that need gradients."""
    draw = torch.Generator().manual_seed(0)
    input, weight = torch.randn(5, 3, 6, generator=draw), torch.randn(12, 6, generator=draw)
    bias_ih, bias_hh = (torch.randn(12, generator=draw) for _ in range(2))
    expected = input.view(15, 6) @ weight.t()
    if biased:
        expected += bias_ih
        expected[:, :fold] += bias_hh[:fold]
    weight.requires_grad_()
    out = torch.full((15, 12), float("nan"))
    before = bias_ih.clone()
    biases = (bias_ih, bias_hh) if biased else (None, None)
    products._by_cublas(input, weight, *biases, fold, out)
    torch.testing.assert_close(out, expected)
    assert torch.equal(bias_ih, before), "the caller's bias"


@pytest.mark.parametrize("count", [None, 4, 12, 20])
def test_cublas_adds_what_a_users_cell_folds(count):
    """Of the recurrent biases fewer than the input's, more, or none."""
    draw = torch.Generator().manual_seed(0)
    input, weight = torch.randn(15, 6, generator=draw), torch.randn(12, 6, generator=draw)
    bias_ih = torch.randn(12, generator=draw)
    bias_hh = None if count is None else torch.randn(count, generator=draw)
    fold = 0 if count is None else min(count, 12)
    expected = input @ weight.t() + bias_ih
    if bias_hh is not None:
        expected[:, :fold] += bias_hh[:fold]
    out = torch.empty(15, 12)
    products._by_cublas(input, weight, bias_ih, bias_hh, fold, out)
    torch.testing.assert_close(out, expected)


# TF32 by cuBLAS -----------------------------------------------------------------------------------


def memory(address, count):
    """So many float32 at an address."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


def gemm(handle, trans_a, trans_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, *rest):
    """What cuBLAS' documentation says of `cublasGemmEx`, of float32, in columns."""
    c_type, ldc, compute, algorithm = rest
    assert (handle, a_type, b_type, c_type, compute, algorithm) == (11, 0, 0, 0, 77, -1)

    def of(address, rows, columns, ld):
        assert ld >= rows
        numbers = memory(address, ld * (columns - 1) + rows)
        bytes = (4, 4 * ld)
        return np.lib.stride_tricks.as_strided(numbers, (rows, columns), bytes)

    left = of(a, *((k, m) if trans_a else (m, k)), lda)
    right = of(b, *((n, k) if trans_b else (k, n)), ldb)
    result = of(c, m, n, ldc)
    product = (left.T if trans_a else left) @ (right.T if trans_b else right)
    scale, kept = (number._obj.value for number in (alpha, beta))
    result[:] = scale * product + (kept * result if kept else 0)
    return 0


@pytest.fixture
def with_gemm(monkeypatch):
    monkeypatch.setattr(cublas, "_gemm", lambda: gemm)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 11)


def test_cublas_is_given_rows_and_columns_as_they_lie(with_gemm):
    wide, high = torch.randn(5, 12), torch.randn(12, 9)
    for a in (torch.randn(5, 7), torch.randn(7, 5).t(), wide[:, 3:10], torch.randn(5, 3, 7)[:, 1]):
        for b in (torch.randn(7, 4), torch.randn(4, 7).t(), high[2:9, 1:5]):
            out = torch.full((5, 4), float("nan"))
            assert cublas.multiply(a, b, out)
            torch.testing.assert_close(out, a @ b)
            assert cublas.multiply(a, b, out, True)
            torch.testing.assert_close(out, 2 * (a @ b))
    # A row or a column alone, and one number.
    for m, n, k in ((1, 4, 7), (5, 1, 7), (5, 4, 1), (1, 1, 1)):
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        assert cublas.multiply(a, b, out) and cublas.multiply(a.t().contiguous().t(), b, out)
        torch.testing.assert_close(out, a @ b)


def test_what_cublas_cannot_read_or_refuses_is_said_not_to_be_done(with_gemm, monkeypatch):
    a, b, out = torch.randn(5, 7), torch.randn(7, 4), torch.zeros(5, 4)
    for odd in (torch.randn(7)[None].expand(5, 7), torch.randn(5, 14)[:, ::2], torch.randn(5, 0)):
        assert not cublas.multiply(odd, b[: odd.size(1)], out)
    assert not cublas.multiply(a[:0], b, out[:0])
    monkeypatch.setattr(cublas, "_gemm", lambda: lambda *arguments: 15)
    assert not cublas.multiply(a, b, out)
    monkeypatch.setattr(cublas, "_gemm", lambda: None)
    assert not cublas.multiply(a, b, out) and not out.any()


def test_torch_without_cuda_has_no_cublas():
    if torch.version.cuda is None:
        assert cublas._gemm() is None
    else:
        assert callable(cublas._gemm())


def test_gradients_of_float32_are_cublas_where_its_switch_alone_forbids_tf32(
    with_gemm, switches, monkeypatch
):
    monkeypatch.setattr(products, "is_for_cublas_in_tf32", lambda device, dtype: True)
    monkeypatch.setattr(products, "_launch", None)
    switches("tf32", "ieee")
    grad = torch.randn(9, 2, 12)
    weights = [torch.randn(12, 5), torch.randn(12, 5)]
    expected = grad[:, 0] @ weights[0] + grad[:, 1] @ weights[1]
    torch.testing.assert_close(products.grad_input(grad, weights), expected)
    torch.testing.assert_close(
        products.grad_input(grad[:, :1], weights[:1]), grad[:, 0] @ weights[0]
    )
    rows = torch.randn(9, 5)
    torch.testing.assert_close(products.grad_weight(grad[:, 1], rows), grad[:, 1].t() @ rows)


def test_only_where_recurrent_layers_allow_it_are_products_tf32(switches):
    switches("ieee", "tf32")
    assert not products.is_for_cublas_in_tf32(CUDA, torch.float32)
    switches("tf32", "ieee")
    assert products.is_for_cublas_in_tf32(CUDA, torch.float32)
    assert not products.is_for_cublas_in_tf32(CUDA, torch.bfloat16)
    assert not products.is_for_cublas_in_tf32(torch.device("cpu"), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert not products.is_for_cublas_in_tf32(CUDA, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
