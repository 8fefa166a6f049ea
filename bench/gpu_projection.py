"""The input's projection by larger blocks and by tensor descriptors, beside today's and cuBLAS.

    python -m bench.gpu_projection OUT_DIR

Leaves OUT_DIR/projection.json and projection.md, written anew after every shape; a minute. Needs
a GPU of compute capability 9.0 or later, torch, triton and the source tree. Returns 1 if a number
was wrong, 2 without such a GPU, and then writes nothing.

Two ways to be faster than today's kernel are tried, which bench/README.md gives the reasons for:

- Larger blocks: a program reads (BLOCK_M + BLOCK_N) * K numbers through the L2 cache, and what all
  of them read, divided by the measured time, is about what that cache can give.
- Descriptors: one thread has the copy engine bring a whole block to shared memory; `matmul` has
  every thread compute addresses and copy 16 bytes for each. A descriptor must be made on the host
  at every call, and wants rows that begin at 16 bytes and lie evenly, so it would be a second
  kernel beside the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import gpu_inside, gpu_machine, gpu_report
from bench.gate import GPU_TOLERANCE, relative_error
from bench.gpu_parts import alone
from bench.gpu_session import plain, write_atomically
from bench.gpu_timing import Stopwatch
from bench.gpu_workers import failure
from triton_rnn.backends.triton import products
from triton_rnn.backends.triton.launch import chip_of
from triton_rnn.backends.triton.products import Blocks
from triton_rnn.kernels.matmul import tile_of


@dataclass(frozen=True)
class Projection:
    """One product: `rows` of the input times the weights of `directions`, (columns, size) each."""

    dtype: str
    rows: int
    size: int
    columns: int
    directions: int = 1

    @property
    def id(self) -> str:
        return f"{self.dtype}-R{self.rows}-I{self.size}-C{self.columns}-D{self.directions}"


# From a layer of 128 units and 16 sequences to what is cuBLAS' by today's rule, and past it: two
# directions are the kernel's at every size, for cuBLAS would have them apart.
POINTS = (
    Projection("float16", 16384, 768, 3072),
    Projection("bfloat16", 16384, 512, 2048, 2),
    Projection("bfloat16", 16384, 128, 512),
    Projection("float32", 16384, 512, 2048, 2),
    Projection("bfloat16", 65536, 512, 1536, 2),
    Projection("float16", 2048, 768, 3072),
    Projection("bfloat16", 2048, 256, 768, 2),
    Projection("float32", 32768, 512, 2048),
)
HEADER = ("projection", "today", "its reads", "cuBLAS", "best of the others", "which", "the rest")


@triton.jit(do_not_specialize=["M"])
def described(
    a_desc,
    b_0_desc,
    b_1_desc,
    bias_0_ptr,
    bias_1_ptr,
    c_desc,
    M,
    N,
    K,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C[:, d] = A B[d]^T + bias[d], as `matmul`; descriptors of (M, K), (N, K) and (M, D, N)."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    block_m, block_n = tile_of(pid % tiles, M, N, BLOCK_M, BLOCK_N, 8)
    m, n, d = block_m * BLOCK_M, block_n * BLOCK_N, pid // tiles
    b_desc, bias_ptr = b_0_desc, bias_0_ptr
    if d == 1:
        b_desc, bias_ptr = b_1_desc, bias_1_ptr
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a_block = a_desc.load([m, k])
        b_block = b_desc.load([n, k])
        product = tl.dot(a_block, b_block.T, product, input_precision=PRECISION)
    column = n + tl.arange(0, BLOCK_N)
    product += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    c_desc.store([m, d, n], tl.reshape(product.to(c_desc.dtype), (BLOCK_M, 1, BLOCK_N)))


def larger_blocks(itemsize: int) -> tuple[Blocks, ...]:
    """What is tried of `matmul`: fewer reads, and as few with less of each on its way."""
    k = 128 // itemsize
    return (Blocks(128, 256, k, 8, 3), Blocks(128, 256, k, 8, 4), Blocks(128, 256, k // 2, 8, 4))


def blocks_of(itemsize: int) -> tuple[Blocks, ...]:
    """What is tried by descriptors, from the blocks that `matmul` has today."""
    k = 128 // itemsize
    return (
        Blocks(128, 128, k, 8, 3),
        Blocks(128, 128, k, 8, 4),
        Blocks(128, 128, k, 4, 4),
        Blocks(128, 256, k, 8, 3),
        Blocks(64, 128, k, 4, 4),
    )


def constants_of(point: Projection, blocks: Blocks, precision: str) -> dict[str, Any]:
    return {
        "D": point.directions,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "PRECISION": precision,
    }


@dataclass
class Data:
    """(rows, size), and of each direction (columns, size) and (columns,)."""

    input: Tensor
    weights: list[Tensor]
    biases: list[Tensor]


def data_of(point: Projection, device: torch.device) -> Data:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, point.dtype)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=generator) * point.size**-0.25
        return numbers.to(device, dtype)

    weights = [random(point.columns, point.size) for _ in range(point.directions)]
    biases = [random(point.columns) for _ in range(point.directions)]
    return Data(random(point.rows, point.size), weights, biases)


def by_descriptors(
    point: Projection, data: Data, blocks: Blocks, precision: str
) -> Callable[[], Tensor]:
    """A call of the kernel: with new descriptors, as the package would make it."""
    a, b = [blocks.m, blocks.k], [blocks.n, blocks.k]
    tiles = triton.cdiv(point.rows, blocks.m) * triton.cdiv(point.columns, blocks.n)

    def call() -> Tensor:
        shape = (point.rows, point.directions, point.columns)
        out = data.input.new_empty(shape)
        weights = [TensorDescriptor.from_tensor(weight, b) for weight in data.weights]
        described[(tiles * point.directions,)](
            TensorDescriptor.from_tensor(data.input, a),
            weights[0],
            weights[-1],
            data.biases[0],
            data.biases[-1],
            TensorDescriptor.from_tensor(out, [blocks.m, 1, blocks.n]),
            point.rows,
            point.columns,
            point.size,
            **constants_of(point, blocks, precision),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return out

    return call


@contextmanager
def by_blocks(blocks: Blocks | None) -> Iterator[None]:
    """`matmul` with these blocks meanwhile, whatever it has today; None: as it is."""
    if blocks is None:
        yield
        return
    with mock.patch.object(products, "matmul_blocks", return_value=blocks):
        # What was decided about a product is kept with its blocks.
        products._ready.cache_clear()
        yield
    products._ready.cache_clear()


def read(point: Projection, blocks: Blocks, itemsize: int) -> int:
    """Bytes of both operands that all programs of `matmul` read together."""
    tiles = triton.cdiv(point.rows, blocks.m) * triton.cdiv(point.columns, blocks.n)
    return tiles * point.directions * (blocks.m + blocks.n) * point.size * itemsize


def by_matmul(point: Projection, data: Data) -> Callable[[], Tensor]:
    """The package's kernel, also where the rule would have cuBLAS."""
    nothing: list[Tensor | None] = [None] * point.directions

    def call() -> Tensor:
        out = data.input.new_empty(point.rows, point.directions, point.columns)
        products.project(data.input, data.weights, data.biases, nothing, 0, out)
        return out

    return call


