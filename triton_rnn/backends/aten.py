"""torch's own kernels: cuDNN, oneDNN, ATen.

Not called through the layer op: torch runs a whole stack of layers at once, so the module hands the
call, as it came, to the forward of its torch.nn parent. That is also what happens to every call that
is malformed, so that the error is torch's own, and to every call that only torch can serve (autocast,
tracing, tensor subclasses, torch.func).
"""

from triton_rnn.request import Request


def supports(request: Request) -> str | None:
    """None: whatever reaches the dispatcher, torch.nn can do."""
    return None
