"""One layer on the kernels: projection, recurrence, and after the backward the products.

A projected LSTM, h = W_hr m, runs as a plain one. Its recurrent product is W_hh h = (W_hh W_hr) m,
so m takes the place of h, (W_hh W_hr) that of W_hh, and W_hr is applied to all steps at once after
the loop. Only h_0 has no m: its part, W_hh h_0, is added to the preactivations of first steps.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_rnn.backends.triton import launch, products
from triton_rnn.backends.triton.launch import Packing
from triton_rnn.cells import OwnCell
from triton_rnn.kernels.cells import KernelCell
from triton_rnn.profiling import ranges
from triton_rnn.request import Request


class Weights(NamedTuple):
    """The weights of a layer, one tensor per direction in each field."""

    weight_ih: Sequence[Tensor]
    weight_hh: Sequence[Tensor]
    bias_ih: Sequence[Tensor | None]
    bias_hh: Sequence[Tensor | None]
    weight_hr: Sequence[Tensor]
    units: Sequence[Tensor | None]


class Given(NamedTuple):
    """What the steps of a `RegularizedCell` are given beside its weights.

    Attributes:
        locked: (D, N, H), what h is multiplied by before W_hh multiplies it.
        masks: (R, D * H) bool each, in any shape: what of h, and of c, stays as it was.
    """

    locked: Tensor | None = None
    masks: Sequence[Tensor] = ()


_NOTHING_GIVEN = Given()


def _by_direction(request: Request, weights: Sequence[Tensor]) -> Weights:
    count = len(weights) // request.directions
    # Each is itself if it is so already.
    own = [weight.contiguous() for weight in weights]
    none: list[Tensor | None] = [None] * request.directions
    return Weights(
        own[::count],
        own[1::count],
        own[2::count] if request.biased else none,
        own[3::count] if request.biased else none,
        own[count - 1 :: count] if request.cell.projected else [],
        own[count - 1 :: count] if isinstance(request.cell, OwnCell) else none,
    )


def _recurrent_weights(own: Weights) -> Sequence[Tensor]:
    """W_hh, or W_hh W_hr of a projected LSTM: what stands in the recurrence."""
    if not own.weight_hr:
        return own.weight_hh
    return [hh @ hr for hh, hr in zip(own.weight_hh, own.weight_hr, strict=True)]


def _folded(
    cell: KernelCell, bias_hh: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor | None], int]:
    """What is added to the input's preactivations, and so many elements of it."""
    first = bias_hh[0]
    if first is None or not cell.products:
        return [None] * len(bias_hh), 0
    size = first.size(0) // cell.products
    if cell.folds >= 0:
        return bias_hh, cell.folds * size
    found: list[Tensor | None] = []
    for bias in bias_hh:
        assert bias is not None
        parts = [bias.new_zeros(size)] * cell.preacts
        for product, start in enumerate(cell.starts):
            if start >= 0:
                parts[start] = bias[product * size : (product + 1) * size]
        found.append(torch.cat(parts))
    return found, cell.preacts * size


