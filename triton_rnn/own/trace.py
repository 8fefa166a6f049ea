"""What a user's cell computes, found out by running it once on a few small tensors.

A dispatch mode sees every ATen operator that the function comes down to, whatever it is written in.
Each has to be pointwise, and is put down as expressions; anything else is refused by its name.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_rnn.own.expression import Graph, Node

# Sizes of the tensors that a function is run on: no two of them could be taken for each other.
_ROWS, _UNITS = 3, 5

_Build = Callable[..., Node]


def _relu(g: Graph, x: Node) -> Node:
    zero = g.constant(0)
    return g.choose(g.apply("ge", zero, x), zero, x)


@functools.cache
def _past_an_end() -> str:
    """How torch's clamp compares a number with an end beyond which no gradient goes through.

    At the end itself one does up to torch 2.13, and from 2.14 on none.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True, device="cpu")
        (grad,) = torch.autograd.grad(x.clamp(min=0).sum(), x)
    return "gt" if grad.item() else "ge"


def _clamp(g: Graph, x: Node, low: Node | None = None, high: Node | None = None) -> Node:
    past = _past_an_end()
    if any(end is not None and end.op != "constant" for end in (low, high)):
        raise _CannotError("ends that are not constants")
    if low is not None and high is not None and low.value > high.value:
        return high
    y = x if high is None else g.choose(g.apply(past, x, high), high, x)
    return y if low is None else g.choose(g.apply(past, low, x), low, y)


def _hardtanh(g: Graph, x: Node, low: Node | None = None, high: Node | None = None) -> Node:
    """No gradients go through at the ends."""
    low, high = low or g.constant(-1), high or g.constant(1)
    inner = g.choose(g.apply("ge", x, high), high, x)
    return g.choose(g.apply("ge", low, x), low, inner)


def _hardsigmoid(g: Graph, x: Node) -> Node:
    shifted = g.apply("add", x, g.constant(3))
    return g.apply("div", _hardtanh(g, shifted, g.constant(0), g.constant(6)), g.constant(6))


def _leaky_relu(g: Graph, x: Node, slope: Node | None = None) -> Node:
    slope = slope or g.constant(0.01)
    return g.choose(g.apply("gt", x, g.constant(0)), x, g.apply("mul", x, slope))


def _celu(g: Graph, x: Node, alpha: Node) -> Node:
    return _elu(g, x, alpha, None, g.apply("div", g.constant(1), alpha))


def _elu(
    g: Graph,
    x: Node,
    alpha: Node | None = None,
    scale: Node | None = None,
    input_scale: Node | None = None,
) -> Node:
    one, zero = g.constant(1), g.constant(0)
    alpha, scale, input_scale = alpha or one, scale or one, input_scale or one
    positive = g.apply("gt", x, zero)
    # Not of large numbers: zero times the infinite derivative that nobody chose would be a NaN.
    inner = g.apply("mul", g.choose(positive, zero, x), input_scale)
    below = g.apply("mul", g.apply("expm1", inner), g.apply("mul", alpha, scale))
    return g.choose(positive, g.apply("mul", x, scale), below)


def _softplus(g: Graph, x: Node, beta: Node | None = None, threshold: Node | None = None) -> Node:
    beta, threshold = beta or g.constant(1), threshold or g.constant(20)
    scaled = g.apply("mul", x, beta)
    linear = g.apply("gt", scaled, threshold)
    inner = g.choose(linear, g.constant(0), scaled)
    curved = g.apply("div", g.apply("log1p", g.apply("exp", inner)), beta)
    return g.choose(linear, x, curved)


def _log_sigmoid(g: Graph, x: Node) -> Node:
    # From 40 on the difference is beyond the last place of float64.
    return g.apply("neg", _softplus(g, g.apply("neg", x), None, g.constant(40)))


def _silu(g: Graph, x: Node) -> Node:
    return g.apply("mul", x, g.apply("sigmoid", x))


