"""Which projections are left to cuBLAS, and that they are the same numbers. No GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the products belong to the kernels, which need triton")

from triton_rnn.backends.triton import products

LARGE = products._CUBLAS_PRODUCTS


def like_input(device="cuda", dtype=torch.bfloat16, contiguous=True):
    return SimpleNamespace(
        device=torch.device(device), dtype=dtype, is_contiguous=lambda: contiguous
    )


def test_only_large_products_of_16_bits_that_lie_in_rows_are_left_to_cublas():
    assert products._is_for_cublas(like_input(), LARGE, True)
    assert products._is_for_cublas(like_input(dtype=torch.float16), LARGE, True)
    for input, count, in_rows in (
        (like_input(), LARGE - 1, True),
        (like_input(), LARGE, False),
        (like_input(contiguous=False), LARGE, True),
        (like_input(dtype=torch.float32), LARGE, True),
        (like_input(device="cpu"), LARGE, True),
    ):
        assert not products._is_for_cublas(input, count, in_rows)


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
