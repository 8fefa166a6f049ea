"""A recurrent module in a graph of torch.fx: one node, as torch.nn's are.

`torch.fx.symbolic_trace` takes modules whose class is torch.nn's as leaves, and traces the forward
of all others with proxies for tensors, which neither torch.nn's forward nor ours can be run with.
"""

from typing import Any

import torch


def tracer_of(*given: Any) -> Any:
    """What traces a call with these arguments, states among them; None if nothing does."""
    for each in given:
        for one in each if isinstance(each, (tuple, list)) else (each,):
            if isinstance(one, torch.fx.Proxy):
                return one.tracer
    return None


def leaf(tracer: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What calling a module comes to while fx traces: a node of its graph that calls the module.

    Raises:
        RuntimeError: the module has hooks, which the graph would run as often again, for fx is
            about to trace them too.
        TraceError: the module is itself what is traced.
    """
    path = tracer.path_of_module(module)
    told = type(module).__name__
    if not path:
        raise torch.fx.proxy.TraceError(f"{told} has a loop over time: it is traced within a model")
    if module._forward_hooks or module._forward_pre_hooks:
        raise RuntimeError(
            f"torch.fx traces the hooks of {path}, a {told} of triton_rnn, and the graph would run "
            "them twice: give it a Tracer whose is_leaf_module says so of this module"
        )
    more = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", path, args, more)
