"""Scalar expressions: what one hidden unit of one row computes, and how that is differentiated.

An expression is a node of a graph in which equal nodes are one node, so a common part is there
once. The operations are one table: how each is evaluated by torch, written in C (in the vectors of
recurrence.c) and in Triton (in blocks of float32), and differentiated. Where a derivative is a
matter of choice (a tie of `maximum`, `abs` at zero) it is torch's: tools/autograd/derivatives.yaml.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Node:
    """An operation on other nodes, or a leaf; made by a `Graph`, where equal nodes are one.

    Attributes:
        op: key of `OPERATIONS`, or ``"leaf"`` or ``"constant"``.
        args: the nodes that it is applied to.
        value: a leaf's kind and number, a constant's number, else None.
        index: its place in the graph; arguments come before what is made of them.
    """

    __slots__ = ("args", "index", "op", "value")

    def __init__(self, op: str, args: "tuple[Node, ...]", value: Any, index: int) -> None:
        self.op, self.args, self.value, self.index = op, args, value, index

    @property
    def is_mask(self) -> bool:
        """Whether it is true or false, not a number."""
        return self.op in OPERATIONS and OPERATIONS[self.op].is_mask


class Graph:
    """Makes nodes, each once, and puts constants together."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def _node(self, op: str, args: tuple[Node, ...], value: Any = None) -> Node:
        # By its text a zero tells its sign, and a NaN is the same as another.
        key = (op, *(arg.index for arg in args), repr(value))
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(op, args, value, len(self._nodes))
        return found

    def leaf(self, kind: str, number: int) -> Node:
        return self._node("leaf", (), (kind, number))

    def constant(self, value: float) -> Node:
        return self._node("constant", (), float(value))

    def apply(self, op: str, *args: Node) -> Node:
        """The node of an operation; simpler where it is the same to the last bit."""
        a, b = (*args, *args)[:2]
        if op in ("add", "sub", "mul", "div") and a.op == b.op == "constant":
            with contextlib.suppress(ArithmeticError):
                return self.constant(_FOLDED[op](a.value, b.value))
        if op in ("mul", "div") and b.op == "constant" and b.value == 1:
            return a
        if op == "mul" and a.op == "constant" and a.value == 1:
            return b
        if op == "detach" and a.op == "constant":
            return a
        if op == "neg" and a.op == "constant":
            return self.constant(-a.value)
        if op == "neg" and a.op == "neg":
            return a.args[0]
        if op in ("add", "mul") and a.index > b.index:
            args = (b, a)
        return self._node(op, args)

    def choose(self, mask: Node, yes: Node, no: Node) -> Node:
        return self.apply("where", mask, yes, no)


_FOLDED: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}

# Of a node and the gradient of its value, the gradients of its arguments; None for none.
Derivative = Callable[[Graph, Node, Node], "tuple[Node | None, ...]"]


class Operation(NamedTuple):
    """One line of the table.

    Attributes:
        evaluate: the torch function.
        c: its C text, of the arguments' names.
        triton: its Triton text, of the arguments' names or numbers.
        derivative: None where nothing is to be differentiated.
        costly: whether a result is rather kept for the backward than computed anew.
        is_mask: whether the result is true or false.
    """

    evaluate: Callable[..., torch.Tensor]
    c: str
    triton: str
    derivative: Derivative | None
    costly: bool = False
    is_mask: bool = False


