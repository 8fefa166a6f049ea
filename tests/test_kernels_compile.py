"""The compile gate on a representative part: kernels that compile as they should, for four chips.

`python -m bench.kernels --all` takes the whole grid. Compiled in a process of its own: Triton must
not be in interpreter mode, and a compiler that dies must not take the tests with it.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

TIMEOUT_S = 600


def test_a_pattern_that_no_kernel_matches_is_no_success():
    command = [sys.executable, "-m", "bench.kernels", "--match", "no such kernel"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 2
    assert "--match no such kernel: there is no such kernel" in run.stderr


# Per chip: every cell and dtype at a size for each variant, both directions of the recurrence.
SCRIPT = """
import json, sys, torch
from bench import kernels

chip = kernels.COMPILED_FOR[sys.argv[1]]
asked = list(kernels.matmuls(chip, (torch.float16, torch.float32)))
sizes = [(64, 16, 1), (100, 16, 2), (512, 64, 1), (1000, 64, 2), (1024, 16, 2), (2048, 16, 1)]
for cell, dtype in (("lstm", torch.float16), ("gru", torch.bfloat16), ("rnn_tanh", torch.float32)):
    for hidden_size, batch, directions in sizes:
        asked += kernels.recurrences(
            chip, (cell,), (dtype,), (hidden_size,), (batch,), (directions,), (None,)
        )
asked += kernels.recurrences(
    chip, ("lstm",), (torch.float16,), (768,), (16,), (1,), ("streaming", "stepwise")
)
# Only by name, and only on Hopper and later.
asked += kernels.recurrences(
    chip, ("lstm",), (torch.float16,), (128,), (16,), (1,), ("cluster",)
)
# Users' cells: the most numbers of a step, products that are no inputs, no product. And torch's
# with all that a module's options can be.
for cell, dtype, sizes in (
    ("PeepholeLSTM", torch.float16, [(64, 16, 1), (2048, 16, 1)]),
    ("MinimalGatedUnit", torch.float32, [(512, 64, 1)]),
    ("IndRNN", torch.float16, [(512, 16, 2)]),
    ("LSTM, all options", torch.float16, [(64, 16, 1), (512, 16, 1)]),
    ("GRU, all options", torch.bfloat16, [(512, 64, 2)]),
):
    for hidden_size, batch, directions in sizes:
        asked += kernels.recurrences(
            chip, (cell,), (dtype,), (hidden_size,), (batch,), (directions,), (None,)
        )