def _gelu(g: Graph, x: Node, approximate: str = "none") -> Node:
    half_x = g.apply("mul", g.constant(0.5), x)
    if approximate == "tanh":
        cube = g.apply("mul", g.apply("mul", x, x), x)
        inner = g.apply("add", x, g.apply("mul", g.constant(0.044715), cube))
        bent = g.apply("tanh", g.apply("mul", g.constant(math.sqrt(2 / math.pi)), inner))
    else:
        bent = g.apply("erf", g.apply("mul", x, g.constant(math.sqrt(0.5))))
    return g.apply("mul", half_x, g.apply("add", g.constant(1), bent))


def _sign(g: Graph, x: Node) -> Node:
    zero = g.constant(0)
    below = g.choose(g.apply("gt", zero, x), g.constant(-1), zero)
    return g.choose(g.apply("gt", x, zero), g.constant(1), below)


def _power(g: Graph, x: Node, exponent: Node) -> Node:
    """Whole exponents by products, halves by a root."""
    if exponent.op != "constant":
        raise _CannotError("an exponent that is not a constant")
    value = exponent.value
    if value not in (-3, -2, -1, -0.5, 0.5, 1, 2, 3, 4):
        raise _CannotError(f"the exponent {value}")
    base = g.apply("sqrt", x) if abs(value) == 0.5 else x
    y = base
    for _ in range(int(abs(value)) - 1):
        y = g.apply("mul", y, base)
    return g.apply("div", g.constant(1), y) if value < 0 else y


def _scaled(op: str) -> _Build:
    def build(g: Graph, a: Node, b: Node, alpha: Node | None = None) -> Node:
        return g.apply(op, a, b if alpha is None else g.apply("mul", b, alpha))

    return build


def _rsub(g: Graph, a: Node, b: Node, alpha: Node | None = None) -> Node:
    return g.apply("sub", b, a if alpha is None else g.apply("mul", a, alpha))


def _lerp(g: Graph, a: Node, b: Node, weight: Node) -> Node:
    return g.apply("add", a, g.apply("mul", weight, g.apply("sub", b, a)))


def _addcmul(g: Graph, a: Node, b: Node, c: Node, value: Node | None = None) -> Node:
    product = g.apply("mul", b, c)
    return g.apply("add", a, product if value is None else g.apply("mul", value, product))


def _addcdiv(g: Graph, a: Node, b: Node, c: Node, value: Node | None = None) -> Node:
    ratio = g.apply("div", b if value is None else g.apply("mul", value, b), c)
    return g.apply("add", a, ratio)


def _one(op: str) -> _Build:
    return lambda g, *args: g.apply(op, *args)


def _other_way(op: str) -> _Build:
    return lambda g, a, b: g.apply(op, b, a)


def _number(g: Graph, x: Node) -> Node:
    """A truth value as 1 or 0."""
    return g.choose(x, g.constant(1), g.constant(0)) if x.is_mask else x


