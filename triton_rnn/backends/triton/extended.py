"""A layer on the kernels whose steps are given more than weights: clipping, zoneout, locked masks.

What of it is pointwise makes another cell (`own.regularized`), of which the kernels' functions are
generated; a mask of h before W_hh, and c of every step, the kernels know themselves. Lengths and
resets are not theirs: they are given a packed batch of episodes instead (`triton_rnn.episodes`).
"""

from collections.abc import Sequence

from torch import Tensor

from triton_rnn.backends import reference
from triton_rnn.backends.triton import layer
from triton_rnn.cells import RegularizedCell
from triton_rnn.extras import Extras
from triton_rnn.request import Request

walk = reference.walk


class ExtendedLayer(reference.ExtendedLayer):
    """A layer of a `RegularizedCell`, in the place of this backend's module."""

    def __init__(self, extras: Extras, walk: None) -> None:
        super().__init__(extras, walk)
        zoneouts = (extras.zoneout_h, extras.zoneout_c)
        masks = [mask for mask in zoneouts if isinstance(mask, Tensor)]
        self.given = layer.Given(extras.recurrent_mask, masks)

    def definition(
        self,
        request: Request,
        batch_sizes: Sequence[int],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """That of the plain cell, which is given the extras."""
        assert isinstance(request.cell, RegularizedCell) and request.cell.plain is not None
        request = request._replace(cell=request.cell.plain)
        return super().definition(request, batch_sizes, input, h_0, c_0, weights)

    def forward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """As the package's; with `all_cells` every step's c is the last result."""
        return layer.forward(request, input, batch_sizes, h_0, c_0, weights, self.given)

    def backward(
        self,
        request: Request,
        input: Tensor,
        batch_sizes: Sequence[int],
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """As the package's; with `all_cells` the last of `grads` is that of every step's c."""
        return layer.backward(
            request, input, batch_sizes, h_0, c_0, weights, saved, grads, needs, self.given
        )