def _extreme(mine: str) -> Derivative:
    """Of the larger or smaller one of two: all to that one, a half to each at a tie."""

    def derivative(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
        a, b = y.args
        half = g.choose(g.apply("eq", a, b), g.apply("mul", grad, g.constant(0.5)), grad)
        zero = g.constant(0)
        a_greater, b_greater = g.apply("gt", a, b), g.apply("gt", b, a)
        if mine == "max":
            return g.choose(b_greater, zero, half), g.choose(a_greater, zero, half)
        return g.choose(a_greater, zero, half), g.choose(b_greater, zero, half)

    return derivative


def _of_div(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    first = g.apply("div", grad, y.args[1])
    return first, g.apply("neg", g.apply("mul", first, y))


def _of_sigmoid(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    return (g.apply("mul", grad, g.apply("mul", y, g.apply("sub", g.constant(1), y))),)


def _of_tanh(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    return (g.apply("mul", grad, g.apply("sub", g.constant(1), g.apply("mul", y, y))),)


def _of_erf(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    square = g.apply("mul", y.args[0], y.args[0])
    slope = g.apply(
        "mul", g.constant(2 / math.sqrt(math.pi)), g.apply("exp", g.apply("neg", square))
    )
    return (g.apply("mul", grad, slope),)


def _of_abs(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    (x,), zero = y.args, g.constant(0)
    negative = g.choose(g.apply("gt", zero, x), g.apply("neg", grad), zero)
    return (g.choose(g.apply("gt", x, zero), grad, negative),)


def _of_where(g: Graph, y: Node, grad: Node) -> tuple[Node | None, ...]:
    mask, zero = y.args[0], g.constant(0)
    return None, g.choose(mask, grad, zero), g.choose(mask, zero, grad)


OPERATIONS: dict[str, Operation] = {
    "add": Operation(torch.add, "{0} + {1}", "{0} + {1}", lambda g, y, d: (d, d)),
    "sub": Operation(torch.sub, "{0} - {1}", "{0} - {1}", lambda g, y, d: (d, g.apply("neg", d))),
    "mul": Operation(
        torch.mul,
        "{0} * {1}",
        "{0} * {1}",
        lambda g, y, d: (g.apply("mul", d, y.args[1]), g.apply("mul", d, y.args[0])),
    ),
    "div": Operation(torch.div, "{0} / {1}", "{0} / {1}", _of_div),
    "neg": Operation(torch.neg, "-{0}", "-{0}", lambda g, y, d: (g.apply("neg", d),)),
    "sigmoid": Operation(
        torch.sigmoid, "sigmoid({0})", "sigmoid({0}, PTX)", _of_sigmoid, costly=True
    ),
    "tanh": Operation(
        torch.tanh, "hyperbolic_tangent({0})", "tanh({0}, PTX)", _of_tanh, costly=True
    ),
    "exp": Operation(
        torch.exp,
        "exponential({0})",
        "exp({0}, PTX)",
        lambda g, y, d: (g.apply("mul", d, y),),
        costly=True,
    ),
    "expm1": Operation(
        torch.expm1,
        "EACH_LANE(expm1, {0})",
        "expm1({0}, PTX)",
        lambda g, y, d: (g.apply("mul", d, g.apply("add", y, g.constant(1))),),
        costly=True,
    ),
    "log": Operation(
        torch.log,
        "EACH_LANE(log, {0})",
        "tl.log({0})",
        lambda g, y, d: (g.apply("div", d, y.args[0]),),
        costly=True,
    ),
    "log1p": Operation(
        torch.log1p,
        "EACH_LANE(log1p, {0})",
        "log1p({0})",
        lambda g, y, d: (g.apply("div", d, g.apply("add", y.args[0], g.constant(1))),),
        costly=True,
    ),
    "sqrt": Operation(
        torch.sqrt,
        "EACH_LANE(sqrt, {0})",
        "tl.sqrt({0})",
        lambda g, y, d: (g.apply("div", d, g.apply("mul", g.constant(2), y)),),
        costly=True,
    ),
    "sin": Operation(
        torch.sin,
        "EACH_LANE(sin, {0})",
        "tl.sin({0})",
        lambda g, y, d: (g.apply("mul", d, g.apply("cos", y.args[0])),),
        costly=True,
    ),
    "cos": Operation(
        torch.cos,
        "EACH_LANE(cos, {0})",
        "tl.cos({0})",
        lambda g, y, d: (g.apply("neg", g.apply("mul", d, g.apply("sin", y.args[0]))),),
        costly=True,
    ),
    "erf": Operation(torch.erf, "EACH_LANE(erf, {0})", "tl.erf({0})", _of_erf, costly=True),
    "abs": Operation(torch.abs, "magnitude({0})", "tl.abs({0})", _of_abs),
    "detach": Operation(torch.detach, "{0}", "{0}", None),
    # A NaN of either is the result, as in torch.
    "maximum": Operation(
        torch.maximum,
        "choose(({0} >= {1}) | ({0} != {0}), {0}, {1})",
        "tl.where(({0} >= {1}) | ({0} != {0}), {0}, {1})",
        _extreme("max"),
    ),
    "minimum": Operation(
        torch.minimum,
        "choose(({0} <= {1}) | ({0} != {0}), {0}, {1})",
        "tl.where(({0} <= {1}) | ({0} != {0}), {0}, {1})",
        _extreme("min"),
    ),
    "where": Operation(torch.where, "choose({0}, {1}, {2})", "tl.where({0}, {1}, {2})", _of_where),
    "gt": Operation(torch.gt, "{0} > {1}", "{0} > {1}", None, is_mask=True),
    "ge": Operation(torch.ge, "{0} >= {1}", "{0} >= {1}", None, is_mask=True),
    "eq": Operation(torch.eq, "{0} == {1}", "{0} == {1}", None, is_mask=True),
    "and": Operation(torch.logical_and, "{0} & {1}", "{0} & {1}", None, is_mask=True),
    "or": Operation(torch.logical_or, "{0} | {1}", "{0} | {1}", None, is_mask=True),
    "not": Operation(torch.logical_not, "~{0}", "~{0}", None, is_mask=True),
}


def reachable(roots: Iterable[Node], stop: Iterable[Node] = ()) -> list[Node]:
    """All nodes that the roots are made of, arguments first; none of what `stop` is made of."""
    seen, ends = set[Node](), set(stop)
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node not in ends:
                todo.extend(node.args)
    return sorted(seen, key=lambda node: node.index)


def differentiate(graph: Graph, results: Sequence[Node], grads: Sequence[Node]) -> dict[Node, Node]:
    """Gradients of all that the results depend on, by reverse accumulation."""
    found: dict[Node, Node] = {}

    def add(node: Node, grad: Node) -> None:
        found[node] = graph.apply("add", found[node], grad) if node in found else grad

    for result, grad in zip(results, grads, strict=True):
        add(result, grad)
    for node in reversed(reachable(results)):
        operation = OPERATIONS.get(node.op)
        if node not in found or operation is None or operation.derivative is None:
            continue
        parts = operation.derivative(graph, node, found[node])
        for arg, part in zip(node.args, parts, strict=True):
            if part is not None and arg.op != "constant":
                add(arg, part)
    return found


def evaluate(roots: Sequence[Node], leaves: Mapping[Node, torch.Tensor]) -> list[torch.Tensor]:
    """The roots' values by torch, from values of the leaves and of any nodes between."""
    like = next(iter(leaves.values()))
    values = dict(leaves)
    for node in reachable(roots, leaves):
        if node in values:
            continue
        if node.op == "constant":
            values[node] = like.new_tensor(node.value)
        else:
            function = OPERATIONS[node.op].evaluate
            values[node] = function(*(values[arg] for arg in node.args))
    return [values[root] for root in roots]


@dataclass
class _Names:
    """The C names of nodes, as they get them."""

    known: dict[Node, str]
    lines: list[str]

    def of(self, node: Node) -> str:
        if node.op == "constant":
            return f"all((REAL){_c_number(node.value)})"
        return self.known[node]


def _c_number(value: float) -> str:
    if math.isnan(value):
        return '__builtin_nan("")'
    if math.isinf(value):
        return "__builtin_inf()" if value > 0 else "-__builtin_inf()"
    return repr(value)


def in_c(stores: Sequence[tuple[str, Node]], known: Mapping[Node, str]) -> list[str]:
    """C statements, of vectors, that store nodes in places.

    Args:
        stores: each place (``"kept[0]"``) and what goes there.
        known: the C text of what is there already: leaves, and nodes that are read, not computed.
    """
    names = _Names(dict(known), [])
    for node in reachable((node for _, node in stores), known):
        if node in names.known or node.op == "constant":
            continue
        operation = OPERATIONS[node.op]
        text = operation.c.format(*(names.of(arg) for arg in node.args))
        kind = "bits" if operation.is_mask else "vec"
        names.known[node] = f"v{node.index}"
        names.lines.append(f"{kind} v{node.index} = {text};")
    return names.lines + [f"{place} = {names.of(node)};" for place, node in stores]


def _triton_number(value: float | bool) -> str:
    """A constant as float32 has it; one out of its range would make a whole block float64."""
    if isinstance(value, bool):
        return str(value)
    rounded = torch.tensor(value, dtype=torch.float32, device="cpu").item()
    if not math.isfinite(rounded):
        return f'float("{rounded}")'
    return repr(rounded if abs(rounded) >= torch.finfo(torch.float32).tiny else 0.0)


def in_triton(
    roots: Sequence[Node], known: Mapping[Node, str]
) -> tuple[list[str], dict[Node, str]]:
    """Triton statements, of blocks, that compute nodes; and the text of each node by then.

    Args:
        roots: the nodes that are wanted.
        known: the text of what is there already, as in `in_c`.
    """
    names, lines = dict(known), list[str]()
    numbers: dict[Node, float | bool] = {}
    for node in reachable(roots, known):
        if node in names:
            continue
        operation = OPERATIONS.get(node.op)
        if operation is None:
            numbers[node] = node.value
        elif all(arg in numbers for arg in node.args):
            # Not by Triton, whose functions are of blocks.
            given = (
                torch.tensor(numbers[arg], dtype=_dtype_of(arg), device="cpu") for arg in node.args
            )
            numbers[node] = operation.evaluate(*given).item()
        else:
            names[node] = f"v{node.index}"
            text = operation.triton.format(*(names[arg] for arg in node.args))
            lines.append(f"{names[node]} = {text}")
        if node in numbers:
            names[node] = _triton_number(numbers[node])
    return lines, names


def _dtype_of(node: Node) -> torch.dtype:
    return torch.bool if node.is_mask else torch.float64
