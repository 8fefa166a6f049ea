"""The plain loops of `triton_rnn.reference` as a backend: any device, any dtype."""

from collections.abc import Sequence

from torch import Tensor

from triton_rnn import reference
from triton_rnn.extras import Extras
from triton_rnn.profiling import ranges
from triton_rnn.request import Request, zero_states

# The one phase that holds all of a layer, in profiles.
WHOLE = "reference"
# Which module has the `ExtendedLayer` of this backend.
TAKES_EXTRAS = __name__


def supports(request: Request) -> str | None:
    """None: the plain loops can do every request."""
    return None


def walk(request: Request, batch_sizes: Sequence[int], extras: Extras) -> None:
    """What all layers of an extended call have in common: here nothing."""


class ExtendedLayer:
    """The plain loop of a layer with extras, in the place of a backend's module."""

    def __init__(self, extras: Extras, walk: object) -> None:
        self.extras = extras

    def definition(
        self,
        request: Request,
        batch_sizes: Sequence[int],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """See `triton_rnn.reference.extended_layer`. h_0, c_0: or both None for zeros."""
        if h_0 is None:
            h_0, c_0 = zero_states(request, input)
        with ranges.phase(request.cell, "reference", "both"):
            return reference.extended_layer(
                request.cell, input, batch_sizes, h_0, c_0, weights, self.extras
            )
