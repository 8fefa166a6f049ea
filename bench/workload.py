"""One side of a case: a layer, its data, and the step that is timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_rnn
from bench.cases import Case

OURS = "triton_rnn"
TORCH = "torch.nn"
PROVIDERS = (OURS, TORCH)


def layer_class(provider: str, cell: str) -> Callable[..., torch.nn.RNNBase]:
    """The class of ``cell`` in ``triton_rnn`` or ``torch.nn``, looked up at every call."""
    package = triton_rnn if provider == OURS else torch.nn
    found: Callable[..., torch.nn.RNNBase] = getattr(package, cell.split("-")[0].upper())
    return found


def backend_context(
    provider: str, backend: str | None
) -> Callable[[], AbstractContextManager[object]]:
    """What a side is run inside of: ``use_backend(backend)`` for ours, nothing for torch.nn."""
    if provider == OURS and backend is not None:
        return lambda: triton_rnn.use_backend(backend)
    return nullcontext


class Workload:
    """A layer of ``provider`` and the data of ``case``; equal seeds give equal sides.

    ``step`` does one inference or one training step and keeps no graph. In training, the input
    wants a gradient, as it does behind an embedding or another layer, and the gradient of the
    output is given, so that no loss is timed.
    """

    def __init__(self, case: Case, provider: str, backend: str | None = None, seed: int = 0):
        self.case = case
        self.context = backend_context(provider, backend)
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
        dense = torch.randn(size.seq_len, size.batch, size.input_size, generator=generator)
        packed = pack_padded_sequence(dense, torch.tensor(size.lengths()))
        # Packing is not timed: the packed data itself is the leaf.
        data = packed.data if case.packed else dense
        self.leaf = data.requires_grad_(case.training)
        self.input: torch.Tensor | PackedSequence = (
            packed._replace(data=self.leaf) if case.packed else self.leaf
        )
        self.grad_output = torch.randn(
            *data.shape[:-1], size.directions * size.hidden_size, generator=generator
        )
        self.leaves = {"input": self.leaf, **dict(self.layer.named_parameters())}
        self.step: Callable[[], tuple[object, object]] = (
            self._training_step if case.training else self._inference_step
        )

    def _inference_step(self) -> tuple[object, object]:
        with torch.no_grad():
            output, state = self.layer(self.input)
            return output, state

    def _training_step(self) -> tuple[object, object]:
        for leaf in self.leaves.values():
            leaf.grad = None
        output, state = self.layer(self.input)
        (output.data if self.case.packed else output).backward(self.grad_output)
        return output, state

    def results(self) -> dict[str, torch.Tensor | None]:
        """Run one step and name everything that it computes; a gradient not given is ``None``."""
        with self.context():
            output, state = self.step()
        results: dict[str, torch.Tensor | None] = {}
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
