"""Training with less memory: a layer's backward goes forward again, a segment of steps at a time.

Sublinear memory, as in Chen, Xu, Zhang & Guestrin 2016 and, for recurrent networks, Gruslys et al.
2016: the state between segments is kept, and what a backward needs of a segment's steps is made
anew when it comes to them. With segments of sqrt(T) steps both are of the order of sqrt(T).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_rnn import dispatch, functional, obstacles, reference
from triton_rnn.request import Request


class Reference:
    """The reference as a backend with a backward, which goes forward once more by itself."""

    @staticmethod
    def forward(
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        rows = input.reshape(-1, request.input_size)
        sizes = batch_sizes or [request.batch] * request.seq_len
        output, *states = reference.layer(request.cell, rows, sizes, h_0, c_0, weights)
        return (output.view(*input.shape[:-1], output.size(-1)), *states), []

    @staticmethod
    def backward(
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        arguments = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip((input, h_0, c_0, *weights), needs, strict=True)
        ]
        with torch.enable_grad():
            first, h, c, *own = arguments
            assert first is not None and h is not None
            layer_weights = [weight for weight in own if weight is not None]
            results, _ = Reference.forward(request, first, batch_sizes, h, c, layer_weights)
        pairs = [
            (result, grad.reshape(result.shape))
            for result, grad in zip(results, grads, strict=True)
            if grad is not None
        ]
        wanted = [a for a, need in zip(arguments, needs, strict=True) if need and a is not None]
        found = iter(
            torch.autograd.grad(
                [result for result, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                materialize_grads=True,
            )
        )
        return [
            next(found) if need and argument is not None else None
            for argument, need in zip(arguments, needs, strict=True)
        ]


class _Segment:
    """Some steps of one direction, in the order in which the direction goes.

    The reverse direction of a batch is the forward direction of the batch with each of its
    sequences turned round; `order` says where the rows of that one lie.
    """

    def __init__(
        self, request: Request, sizes: Sequence[int], begin: int, end: int, order: Tensor | None
    ) -> None:
        self.begin = begin
        self.sizes = list(sizes[begin:end])
        self.batch = self.sizes[0]
        first = sum(sizes[:begin])
        self.rows = slice(first, first + sum(self.sizes))
        self.order = None if order is None else order[self.rows]
        even = self.sizes[-1] == self.batch
        self.batch_sizes = [] if even else self.sizes
        self.request = request._replace(
            seq_len=end - begin, batch=self.batch, directions=1, packed=not even
        )

    def of(self, rows: Tensor) -> Tensor:
        """Its rows of the whole sequence's, (rows, ...)."""
        return rows[self.rows] if self.order is None else rows.index_select(0, self.order)

    def of_input(self, request: Request, input: Tensor) -> Tensor:
        """Its steps of the input, (T, N, I) or, packed, (rows, I); no copy going forward."""
        if request.packed:
            part = self.of(input)
            return part if self.batch_sizes else part.view(-1, self.batch, part.size(-1))
        steps = len(self.sizes)
        if self.order is None:
            return input[self.begin : self.begin + steps]
        end = request.seq_len - self.begin
        return input[end - steps : end].flip(0)

    def put(self, rows: Tensor, part: Tensor) -> None:
        """Write its rows among the whole sequence's."""
        if self.order is None:
            rows[self.rows] = part
        else:
            rows.index_copy_(0, self.order, part)

    def add(self, rows: Tensor, part: Tensor) -> None:
        if self.order is None:
            rows[self.rows] += part
        else:
            rows.index_add_(0, self.order, part)