# ATen's operators, by the name before the point. The names of arguments are ATen's.
_BUILD: dict[str, _Build] = {
    **{name: _one(name) for name in ("neg", "sigmoid", "tanh", "exp", "expm1", "log", "log1p")},
    **{name: _one(name) for name in ("sqrt", "sin", "cos", "erf", "abs", "maximum", "minimum")},
    **{name: _one(name) for name in ("mul", "gt", "ge", "eq", "detach")},
    "lt": _other_way("gt"),
    "le": _other_way("ge"),
    "ne": lambda g, a, b: g.apply("not", g.apply("eq", a, b)),
    "add": _scaled("add"),
    "sub": _scaled("sub"),
    "rsub": _rsub,
    "div": _one("div"),
    "reciprocal": lambda g, x: g.apply("div", g.constant(1), x),
    "rsqrt": lambda g, x: g.apply("div", g.constant(1), g.apply("sqrt", x)),
    "square": lambda g, x: g.apply("mul", x, x),
    "pow": _power,
    "where": lambda g, mask, yes, no: g.choose(mask, _number(g, yes), _number(g, no)),
    "relu": _relu,
    "clamp": _clamp,
    "clamp_min": lambda g, x, low: _clamp(g, x, low),
    "clamp_max": lambda g, x, high: _clamp(g, x, None, high),
    "hardtanh": _hardtanh,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda g, x: g.apply("mul", x, _hardsigmoid(g, x)),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "celu": lambda g, x, alpha=None: _celu(g, x, g.constant(1) if alpha is None else alpha),
    "softplus": _softplus,
    "log_sigmoid_forward": _log_sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "mish": lambda g, x: g.apply("mul", x, g.apply("tanh", _softplus(g, x))),
    "threshold": lambda g, x, at, value: g.choose(g.apply("ge", at, x), value, x),
    "sign": _sign,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "logical_and": _one("and"),
    "bitwise_and": _one("and"),
    "logical_or": _one("or"),
    "bitwise_or": _one("or"),
    "logical_not": _one("not"),
    "bitwise_not": _one("not"),
    # The same numbers under another name.
    "alias": lambda g, x: x,
    "clone": lambda g, x: x,
    "expand": lambda g, x, size: x,
    "_to_copy": _number,
}
_OF_MASKS = {"logical_and", "bitwise_and", "logical_or", "bitwise_or", "logical_not", "bitwise_not"}
_CONSTANTS = ("zeros_like", "ones_like", "full_like", "scalar_tensor", "new_zeros", "new_ones")
# What says where and how a result lies, which is checked by the result itself.
_PLACEMENT = (
    "dtype",
    "device",
    "layout",
    "pin_memory",
    "non_blocking",
    "memory_format",
    "implicit",
)


class _CannotError(Exception):
    """An operator is known, but not with these arguments."""


