"""Random layers on the machine that runs PTX, with random plans and orders of events.

    python tests/ptx/ptx_fuzz.py CASES SEED

With the root of the checkout on PYTHONPATH; a case takes a few seconds. Of another version of
Triton there what that one's compiler makes is run. Prints the cases that fail, and how many
there were; the exit code is 1 if any did.
"""

import collections
import pathlib
import random
import sys

# Also where this file is run as a program.
sys.path.insert(1, str(pathlib.Path(__file__).parent.parent))

import numpy as np
import torch
from compare import each_state, exact_and_ours, input_and_hx, pack, run_on_kernels
from ptx_layers import NoPlan, on_machine
from ptx_operations import Unknown
from tolerances import TOLERANCES, assert_close, run

KINDS = ("rnn_tanh", "gru", "lstm")
CHIPS = ("A100", "RTX 4090", "H200", "H200", "B200")
VARIANTS = ("cluster", "cluster", "cooperative", "cooperative", "streaming", "resident", "stepwise")
SIZES = (16, 20, 24, 32, 40, 64, 96, 100, 128, 136, 192, 256)


def case(chance):
    """A random layer, input and plan."""
    steps, batch = chance.choice([1, 2, 3, 4, 5]), chance.choice([1, 3, 8, 9, 16, 20])
    lengths = [steps] + [chance.randint(1, steps) for _ in range(batch - 1)]
    return {
        "kind": chance.choice(KINDS),
        "chip": chance.choice(CHIPS),
        "variant": chance.choice(VARIANTS),
        "dtype": chance.choice([torch.float16, torch.bfloat16, torch.float32]),
        "precision": chance.choice(["tf32", "ieee"]),
        "size": chance.choice(SIZES),
        "steps": steps,
        "batch": batch,
        "lengths": lengths if chance.random() < 0.4 else None,
        "bidirectional": chance.random() < 0.4,
        "seed": chance.randrange(1 << 20),
    }


def outcome(asked):
    """What came of a case: "right", or why it was not run."""
    torch.manual_seed(asked["seed"])
    exact, ours = exact_and_ours(
        asked["kind"], 8, asked["size"], dtype=asked["dtype"], bidirectional=asked["bidirectional"]
    )
    shape = asked["steps"], asked["batch"], 8
    input, hx = input_and_hx(asked["kind"], ours, *shape, batch=asked["batch"])
    how = {} if asked["lengths"] is None else {"prepare": pack(asked["lengths"])}
    expected = run(exact, input.double(), each_state(torch.Tensor.double, hx), **how)
    torch.backends.cudnn.rnn.fp32_precision = asked["precision"]
    where = on_machine(asked["chip"], variant=asked["variant"], seed=asked["seed"])
    with where, np.errstate(all="ignore"):
        try:
            actual = run_on_kernels(ours, input, hx, **how)
        except Unknown as error:
            return f"the machine does not know {str(error).split('.')[0].split()[-1]}"
        except NoPlan:
            return "no plan of this variant"
    like = asked["dtype"]
    if like == torch.float32 and asked["precision"] == "tf32":
        # Which has as many bits.
        like = torch.float16
    for name, value in expected.items():
        assert_close(actual[name].double(), value, name, TOLERANCES[like])
    return "right"


def main(cases, seed):
    chance = random.Random(seed)
    counts = collections.Counter()
    for _ in range(cases):
        asked = case(chance)
        try:
            counts[outcome(asked)] += 1
        except Exception as error:
            counts["WRONG"] += 1
            print(f"{asked}: {type(error).__name__}: {error}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