def _vectors(
    cell: KernelCell, bias_hh: Sequence[Tensor | None], units: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Of each direction the numbers of each unit that the forward is given, or None.

    They are the biases of products that are not folded, and the unit weights.
    """
    if not cell.biases and not cell.units:
        return [None] * len(bias_hh)
    found = []
    for bias, own in zip(bias_hh, units, strict=True):
        parts = []
        if bias is not None and cell.biases:
            blocks = bias.view(cell.products, -1)
            parts += [blocks[p] for p, start in enumerate(cell.starts) if start < 0]
        if own is not None and cell.units:
            parts.append(own.view(-1))
        found.append(torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None)
    return found


_NOTHING = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: make it the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


def _first_rows(request: Request, rows: int, d: int, packing: Packing | None) -> slice | Tensor:
    """The rows of every sequence's first step in a direction."""
    if d == 0:
        return slice(0, request.batch)
    return slice(rows - request.batch, rows) if packing is None else packing.last


def _last_rows(request: Request, rows: int, d: int, packing: Packing | None) -> slice | Tensor:
    """The rows of every sequence's last step in a direction."""
    return _first_rows(request, rows, 1 - d, packing)


def _with_states_before(
    hidden: Tensor,
    states: Tensor,
    first: Tensor | None,
    request: Request,
    d: int,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Rows of `hidden` (R, C), and of each the state before its step (R, H).

    Args:
        states: after the steps. first: (N, H), before those that none precedes; None for zeros,
            with which they may be left out.
    """
    batch = request.batch
    if packing is None:
        later, earlier = slice(batch, None), slice(0, states.size(0) - batch)
        if d == 1:
            later, earlier = earlier, later
        if first is None:
            return hidden[later], states[earlier]
        parts = (first, states[earlier]) if d == 0 else (states[earlier], first)
        return hidden, torch.cat(parts)
    if d == 0:
        before = states.index_select(0, packing.earlier)
        if first is None:
            return hidden[batch:], before
        return hidden, torch.cat((first, before))
    before = torch.empty_like(states, memory_format=torch.contiguous_format)
    before[packing.earlier] = states[batch:]
    before[packing.last] = 0 if first is None else first
    return hidden, before


def _shift_back(
    grads: Tensor, request: Request, d: int, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `states` (R, H) and `first` (N, H) by those of the states before each step."""
    batch, rows = request.batch, grads.size(0)
    first = grads[_first_rows(request, rows, d, packing)]
    shifted = torch.zeros_like(grads)
    if packing is None:
        if d == 0:
            shifted[: rows - batch] = grads[batch:]
        else:
            shifted[batch:] = grads[: rows - batch]
    elif d == 0:
        shifted[packing.earlier] = grads[batch:]
    else:
        shifted[batch:] = grads.index_select(0, packing.earlier)
    return shifted, first


def forward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    given: Given = _NOTHING_GIVEN,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """See the package's `forward`. If the cell shows c, c after every step is the last result."""
    device = request.device
    with _on(device):
        launch.raise_failed_wait(device)
        packing = launch.packing_of(batch_sizes, device) if batch_sizes else None
        cell = launch.kernel_cell(request.cell)
        own = _by_direction(request, weights)
        h_0 = None if h_0 is None else h_0.contiguous()
        c_0 = None if c_0 is None else c_0.contiguous()
        hidden_size, directions = request.hidden_size, request.directions
        leading = input.shape[:-1]
        rows = math.prod(leading)
        row = cell.row if request.needs_grad else cell.inputs
        gates = input.new_empty((rows, directions, row * hidden_size))
        # What a GRU's reset gate multiplies has its bias inside, the others' are added up here.
        folded, fold = _folded(cell, own.bias_hh)
        first_mask = (row - cell.masks) * hidden_size
        preacts = gates[:, :, first_mask - cell.preacts * hidden_size : first_mask]
        with ranges.phase(request.cell, "projection", "both"):
            products.project(input, own.weight_ih, own.bias_ih, folded, fold, preacts)
        if given.masks:
            blocks = gates[:, :, first_mask:].view(rows, directions, cell.masks, hidden_size)
            for number, mask in enumerate(given.masks):
                blocks[:, :, number] = mask.view(rows, directions, hidden_size)
        initial = h_0
        if request.cell.projected:
            initial = None
            if h_0 is not None:
                for d in range(directions):
                    first = _first_rows(request, rows, d, packing)
                    gates[first, d] += h_0[d] @ own.weight_hh[d].t()
        # Results are no views: autograd would forbid to change them in place.
        output = input.new_empty((*leading, directions * hidden_size))
        with ranges.phase(request.cell, "recurrence", "both"):
            cells, h_n, c_n, sent = launch.forward(
                request,
                output,
                gates,
                _recurrent_weights(own),
                _vectors(cell, own.bias_hh, own.units),
                initial,
                c_0,
                packing,
                given.locked,
            )
        saved = [output]
        if request.needs_grad:
            saved += [gates] if cell.saves else []
            saved += [cells] if cells is not None and cell.keeps_c else []
            saved += [sent] if cell.locked else []
        if request.cell.projected:
            states = output.view(rows, directions, hidden_size)
            output = input.new_empty((*leading, directions * request.output_size))
            parts = output.view(rows, directions, request.output_size)
            for d, weight in enumerate(own.weight_hr):
                parts[:, d] = states[:, d] @ weight.t()
            last = [_last_rows(request, rows, d, packing) for d in range(directions)]
            h_n = torch.stack([parts[last[d], d] for d in range(directions)])
        results = (output, h_n, c_n, cells if cell.shows_c else None)
        return tuple(result for result in results if result is not None), saved


def backward(
    request: Request,
    input: Tensor,
    batch_sizes: Sequence[int],
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    given: Given = _NOTHING_GIVEN,
) -> list[Tensor | None]:
    """See the package's `backward`. If the cell shows c, the last of `grads` is that of all c."""
    with _on(request.device):
        packing = launch.packing_of(batch_sizes, request.device) if batch_sizes else None
        cell = launch.kernel_cell(request.cell)
        own = _by_direction(request, weights)
        directions, hidden_size = request.directions, request.hidden_size
        output, *rest = saved
        output = output.view(-1, directions * hidden_size)
        sent = rest.pop().view(output.shape) if cell.locked else output
        grad_cells = None
        if cell.shows_c:
            *grads, grad_cells = grads
            grad_cells = torch.zeros_like(output) if grad_cells is None else grad_cells.contiguous()
        gates = rest[0] if cell.saves else output
        # A gradient that was not given is zeros, and so is an initial state.
        h_0, c_0, grad_output, grad_h_n, grad_c_n = (
            None if tensor is None else tensor.contiguous()
            for tensor in (h_0, c_0, *grads, *[None] * (3 - len(grads)))
        )
        if grad_output is None:
            grad_output = output.new_zeros((output.size(0), directions * request.output_size))
        initial = c_0 if cell.keeps_c else h_0
        # The gradients that come from outside, of m in the place of h if the LSTM is projected.
        grad_states = grad_output
        grad_projected: list[Tensor] = []
        if request.cell.projected:
            grad_projected = _grad_projected(request, grad_output, grad_h_n, packing)
            grad_states = torch.cat(
                [g @ w for g, w in zip(grad_projected, own.weight_hr, strict=True)], 1
            )
            grad_h_n = None
        with ranges.phase(request.cell, "backward.recurrence", "both"):
            grad_gates, grad_h_0, grad_c_0 = launch.backward(
                request,
                grad_states,
                gates,
                rest[1] if cell.keeps_c else output,
                initial,
                _recurrent_weights(own),
                own.units,
                grad_h_n,
                grad_c_n,
                packing,
                given.locked,
                grad_cells,
            )
        with ranges.phase(request.cell, "backward.weights", "both"):
            return _after_the_loop(
                request,
                input,
                h_0 if h_0 is None or given.locked is None else h_0 * given.locked,
                own,
                sent,
                grad_gates,
                (grad_h_0, grad_c_0),
                grad_projected,
                needs,
                packing,
            )


def _after_the_loop(
    request: Request,
    input: Tensor,
    h_0: Tensor | None,
    own: Weights,
    output: Tensor,
    grad_gates: Tensor,
    grad_states: tuple[Tensor, Tensor | None],
    grad_projected: list[Tensor],
    needs: Sequence[bool],
    packing: Packing | None,
) -> list[Tensor | None]:
    """The gradients that need no recurrence: of the input, the weights and the biases.

    Args:
        h_0, output: what W_hh multiplied.
    """
    cell = launch.kernel_cell(request.cell)
    grad_h_0, grad_c_0 = grad_states
    directions, hidden_size = request.directions, request.hidden_size
    count = (len(needs) - 3) // directions
    end = (cell.width - cell.units) * hidden_size
    grad_preact = grad_gates[:, :, end - cell.preacts * hidden_size : end]
    turned = cell.turn * hidden_size
    results: list[Tensor | None] = [
        products.grad_input(grad_preact, own.weight_ih) if needs[0] else None
    ]
    rows = input.reshape(-1, request.input_size) if any(needs[3::count]) else input
    found: list[Tensor | None] = []
    grad_h: list[Tensor] = []
    # The gradients of biases and of unit weights, for which everything is read once.
    summed = (request.biased or cell.units > 0) and any(needs[3:])
    sums = grad_gates.sum(0) if summed else grad_gates[0]
    for d in range(directions):
        wanted = needs[3 + d * count : 3 + (d + 1) * count]
        preact, hidden = grad_preact[:, d], grad_gates[:, d, : cell.products * hidden_size]
        states = output[:, d * hidden_size : (d + 1) * hidden_size]
        if request.cell.projected:
            # Of h_t: what comes from outside, and what the next step sends through W_hh.
            recurrent, grad_first = _shift_back(hidden @ own.weight_hh[d], request, d, packing)
            grad_h.append(grad_first)
            grad_of_h = grad_projected[d] + recurrent
            states_m, states = states, states @ own.weight_hr[d].t()
        found.append(products.grad_weight(preact, rows) if wanted[0] else None)
        if wanted[1] and cell.products:
            first = None if h_0 is None else h_0[d]
            later, before = _with_states_before(hidden, states, first, request, d, packing)
            found.append(_in_torch_order(products.grad_weight(later, before), turned))
        else:
            found.append(None)
        if request.biased:
            found.append(sums[d, end - cell.preacts * hidden_size : end] if wanted[2] else None)
            total = None
            if wanted[3]:
                total = sums[d, : cell.products * hidden_size]
                # Never the memory of the other one's: each may be changed in place.
                total = _in_torch_order(total, turned) if turned else total.clone()
            found.append(total)
        if request.cell.projected:
            found.append(products.grad_weight(grad_of_h, states_m) if wanted[-1] else None)
        if isinstance(request.cell, OwnCell):
            found.append(sums[d, end:].view(cell.units, hidden_size) if wanted[-1] else None)
    if request.cell.projected:
        grad_h_0 = torch.stack(grad_h)
    results += [grad_h_0 if needs[1] else None, grad_c_0 if needs[2] else None]
    return results + found


def _grad_projected(
    request: Request, grad_output: Tensor, grad_h_n: Tensor | None, packing: Packing | None
) -> list[Tensor]:
    """Gradients (R, H_out) of every step's h that come from outside, per direction."""
    parts = []
    for d, part in enumerate(grad_output.chunk(request.directions, 1)):
        total = part.clone(memory_format=torch.contiguous_format)
        if grad_h_n is not None:
            total[_last_rows(request, total.size(0), d, packing)] += grad_h_n[d]
        parts.append(total)
    return parts


def _in_torch_order(grad: Tensor, turned: int) -> Tensor:
    """The products' rows, which lie in a ring that begins at row `turned`, from the first on."""
    return grad.roll(turned, 0) if turned else grad
