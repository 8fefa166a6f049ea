"""The pointwise arithmetic of every cell: what lies between the two products and the next state.

A cell is three functions. With `a` the parts of W_hh h (float32, one block of hidden units by batch
rows each), `x` the parts of the input's preactivations, `v` numbers of each unit (one column of
hidden units each):

    forward(a, x, v, h, c, PTX) -> h, c, saved        `saved` is what the backward needs
    factors(saved, state, before, v, PTX) -> factors  what a backward step needs that no gradient
                                                      enters; `state` and `before` are the state at
                                                      t and t - 1: c where `keeps_c`, else h
    backward(factors, dh, dc, v, PTX) -> grads, dh_before, dc_before

Forward, `v` are biases of W_hh h that cannot be added to the input's (b_hn of a GRU), then the unit
weights of a user's cell; backward, the unit weights alone. PTX is as in `functions`. `backward` is
all that stands between two steps of the chain. Its `grads` are WIDTH blocks in the order of
`grad_gates`; `dh_before` is the part of the gradient of h_{t-1} that does not come through W_hh.
The functions of a user's cell are generated (`backends.triton.own`). Of torch's, with dh, dc the
gradients that reach h_t, c_t (formulas of torch.nn's documentation):

    rnn   da = dh (1 - h^2)                       [relu: dh (h > 0)]
    gru   dn = dh (1-z)(1-n^2)   dm = dn r   dr = dn m r(1-r)   dz = dh (h_before - n) z(1-z)
          dh_before = dh z
    lstm  dc += dh o (1-tanh(c)^2)   do = dh tanh(c) o(1-o)   di = dc g i(1-i)   dg = dc i (1-g^2)
          df = dc c_before f(1-f)   dc_before = dc f
"""

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from triton_rnn.kernels.functions import sigmoid, tanh


@triton.jit
def rnn_tanh_forward(a, x, v, h, c, PTX: tl.constexpr):
    return tanh(a[0] + x[0], PTX), c, ()


@triton.jit
def rnn_relu_forward(a, x, v, h, c, PTX: tl.constexpr):
    preact = a[0] + x[0]
    # Not tl.maximum: a NaN must stay one.
    return tl.where(preact <= 0, 0.0, preact), c, ()


@triton.jit
def gru_forward(a, x, v, h, c, PTX: tl.constexpr):
    m = a[2] + v[0]
    r = sigmoid(a[0] + x[0], PTX)
    z = sigmoid(a[1] + x[1], PTX)
    n = tanh(x[2] + r * m, PTX)
    return (1.0 - z) * n + z * h, c, (m, r, z, n)


@triton.jit
def lstm_forward(a, x, v, h, c, PTX: tl.constexpr):
    i = sigmoid(a[0] + x[0], PTX)
    f = sigmoid(a[1] + x[1], PTX)
    g = tanh(a[2] + x[2], PTX)
    o = sigmoid(a[3] + x[3], PTX)
    c = f * c + i * g
    return o * tanh(c, PTX), c, (i, f, g, o)


@triton.jit
def rnn_tanh_factors(saved, state, before, v, PTX: tl.constexpr):
    return (1.0 - state * state,)


@triton.jit
def rnn_relu_factors(saved, state, before, v, PTX: tl.constexpr):
    # As torch has it: a NaN lets the gradient through.
    return (tl.where(state <= 0, 0.0, 1.0),)


@triton.jit
def rnn_tanh_backward(factors, dh, dc, v, PTX: tl.constexpr):
    return (dh * factors[0],), tl.zeros_like(dh), dc


@triton.jit
def rnn_relu_backward(factors, dh, dc, v, PTX: tl.constexpr):
    # Selected, not multiplied: a NaN ends where the relu is off.
    return (tl.where(factors[0] == 0, 0.0, dh),), tl.zeros_like(dh), dc


@triton.jit
def gru_factors(saved, state, before, v, PTX: tl.constexpr):
    m, r, z, n = saved
    return (1.0 - z) * (1.0 - n * n), r, m * r * (1.0 - r), (before - n) * z * (1.0 - z), z


