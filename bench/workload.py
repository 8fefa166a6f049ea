"""One side of a case: a layer, its data, and the step that is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from bench.cases import Case

OURS = "triton_rnn"
TORCH = "torch.nn"
PAIR = (OURS, TORCH)

Results = dict[str, Tensor | None]


def backend_of(provider: str) -> str | None:
    """The backend that ``triton_rnn:NAME`` asks for."""
    package, _, backend = provider.partition(":")
    return backend if package == OURS and backend else None


def layer_class(provider: str, cell: str) -> Callable[..., torch.nn.RNNBase]:
    """The class of ``cell`` in ``triton_rnn`` or ``torch.nn``, looked up at every call."""
    package = triton_rnn if provider.partition(":")[0] == OURS else torch.nn
    found: Callable[..., torch.nn.RNNBase] = getattr(package, cell.split("-")[0].upper())
    return found


def backend_context(provider: str) -> Callable[[], AbstractContextManager[object]]:
    """What a side is run inside of: ``use_backend(NAME)`` for ``triton_rnn:NAME``."""
    backend = backend_of(provider)
    if backend is not None:
        return lambda: triton_rnn.use_backend(backend)
    return nullcontext


class Workload:
    """A layer of ``provider`` and the data of ``case``; equal seeds give equal sides.

    ``step`` does one inference or one training step and keeps no graph. In training, the input
    wants a gradient, as it does behind an embedding or another layer, and the gradient of the
    output is given, so that no loss is timed. A whole step (mode ``step``) is what a program does:
    layer, linear head, mean squared error, backward, Adam; its input is data and wants no gradient.

    ``call`` is what the step calls; it is the layer unless a provider puts something around it.
    """

    def __init__(self, case: Case, provider: str, seed: int = 0):
        self.case = case
        self.provider = provider
        self.context = backend_context(provider)
        size = case.size
        options = {"nonlinearity": "relu"} if case.cell == "rnn-relu" else {}
        self.layer = layer_class(provider, case.cell)(
            size.input_size,
            size.hidden_size,
            size.layers,
            bidirectional=size.directions == 2,
            **options,
        )
        # Drawn anew rather than relied upon: the gate must not hang on equal initialisation.
        generator = torch.Generator().manual_seed(seed)
        bound = size.hidden_size**-0.5
        for parameter in self.layer.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)
        place = {"device": case.device, "dtype": getattr(torch, case.dtype)}
        self.layer.to(**place)
        self.call: Callable[..., tuple[object, object]] = self.layer
        dense = torch.randn(size.seq_len, size.batch, size.input_size, generator=generator)
        dense = dense.to(**place)
        packed = pack_padded_sequence(dense, torch.tensor(size.lengths()))
        # Packing is not timed: the packed data itself is the leaf.
        data = packed.data if case.packed else dense
        self.leaf = data.requires_grad_(case.mode == "training")
        self.input: Tensor | PackedSequence = (
            packed._replace(data=self.leaf) if case.packed else self.leaf
        )
        width = size.directions * size.hidden_size
        self.grad_output = torch.randn(*data.shape[:-1], width, generator=generator).to(**place)
        self.leaves: Mapping[str, Tensor] = dict(self.layer.named_parameters())
        if case.mode == "training":
            self.leaves = {"input": self.leaf, **self.leaves}
        if case.mode == "step":
            self.head = torch.nn.Linear(width, 1)
            for parameter in self.head.parameters():
                torch.nn.init.uniform_(parameter, -bound, bound, generator=generator)
            self.head.to(**place)
            self.target = torch.randn(*data.shape[:-1], 1, generator=generator).to(**place)
            parameters = [*self.layer.parameters(), *self.head.parameters()]
            self.optimizer = torch.optim.Adam(parameters)
        steps = {
            "inference": self._inference_step,
            "training": self._training_step,
            "step": self._whole_step,
        }
        self.step: Callable[[], tuple[object, object]] = steps[case.mode]

    def _inference_step(self) -> tuple[object, object]:
        with torch.no_grad():
            output, state = self.call(self.input)
            return output, state

    def _training_step(self) -> tuple[object, object]:
        for leaf in self.leaves.values():
            leaf.grad = None
        output, state = self.call(self.input)
        (output.data if self.case.packed else output).backward(self.grad_output)
        return output, state

    def _whole_step(self) -> tuple[object, object]:
        self.optimizer.zero_grad()
        output, state = self.call(self.input)
        loss = torch.nn.functional.mse_loss(self.head(output), self.target)
        loss.backward()
        self.optimizer.step()
        return output, state

    def results(self) -> Results:
        """Run one step and name everything that it computes; a gradient not given is ``None``."""
        with self.context():
            output, state = self.step()
        results: Results = {}
        if isinstance(output, PackedSequence):
            results["batch_sizes"] = output.batch_sizes
            output = output.data
        assert isinstance(output, torch.Tensor)
        results["output"] = output.detach()
        states = state if isinstance(state, tuple) else (state,)
        for name, value in zip(("h_n", "c_n"), states, strict=False):
            results[name] = value.detach()
        if self.case.training:
            for name, leaf in self.leaves.items():
                results[f"grad of {name}"] = leaf.grad
        return results
