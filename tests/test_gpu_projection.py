"""The projection by larger blocks and descriptors (bench/gpu_projection.py), compiled for an H200.

Their numbers are checked in Triton's interpreter (tests/interpreter/test_projection_sides.py).
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux alone")

from bench import gpu_projection

SCRIPT = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench import gpu_projection, kernels
from triton_rnn.backends.triton import products

larger, chip = [], kernels.COMPILED_FOR["H200"]
for dtype, precision in ((torch.float16, "ieee"), (torch.float32, "tf32")):
    for blocks in gpu_projection.larger_blocks(dtype.itemsize):
        constants = products.matmul_constants(blocks, 2, False, 1, True, 384, precision)
        row = kernels.examine(kernels._kernel(
            "projection", chip, dtype, f"{dtype} {blocks}", constants,
            products.matmul_options(blocks), ("a_k", "b_k"),
        ))
        larger.append((row.kernel.what, row.problems))
rows, names = [], gpu_projection.described.arg_names
for dtype, kind, itemsize in (("float16", "fp16", 2), ("float32", "fp32", 4)):
    for blocks in gpu_projection.blocks_of(itemsize):
        point = gpu_projection.Projection(dtype, 1, 1, 1, directions=2)
        precision = "tf32" if itemsize == 4 else "ieee"
        constants = gpu_projection.constants_of(point, blocks, precision)
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
            gpu_projection.described, {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        registers, stack, spills, code = kernels._read_nvidia(made)
        rows.append(dict(
            what=f"{dtype} {blocks}", stack=stack, spills=spills, shared=made.metadata.shared,
            **{n: sum(n in line for line in code) for n in ("HGMMA", "UTMALDG", "UTMASTG")},
        ))
print(json.dumps([rows, larger]))
"""


@pytest.fixture(scope="module")
def found():
    """Rows of the kernels by descriptors; of larger blocks, and what is wrong with each."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_larger_blocks_stay_in_registers(found):
    _, larger = found
    assert len(larger) == 6
    for what, problems in larger:
        assert not problems, what


def test_descriptors_compile_to_copies_of_whole_blocks(found):
    rows, _ = found
    assert len(rows) == 10
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        # Of an H200's multiprocessor.
        assert row["shared"] <= 227 * 1024, row
        assert row["HGMMA"] and row["UTMALDG"] and row["UTMASTG"], row


def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu_projection.main([str(tmp_path / "out")]) == 2
    assert "no GPU with compute capability 9.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
