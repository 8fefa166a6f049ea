"""Lengths and resets as a packed batch: every episode a sequence of its own, the longest first.

So backends whose loops know packed batches, and nothing of lengths and resets, run such calls too.
Episodes that follow one another in time run side by side, and the loop over time is as long as the
longest of them, not as the sequences.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch
from triton_rnn.extras import Extras
from triton_rnn.request import Request


class Episodes(NamedTuple):
    """The episodes of a padded batch of N sequences over T steps, E of them, of R steps in all.

    Attributes:
        steps, batch: T, N.
        batch_sizes: of every step of the packed batch, how many episodes it is for.
        rows: (R,) int64, for each row of the packed batch that of the padded one, t * N + n.
        sequences: (E,) int64, whose each episode is.
        begins: (2, E) bool, which episodes begin with the states that the call is given, going
            forward and in reverse; the others begin with zeros.
        ends: (2, N) int64, in which episode a sequence's last state is, in either direction.
        empty: (N,) bool, which sequences have no step and keep their states.
        has_empty: whether there are any.
    """

    steps: int
    batch: int
    batch_sizes: list[int]
    rows: Tensor
    sequences: Tensor
    begins: Tensor
    ends: Tensor
    empty: Tensor
    has_empty: bool

    def take(self, padded: Tensor) -> Tensor:
        """(T, N, C) as the rows of the packed batch, (R, C)."""
        rows = self.rows
        if not padded.is_contiguous():
            # As a batch-first input lies in memory, which then need not be turned first.
            padded = padded.transpose(0, 1)
            rows = rows % self.batch * self.steps + rows // self.batch
        return padded.reshape(-1, padded.size(-1)).index_select(0, rows)

    def put(self, packed: Tensor) -> Tensor:
        """(R, C) as a padded batch, (T, N, C), zeros where no sequence is."""
        padded = packed.new_zeros((self.steps * self.batch, packed.size(-1)))
        return padded.index_copy_(0, self.rows, packed).view(self.steps, self.batch, -1)

    def take_locked(self, locked: Tensor) -> Tensor:
        """(N, C), what is one for all steps of a sequence, for each row: (R, C)."""
        return locked.index_select(0, self.rows % self.batch)

    def take_states(self, states: Tensor, directions: int) -> Tensor:
        """States (L * D, N, H) that each episode begins with, (L * D, E, H)."""
        # Indexed, not selected: the gradients of the episodes of a sequence are added up in order.
        every = states[:, self.sequences]
        begins = self.begins[:directions].repeat(len(states) // directions, 1)
        return torch.where(begins.unsqueeze(-1), every, every.new_zeros(()))

    def put_states(self, states: Tensor, initial: Tensor | None, directions: int) -> Tensor:
        """States (L * D, E, H) after the episodes as those after the sequences, (L * D, N, H)."""
        ends = self.ends[:directions].repeat(len(states) // directions, 1)
        numbers = torch.arange(len(states), device=states.device).unsqueeze(1)
        last = states[numbers, ends]
        if not self.has_empty:
            return last
        kept = last.new_zeros(()) if initial is None else initial
        return torch.where(self.empty.unsqueeze(-1), kept, last)


def episodes_of(steps: int, batch: int, extras: Extras, device: torch.device) -> Episodes | None:
    """The episodes of a padded batch with lengths, resets or both; None if there is no step at all.

    A mask on a GPU is waited for: how many episodes there are decides what is launched.

    Raises:
        RuntimeError: while a CUDA graph is captured, whose replay would know of no other episodes,
            and read what says where these are from memory that is gone.
    """
    if dispatch.capturing(device):
        raise RuntimeError(
            "lengths and reset_mask cannot be captured in a CUDA graph: where the episodes are is "
            "worked out on the processor, at every call"
        )
    if not steps * batch:
        return None
    # Sequence by sequence, each with `steps` places, and in each by time.
    numbers = torch.arange(batch, device="cpu")
    ends_of_all = numbers * steps + (steps if extras.lengths is None else extras.lengths)
    if extras.reset_mask is None:
        starts = numbers * steps
        marked = torch.zeros_like(starts, dtype=torch.bool)
    else:
        marks = extras.reset_mask.t().to("cpu", copy=True)
        marked = marks[:, 0].clone()
        marks[:, 0] = True
        starts = marks.flatten().nonzero().squeeze(1)
    sequences = starts // steps
    ends = ends_of_all[sequences]
    following = torch.cat((starts[1:], torch.tensor([steps * batch], device="cpu")))
    own = torch.minimum(following, ends) - starts
    # Where a sequence is over, the next one's place is beyond its end.
    is_last = following >= ends
    if extras.lengths is not None:
        within = own > 0
        starts, sequences, own, is_last = (
            each[within] for each in (starts, sequences, own, is_last)
        )
        if not len(own):
            return None
    own, order = own.sort(descending=True, stable=True)
    starts, sequences, is_last = starts[order], sequences[order], is_last[order]
    firsts = starts - sequences * steps
    is_first = firsts == 0
    count, longest = len(own), int(own[0])
    ends = torch.zeros((2, batch), dtype=torch.int64, device="cpu")
    for row, which in enumerate((is_last, is_first)):
        chosen = which.nonzero().squeeze(1)
        ends[row, sequences[chosen]] = chosen
    begins = torch.stack((is_first & ~marked[sequences], is_last))
    if extras.reset_to_initial:
        begins.fill_(True)

    sizes = count - own.bincount(minlength=longest + 1).cumsum(0)[:longest]
    step = torch.arange(longest, device="cpu").repeat_interleave(sizes)
    in_step = torch.arange(len(step), device="cpu") - (sizes.cumsum(0) - sizes)[step]
    rows = (firsts * batch + sequences)[in_step] + step * batch
    empty = ends_of_all == numbers * steps
    has_empty = bool(empty.any())
    rows, sequences, begins, ends, empty = _moved((rows, sequences, begins, ends, empty), device)
    return Episodes(steps, batch, sizes.tolist(), rows, sequences, begins, ends, empty, has_empty)


def _moved(parts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Tensors of int64 and bool on a device, by one copy for all."""
    if device.type == "cpu":
        return tuple(parts)
    together = torch.cat([part.flatten().long() for part in parts])
    if device.type == "cuda":
        # From pinned memory it does not wait for what the device is busy with.
        together = together.pin_memory()
    moved = together.to(device, non_blocking=True).split([part.numel() for part in parts])
    return tuple(
        there.view(part.shape).to(part.dtype) for there, part in zip(moved, parts, strict=True)
    )


