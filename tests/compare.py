"""What nearly every test here does: ours on the kernels, against torch.nn in float64."""

import dataclasses

import torch
from tolerances import TOLERANCES, assert_close, random, random_state, run, twins
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn.backends.triton import launch


def pack(lengths, batch_first=False):
    """How to make a padded input of these lengths a packed one."""
    return lambda input: pack_padded_sequence(
        input, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False
    )


def _avoids_kink(kind, dtype):
    return kind == "rnn_relu" and dtype == torch.float16


def exact_and_ours(kind, *sizes, dtype=torch.float32, **options):
    """torch.nn in float64 and ours in a dtype, with the same weights, rounded to that dtype.

    relu's slope jumps at 0, where rounding to 11 bits decides the side: its units are made to stay
    far from it, every other one above and the rest below, as long as input and state are positive.
    """
    theirs, ours = twins(kind, *sizes, dtype=dtype, **options)
    if _avoids_kink(kind, dtype):
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                parameter.abs_()
                if "bias_ih" in name:
                    parameter[1::2] = -100
    theirs.load_state_dict(ours.state_dict())
    return theirs.double(), ours


def input_and_hx(kind, ours, *shape, batch, seed=0):
    """An input of this shape and a state for so many sequences, positive where relu wants it."""
    dtype = next(ours.parameters()).dtype
    input = random(*shape, seed=seed, dtype=dtype)
    hx = random_state(ours, batch, seed=seed + 1)
    if _avoids_kink(kind, dtype):
        input, hx = input.abs(), hx.abs()
    return input, hx


def each_state(function, hx):
    """A function of each state of an hx."""
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def run_on_kernels(module, *args, **kwargs):
    """`tolerances.run` on the kernels."""
    with triton_rnn.use_backend("triton"):
        return run(module, *args, **kwargs)


def assert_torchs_numbers(exact, ours, input, hx=None, **how):
    """Every output and gradient, in the dtype of `ours` and as near as the table says; returned."""
    exact_hx = None if hx is None else each_state(torch.Tensor.double, hx)
    expected = run(exact, input.double(), exact_hx, **how)
    actual = run_on_kernels(ours, input, hx, **how)
    assert_as_expected(actual, expected, input.dtype)
    return actual


def assert_as_expected(actual, expected, dtype):
    """Results in a dtype against those in float64."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        if value is None or found is None:
            # Where a loss reaches no weight, None and zeros are the same gradient.
            assert found is value or (value is None and not found.any()), f"{name}: one is None"
            continue
        assert found.dtype == dtype, f"{name} is {found.dtype}"
        assert_close(found.double(), value, name, TOLERANCES[dtype])


def change_plans(monkeypatch, change):
    """Launch by `change(plan, request)` in place of the planner's plan."""
    planned = launch.plan_of

    def plan_of(request, kernel):
        return change(planned(request, kernel), request)

    monkeypatch.setattr(launch, "plan_of", plan_of)


def tiled(monkeypatch, slots, at_once=2):
    """Blocks of 16 sequences, `slots` of them side by side, at most `at_once` directions a launch.

    What the planner gives the interpreter is one block for everything.
    """

    def change(plan, request):
        return dataclasses.replace(
            plan, block_n=16, slots=slots, at_once=min(at_once, request.directions)
        )

    change_plans(monkeypatch, change)


def exchanging(
    monkeypatch,
    variant,
    exchange,
    *,
    block_h=8,
    block_k=16,
    slots=1,
    at_once=2,
    splits=2,
    together=1,
    streamed=0,
    sums=1,
):
    """Programs that exchange their states, which the planner never gives the interpreter.

    Args:
        variant, exchange: "cooperative" with "flag" or "barrier", "streaming" with "barrier", or
            "cluster" with "cluster".
        block_h: hidden units of a program. slots, at_once: as in `tiled`. The others: see `Plan`.
        With "flag" and "cluster" `block_k` is what its pieces make it.
    """
    monkeypatch.setattr(launch, "variant", "stepwise")

    def change(plan, request):
        pieces = request.hidden_size * request.dtype.itemsize % 16 == 0
        in_pieces = exchange in IN_PIECES
        assert pieces or not in_pieces, "others are waited for for ever"
        return dataclasses.replace(
            plan,
            variant=variant,
            exchange=exchange,
            block_h=block_h,
            block_n=16,
            block_k=64 // request.dtype.itemsize if in_pieces else block_k,
            splits=splits,
            together=together,
            streamed=streamed,
            sums=sums,
            units=-(-request.hidden_size // block_h),
            slots=slots,
            at_once=min(at_once, request.directions),
        )

    change_plans(monkeypatch, change)


def hidden_size(exchange, dtype=torch.float32):
    """For three programs: in pieces rows of whole ones of 16 bytes, else odd ones."""
    return {4: 20, 2: 24}[dtype.itemsize] if exchange in IN_PIECES else 19


# What is exchanged in pieces of 16 bytes.
IN_PIECES = ("flag", "cluster")

# Variant and exchange, by the name in test ids.
EXCHANGES = {
    "flag": ("cooperative", "flag"),
    "barrier": ("cooperative", "barrier"),
    "streaming": ("streaming", "barrier"),
    "cluster": ("cluster", "cluster"),
}
