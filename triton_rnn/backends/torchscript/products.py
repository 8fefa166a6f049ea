"""The matrix products of the CPU backend, by torch's BLAS or by oneDNN.

torch sends every float32 `mm` to its BLAS. Where that is MKL on a processor that is not Intel's, it
runs at half the speed of oneDNN or less, which the same wheel holds and uses for its own LSTM. The
operator used here is the one that torch's compiler (Inductor) emits for a linear layer; where a
build lacks it, `HAS_ONEDNN_LINEAR` is False and BLAS does all. `rules.py` says which of the two a
call takes.

A step's weight is handed over in the orientation that its product wants: (K, P) for BLAS, (P, K)
for oneDNN. `step_weight` makes it.
"""

import torch
from torch import Tensor

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
)

if HAS_ONEDNN_LINEAR:

    def onednn_pack(weight: Tensor, batch: int) -> Tensor:
        """Weight (P, K) in the layout that oneDNN likes best for `batch` rows; an opaque tensor."""
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)

    def onednn_linear(left: Tensor, weight: Tensor) -> Tensor:
        """left (M, K) times the transpose of weight (P, K): (M, P)."""
        return torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")

    def onednn_linear_add(left: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
        """left (M, K) times the transpose of weight (P, K), plus addend (M, P): (M, P)."""
        return torch.ops.mkldnn._linear_pointwise(left, addend, weight, None, "add")

else:

    def onednn_pack(weight: Tensor, batch: int) -> Tensor:
        return weight

    def onednn_linear(left: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(left, weight.t())

    def onednn_linear_add(left: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
        return torch.addmm(addend, left, weight.t())


def step_weight(weight: Tensor, batch: int, onednn: bool, copy: bool) -> Tensor:
    """Weight (P, K) as the products of many steps want it; `copy` where they are many enough.

    BLAS gets the transpose, as a view or, better, contiguous.
    """
    if onednn:
        return onednn_pack(weight, batch) if copy else weight
    return weight.t().contiguous() if copy else weight.t()


def add_product_(addend: Tensor, left: Tensor, weight: Tensor, onednn: bool) -> Tensor:
    """addend (M, P) plus left (M, K) times weight; BLAS writes it into the addend."""
    if onednn:
        return onednn_linear_add(left, weight, addend)
    return addend.addmm_(left, weight)


def project_into(out: Tensor, left: Tensor, weight: Tensor, bias: Tensor, onednn: bool) -> None:
    """Write left (M, K) @ weight (P, K)^T + bias (P) into out (M, P); an empty bias is none."""
    if onednn:
        if bias.numel() > 0:
            torch.add(onednn_linear(left, weight), bias, out=out)
        else:
            out.copy_(onednn_linear(left, weight))
    elif bias.numel() > 0:
        torch.addmm(bias, left, weight.t(), out=out)
    else:
        torch.mm(left, weight.t(), out=out)


def add_weight_gradient(total: Tensor, grad: Tensor, left: Tensor, onednn: bool) -> Tensor:
    """total (P, K) plus grad (M, P)^T @ left (M, K); an empty total is zero."""
    if total.numel() == 0:
        if onednn:
            return onednn_linear(grad.t(), left.t())
        return torch.mm(grad.t(), left)
    if onednn:
        return onednn_linear_add(grad.t(), left.t(), total)
    return total.addmm_(grad.t(), left)


def input_gradient_into(out: Tensor, grad: Tensor, weight: Tensor, add: bool, onednn: bool) -> None:
    """Write grad (M, P) @ weight (P, K) into out (M, K), or add it."""
    if onednn:
        product = onednn_linear(grad, weight.t())
        if add:
            out.add_(product)
        else:
            out.copy_(product)
    elif add:
        out.addmm_(grad, weight)
    else:
        torch.mm(grad, weight, out=out)
