"""One of the processes of test_distributed.py, and the training that both sides of it do.

torchrun starts it with a folder, into which every rank writes what came of its cases.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

import triton_rnn
from triton_rnn import dispatch, functional
from triton_rnn.backends.native import calls

PROCESSES = 2
STEPS = 3
CHARACTERS, EMBEDDED, HIDDEN, LAYERS = 13, 6, 5, 2
# Rows of the batches; not sorted by length, and the longest of the two halves differ.
LENGTHS = (9, 20, 14, 20, 17, 11)
SEQ_LEN = max(LENGTHS)


@dataclass(frozen=True)
class Case:
    """A training run: ``style`` is ddp, fsdp or unshared (DDP that shares no gradients)."""

    style: str
    cell: str
    form: str
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.style}-{self.cell}-{self.form}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(*values)
    for values in product(
        ("ddp", "fsdp"),
        ("RNN", "GRU", "LSTM"),
        ("padded", "packed"),
        (torch.float64, torch.float32),
    )
]
UNSHARED = Case("unshared", "GRU", "padded", torch.float64)


@dataclass
class Outcome:
    """What a run leaves: losses of the joined batch, final parameters, which of them were sharded,
    and which backends answered.
    """

    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    answered_by: set[str] = field(default_factory=set)
    sharded: set[str] = field(default_factory=set)


class Model(nn.Module):
    """Characters (N, T) to scores (rows, CHARACTERS), a row for every character that is there."""

    def __init__(self, library: ModuleType, case: Case) -> None:
        super().__init__()
        self.packed = case.form == "packed"
        self.embedding = nn.Embedding(CHARACTERS, EMBEDDED)
        layer_class = getattr(library, case.cell)
        self.recurrent = layer_class(EMBEDDED, HIDDEN, LAYERS, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, CHARACTERS)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        input = self.embedding(characters)
        if self.packed:
            input = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
            return self.head(self.recurrent(input)[0].data)
        return self.head(self.recurrent(input)[0]).flatten(0, 1)


def build(library: ModuleType, case: Case) -> Model:
    torch.manual_seed(0)
    return Model(library, case).to(case.dtype)


def batch_at(step: int) -> tuple[Tensor, Tensor]:
    """Characters (N, T) and lengths (N) of the joined batch."""
    generator = torch.Generator().manual_seed(step)
    characters = torch.randint(CHARACTERS, (len(LENGTHS), SEQ_LEN), generator=generator)
    return characters, torch.tensor(LENGTHS)


def targets(model: Model, characters: Tensor, lengths: Tensor) -> Tensor:
    """The next character (the first follows the last) of every row that the model scores."""
    following = characters.roll(-1, 1)
    if not model.packed:
        return following.flatten()
    return pack_padded_sequence(following, lengths, batch_first=True, enforce_sorted=False).data


def train(model: Model, wrapped: nn.Module, rank: int = 0, processes: int = 1) -> list[Tensor]:
    """This rank's share of the loss at every step; their mean over ranks is the joined loss."""
    # foreach=False: DTensors of FSDP and plain tensors take the same way through the optimiser.
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=2.0, momentum=0.9, foreach=False)
    losses = []
    for step in range(STEPS):
        characters, lengths = batch_at(step)
        joined_rows = len(targets(model, characters, lengths))
        characters, lengths = (part.tensor_split(processes)[rank] for part in (characters, lengths))
        optimizer.zero_grad()
        scores = wrapped(characters, lengths)
        target = targets(model, characters, lengths)
        # The ranks' gradients are averaged, and they have unequal numbers of characters.
        share = processes / joined_rows
        loss = share * nn.functional.cross_entropy(scores, target, reduction="sum")
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@contextmanager
def watched() -> Iterator[set[str]]:
    """The backends that answer calls inside; "torch.nn" where its own forward is left to do it."""
    seen: set[str] = set()
    forward, choose = functional.forward, dispatch.choose

    def watched_forward(*arguments: Any) -> Any:
        result = forward(*arguments)
        if result is None:
            seen.add("torch.nn")
        return result

    def watched_choose(*arguments: Any) -> Any:
        choice = choose(*arguments)
        seen.add(choice.backend)
        return choice

    functional.forward, dispatch.choose = watched_forward, watched_choose
    # What was decided about a call in another case would not be decided here again.
    calls.forget()
    try:
        yield seen
    finally:
        functional.forward, dispatch.choose = forward, choose


def run_case(case: Case) -> Outcome:
    """Train over all ranks."""
    model = build(triton_rnn, case)
    wrapped: nn.Module = model
    if case.style == "fsdp":
        # A group of its own, so that its weights are gone between its forward and its backward.
        fully_shard(model.recurrent)
        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    unshared = wrapped.no_sync() if case.style == "unshared" else nullcontext()
    with watched() as seen, unshared:
        losses = train(model, wrapped, dist.get_rank(), dist.get_world_size())
    for loss in losses:
        dist.all_reduce(loss)
    parameters = dict(model.named_parameters())
    sharded = {name for name, value in parameters.items() if isinstance(value, DTensor)}
    whole = {
        name: (value.full_tensor() if name in sharded else value).detach()
        for name, value in parameters.items()
    }
    means = [float(loss) / dist.get_world_size() for loss in losses]
    return Outcome(means, whole, seen, sharded)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {case.id: run_case(case) for case in (*CASES, UNSHARED)}
    saved = {name: vars(outcome) for name, outcome in outcomes.items()}
    torch.save(saved, folder / f"{os.environ['RANK']}.pt")
    # As in the demo: DDP's cycles must not be left until the interpreter's end.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
