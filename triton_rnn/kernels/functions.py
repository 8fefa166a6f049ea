"""The functions that cells are made of: exp, reciprocal and what follows from them.

`PTX` says by what: "" for Triton's own operations, or the dtype in which results are kept, and then
NVIDIA's instructions, which take denormal numbers for zero. Triton's own take care of those and of
quotients near the ends of float32, which is three to six instructions more each; and a step of a
small layer is bound by its number of instructions.

In float32 all come out to its last digits, `tanh`, `expm1` and `log1p` near zero relative to the
result. Numbers that are kept in 16 bits do not need that: float16's smallest number is the rounding
of `1 - 2 / (exp(2x) + 1)`, and bfloat16 has 8 bits, of which `tanh.approx` (PTX ISA, relative error
of 2^-11) loses none.
"""

import triton
import triton.language as tl

# Two definitions each, not one that asks: a number of the module in a function makes the key that
# Triton keeps its caller's machine code by another one, the second time that it is asked for.
if triton.knobs.runtime.interpret:
    # The interpreter knows no PTX. The formulas are the same.

    @triton.jit
    def _ex2(x):
        return tl.exp2(x)

    @triton.jit
    def _rcp(x):
        return 1.0 / x

    @triton.jit
    def _tanh_approx(x):
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)

else:

    @triton.jit
    def _ex2(x):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _rcp(x):
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _tanh_approx(x):
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp(x, PTX: tl.constexpr):
    if PTX == "":
        y = tl.exp(x)
    else:
        y = _ex2(x * 1.4426950408889634)
    return y


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    if PTX == "":
        y = 1.0 / x
    else:
        y = _rcp(x)
    return y


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    if PTX == "":
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        # Not of -x, which would be an instruction more.
        y = _rcp(1.0 + _ex2(x * -1.4426950408889634))
    return y


@triton.jit
def _tanh(x, PTX: tl.constexpr):
    """Good to float32's rounding of one, whatever the size of x."""
    return 1.0 - 2.0 * reciprocal(exp(2.0 * x, PTX) + 1.0, PTX)


@triton.jit
def tanh(x, PTX: tl.constexpr):
    if PTX == "bfloat16":
        y = _tanh_approx(x)
    elif PTX == "float16":
        y = _tanh(x, PTX)
    else:
        # Near zero a series. Elsewhere by the magnitude: both signs are then equally good.
        magnitude = tl.abs(x)
        far = _tanh(magnitude, PTX)
        far = tl.where(x < 0, -far, far)
        square = x * x
        near = -17.0 / 315 + square * (62.0 / 2835)
        near = -1.0 / 3 + square * (2.0 / 15 + square * near)
        y = tl.where(magnitude < 0.25, x + x * (square * near), far)
    return y


@triton.jit
def expm1(x, PTX: tl.constexpr):
    """exp(x) - 1, near zero relative to the result: by tanh there."""
    half = tanh(0.5 * x, "" if PTX == "" else "float32")
    near = 2.0 * half * reciprocal(1.0 - half, PTX)
    return tl.where(tl.abs(x) < 1.0, near, exp(x, PTX) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), near zero relative to the result: what 1 + x has rounded off is made up for."""
    whole = 1.0 + x
    lost = tl.where(whole == 1.0, x, tl.log(whole) * (x / (whole - 1.0)))
    return tl.where(tl.abs(x) < 1.0, lost, tl.log(whole))