class _Recorder(TorchDispatchMode):
    """Puts every operator that runs down as a node."""

    def __init__(self, told: str, graph: Graph) -> None:
        super().__init__()
        self.told, self.graph = told, graph
        # By identity; the tensors are kept, so that none is reused.
        self.nodes: dict[int, tuple[Tensor, Node]] = {}
        # Numbers that the function makes for itself, as tensors without dimensions.
        self.numbers: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To hide from Dynamo, the mode would import all of it, which takes seconds.
        return False

    def put(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = (tensor, node)

    def node_of(self, value: Any, operator: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) in self.nodes:
                return self.nodes[id(value)][1]
            if id(value) in self.numbers:
                return self.graph.constant(value.item())
            raise ValueError(
                f"{self.told}: {operator} takes a tensor of shape {tuple(value.shape)} that is not "
                "made of the arguments; what a cell learns belongs into its unit_weights, and a "
                "number should be Python's"
            )
        if isinstance(value, (bool, int, float)):
            return self.graph.constant(value)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = str(func).removeprefix("aten.").partition(".")[0]
        if func._schema.is_mutable:
            raise ValueError(f"{self.told}: {operator} writes to a tensor in place")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{self.told}: {operator} draws random numbers")
        if operator == "empty_like":
            raise ValueError(f"{self.told}: {operator} is for what is written in place, as dropout")
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        try:
            result = func(*args, **kwargs)
        except RuntimeError:
            # Of a tensor that does not belong here the shape is not what is wrong.
            for arg in given:
                self.node_of(arg, operator)
            if operator not in _BUILD:
                raise ValueError(f"{self.told} is not pointwise: it calls {operator}") from None
            raise
        shown = result[0] if operator == "log_sigmoid_forward" else result
        if not any(id(arg) in self.nodes for arg in given):
            made = all(id(arg) in self.numbers for arg in given) or operator == "lift_fresh"
            if not isinstance(shown, Tensor) or shown.dim() > 0 or not made:
                raise ValueError(f"{self.told} is not pointwise: it calls {operator}")
            self.numbers[id(shown)] = shown
            return result
        self.put(shown, self._built(operator, func, args, kwargs, shown))
        return result

    def _built(self, operator: str, func: Any, args: Any, kwargs: Any, result: Any) -> Node:
        if operator in _CONSTANTS:
            return self.graph.constant(result.flatten()[0].item())
        build = _BUILD.get(operator)
        if build is None:
            raise ValueError(f"{self.told} is not pointwise: it calls {operator}")
        operands = [self.node_of(arg, operator) for arg in args]
        named = {
            name: self.node_of(value, operator)
            for name, value in kwargs.items()
            if name not in _PLACEMENT
        }
        if named.pop("rounding_mode", None) is not None:
            raise ValueError(f"{self.told}: {operator} with a rounding_mode is not supported")
        masks = [isinstance(node, Node) and node.is_mask for node in operands]
        if operator in _OF_MASKS and not all(masks):
            raise ValueError(f"{self.told}: {operator} of numbers is not supported")
        if operator not in _OF_MASKS and operator != "where":
            operands = [_number(self.graph, o) if isinstance(o, Node) else o for o in operands]
        if result.dtype not in (torch.float64, torch.bool):
            raise ValueError(f"{self.told}: {operator} changes the dtype to {result.dtype}")
        try:
            return build(self.graph, *operands, **named)
        except _CannotError as why:
            raise ValueError(f"{self.told}: {operator} with {why} is not supported") from None
        except (TypeError, AttributeError):
            raise ValueError(f"{self.told}: {func} is not supported with these arguments") from None


def trace(
    function: Callable[..., Any],
    told: str,
    gates: int,
    products: int,
    states: int,
    unit_weights: int,
) -> tuple[Graph, list[Node]]:
    """The next states that a user's cell computes, as expressions.

    Args:
        function: called with tuples of tensors, as `Recurrent.step` is.
        told: what errors call it.
        gates, products, states, unit_weights: how many tensors each tuple holds.

    Returns:
        The graph and one node for each state. Leaves are ("input", gate), ("hidden", product),
        ("state", number) and ("unit", number).

    Raises:
        ValueError: the function is not pointwise, or uses what has no derivative or no C text here;
            the message names the operator. Or what it returns is not one (N, H) for each state.
    """
    graph = Graph()
    recorder = _Recorder(told, graph)
    # Asked now, for within there is no autograd.
    _past_an_end()
    # Between 0 and 1, so that nothing that is run is undefined.
    generator = torch.Generator().manual_seed(0)

    def leaves(kind: str, count: int, *shape: int) -> tuple[Tensor, ...]:
        found = tuple(
            torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
            for _ in range(count)
        )
        for number, tensor in enumerate(found):
            recorder.put(tensor, graph.leaf(kind, number))
        return found

    rows = (_ROWS, _UNITS)
    arguments = [
        leaves("input", gates, *rows),
        leaves("hidden", products, *rows),
        leaves("state", states, *rows),
    ]
    if unit_weights:
        arguments.append(leaves("unit", unit_weights, _UNITS))
    with torch.no_grad(), recorder:
        returned = function(*arguments)
    results: Sequence[Any] = (returned,) if isinstance(returned, Tensor) else returned
    if not isinstance(results, (tuple, list)) or len(results) != states:
        raise ValueError(f"{told} must return {states} tensor{'s' if states > 1 else ''}")
    nodes = []
    for number, result in enumerate(results):
        if not isinstance(result, Tensor) or id(result) not in recorder.nodes:
            raise ValueError(f"{told}: state {number} that it returns is not made of its arguments")
        if result.shape != rows or result.dtype != torch.float64:
            raise ValueError(
                f"{told}: state {number} that it returns is {result.dtype} of shape "
                f"{tuple(result.shape)} where the arguments are torch.float64 of shape {rows}"
            )
        nodes.append(recorder.nodes[id(result)][1])
    return graph, nodes
