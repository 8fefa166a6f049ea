"""The compile gate on a representative part: kernels that compile as they should, for four chips.

`python -m bench.kernels --all` takes the whole grid. Compiled in a process of its own: Triton must
not be in interpreter mode, and a compiler that dies must not take the tests with it.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

TIMEOUT_S = 600

# Per chip: every cell and dtype at a size for each variant, both directions of the recurrence.
SCRIPT = """
import json, sys, torch
from bench import kernels
from triton_rnn.kernels.plan import CHIPS

chip = CHIPS[sys.argv[1]]
asked = list(kernels.matmuls(chip, (torch.float16, torch.float32)))
sizes = [(64, 16, 1), (100, 16, 2), (512, 64, 1), (1024, 16, 2), (2048, 16, 1)]
for cell, dtype in (("lstm", torch.float16), ("gru", torch.bfloat16), ("rnn_tanh", torch.float32)):
    for hidden_size, batch, directions in sizes:
        asked += kernels.recurrences(
            chip, (cell,), (dtype,), (hidden_size,), (batch,), (directions,), (None,)
        )
asked += kernels.recurrences(
    chip, ("lstm",), (torch.float16,), (768,), (16,), (1,), ("streaming", "stepwise")
)
rows = kernels.examine_all(asked, 2)
print(json.dumps([
    dict(name=row.kernel.name, what=row.kernel.what, registers=row.registers, stack=row.stack,
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
            seen += 1
            assert row["loop"]["load"] < 64, row
            assert row["loop"]["matrix"] > 0, row
    assert seen > 0


def test_a_resident_step_neither_waits_nor_exchanges(rows):
    seen = 0
    for row in rows:
        if "resident" in row["what"]:
            seen += 1
            assert "atomic" not in row["loop"], row
    assert seen > 0
