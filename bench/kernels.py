"""The compile gate: every kernel at every plan, compiled ahead of time, read as machine code.

No GPU is needed. ``python -m bench.kernels`` prints a row per kernel: registers, stack, shared
memory, and what lies inside the loop over time: instructions of a warp, and of these barriers,
global loads and stores, matrix instructions (in the code, not times executed). A kernel fails the
gate if it uses local memory, spills, takes more shared memory than the architecture has, has no
matrix instruction though it has a product, or has W_hh in shared memory though the plan says
registers. ``--all`` compiles the whole grid, which takes a good while.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.beyond_cells import LOOPS
from triton_rnn.backends.triton import launch, products
from triton_rnn.cells import GRU, LSTM, RNN_TANH, Cell
from triton_rnn.kernels.backward import recurrence_backward
from triton_rnn.kernels.cells import KERNEL_CELLS, KernelCell
from triton_rnn.kernels.chips import CHIPS, Chip
from triton_rnn.kernels.compiler import NARROW_PRODUCTS_APART
from triton_rnn.kernels.forward import recurrence_forward
from triton_rnn.kernels.matmul import matmul
from triton_rnn.kernels.plan import Plan
from triton_rnn.kernels.planner import plan
from triton_rnn.own.regularized import regularized

# One chip for each architecture that the gate speaks of, as this Triton compiles for them.
TARGETS = ("A100", "H200", "B200", "MI300X")
COMPILED_FOR = {
    **CHIPS,
    "B200": replace(CHIPS["B200"], narrow_apart=NARROW_PRODUCTS_APART),
}
CELLS = ("rnn_tanh", "gru", "lstm")
# Of which the kernels are generated: users' cells, and torch's with a module's options.
OWN_CELLS: dict[str, Cell] = {kind.__name__: kind.cell for kind in LOOPS}
REGULARIZED_CELLS: dict[str, Cell] = {
    "LSTM locked": regularized(LSTM, 0.0, 0.0, (0.0, 0.0), locked=True, shows_c=False),
    "LSTM, all options": regularized(LSTM, 1.0, 2.0, (None, None), locked=True, shows_c=True),
    "GRU, all options": regularized(GRU, 1.0, 0.0, (None,), locked=True, shows_c=False),
    "RNN zoneout": regularized(RNN_TANH, 0.0, 0.0, (None,), locked=False, shows_c=False),
}
_MADE_CELLS = {**OWN_CELLS, **REGULARIZED_CELLS}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Powers of two, multiples of 64 and of 16, and others.
HIDDEN_SIZES = (1, 20, 64, 100, 128, 192, 256, 384, 512, 650, 768, 1000, 1024, 1500, 1536, 2048)
BATCHES = (1, 16, 64, 256)

_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# Other than the dtype of the layer. With "launch" the states between launches are float32.
_FIXED = {
    "batch_sizes_ptr": "*i32",
    "offsets_ptr": "*i64",
    "counters_ptr": "*i32",
    "error_ptr": "*i64",
}
_STATES = ("h_in_ptr", "c_in_ptr", "h_out_ptr", "c_out_ptr")
_GRAD_STATES = ("grad_h_in_ptr", "grad_c_in_ptr", "grad_h_out_ptr", "grad_c_out_ptr")


@dataclass(frozen=True)
class Kernel:
    """A kernel with all that it is compiled for."""

    name: str
    chip: Chip
    dtype: torch.dtype
    what: str
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    ones: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What the machine code of a kernel says.

    Attributes:
        shared, limit: bytes it takes, bytes that there are.
        stack: bytes of local memory.
        loop: instructions inside the loop over time (a product: over its inner dimension), by kind
            and "all".
        problems: why it fails the gate; empty if it passes.
    """

    kernel: Kernel
    registers: int
    stack: int
    shared: int
    limit: int
    loop: dict[str, int]
    problems: tuple[str, ...]


def recurrences(
    chip: Chip,
    cells: Iterable[str] = CELLS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    hidden_sizes: Iterable[int] = HIDDEN_SIZES,
    batches: Iterable[int] = BATCHES,
    directions: Iterable[int] = (1, 2),
    variants: Iterable[str | None] = (None, "cluster", "streaming", "stepwise"),
) -> Iterator[Kernel]:
    """Every recurrence at every plan over a grid of sizes, once each."""
    seen = set()
    sizes = [(h, n, d) for h in hidden_sizes for n in batches for d in directions]
    for cell_name in cells:
        for dtype in dtypes:
            for variant in variants:
                for size in sizes:
                    for kernel in _recurrence(chip, cell_name, dtype, variant, *size):
                        key = (kernel.name, kernel.constants, kernel.options, dtype)
                        if key not in seen:
                            seen.add(key)
                            yield kernel