def by_cublas(data: Data) -> Callable[[], list[Tensor]]:
    """Each direction by itself, which is not as the recurrence reads them."""

    def call() -> list[Tensor]:
        pairs = zip(data.biases, data.weights, strict=True)
        return [torch.addmm(bias, data.input, weight.t()) for bias, weight in pairs]

    return call


def measure(point: Projection, device: torch.device) -> dict[str, Any]:
    """Device time of every side in seconds, and how far each is from float64."""
    precision = "tf32" if point.dtype == "float32" and device.type == "cuda" else "ieee"
    data = data_of(point, device)
    exact = Data(
        data.input.double(), [w.double() for w in data.weights], [b.double() for b in data.biases]
    )
    expected = torch.stack(by_cublas(exact)(), 1)
    itemsize = data.input.element_size()
    ours, theirs = by_matmul(point, data), by_cublas(data)
    sides: dict[str, tuple[Callable[[], Any], Blocks | None]] = {
        "today": (ours, None),
        "cuBLAS": (theirs, None),
    }
    for blocks in larger_blocks(itemsize):
        sides[f"matmul {told(blocks)}"] = ours, blocks
    for blocks in blocks_of(itemsize):
        described_call = by_descriptors(point, data, blocks, precision)
        sides[f"descriptors {told(blocks)}"] = described_call, None
    watch = Stopwatch(device)
    found: dict[str, Any] = {}
    for name, (call, blocks) in sides.items():
        try:
            with by_blocks(blocks):
                result = call()
                actual = torch.stack(result, 1) if isinstance(result, list) else result
                off = relative_error(actual, expected)
                # Written so that a NaN is wrong.
                right = off <= GPU_TOLERANCE[point.dtype]
                seconds = alone(call, watch)
            found[name] = {
                "status": "ok" if right else "wrong", "difference": off, "seconds": seconds,
            }  # fmt: skip
        except Exception as error:
            found[name] = failure(error)
    today = products.matmul_blocks(itemsize, point.columns, precision, chip_of(device))
    found["today"]["read_bytes"] = read(point, today, itemsize)
    return found


