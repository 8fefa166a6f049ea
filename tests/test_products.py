"""Which projections are left to cuBLAS, and that they are the same numbers. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the products belong to the kernels, which need triton")

from triton_rnn.backends.triton import products
from triton_rnn.kernels.plan import CHIPS

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
