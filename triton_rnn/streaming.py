"""A sequence in chunks: a module with the state that it has come to, and training over chunks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_rnn import dispatch, obstacles, recompute, stacking
from triton_rnn.cells import MODES, NORMALIZED
from triton_rnn.request import Request

# `auto` chooses for a stream as it would for a sequence of so many steps, whatever its chunks are.
_LONG = 128

Loss = Callable[[Tensor, Tensor], Tensor]


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state with a function of each of its tensors in their places."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    # A list where layers have states of several sizes; whatever a caller gave is a tuple else.
    kind = list if isinstance(state, list) else tuple
    return kind(_map(function, part) for part in state)


def _tensors(state: Any) -> list[Tensor]:
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in _tensors(part)]


class Stream:
    """A recurrent module that carries its state from chunk to chunk of a sequence.

    >>> stream = triton_rnn.Stream(module)
    >>> for chunk in chunks:                 # of any length, one step too
    ...     output = stream(chunk)

    On the backend `native` the outputs and the state are those of the whole sequence at once, bit
    for bit, wherever it is cut: there a number is always the same sum in the same order. The other
    backends leave the products to libraries that may sum in another order for another number of
    rows, so there they are the same but for rounding. Dropout between layers is drawn anew for
    each chunk.

    `auto` would take another backend for a short chunk than for a long one. A stream chooses at its
    first chunk and keeps to it until `reset()`: `native` where that can run, else what `auto` takes
    for a long sequence. A backend asked for by name at the first chunk is kept likewise.

    A stream holds no parameters and is no torch.nn.Module: the module stays where it is in a model.
    It can be copied (`copy.deepcopy`, with the module) and pickled; the state of the copy is
    detached, as a copy of a graph cannot be made.

    Attributes:
        module: the module.
        backend: the backend that the stream keeps to; None before the first chunk.
        truncate: whether the state is detached ahead of every chunk.

    Args:
        module: an RNN, GRU or LSTM, this package's or torch.nn's, of one direction.
        truncate: detach the state ahead of every chunk, so that gradients end where the chunk
            begins and what a chunk needed is freed with its own backward: truncated
            backpropagation through time (Williams & Peng 1990). See also `tbptt`.

    Raises:
        TypeError: the module is no RNN, GRU or LSTM.
        ValueError: the module is bidirectional; its reverse direction begins at the end of the
            sequence, which a stream has not seen.
    """

    def __init__(self, module: torch.nn.Module, *, truncate: bool = False) -> None:
        if not isinstance(module, torch.nn.RNNBase):
            raise TypeError(f"a stream is of an RNN, GRU or LSTM, not of a {type(module).__name__}")
        if module.bidirectional:
            raise ValueError(
                "a bidirectional module cannot be streamed: its reverse direction begins at the "
                "end of the sequence"
            )
        self.module = module
        self.truncate = truncate
        self.backend: str | None = None
        self._state: Any = None

    def __call__(self, chunk: Tensor) -> Tensor:
        """The output for the next steps; the state goes on from here.

        Args:
            chunk: (T, N, I), (N, T, I) where the module is `batch_first`, or (T, I) unbatched;
                T may differ from chunk to chunk.

        Returns:
            The module's output for the chunk, laid out as its input.

        Raises:
            TypeError: the chunk is packed, or is no tensor.
            BackendError: a backend was asked for by name that cannot run the chunk, or that is not
                the one that the stream has begun on; or it is exported.
            RuntimeError, ValueError: as the module; the state is then what it was.
        """
        if torch.compiler.is_exporting():
            raise dispatch.BackendError(
                "a stream keeps its state outside of a program: export its module, with hx"
            )
        if isinstance(chunk, PackedSequence):
            raise TypeError(
                "a stream takes padded chunks: the sequences of a packed batch end inside of it"
            )
        if not isinstance(chunk, Tensor):
            raise TypeError(f"a stream takes tensors, not {type(chunk).__name__}")
        state = _map(Tensor.detach, self._state) if self.truncate else self._state
        backend = self._backend_for(chunk, state)
        with dispatch.use_backend(backend):
            output, state = self.module(chunk, state)
        # Only now, so that a chunk that is refused changes nothing.
        self._state, self.backend = state, backend
        return output

    def _backend_for(self, chunk: Tensor, state: Any) -> str:
        wanted = dispatch.requested()
        if self.backend is not None:
            if wanted not in ("auto", self.backend):
                raise dispatch.BackendError(
                    f"backend {wanted!r} cannot run this chunk: the stream has begun on "
                    f"{self.backend!r}; reset() it to begin on another"
                )
            return self.backend
        if wanted != "auto":
            return wanted
        normalized = getattr(self.module, "_normalized", False)
        if obstacles.obstacle() is not None:
            return "reference" if normalized else "aten"
        # Whether it can is a matter of device and dtype only.
        cell = (NORMALIZED if normalized else MODES)[self.module.mode]
        some = Request(cell, chunk.device, chunk.dtype, 1, 1, 1, 1, 1, 1, True, False, False)
        if dispatch.backend_module("native").supports(some) is None:
            return "native"
        if normalized:
            return "reference"
        names = {
            self._choose(request._replace(seq_len=_LONG))
            for request in stacking.requests(self.module, chunk, state)
        }
        # Layers that `auto` would give to different backends are torch's, which can do all of them,
        # or the reference's. Of a malformed call there is none: the module says what is wrong.
        if len(names) < 2:
            return names.pop() if names else "auto"
        return "reference" if getattr(self.module, "_recompute", False) else "aten"

    def _choose(self, request: Request) -> str:
        recomputed = request.needs_grad and getattr(self.module, "_recompute", False)
        return (recompute if recomputed else dispatch).choose(request, "auto").backend

    @property
    def state(self) -> Any:
        """The state after the last chunk, as the module returns it; None for zeros.

        It may be set, to any hx that the module takes. It is never written to: the next state is
        another tensor.
        """
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def reset(self, rows: Any = None) -> None:
        """Start all sequences anew, or some of them.

        Args:
            rows: which sequences of the batch start from zeros at the next chunk: a number, several
                of them, or a bool tensor (N,). Gradients end there. None for all of them; then the
                next chunk may have another batch size, dtype or device, and the backend is chosen
                anew.

        Raises:
            IndexError: there is no such sequence.
            ValueError: rows of an unbatched stream, or a mask that is not of the batch's size.
        """
        if rows is None:
            self._state, self.backend = None, None
            return
        tensors = _tensors(self._state)
        if not tensors:
            return
        if tensors[0].dim() != 3:
            raise ValueError("the stream is unbatched, it has no rows; reset() starts it anew")
        batch = tensors[0].size(1)
        index = torch.as_tensor(rows, device=tensors[0].device)
        if index.dtype == torch.bool:
            if index.shape != (batch,):
                raise ValueError(f"a mask of rows has shape ({batch},), not {tuple(index.shape)}")
            index = index.nonzero().flatten()
        else:
            if index.numel() == 0:
                return
            if index.is_floating_point() or index.is_complex() or index.dim() > 1:
                raise ValueError("rows is a number, several numbers, or a bool tensor (N,)")
            index = index.to(torch.int64).reshape(-1)
            if int(index.min()) < -batch or int(index.max()) >= batch:
                raise IndexError(f"rows {index.tolist()} of a stream of {batch} sequences")
            index = index % batch
        self._state = _map(lambda tensor: tensor.index_fill(1, index, 0), self._state)

    def detach(self) -> None:
        """Let gradients end here: the state keeps its numbers and forgets how it came about."""
        self._state = _map(Tensor.detach, self._state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": _map(Tensor.detach, self._state)}

    def __repr__(self) -> str:
        shapes = [tuple(tensor.shape) for tensor in _tensors(self._state)]
        truncate = ", truncate=True" if self.truncate else ""
        return f"Stream({self.module!r}{truncate}, state={shapes or None})"


def tbptt(
    stream: Stream, input: Tensor, target: Tensor, loss: Loss, *, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Truncated backpropagation through time: go over a sequence in chunks, a loss for each.

    The state is carried on and its gradient is not, so a backward reaches to the beginning of its
    chunk, and the memory of training is that of a chunk however long the sequence is. The
    algorithm is BPTT(h; h') of Williams & Peng 1990 with h = h' = `chunk`.

    >>> for loss, output in triton_rnn.tbptt(stream, input, target, criterion, chunk=64):
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()

    Args:
        stream: goes on from the state it has; `stream.reset()` before a new sequence.
        input: the whole sequence, as the module takes it.
        target: with as many steps in the same dimension as the input.
        loss: of a chunk's output and target, a scalar; the layers behind the module belong in here.
        chunk: steps per chunk; the last one may be shorter.

    Yields:
        The loss of each chunk, and the output it is made of.

    Raises:
        ValueError: at once, for a chunk size below one or a target of another number of steps.
        TypeError: at once, for what is no stream or no tensor.
    """
    if not isinstance(stream, Stream):
        raise TypeError(f"expected a triton_rnn.Stream, got a {type(stream).__name__}")
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        raise TypeError("input and target are tensors; for other sources call the stream by chunk")
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"chunk is a number of steps, at least 1, not {chunk!r}")
    time = 1 if stream.module.batch_first and input.dim() == 3 else 0
    if input.dim() not in (2, 3) or target.dim() <= time or target.size(time) != input.size(time):
        raise ValueError(
            f"target {tuple(target.shape)} has not the steps of input {tuple(input.shape)} in "
            f"dimension {time}"
        )
    return _chunks(stream, input, target, loss, chunk, time)


def _chunks(
    stream: Stream, input: Tensor, target: Tensor, loss: Loss, chunk: int, time: int
) -> Iterator[tuple[Tensor, Tensor]]:
    def one(begin: int) -> tuple[Tensor, Tensor]:
        length = min(chunk, input.size(time) - begin)
        stream.detach()
        output = stream(input.narrow(time, begin, length))
        return loss(output, target.narrow(time, begin, length)), output

    for begin in range(0, input.size(time), chunk):
        # By a function, so that no name here keeps a chunk's graph while the next one is made.
        yield one(begin)
    stream.detach()