rows = kernels.examine_all(asked, 2)
print(json.dumps([
    dict(chip=row.kernel.chip.name, name=row.kernel.name, what=row.kernel.what,
         registers=row.registers, stack=row.stack,
         shared=row.shared, limit=row.limit, loop=row.loop, problems=row.problems)
    for row in rows
]))
"""


@pytest.fixture(scope="module", params=["A100", "H200", "B200", "MI300X"])
def rows(request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, request.param],
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_kernel_spills_or_exceeds_its_chip_or_lacks_matrix_instructions(rows):
    failed = [f"{row['name']} {row['what']}: {row['problems']}" for row in rows if row["problems"]]
    assert not failed, "\n".join(failed)
    assert len(rows) >= 40
    for row in rows:
        assert row["registers"] > 0
        assert row["shared"] <= row["limit"]


def test_a_cooperative_step_loads_no_weights_again(rows):
    # Rows of W_hh are loaded before the loop over time: inside it are the step's own numbers, those
    # of the next, and the state of all others. With 16 bytes a load that is some dozens.
    seen = 0
    for row in rows:
        if row["name"] == "forward" and "cooperative" in row["what"] and "float16" in row["what"]:
            if "read again" in row["what"]:
                continue
            seen += 1
            assert row["loop"]["load"] < 64, row
            assert row["loop"]["matrix"] > 0, row
    assert seen > 0


def test_a_step_with_w_hh_in_registers_has_no_fence_and_few_barriers(rows):
    # Two for the product's parts; some more where a block is larger than the threads, and numbers
    # are handed from thread to thread. That nothing else is in shared memory the gate sees.
    seen = 0
    for row in rows:
        if "cooperative" in row["what"] and "in registers" in row["what"]:
            seen += 1
            if "read again" not in row["what"]:
                # That is waited for a few blocks at a time; threads come together after a wait.
                assert row["loop"].get("barrier", 0) <= 12, row
            assert "fence" not in row["loop"] and "atomic" not in row["loop"], row
    # AMD's have none: the pieces are loaded by PTX.
    assert (seen > 0) == all(row["chip"] != "MI300X" for row in rows)


def test_a_clusters_step_has_no_fence_and_sends_its_numbers_to_all(rows):
    seen = [row for row in rows if "cluster" in row["what"]]
    assert bool(seen) == (rows[0]["chip"] in ("H200", "B200"))
    for row in seen:
        # A number of each thread to all programs; backward its sums to one each, four in each round
        # of sixteen units for every warp.
        size, warps, programs = map(
            int, re.search(r"H=(\d+).* (\d+) warps.* (\d+) programs", row["what"]).groups()
        )
        sums = 4 * -(-size // (16 * warps))
        assert row["loop"]["sent"] == (programs if row["name"] == "forward" else sums), row
        assert row["loop"]["barrier"] <= 4, row
        assert "fence" not in row["loop"] and "atomic" not in row["loop"], row


def test_a_resident_step_neither_waits_nor_exchanges(rows):
    seen = 0
    for row in rows:
        if "resident" in row["what"]:
            seen += 1
            assert "atomic" not in row["loop"], row
    assert seen > 0


def test_a_resident_step_of_16_bits_reads_no_weights_from_shared_memory(rows):
    # That W_hh of larger layers is in registers is for the gate itself to see.
    seen = [row for row in rows if "in registers" in row["what"]]
    # MI300X, which has 64 KB of shared memory, keeps everything in registers anyway.
    assert bool(seen) == (rows[0]["limit"] > 64 * 1024)
    for row in seen:
        if "H=100" in row["what"] and row["name"] == "forward":
            assert row["shared"] < 64 * 1024, row


KEYS = """
import json, torch
import triton_rnn
from bench import kernels
from triton_rnn.backends.triton import own
from triton_rnn.kernels.chips import CHIPS

def like_rnn(name, step):
    kind = type(name, (triton_rnn.Recurrent,), {"step": staticmethod(step)}, gates=1)
    kernels._MADE_CELLS[name] = kind.cell
    return own.kernel_cell(kind.cell)

made = {
    "tanh": like_rnn("Tanh", lambda i, u, s: torch.tanh(i[0] + u[0])),
    "tanh again": like_rnn("Again", lambda i, u, s: torch.tanh(u[0] + i[0])),
    "sigmoid": like_rnn("Sigmoid", lambda i, u, s: torch.sigmoid(i[0] + u[0])),
    "twice": like_rnn("Twice", lambda i, u, s: 2 * torch.tanh(i[0] + u[0])),
    "thrice": like_rnn("Thrice", lambda i, u, s: 3 * torch.tanh(i[0] + u[0])),
}
parts = ("forward", "factors", "backward")
keys = {n: {p: getattr(c, p).cache_key for p in parts} for n, c in made.items()}
chip = CHIPS["H200"]
binaries = []
for name in ("Tanh", "Sigmoid"):
    for kernel in kernels.recurrences(chip, (name,), (torch.float16,), (64,), (16,), (1,), (None,)):
        binaries.append(kernels.compiled(kernel).hash)
print(json.dumps([keys, binaries]))
"""


def test_a_users_cell_is_its_text_to_tritons_cache(tmp_path):
    """Two cells never share a key; the same one, in another process, is found again."""

    def run():
        done = subprocess.run(
            [sys.executable, "-c", KEYS],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1]), sorted(tmp_path.iterdir())

    (keys, binaries), files = run()
    assert keys["tanh"] == keys["tanh again"]
    others = [keys[name] for name in ("tanh", "sigmoid", "twice", "thrice")]
    assert len({key["forward"] for key in others}) == 4
    # The factor of a backward may be another's.
    assert len({(key["factors"], key["backward"]) for key in others}) == 4
    # Forward, which saves nothing beside h, and backward, of each.
    assert len(set(binaries)) == len(binaries) == 4
    assert run() == ([keys, binaries], files)
