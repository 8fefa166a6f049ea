"""The place of the Triton kernels; they are not part of this version."""

from triton_rnn.request import Request


def supports(request: Request) -> str | None:
    """Why the Triton kernels cannot serve a request: there are none yet."""
    return "the Triton kernels are not part of this version"
