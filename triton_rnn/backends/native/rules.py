"""Up to which size one thread of plain C is the fastest way."""

from triton_rnn.request import Request


def too_large(request: Request) -> str | None:
    """Why `auto` leaves a request to libraries with threads; None where C is faster."""
    return None
