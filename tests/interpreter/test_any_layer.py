"""Sizes, options, plans and orders of events that nobody thought of, against torch.nn."""

import pytest
import torch
from compare import (
    EXCHANGES,
    IN_PIECES,
    assert_torchs_numbers,
    exact_and_ours,
    exchanging,
    input_and_hx,
    pack,
    tiled,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from threads import AtRandom, Threads
from tolerances import LAYERS

from triton_rnn.backends.triton import launch

# The same examples every time, so that a red build is one that everybody can repeat; no deadline,
# for the interpreter is slow.
REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    suppress_health_check=list(HealthCheck),
)

sizes = st.integers(1, 9) | st.sampled_from([15, 16, 17, 31, 33])


@st.composite
def layer_calls(draw):
    kind = draw(st.sampled_from(sorted(LAYERS)))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
    }
    hidden_size = draw(sizes)
    if kind == "lstm_proj":
        hidden_size += 1
        options["proj_size"] = draw(st.integers(1, hidden_size - 1))
    seq_len, batch = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    lengths = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, seq_len), min_size=batch, max_size=batch))
        seq_len = max(lengths)
    return kind, draw(sizes), hidden_size, options, seq_len, batch, lengths, draw(st.booleans())


@REPEATABLE
@given(
    call=layer_calls(),
    variant=st.sampled_from(["resident", "stepwise", *EXCHANGES]),
    used=st.sets(st.sampled_from(["output", "h_n", "c_n"]), min_size=1),
    slots=st.integers(1, 2),
    at_once=st.integers(1, 2),
    block_h=st.sampled_from([8, 16]),
    splits=st.sampled_from([1, 2, 4]),
    together=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_layer_on_any_plan_gives_torchs_outputs_and_gradients(
    call, variant, used, slots, at_once, block_h, splits, together, seed
):
    kind, input_size, hidden_size, options, seq_len, batch, lengths, given_hx = call
    if variant in IN_PIECES:
        # Rows of whole pieces of 16 bytes.
        hidden_size += -hidden_size % (16 // options["dtype"].itemsize)
    torch.manual_seed(seed)
    exact, ours = exact_and_ours(kind, input_size, hidden_size, **options)
    shape = (batch, seq_len) if options["batch_first"] else (seq_len, batch)
    input, hx = input_and_hx(kind, ours, *shape, input_size, batch=batch, seed=seed)
    how = {"used": used if "lstm" in kind else used - {"c_n"} or {"h_n"}}
    if lengths is not None:
        how["prepare"] = pack(lengths, options["batch_first"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        if variant in EXCHANGES:
            exchanging(
                monkeypatch,
                *EXCHANGES[variant],
                block_h=block_h,
                slots=slots,
                at_once=at_once,
                splits=splits,
                together=together,
            )
            Threads(monkeypatch, lambda: AtRandom(seed))
        else:
            monkeypatch.setattr(launch, "variant", variant)
            tiled(monkeypatch, slots, at_once)
        assert_torchs_numbers(exact, ours, input, hx if given_hx else None, **how)
