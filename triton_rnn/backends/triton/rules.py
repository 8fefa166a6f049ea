"""When `auto` takes the kernels."""

from triton_rnn.request import Request


def slower_than_torch(request: Request) -> str | None:
    return None