def cell_of(name: str) -> KernelCell:
    """A cell of torch's, or one of those above, as the kernels see it."""
    return launch.kernel_cell(_MADE_CELLS[name]) if name in _MADE_CELLS else KERNEL_CELLS[name]


def _recurrence(
    chip: Chip,
    cell_name: str,
    dtype: torch.dtype,
    variant: str | None,
    hidden_size: int,
    batch: int,
    directions: int,
) -> Iterator[Kernel]:
    cell = cell_of(cell_name)
    # Full float32 takes other instructions; one plan in three is enough of that.
    asked = ["ieee"] if dtype != torch.float32 or chip.backend == "hip" else ["tf32", "tf32x3"]
    ptx = launch.ptx(dtype, chip.backend)
    for kernel in ("forward", "backward"):
        for precision in asked:
            copies = launch.copies(precision)
            shape = launch.shape_of(
                cell, kernel, hidden_size, directions, batch, dtype.itemsize, copies
            )
            found = plan(shape, chip, variant)
            if found is None:
                continue
            packed = hidden_size % 128 == 0
            what = f"{cell_name} {_short(dtype)} H={hidden_size} N={batch} D={directions}"
            if precision == "tf32x3":
                what += " 3xTF32"
            if kernel == "forward":
                for save in (False, True):
                    yield _kernel(
                        "forward",
                        chip,
                        dtype,
                        f"{what} {'training' if save else 'inference'}: {_blocks(found)}",
                        launch.forward_constants(
                            cell,
                            found,
                            hidden_size,
                            directions,
                            save,
                            True,
                            packed,
                            precision,
                            ptx,
                        ),
                        launch.recurrence_options(found),
                    )
            else:
                yield _kernel(
                    "backward",
                    chip,
                    dtype,
                    f"{what}: {_blocks(found)}",
                    launch.backward_constants(
                        cell, found, hidden_size, directions, packed, precision, ptx
                    ),
                    launch.recurrence_options(found),
                )


def matmuls(chip: Chip, dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Kernel]:
    """The product kernel in its three uses."""
    for dtype in dtypes:
        asked = ["ieee"] if dtype != torch.float32 or chip.backend == "hip" else ["tf32", "tf32x3"]
        for precision in asked:
            for columns in (16, 512):
                uses = [("projection", {"a_k", "b_k"}, False, 1, True)]
                if dtype == torch.float32:
                    uses += [
                        ("grad_input", {"a_k", "b_n", "inner"}, True, 1, False),
                        ("grad_input, turned", {"a_k", "b_k", "inner"}, True, 1, False),
                        ("grad_weight", {"a_outer", "b_n", "inner"}, False, 8, False),
                    ]
                blocks = products.matmul_blocks(dtype.itemsize, columns, precision, chip)
                for use, ones, total, splits, biased in uses:
                    constants = products.matmul_constants(
                        blocks, 2, total, splits, biased, 384 if biased else 0, precision
                    )
                    yield _kernel(
                        use,
                        chip,
                        dtype,
                        f"{_short(dtype)} {precision} blocks {blocks.m} x {blocks.n} x {blocks.k}",
                        constants,
                        products.matmul_options(blocks),
                        tuple(sorted(ones - {"inner"})),
                    )


def _kernel(
    name: str,
    chip: Chip,
    dtype: torch.dtype,
    what: str,
    constants: dict[str, Any],
    options: dict[str, Any],
    ones: tuple[str, ...] = (),
) -> Kernel:
    return Kernel(name, chip, dtype, what, tuple(constants.items()), tuple(options.items()), ones)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _blocks(found: Plan) -> str:
    kept = f", {found.in_registers} in registers" if found.in_registers else ""
    kept += f", {found.streamed} blocks read again" if found.streamed else ""
    kept += f", {found.cluster} programs" if found.cluster > 1 else ""
    return (
        f"{found.variant} {found.block_h} x {found.block_n} x {found.block_k}"
        f" / {found.splits}, {found.warps} warps{kept}"
    )


def _function(name: str) -> Any:
    return {"forward": recurrence_forward, "backward": recurrence_backward}.get(name, matmul)


