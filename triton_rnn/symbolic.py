"""A recurrent module in a graph of torch.fx: one node, as torch.nn's are.

`torch.fx.symbolic_trace` takes modules whose class is torch.nn's as leaves, and traces the forward
of all others with proxies for tensors, which neither torch.nn's forward nor ours can be run with.
"""

from typing import Any

import torch


def is_proxy(input: Any) -> bool:
    return isinstance(input, torch.fx.Proxy)


def leaf(module: torch.nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
    """What calling a module comes to while fx traces: a node of its graph that calls the module."""
    tracer = input.tracer
    return tracer.create_proxy(
        "call_module",
        tracer.path_of_module(module),
        (input, *args),
        {name: value for name, value in kwargs.items() if value is not None},
    )
