"""The arithmetic of every cell, forward and backward, as functions that TorchScript compiles.

The recurrence (`recurrence.py`) is written once and calls these through a `ScriptCell`. For every
row (one batch row at one step) a cell keeps `width` numbers in `gates`:

    rnn   [a]            width H      the preactivation; the state itself is what the backward needs
    gru   [m r z n]      width 4H     m = W_hn h + b_hn, the part that the reset gate multiplies
    lstm  [i f g o]      width 4H

The input's projection fills the last G * H columns, the recurrent product is added to the first G *
H; GRU's row starts with m so that both are one contiguous range and one matrix product.

The backward of a cell splits into `factors`, all that does not depend on the incoming gradients and
is computed for a block of steps at once, and `backward_step`, the few operations that must be done
one step after the other. With dh, dc the gradients that reach h_t, c_t:

    rnn   da = dh (1 - h^2)                       [relu: dh (h > 0)]
    gru   dn = dh (1-z)(1-n^2)   dm = dn r   dr = dn m r(1-r)   dz = dh (h_prev - n) z(1-z)
          dh_prev = dh z + [dm dr dz] [W_hn W_hr W_hz]
    lstm  dc += dh o (1-tanh(c)^2)   do = dh tanh(c) o(1-o)   di = dc g i(1-i)   dg = dc i (1-g^2)
          df = dc c_prev f(1-f)   dc_prev = dc f
    projected lstm: h = W_hr m, so dm = dh W_hr stands where dh stands for the lstm

Shapes: h (n, H_out), c (n, H), a block of `gates` (rows, width); n is the batch at one step.
`views` holds one list per quantity, each with one tensor per step. Forward: views[0][t] is where
step t writes h, views[1][t] where it writes c, the rest is the cell's own; `gates` is `h` for a
cell of one gate.
Backward: views[0][t] receives the gradient of the columns of the recurrent product; `addend` is the
gradient that reaches h_prev from elsewhere, it may be overwritten.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triton_rnn.backends.torchscript.products import add_product_


@dataclass(frozen=True)
class ScriptCell:
    """What the recurrence calls; every field is a function that TorchScript can compile.

    Attributes:
        recurrent_order: (rows of weight_hh or bias_hh, H) -> the same rows in the order of `gates`.
        torch_order: the way back.
        forward_views: (gates, H, batch_sizes, batch) -> the cell's own views.
        forward_step: (t, views, h, c, weight, weight_hr, onednn) -> None, writes h_t and c_t.
        factors: (gates, h, h_prev, c, c_prev, grad_gates) -> extra; fills grad_gates with factors.
        backward_views: (gates, extra, grad_gates, grad_states, H, batch_sizes, batch) -> views.
        backward_step: (t, views, dh, dc, addend, weight, weight_hr, onednn) -> (dh_prev + addend,
            dc_prev); turns the factors of step t into its `grad_gates`.
    """

    recurrent_order: Callable[..., Tensor]
    torch_order: Callable[..., Tensor]
    forward_views: Callable[..., list[list[Tensor]]]
    forward_step: Callable[..., None]
    factors: Callable[..., Tensor]
    backward_views: Callable[..., list[list[Tensor]]]
    backward_step: Callable[..., tuple[Tensor, Tensor]]


def steps(rows: Tensor, batch_sizes: list[int], batch: int) -> list[Tensor]:
    """Cut rows (sum of batch sizes, width) into one view per time step.

    An empty `batch_sizes` means that every step has `batch` rows, at least one. (What is a tuple
    in Python is a list in TorchScript.)
    """
    if len(batch_sizes) > 0:
        return torch.split_with_sizes(rows, batch_sizes)  # type: ignore[return-value]
    return rows.view(-1, batch, rows.size(1)).unbind(0)  # type: ignore[return-value]


def columns(rows: Tensor, begin: int, end: int, batch_sizes: list[int], batch: int) -> list[Tensor]:
    """`steps` of the columns begin:end."""
    return steps(rows[:, begin:end], batch_sizes, batch)


def steps_by_gate(rows: Tensor, gates: int, batch_sizes: list[int], batch: int) -> list[Tensor]:
    """`steps` of rows (.., gates * H) as (n, gates, H)."""
    hidden_size = rows.size(1) // gates
    if len(batch_sizes) > 0:
        by_gate = rows.unflatten(1, [gates, hidden_size])
        return torch.split_with_sizes(by_gate, batch_sizes)  # type: ignore[return-value]
    by_step = rows.unflatten(1, [gates, hidden_size]).unflatten(0, [-1, batch])
    return list(by_step.unbind(0))


def keep_order(rows: Tensor, hidden_size: int) -> Tensor:
    return rows


# RNN ----------------------------------------------------------------------------------------------


def rnn_forward_views(
    gates: Tensor, hidden_size: int, batch_sizes: list[int], batch: int
) -> list[list[Tensor]]:
    """None of its own: the preactivation of a step lies where its h is to be."""
    views: list[list[Tensor]] = []
    return views


def rnn_tanh_forward_step(
    t: int,
    views: list[list[Tensor]],
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> None:
    torch.tanh(add_product_(views[0][t], h, weight, onednn), out=views[0][t])


def rnn_relu_forward_step(
    t: int,
    views: list[list[Tensor]],
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> None:
    torch.clamp_min(add_product_(views[0][t], h, weight, onednn), 0, out=views[0][t])


def rnn_tanh_factors(
    gates: Tensor, h: Tensor, h_prev: Tensor, c: Tensor, c_prev: Tensor, grad_gates: Tensor
) -> Tensor:
    torch.mul(h, h, out=grad_gates).neg_().add_(1)
    return c


def rnn_relu_factors(
    gates: Tensor, h: Tensor, h_prev: Tensor, c: Tensor, c_prev: Tensor, grad_gates: Tensor
) -> Tensor:
    grad_gates.copy_(h > 0)
    return c


def rnn_backward_views(
    gates: Tensor,
    extra: Tensor,
    grad_gates: Tensor,
    grad_states: Tensor,
    hidden_size: int,
    batch_sizes: list[int],
    batch: int,
) -> list[list[Tensor]]:
    return [steps(grad_gates, batch_sizes, batch)]


def rnn_backward_step(
    t: int,
    views: list[list[Tensor]],
    dh: Tensor,
    dc: Tensor,
    addend: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> tuple[Tensor, Tensor]:
    return add_product_(addend, views[0][t].mul_(dh), weight, onednn), dc


# GRU ----------------------------------------------------------------------------------------------


def gru_recurrent_order(rows: Tensor, hidden_size: int) -> Tensor:
    """Torch's [r z n] to [m r z]."""
    return torch.cat([rows[2 * hidden_size :], rows[: 2 * hidden_size]])