def _check_lengths(lengths: Any, input: Any, request: Request) -> Tensor:
    """Lengths on the CPU, the caller's own left alone.

    Raises:
        TypeError, ValueError: if they are not those of this batch.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths should be a Tensor, got {type(lengths).__name__}")
    if isinstance(input, PackedSequence):
        raise ValueError("a PackedSequence has lengths already; lengths= is for a padded input")
    if input.dim() != 3:
        raise ValueError("lengths= is for a batch, the input is one sequence (2-D)")
    if lengths.dtype != torch.int64:
        raise ValueError(f"lengths should be int64, got {lengths.dtype}")
    if lengths.shape != (request.batch,):
        raise ValueError(
            f"lengths should be of shape ({request.batch},), got {tuple(lengths.shape)}"
        )
    # A copy: the backward reads them again.
    lengths = lengths.detach().to("cpu", copy=True)
    if request.batch:
        least, most = map(int, lengths.aminmax())
        if least < 0 or most > request.seq_len:
            raise ValueError(
                f"lengths should be from 0 to {request.seq_len}, got {least} to {most}"
            )
    return lengths


def _check_resets(batch_first: bool, reset_mask: Any, input: Any, request: Request) -> Tensor:
    """A mask (T, N) on the input's device, the caller's own left alone.

    Raises:
        TypeError, ValueError: if it is not one of this batch.
    """
    if not isinstance(reset_mask, Tensor):
        raise TypeError(f"reset_mask should be a Tensor, got {type(reset_mask).__name__}")
    if isinstance(input, PackedSequence):
        raise ValueError("reset_mask= is for a padded input, with lengths= if need be")
    if reset_mask.dtype != torch.bool:
        raise ValueError(f"reset_mask should be bool, got {reset_mask.dtype}")
    if input.dim() == 2:
        expected: tuple[int, ...] = (request.seq_len,)
    elif batch_first:
        expected = (request.batch, request.seq_len)
    else:
        expected = (request.seq_len, request.batch)
    if reset_mask.shape != expected:
        raise ValueError(f"reset_mask should be of shape {expected}, got {tuple(reset_mask.shape)}")
    if input.dim() == 2:
        reset_mask = reset_mask.unsqueeze(1)
    elif batch_first:
        reset_mask = reset_mask.transpose(0, 1)
    return reset_mask.detach().to(request.device, copy=True)


def check_reset_to(reset_to: Any) -> None:
    """Raise if there is no such state to begin an episode with.

    Raises:
        ValueError: names the two that there are.
    """
    if reset_to not in ("zeros", "initial"):
        raise ValueError(f"reset_to should be 'zeros' or 'initial', got {reset_to!r}")


def checked(
    lengths: Any, reset_mask: Any, reset_to: Any, batch_first: bool, input: Any, request: Request
) -> Extras:
    """Lengths and resets of a call, None for none, as its steps are given them.

    Raises:
        TypeError, ValueError: if they are not those of this batch.
    """
    check_reset_to(reset_to)
    if lengths is not None:
        lengths = _check_lengths(lengths, input, request)
    if reset_mask is not None:
        reset_mask = _check_resets(batch_first, reset_mask, input, request)
    return Extras(lengths, reset_mask, reset_to == "initial")