def source_of(kernel: Kernel) -> ASTSource:
    """The kernel as Triton's ahead-of-time compiler takes it."""
    function = _function(kernel.name)
    constants = dict(kernel.constants)
    stepwise = constants.get("EXCHANGE") == "launch"
    own = _POINTERS[kernel.dtype]
    signature: dict[str, str] = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in kernel.ones:
            signature[name] = "constexpr"
            constants[name] = 1
        elif name in _FIXED:
            signature[name] = _FIXED[name]
        elif name in _STATES + _GRAD_STATES:
            signature[name] = "*fp32" if stepwise else own
        elif name.endswith("_ptr"):
            signature[name] = own
        else:
            signature[name] = "i32"
    places = {name: (i,) for i, name in enumerate(function.arg_names)}
    # As at run time: pointers and sizes are multiples of 16, but those that are not specialised.
    plain = set(function.do_not_specialize or ())
    attributes = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind != "constexpr" and name not in plain and name != "error_ptr"
    }
    return ASTSource(
        function, signature, {places[name]: value for name, value in constants.items()}, attributes
    )


def compiled(kernel: Kernel) -> Any:
    """Compile a kernel for its chip."""
    chip = kernel.chip
    width = 64 if chip.backend == "hip" else 32
    target = GPUTarget(chip.backend, chip.architecture, width)
    return triton.compile(source_of(kernel), target=target, options=dict(kernel.options))


def examine(kernel: Kernel) -> Row:
    """Compile a kernel and hold it against the limits of its architecture."""
    try:
        binary = compiled(kernel)
    except Exception as error:
        line = str(error).strip().splitlines()[-1:] or [""]
        return Row(kernel, 0, 0, 0, 0, {}, (f"{type(error).__name__}: {line[0]}",))
    read = _read_amd if kernel.chip.backend == "hip" else _read_nvidia
    registers, stack, spills, code = read(binary)
    loop = _in_loop(code, kernel.name in ("forward", "backward"))
    problems = []
    if stack:
        problems.append(f"{stack} bytes of local memory")
    if spills:
        problems.append(f"{spills} registers spilled")
    if binary.metadata.shared > kernel.chip.shared_memory:
        problems.append(f"{binary.metadata.shared} bytes of shared memory")
    if dict(kernel.constants).get("GATES") != 0 and not any(
        "matrix" in _kinds_of(line) for line in code
    ):
        problems.append("no matrix instruction")
    constants = dict(kernel.constants)
    if constants.get("EXCHANGE") in ("flag", "cluster"):
        # Nothing but the parts of the product; a cluster's backward sends those.
        rows = constants["BLOCK_H"]
        if kernel.name == "forward":
            rows *= 1 << (constants["GATES"] - 1).bit_length()
        elif constants["EXCHANGE"] == "cluster":
            rows = 0
        parts = 4 * constants["SPLITS"] * rows * constants["BLOCK_N"]
        if binary.metadata.shared > parts + 1024:
            problems.append("more than a product's parts in shared memory")
    elif constants.get("IN_REGISTERS"):
        weights = constants["GATES"] * constants["BLOCK_H"] ** 2 * kernel.dtype.itemsize
        # On their way they pass through it a gate at a time. Small ones are hidden by what the step
        # itself takes.
        if binary.metadata.shared > weights >= 32 * 1024:
            problems.append("W_hh is not in registers")
    if constants.get("EXCHANGE") == "flag" and _waits_before_it_multiplies(code):
        problems.append("warps wait for each other between what they look for and its product")
    if constants.get("EXCHANGE") == "cluster":
        problems += _of_a_cluster(constants, kernel.name == "backward", binary, loop)
    return Row(
        kernel,
        registers,
        stack,
        binary.metadata.shared,
        kernel.chip.shared_memory,
        loop,
        tuple(problems),
    )


def _waits_before_it_multiplies(code: list[str]) -> bool:
    """Whether a barrier stands between a look at what others send and matrix instructions.

    Triton puts it where shared memory asks for it, and ptxas moves it ahead of what touches none.
    """
    looked = False
    for line in map(_code, code):
        if line.startswith("LDG.E.128.STRONG.GPU"):
            looked = True
        elif line.startswith("HMMA"):
            looked = False
        elif looked and line.startswith("BAR."):
            return True
    return False


