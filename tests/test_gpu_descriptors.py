"""The projection by tensor descriptors (bench/gpu_descriptors.py), compiled for an H200.

Its numbers are checked in Triton's interpreter (tests/interpreter/test_descriptors.py).
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from bench import gpu_descriptors

SCRIPT = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import gpu_descriptors, kernels

rows, names = [], gpu_descriptors.described.arg_names
for dtype, kind, itemsize in (("float16", "fp16", 2), ("float32", "fp32", 4)):
    for blocks in gpu_descriptors.blocks_of(itemsize):
        point = gpu_descriptors.Projection(dtype, 1, 1, 1, directions=2)
        precision = "tf32" if itemsize == 4 else "ieee"
        constants = gpu_descriptors.constants_of(point, blocks, precision)
        weight = f"tensordesc<{kind}[{blocks.n},{blocks.k}]>"
        signature = {
            "a_desc": f"tensordesc<{kind}[{blocks.m},{blocks.k}]>",
            "b_0_desc": weight, "b_1_desc": weight,
            "bias_0_ptr": f"*{kind}", "bias_1_ptr": f"*{kind}",
            "c_desc": f"tensordesc<{kind}[{blocks.m},1,{blocks.n}]>",
            "M": "i32", "N": "i32", "K": "i32",
            **dict.fromkeys(constants, "constexpr"),
        }
        source = ASTSource(
            gpu_descriptors.described, {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        registers, stack, spills, code = kernels._read_nvidia(made)
        rows.append(dict(
            what=f"{dtype} {blocks}", stack=stack, spills=spills, shared=made.metadata.shared,
            **{n: sum(n in line for line in code) for n in ("HGMMA", "UTMALDG", "UTMASTG")},
        ))
print(json.dumps(rows))
"""


def test_every_kind_compiles_to_copies_of_whole_blocks():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 10
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        # Of an H200's multiprocessor.
        assert row["shared"] <= 227 * 1024, row
        assert row["HGMMA"] and row["UTMALDG"] and row["UTMASTG"], row


def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu_descriptors.main([str(tmp_path / "out")]) == 2
    assert "no GPU with compute capability 9.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
