"""The plain loops of `triton_rnn.reference` as a backend: any device, any dtype."""

from triton_rnn.request import Request

# The one phase that holds all of a layer, in profiles.
WHOLE = "reference"


def supports(request: Request) -> str | None:
    """None: the plain loops can do every request."""
    return None
