"""Trying the kernels out before they are trusted."""

from triton_rnn.request import Request


def obstacle(request: Request) -> str | None:
    from triton_rnn.backends.triton import launch

    kernels = ("forward", "backward") if request.needs_grad else ("forward",)
    for kernel in kernels:
        if launch.plan_of(request, kernel) is None:
            return f"no plan of the {kernel} recurrence fits this device"
    return None