def _turned(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where the rows of a batch lie whose sequences are turned round, row by row of that batch."""
    batch_sizes = torch.tensor(sizes, device="cpu")
    batch = sizes[0]
    step = torch.arange(len(sizes), device="cpu").repeat_interleave(batch_sizes)
    offsets = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
    sequence = torch.arange(int(offsets[-1]), device="cpu") - offsets[step]
    numbers = torch.arange(batch, device="cpu")
    lengths = (batch_sizes[None, :] > numbers[:, None]).sum(1)
    return (offsets[lengths[sequence] - 1 - step] + sequence).to(device)


class Recomputing:
    """A backend that saves the states between segments, and goes through each again going back.

    Args:
        inner: the backend that does the work.
        steps: of a segment; 0 for the square root of the sequence's.
    """

    # Going forward again takes all that going forward took.
    READS = "everything"

    def __init__(self, inner: Any, steps: int) -> None:
        self.inner = inner
        self.steps = steps

    def steps_of(self, seq_len: int) -> int:
        """Steps of a segment of a sequence of so many."""
        return min(self.steps or math.isqrt(seq_len - 1) + 1, seq_len)

    def _segments(
        self, request: Request, batch_sizes: Sequence[int], device: torch.device, direction: int
    ) -> Iterator[_Segment]:
        steps = self.steps_of(request.seq_len)
        sizes = batch_sizes or [request.batch] * request.seq_len
        order = _turned(sizes, device) if direction else None
        for begin in range(0, request.seq_len, steps):
            end = min(begin + steps, request.seq_len)
            yield _Segment(request, sizes, begin, end, order)

    def forward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """As a backend's; saved are the states ahead of every segment, of each direction."""
        plain = request._replace(needs_grad=False)
        size = request.output_size
        # Not a view of its rows: what autograd is given as a view cannot be changed in place.
        output = input.new_empty((*input.shape[:-1], request.directions * size))
        rows = output.view(-1, request.directions * size)
        count = len(weights) // request.directions
        saved: list[Tensor] = []
        finals: list[list[Tensor]] = []
        for d in range(request.directions):
            # Written in place from here on, and never the caller's.
            states = [state[d : d + 1].clone() for state in (h_0, c_0) if state is not None]
            shown = rows[:, d * size : (d + 1) * size]
            for part in self._segments(plain, batch_sizes, input.device, d):
                before = [state[:, : part.batch].clone() for state in states]
                saved += before
                results, _ = self.inner.forward(
                    part.request,
                    part.of_input(request, input),
                    part.batch_sizes,
                    before[0],
                    before[1] if len(before) > 1 else None,
                    weights[d * count : (d + 1) * count],
                )
                part.put(shown, results[0].reshape(-1, size))
                for state, after in zip(states, results[1:], strict=True):
                    state[:, : part.batch] = after
            finals.append(states)
        last = [torch.cat(states) for states in zip(*finals, strict=True)]
        return (output, *last), saved

    def backward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """As a backend's, segment by segment from the last to the first."""
        grad_output, *grad_finals = grads
        size, count = request.output_size, len(weights) // request.directions
        kept = 1 if c_0 is None else 2
        per_direction = len(saved) // request.directions
        rows = math.prod(input.shape[:-1])
        grad_input = input.new_zeros((rows, request.input_size)) if needs[0] else None
        grad_weights: list[Tensor | None] = [None] * len(weights)
        initials: list[list[Tensor]] = []
        for d in range(request.directions):
            own = slice(d * count, (d + 1) * count)
            own_needs = [needs[0], True, c_0 is not None, *needs[3:][own]]
            whole = [h_0, c_0][:kept]
            states = [
                torch.zeros_like(state[d : d + 1], memory_format=torch.contiguous_format)
                if grad is None
                else grad[d : d + 1].clone(memory_format=torch.contiguous_format)
                for state, grad in zip(whole, grad_finals, strict=True)
                if state is not None
            ]
            segments = list(self._segments(request, batch_sizes, input.device, d))
            for number in reversed(range(len(segments))):
                part = segments[number]
                at = d * per_direction + number * kept
                before = saved[at : at + kept]
                first = before[0], before[1] if kept == 2 else None
                steps = part.of_input(request, input)
                arguments = part.request, steps, part.batch_sizes, *first, weights[own]
                _, remembered = self.inner.forward(*arguments)
                given: list[Tensor | None] = [None]
                if grad_output is not None:
                    given = [part.of(grad_output[:, d * size : (d + 1) * size])]
                given += [state[:, : part.batch].contiguous() for state in states]
                found = self.inner.backward(*arguments, remembered, given, own_needs)
                if grad_input is not None and found[0] is not None:
                    part.add(grad_input, found[0].reshape(-1, request.input_size))
                for state, grad in zip(states, found[1:3], strict=False):
                    state[:, : part.batch] = grad
                for index, grad in enumerate(found[3:], own.start):
                    if grad is not None:
                        total = grad_weights[index]
                        grad_weights[index] = grad if total is None else total.add_(grad)
            initials.append(states)
        ahead: list[Tensor | None] = [torch.cat(states) for states in zip(*initials, strict=True)]
        return [grad_input, ahead[0], ahead[1] if kept == 2 else None, *grad_weights]


_KEEPS_TO_ITSELF = (
    "torch's kernels go forward once and keep to themselves what they save, which recompute is "
    "there to avoid"
)


def choose(request: Request, wanted: str) -> dispatch.Choice:
    """The backend that does the work of a segment, and why each other one was not taken.

    Raises:
        BackendError: if `wanted` keeps to itself what it saves, or cannot serve the request.
    """
    if wanted == "aten":
        raise dispatch.BackendError(f"backend 'aten' cannot run this call: {_KEEPS_TO_ITSELF}")
    choice = dispatch.choose(request, wanted)
    if choice.backend != "aten":
        return choice
    cannot = dispatch.backend_module("native").supports(request)
    name = "torchscript" if cannot else "native"
    reasons = {**choice.reasons, "aten": _KEEPS_TO_ITSELF}
    if cannot:
        reasons["native"] = cannot
    else:
        reasons["torchscript"] = "native comes first"
    del reasons[name]
    return dispatch.Choice(name, reasons)


def refuse_obstacles() -> None:
    """Raise if only torch.nn's own forward can serve a call here and now.

    Raises:
        BackendError: with what stands in the way.
    """
    reason = obstacles.obstacle()
    if reason is not None:
        raise dispatch.BackendError(f"recompute=True cannot run this call: {reason}")


def backend(request: Request, wanted: str, steps: int) -> Recomputing:
    """A backend of segments of so many steps, 0 for any, made of the one that `choose` chooses."""
    name = choose(request, wanted).backend
    inner: Any = Reference if name == "reference" else dispatch.backend_module(name)
    return Recomputing(inner, steps)


def forward(module: torch.nn.RNNBase, input: Any, hx: Any, steps: int) -> Any:
    """What `module(input, hx)` returns, with a backward that goes forward again.

    Args:
        steps: of a segment; 0 for the square root of the sequence's.

    Returns:
        As `functional.forward`; None if torch.nn's own forward is to say what is wrong.

    Raises:
        BackendError: if only torch.nn's forward can serve the call, or the backend that was asked
            for cannot.
        RuntimeError: for what ends the process in torch's own LSTM.
    """
    refuse_obstacles()
    functional.refuse_unsafe(module, input, hx)
    call = functional.prepare(module, input, hx)
    if call is None:
        return None
    if not call.request.needs_grad:
        return functional.forward(module, input, hx)
    recomputing = backend(call.request, dispatch.requested(), steps)
    drop = module.dropout if module.training else 0.0
    output, *states = functional.stack(call, recomputing, module.num_layers, drop)
    return functional.in_callers_form(module, input, output, states)