def told(blocks: Blocks) -> str:
    return f"{blocks.m}x{blocks.n}x{blocks.k} w{blocks.warps} s{blocks.stages}"


def table_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    def time_of(side: Mapping[str, Any]) -> str:
        if side["status"] != "ok":
            return f"{side['status']} {side.get('error', '')[:80]}".strip()
        return f"{side['seconds'] * 1e6:.0f} us"

    sides = dict(row["sides"])
    today, cublas = sides.pop("today"), sides.pop("cuBLAS")
    reads = ""
    if "seconds" in today:
        reads = f"{today['read_bytes'] / today['seconds'] / 1e12:.1f} TB/s"
    right = {name: side for name, side in sides.items() if side["status"] == "ok"}
    best = min(right, key=lambda name: right[name]["seconds"], default="")
    rest = ", ".join(f"{name}: {time_of(side)}" for name, side in sides.items() if name != best)
    fastest = time_of(right[best]) if best else "none"
    return (row["id"], time_of(today), reads, time_of(cublas), fastest, best, rest)


def run(points: Sequence[Projection], device: torch.device, out_dir: Path) -> int:
    """Measure all and write what is known after each; how many sides were wrong or failed."""
    told: dict[str, Any] = {"machine": gpu_machine.describe(device), "rows": []}
    out_dir.mkdir(parents=True, exist_ok=True)
    failed = 0
    gpu_inside.set_tf32(True)
    # The kernel for all sizes; and cuBLAS by the same rules of float32 as the kernels.
    never = mock.patch.object(products, "_CUBLAS_PRODUCTS", sys.maxsize)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with never:
            for point in points:
                row = {"id": point.id, "projection": asdict(point), "sides": measure(point, device)}
                failed += sum(side["status"] != "ok" for side in row["sides"].values())
                told["rows"].append(row)
                print(*table_row(row), flush=True)
                text = json.dumps(plain(told), indent=1) + "\n"
                write_atomically(out_dir / "projection.json", text)
                write_atomically(out_dir / "projection.md", markdown(told))
    finally:
        matmul.fp32_precision = before
    return failed


def markdown(told: Mapping[str, Any]) -> str:
    table = gpu_report.table(HEADER, map(table_row, told["rows"]))
    return f"# The projection of the input\n\n{gpu_report.machine_line(told)}\n\n{table}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_projection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out_dir", type=Path, help="where projection.json and projection.md go")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(0)[0] < 9:
        print(
            "bench.gpu_projection: no GPU with compute capability 9.0 is at hand", file=sys.stderr
        )
        return 2
    return 1 if run(POINTS, torch.device("cuda", 0), options.out_dir) else 0


if __name__ == "__main__":
    sys.exit(main())
