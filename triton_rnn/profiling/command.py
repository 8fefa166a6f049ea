"""``python -m triton_rnn profile``: a layer of given sizes under the profiler."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from triton_rnn.profiling.session import profile


@dataclass(frozen=True)
class Job:
    """What to profile; sizes as torch.nn names them."""

    cell: str
    hidden: int
    input: int
    batch: int
    seq_len: int
    layers: int
    bidirectional: bool
    packed: bool
    dtype: str
    device: torch.device
    backend: str
    training: bool
    steps: int

    @property
    def title(self) -> str:
        """The job in a line."""
        parts = [
            self.cell.replace("-", " ").upper(),
            f"hidden {self.hidden}, input {self.input}, batch {self.batch}, {self.seq_len} steps",
            f"{self.layers} layer{'s' if self.layers > 1 else ''}",
            "two directions" if self.bidirectional else "",
            "packed" if self.packed else "",
            f"{self.dtype} on {self.device}",
            "forward and backward" if self.training else "inference",
        ]
        return ", ".join(part for part in parts if part)


def _step(job: Job) -> tuple[torch.nn.RNNBase, Any, Callable[[], None]]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"nonlinearity": "relu"} if job.cell == "rnn-relu" else {}
    module: torch.nn.RNNBase = getattr(triton_rnn, job.cell.partition("-")[0].upper())(
        job.input,
        job.hidden,
        job.layers,
        bidirectional=job.bidirectional,
        device=job.device,
        dtype=getattr(torch, job.dtype),
        **options,
    )
    dense = torch.randn(job.seq_len, job.batch, job.input).to(job.device, getattr(torch, job.dtype))
    dense.requires_grad_(job.training)
    given: torch.Tensor | PackedSequence = dense
    if job.packed:
        # Descending from all steps to half of them.
        shortest = (job.seq_len + 1) // 2
        lengths = torch.linspace(job.seq_len, shortest, job.batch).round().long()
        packed = pack_padded_sequence(dense.detach(), lengths)
        given = packed._replace(data=packed.data.requires_grad_(job.training))

    def step() -> None:
        with torch.set_grad_enabled(job.training):
            output, _ = module(given)
        if job.training:
            module.zero_grad(set_to_none=True)
            data = output.data if isinstance(output, PackedSequence) else output
            data.backward(torch.ones_like(data))

    return module, given, step


def run(job: Job, folder: Path) -> None:
    """Warm up, profile, print, and write the files."""
    with triton_rnn.use_backend(job.backend):
        module, given, step = _step(job)
        plan = triton_rnn.explain(module, given)
        for _ in range(3):
            step()
        with profile() as session:
            for _ in range(job.steps):
                step()
    print(f"{job.title}; {job.steps} times")
    print("\n".join([f"backend {plan.backend}", *(f"  {line}" for line in plan.plan)]))
    _print(session)
    written = session.save(folder, job.title)
    print(f"written: {', '.join(map(str, written))}")
    if len(written) < 3:
        print("no picture: matplotlib is not installed (pip install 'triton_rnn[demo]')")


def _print(session: profile) -> None:
    if importlib.util.find_spec("rich") is None:
        print(session)
        return
    from rich.console import Console
    from rich.table import Table

    header, rows = session.rows()
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Narrower than this, numbers would be cut off.
    width = max(shutil.get_terminal_size().columns, 100)
    console = Console(highlight=False, width=width)
    console.print(table)
    console.print(session.verdict, markup=False)