def _of_a_cluster(
    constants: dict[str, Any], is_backward: bool, binary: Any, loop: dict[str, int]
) -> list[str]:
    """What would be wrong, or wait for ever, and nothing but a GPU would show it."""
    block_n, splits, size = constants["BLOCK_N"], constants["SPLITS"], constants["H"]
    programs = -(-size // constants["BLOCK_H"])
    elements = constants["BLOCK_H"] * block_n // (32 * splits)
    if is_backward:
        # Of each round's parts a thread has so many; it adds up those of all programs.
        sent = -(-size // (16 * splits)) * block_n // 2
        read, word = elements * programs, "b32"
    else:
        sent = elements * programs
        read, word = -(-size // (splits * constants["BLOCK_K"])) * block_n // 8, "v4.b32"
    problems = []
    # A number that two threads have would be sent twice.
    if loop.get("sent", 0) != sent:
        problems.append(f"{loop.get('sent', 0)} numbers sent for {sent}")
    ptx = binary.asm["ptx"]
    # As often before the first step.
    if ptx.count("st.relaxed.cluster.b") != 2 * sent:
        problems.append(f"{ptx.count('st.relaxed.cluster.b')} stores to others for {2 * sent}")
    # What is read is unwritten then: a second reading would wait for it.
    count = ptx.count(f"ld.relaxed.cluster.shared::cta.{word}")
    if count != read:
        problems.append(f"{count} numbers read for {read}")
    if not loop.get("barrier"):
        problems.append("nothing between what a step reads and what it sends")
    # Shared memory that Triton does not know of.
    rooms = re.findall(r"\.shared \.align 16 \.b8 room\[(\d+)\]", ptx)
    if len(rooms) != 1 or int(rooms[0]) + binary.metadata.shared > 48 * 1024:
        problems.append(f"rooms of {rooms} beside {binary.metadata.shared} bytes")
    return problems


# Triton's functions cannot be sent to another process; one that is forked has them already.
_asked: list[Kernel] = []


def _examine_number(number: int) -> tuple[Any, ...]:
    row = examine(_asked[number])
    return row.registers, row.stack, row.shared, row.limit, row.loop, row.problems


def examine_all(asked: list[Kernel], jobs: int) -> list[Row]:
    """Examine kernels in so many processes."""
    _asked[:] = asked
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        found = pool.map(_examine_number, range(len(asked)), chunksize=2)
        return [Row(kernel, *parts) for kernel, parts in zip(asked, found, strict=True)]


def _tool(name: str, binary: bytes, *options: str) -> str:
    """Run one of the binary tools that come with triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        done = subprocess.run(
            [program, *options, path], capture_output=True, text=True, check=True, timeout=120
        )
    return done.stdout


def _read_nvidia(binary: Any) -> tuple[int, int, int, list[str]]:
    """Registers, bytes of stack, spilled registers (part of the stack), lines of machine code."""
    usage = _tool("cuobjdump", binary.asm["cubin"], "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    code = _tool("nvdisasm", binary.asm["cubin"], "-c")
    return int(found[1]), int(found[2]), 0, code.splitlines()


def _read_amd(binary: Any) -> tuple[int, int, int, list[str]]:
    text = binary.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    registers = number("vgpr_count") + number("agpr_count")
    return (
        registers,
        number("private_segment_fixed_size"),
        number("vgpr_spill_count"),
        text.splitlines(),
    )


# What counts as what, by the beginning of the instruction's name.
_KINDS = {
    "matrix": r"(HMMA|HGMMA|QGMMA|UTC\w*MMA|OMMA|v_mfma|v_smfma)",
    "barrier": r"(BAR\.|WARPSYNC\.|s_barrier)",
    "load": r"(LDG|global_load|buffer_load|flat_load)",
    "store": r"(STG|global_store|buffer_store|flat_store)",
    # Into the shared memory of a cluster's programs.
    "sent": r"ST\.E",
    "async": r"(LDGSTS|UBLKCP)",
    "shared": r"(LDS|STS|LDSM|STSM|ds_read|ds_write|ds_load|ds_store)",
    "atomic": r"(ATOM|RED\b|ATOMG|global_atomic|buffer_atomic|flat_atomic)",
    "fence": r"(MEMBAR|FENCE|CCTL\.(?!E\.PF)|buffer_wbl2|buffer_inv)",
}
# Neither a label nor a directive nor a comment.
_INSTRUCTION = re.compile(r"[A-Za-z]\w*[\w.]*(\s|;|$)")
_LABEL = re.compile(r"^\s*(\.L_\w+|\.LBB\w+):")
_BRANCH = re.compile(r"\b(?:BRA\S*|s_c?branch\w*)\s.*?(\.L_\w+|\.LBB\w+)")


def _in_loop(lines: list[str], timed: bool) -> dict[str, int]:
    """Instructions by kind within the loop over time, or within the only loop of a product.

    Loops are backward branches. Of those around a matrix instruction the outermost is the one over
    blocks of the batch, and the next one the one over time.
    """
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    kinds = [(i, kind) for i, line in enumerate(lines) for kind in _kinds_of(line)]
    matrix = [i for i, kind in kinds if kind == "matrix"]
    loops = set()
    for i, line in enumerate(lines):
        found = _BRANCH.search(line)
        begin = labels.get(found[1], i) if found else i
        if begin < i and any(begin < place < i for place in matrix):
            loops.add((begin, i))
    if not loops:
        return {}
    # Branches to one label are one loop: the longest counts.
    longest = {}
    for begin, end in loops:
        longest[begin] = max(end, longest.get(begin, 0))
    nested = sorted(longest.items(), key=lambda loop: loop[0] - loop[1])
    begin, end = nested[1] if timed and len(nested) > 1 else nested[0]
    found = Counter(kind for i, kind in kinds if begin < i < end)
    found["all"] = sum(bool(_INSTRUCTION.match(_code(line))) for line in lines[begin:end])
    return dict(found)


def _code(line: str) -> str:
    """An instruction, without what surrounds it."""
    code = re.sub(r"/\*.*?\*/", "", line).strip()
    return re.sub(r"^@!?U?P\w+\s+", "", code)


def _kinds_of(line: str) -> list[str]:
    code = _code(line)
    return [kind for kind, pattern in _KINDS.items() if re.match(pattern, code)]


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    kinds = [kind for kind in _KINDS if kind != "async"]
    head = ["chip", "kernel", "what", "registers", "stack", "shared KB", "all", *kinds, "gate"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row.kernel.chip.name,
            row.kernel.name,
            row.kernel.what,
            str(row.registers),
            str(row.stack),
            f"{row.shared / 1024:.0f}",
            *(str(row.loop.get(kind, 0)) for kind in ("all", *kinds)),
            "; ".join(row.problems) or "passes",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kernels(arguments: argparse.Namespace) -> list[Kernel]:
    found: list[Kernel] = []
    for name in arguments.chip or TARGETS:
        chip = COMPILED_FOR[name]
        found += matmuls(chip)
        if arguments.all:
            found += recurrences(chip, (*CELLS, *_MADE_CELLS))
        else:
            sizes: dict[str, Any] = {"hidden_sizes": (128, 768), "batches": (16,)}
            sizes |= {"directions": (2,), "variants": (None,)}
            found += recurrences(chip, **sizes)
            # Only where asked for.
            small = {**sizes, "hidden_sizes": (128,), "variants": ("cluster",)}
            found += recurrences(chip, **small)
            # So many hidden units that a part of W_hh is read again.
            large = {**sizes, "hidden_sizes": (1536,)}
            found += recurrences(chip, ("lstm",), (torch.float16, torch.float32), **large)
            found += recurrences(chip, _MADE_CELLS, (torch.float16,), **sizes)
    return [
        kernel for kernel in found if re.search(arguments.match, f"{kernel.name} {kernel.what}")
    ]


def main(options: list[str] | None = None) -> int:
    """Compile, print the table, and say what failed: the exit code is 1 then."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the whole grid of sizes")
    parser.add_argument("--chip", action="append", choices=sorted(CHIPS), help="may be repeated")
    parser.add_argument("--match", default="", help="only kernels whose row matches this pattern")
    parser.add_argument("--failed", action="store_true", help="print the rows that fail only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--save", type=Path, help="write the table to this file too")
    arguments = parser.parse_args(options)
    chosen = kernels(arguments)
    if not chosen:
        parser.error(f"--match {arguments.match}: there is no such kernel")
    rows = examine_all(chosen, arguments.jobs)
    failed = [row for row in rows if row.problems]
    text = table(failed if arguments.failed else rows)
    summary = f"{len(rows)} kernels, {len(failed)} fail the gate; Triton {triton.__version__}"
    print(text)
    print(summary)
    if arguments.save:
        arguments.save.write_text(f"{summary}\n\n{text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
