"""The plain loops of `triton_rnn.reference` as a backend: any device, any dtype, differentiable as is."""

from triton_rnn.request import Request


def supports(request: Request) -> str | None:
    """Why the plain loops cannot serve a request; None when they can."""
    return request.obstacle