def gru_torch_order(rows: Tensor, hidden_size: int) -> Tensor:
    """[m r z] to torch's [r z n]."""
    return torch.cat([rows[hidden_size:], rows[:hidden_size]])


def gru_forward_views(
    gates: Tensor, hidden_size: int, batch_sizes: list[int], batch: int
) -> list[list[Tensor]]:
    size = hidden_size
    return [
        columns(gates, 0, 3 * size, batch_sizes, batch),
        columns(gates, size, 3 * size, batch_sizes, batch),
        columns(gates, 0, size, batch_sizes, batch),
        columns(gates, size, 2 * size, batch_sizes, batch),
        columns(gates, 2 * size, 3 * size, batch_sizes, batch),
        columns(gates, 3 * size, 4 * size, batch_sizes, batch),
    ]


def gru_forward_step(
    t: int,
    views: list[list[Tensor]],
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> None:
    mrz = add_product_(views[2][t], h, weight, onednn)
    m = views[4][t]
    if onednn:
        hidden_size = m.size(1)
        m.copy_(mrz[:, :hidden_size])
        torch.sigmoid(mrz[:, hidden_size:], out=views[3][t])
    else:
        views[3][t].sigmoid_()
    # tanh of a contiguous tensor takes half the time of one with strides; the copy is cheap.
    n = torch.addcmul(views[7][t], views[5][t], m).tanh_()
    views[7][t].copy_(n)
    torch.lerp(n, h, views[6][t], out=views[0][t])


def gru_factors(
    gates: Tensor, h: Tensor, h_prev: Tensor, c: Tensor, c_prev: Tensor, grad_gates: Tensor
) -> Tensor:
    m, r, z, n = gates.chunk(4, 1)
    for_m, for_r, for_z, for_n = grad_gates.chunk(4, 1)
    one_minus_z = 1 - z
    torch.mul(n, n, out=for_n).neg_().add_(1).mul_(one_minus_z)
    torch.mul(for_n, r, out=for_m)
    torch.neg(r, out=for_r).add_(1).mul_(for_m).mul_(m)
    torch.sub(h_prev, n, out=for_z).mul_(z).mul_(one_minus_z)
    return c


def gru_backward_views(
    gates: Tensor,
    extra: Tensor,
    grad_gates: Tensor,
    grad_states: Tensor,
    hidden_size: int,
    batch_sizes: list[int],
    batch: int,
) -> list[list[Tensor]]:
    return [
        columns(grad_gates, 0, 3 * hidden_size, batch_sizes, batch),
        steps_by_gate(grad_gates, 4, batch_sizes, batch),
        columns(gates, 2 * hidden_size, 3 * hidden_size, batch_sizes, batch),
    ]


def gru_backward_step(
    t: int,
    views: list[list[Tensor]],
    dh: Tensor,
    dc: Tensor,
    addend: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> tuple[Tensor, Tensor]:
    views[1][t].mul_(dh.unsqueeze(1))
    direct = addend.addcmul_(dh, views[2][t])
    return add_product_(direct, views[0][t], weight, onednn), dc


# LSTM ---------------------------------------------------------------------------------------------


def lstm_forward_views(
    gates: Tensor, hidden_size: int, batch_sizes: list[int], batch: int
) -> list[list[Tensor]]:
    size = hidden_size
    return [
        steps(gates, batch_sizes, batch),
        columns(gates, 0, 2 * size, batch_sizes, batch),
        columns(gates, 0, size, batch_sizes, batch),
        columns(gates, size, 2 * size, batch_sizes, batch),
        columns(gates, 2 * size, 3 * size, batch_sizes, batch),
        columns(gates, 3 * size, 4 * size, batch_sizes, batch),
    ]


def lstm_gates(
    t: int, views: list[list[Tensor]], h: Tensor, c: Tensor, weight: Tensor, onednn: bool
) -> None:
    """Leave i f g o of step t in `gates` and write c_t."""
    preact = add_product_(views[2][t], h, weight, onednn)
    if onednn:
        hidden_size = c.size(1)
        torch.sigmoid(preact[:, : 2 * hidden_size], out=views[3][t])
        torch.tanh(preact[:, 2 * hidden_size : 3 * hidden_size], out=views[6][t])
        torch.sigmoid(preact[:, 3 * hidden_size :], out=views[7][t])
    else:
        views[3][t].sigmoid_()
        views[6][t].tanh_()
        views[7][t].sigmoid_()
    torch.mul(views[5][t], c, out=views[1][t]).addcmul_(views[4][t], views[6][t])


def lstm_forward_step(
    t: int,
    views: list[list[Tensor]],
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> None:
    lstm_gates(t, views, h, c, weight, onednn)
    torch.tanh(views[1][t], out=views[0][t]).mul_(views[7][t])


def lstm_projected_forward_step(
    t: int,
    views: list[list[Tensor]],
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> None:
    lstm_gates(t, views, h, c, weight, onednn)
    torch.mm(torch.tanh(views[1][t]).mul_(views[7][t]), weight_hr.t(), out=views[0][t])


def lstm_factors(
    gates: Tensor, h: Tensor, h_prev: Tensor, c: Tensor, c_prev: Tensor, grad_gates: Tensor
) -> Tensor:
    """Return o (1 - tanh(c)^2), what dh adds to dc."""
    i, f, g, o = gates.chunk(4, 1)
    for_i, for_f, for_g, for_o = grad_gates.chunk(4, 1)
    torch.neg(i, out=for_i).add_(1).mul_(i).mul_(g)
    torch.neg(f, out=for_f).add_(1).mul_(f).mul_(c_prev)
    torch.mul(g, g, out=for_g).neg_().add_(1).mul_(i)
    tanh_c = torch.tanh(c)
    torch.neg(o, out=for_o).add_(1).mul_(o).mul_(tanh_c)
    return tanh_c.mul_(tanh_c).neg_().add_(1).mul_(o)


def lstm_backward_views(
    gates: Tensor,
    extra: Tensor,
    grad_gates: Tensor,
    grad_states: Tensor,
    hidden_size: int,
    batch_sizes: list[int],
    batch: int,
) -> list[list[Tensor]]:
    size = hidden_size
    return [
        steps(grad_gates, batch_sizes, batch),
        steps_by_gate(grad_gates[:, : 3 * size], 3, batch_sizes, batch),
        columns(grad_gates, 3 * size, 4 * size, batch_sizes, batch),
        steps(extra, batch_sizes, batch),
        columns(gates, size, 2 * size, batch_sizes, batch),
        steps(grad_states, batch_sizes, batch),
    ]


def lstm_backward_step(
    t: int,
    views: list[list[Tensor]],
    dh: Tensor,
    dc: Tensor,
    addend: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> tuple[Tensor, Tensor]:
    dc = torch.addcmul(dc, dh, views[3][t])
    views[1][t].mul_(dc.unsqueeze(1))
    views[2][t].mul_(dh)
    return add_product_(addend, views[0][t], weight, onednn), dc.mul_(views[4][t])


def lstm_projected_backward_step(
    t: int,
    views: list[list[Tensor]],
    dh: Tensor,
    dc: Tensor,
    addend: Tensor,
    weight: Tensor,
    weight_hr: Tensor,
    onednn: bool,
) -> tuple[Tensor, Tensor]:
    if onednn:
        views[5][t].copy_(dh)
    dm = torch.mm(dh, weight_hr)
    return lstm_backward_step(t, views, dm, dc, addend, weight, weight_hr, onednn)


_LSTM = ScriptCell(
    keep_order,
    keep_order,
    lstm_forward_views,
    lstm_forward_step,
    lstm_factors,
    lstm_backward_views,
    lstm_backward_step,
)

SCRIPT_CELLS = {
    "rnn_tanh": ScriptCell(
        keep_order,
        keep_order,
        rnn_forward_views,
        rnn_tanh_forward_step,
        rnn_tanh_factors,
        rnn_backward_views,
        rnn_backward_step,
    ),
    "rnn_relu": ScriptCell(
        keep_order,
        keep_order,
        rnn_forward_views,
        rnn_relu_forward_step,
        rnn_relu_factors,
        rnn_backward_views,
        rnn_backward_step,
    ),
    "gru": ScriptCell(
        gru_recurrent_order,
        gru_torch_order,
        gru_forward_views,
        gru_forward_step,
        gru_factors,
        gru_backward_views,
        gru_backward_step,
    ),
    "lstm": _LSTM,
    "lstm_projected": replace(
        _LSTM,
        forward_step=lstm_projected_forward_step,
        backward_step=lstm_projected_backward_step,
    ),
}