@triton.jit
def gru_backward(factors, dh, dc, v, PTX: tl.constexpr):
    dn = dh * factors[0]
    return (dn * factors[1], dn * factors[2], dh * factors[3], dn), dh * factors[4], dc


@triton.jit
def lstm_factors(saved, state, before, v, PTX: tl.constexpr):
    i, f, g, o = saved
    s = tanh(state, PTX)
    return (
        o * (1.0 - s * s),
        g * i * (1.0 - i),
        before * f * (1.0 - f),
        i * (1.0 - g * g),
        s * o * (1.0 - o),
        f,
    )


@triton.jit
def lstm_backward(factors, dh, dc, v, PTX: tl.constexpr):
    dc = dc + dh * factors[0]
    grads = (dc * factors[1], dc * factors[2], dc * factors[3], dh * factors[4])
    return grads, tl.zeros_like(dh), dc * factors[5]


@dataclass(frozen=True)
class KernelCell:
    """A cell as the kernels see it.

    Attributes:
        forward, factors, backward: the three functions above.
        inputs: the parts of the input's preactivations, and behind them the masks.
        products: P, the parts of W_hh h.
        saved: the blocks that `forward` saves.
        width: WIDTH, the blocks that `backward` returns: first those of the products, last, but
            for the unit weights', those of the inputs; both may share some.
        turn: the product whose gradients come first, the others following in a ring.
        starts: for each product the input's part that its bias is added to before the loop, or -1:
            it is among `v`, in the order of the products.
        carried: the blocks that `factors` returns.
        units: how many unit weights there are.
        has_c: whether the state is (h, c).
        keeps_c: whether the backward reads c, not h, at every step.
        masks: inputs, the last, that no weight makes: ones and zeros of every step.
        locked: whether h is multiplied by numbers of each sequence before W_hh multiplies it.
        shows_c: whether c after every step is a result.
    """

    forward: Any
    factors: Any
    backward: Any
    inputs: int
    products: int
    saved: int
    width: int
    carried: int
    starts: tuple[int, ...]
    turn: int = 0
    units: int = 0
    has_c: bool = False
    keeps_c: bool = False
    masks: int = 0
    locked: bool = False
    shows_c: bool = False

    @property
    def preacts(self) -> int:
        """G, the parts of the input's preactivations."""
        return self.inputs - self.masks

    @functools.cached_property
    def biases(self) -> int:
        """How many products have their bias among `v`."""
        return self.starts.count(-1)

    @functools.cached_property
    def folds(self) -> int:
        """So many products, the first, have their bias added to the same parts of the input's.

        -1 if the others are not just those whose bias is among `v`.
        """
        count = self.products - self.biases
        return count if self.starts[:count] == tuple(range(count)) else -1

    @property
    def saves(self) -> bool:
        """Whether `forward` saves anything but the states."""
        return self.saved > 0

    @property
    def row(self) -> int:
        """Blocks in a row of `gates` in training: what is saved replaces the input's parts."""
        return max(self.inputs, self.saved)


KERNEL_CELLS = {
    "rnn_tanh": KernelCell(
        rnn_tanh_forward, rnn_tanh_factors, rnn_tanh_backward, 1, 1, 0, 1, 1, (0,)
    ),
    "rnn_relu": KernelCell(
        rnn_relu_forward, rnn_relu_factors, rnn_relu_backward, 1, 1, 0, 1, 1, (0,)
    ),
    # m is the last product; r and z are of both sides.
    "gru": KernelCell(
        gru_forward, gru_factors, gru_backward, 3, 3, 4, 4, 5, (0, 1, -1), turn=2
    ),
    "lstm": KernelCell(
        lstm_forward, lstm_factors, lstm_backward, 4, 4, 4, 4, 6, (0, 1, 2, 3),
        has_c=True, keeps_c=True,
    ),
}  # fmt: skip
