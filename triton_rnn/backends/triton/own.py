"""A traced cell in the Triton kernels: the three functions of a `KernelCell`, as generated text.

Forward is the traced step. The derived backward is cut in two: what no gradient enters goes to
`factors`, which the kernel computes a step ahead, and the rest to `backward`, which stands between
two steps of the chain.
"""

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from triton_rnn.cells import OwnCell, RegularizedCell
from triton_rnn.kernels import functions
from triton_rnn.kernels.cells import KernelCell
from triton_rnn.own.expression import Graph, Node, in_triton, reachable
from triton_rnn.own.program import Program, to_keep

# What a node is made of, by the most changeable of its leaves.
_CONSTANT, _UNIT, _ROW, _GRAD = range(4)
_LEAVES = {"unit": _UNIT, "input": _ROW, "hidden": _ROW, "state": _ROW, "grad": _GRAD}


def _ranks(nodes: Sequence[Node]) -> dict[Node, int]:
    """What each node is made of; arguments come first in `nodes`."""
    ranks: dict[Node, int] = {}
    for node in nodes:
        own = _LEAVES[node.value[0]] if node.op == "leaf" else _CONSTANT
        ranks[node] = max([own, *(ranks[arg] for arg in node.args)])
    return ranks


def regrouped(roots: Sequence[Node]) -> list[Node]:
    """The same with (grad * a) * b as grad * (a * b): a step of the chain has fewer products."""
    graph, made, ranks = Graph(), dict[Node, Node](), dict[Node, int]()

    def apply(op: str, *args: Node) -> Node:
        node = graph.apply(op, *args)
        ranks.setdefault(node, max(ranks[arg] for arg in args))
        return node

    def multiplied(a: Node, b: Node) -> Node:
        for product, factor in ((a, b), (b, a)):
            if product.op == "mul" and ranks[product] == _GRAD and ranks[factor] == _ROW:
                for grad, other in (product.args, product.args[::-1]):
                    if ranks[grad] == _GRAD and ranks[other] in (_CONSTANT, _ROW):
                        return apply("mul", grad, apply("mul", other, factor))
        return apply("mul", a, b)

    for node in reachable(roots):
        if node.op == "leaf":
            made[node] = graph.leaf(*node.value)
            ranks[made[node]] = _LEAVES[node.value[0]]
        elif node.op == "constant":
            made[node] = graph.constant(node.value)
            ranks[made[node]] = _CONSTANT
        else:
            args = [made[arg] for arg in node.args]
            made[node] = multiplied(*args) if node.op == "mul" else apply(node.op, *args)
    return [made[root] for root in roots]


def layout(inputs: Sequence[int], products: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """An order of gradients in which those of all products, and those of all inputs, lie together.

    Args:
        inputs, products: which gradient belongs to each.

    Returns:
        The product that comes first, the others following in a ring; and the order: the products,
        then the inputs, of which the first may be the last products.
    """
    best: tuple[int, tuple[int, ...]] = (0, (*products, *inputs))
    for turn in range(len(products)):
        ring = (*products[turn:], *products[:turn])
        for shared in range(min(len(ring), len(inputs)), 0, -1):
            order = (*ring, *inputs[shared:])
            if ring[-shared:] == tuple(inputs[:shared]) and len(order) < len(best[1]):
                best = turn, order
    return best


def _function(head: str, lines: Sequence[str]) -> str:
    return f"@triton.jit\ndef {head}:\n" + "".join(f"    {line}\n" for line in lines) + "\n\n"


def _tuple(texts: Sequence[str]) -> str:
    return "(" + "".join(f"{text}, " for text in texts) + ")"


def _number(node: Node, text: str) -> str:
    """A block of numbers, of a mask ones and zeros."""
    return f"tl.where({text}, 1.0, 0.0)" if node.is_mask else text


def _whole(node: Node, text: str, like: str, ranks: dict[Node, int]) -> str:
    """A block of all rows, of what may be one number, or one for each unit."""
    if ranks[node] >= _ROW:
        return text
    return f"tl.zeros_like({like})" + ("" if text == "0.0" else f" + {text}")


class _Text:
    """The functions' text, and the numbers that the kernels are compiled for."""

    def __init__(self, program: Program) -> None:
        self.turn, order = layout(program.input_slots, program.hidden_slots)
        zero = Graph().constant(0)
        blocks = [program.grads[slot] for slot in order]
        blocks += [zero if grad is None else grad for grad in program.grad_units]
        before = [zero if grad is None else grad for grad in program.grad_states]
        count = len(program.results)
        # In one graph, where equal nodes are one.
        nodes = regrouped([*program.results, *blocks, *before])
        self.program, self.results = program, nodes[:count]
        self.blocks, self.before = nodes[count : count + len(blocks)], nodes[count + len(blocks) :]
        self.ranks = _ranks(reachable(nodes))
        # The next h is there anyway.
        kept = to_keep(self.results, nodes[count:], masks=True)
        self.kept = [node for node in kept if node is not self.results[0]]
        wanted = [*self.blocks, *self.before]
        found = {
            arg
            for node in reachable(wanted)
            if self.ranks[node] == _GRAD
            for arg in node.args
            if self.ranks[arg] == _ROW
        }
        self.factors = sorted(found, key=lambda node: node.index)
        self.biases = program.starts.count(-1)

    def _leaves(self, texts: dict[tuple[str, int], str]) -> dict[Node, str]:
        return {
            node: texts[node.value]
            for node in self.ranks
            if node.op == "leaf" and node.value in texts
        }

    def forward(self) -> str:
        texts, lines = {("state", 0): "h", ("state", 1): "c"}, []
        for number in range(self.program.gates + self.program.masks):
            texts["input", number] = f"x[{number}]"
        for number in range(self.program.unit_weights):
            texts["unit", number] = f"v[{self.biases + number}]"
        bias = 0
        for product, start in enumerate(self.program.starts):
            texts["hidden", product] = f"a{product}"
            other = f"x[{start}]" if start >= 0 else f"v[{bias}]"
            lines.append(f"a{product} = a[{product}] + {other}")
            bias += start < 0
        statements, names = in_triton([*self.results, *self.kept], self._leaves(texts))
        states = [_whole(node, names[node], "h", self.ranks) for node in self.results]
        kept = [_number(node, names[node]) for node in self.kept]
        returned = ", ".join([*states, "c"][:2])
        lines += [*statements, f"return {returned}, {_tuple(kept)}"]
        return _function("own_forward(a, x, v, h, c, PTX: tl.constexpr)", lines)

    def _units(self) -> dict[tuple[str, int], str]:
        return {("unit", k): f"v[{k}]" for k in range(self.program.unit_weights)}

    def factors_of(self) -> str:
        known = {self.results[0]: "state"}
        known |= self._leaves({("state", 0): "before", **self._units()})
        known |= {
            node: f"(saved[{k}] != 0)" if node.is_mask else f"saved[{k}]"
            for k, node in enumerate(self.kept)
        }
        lines, names = in_triton(self.factors, known)
        found = [_number(node, names[node]) for node in self.factors]
        return _function(
            "own_factors(saved, state, before, v, PTX: tl.constexpr)",
            [*lines, f"return {_tuple(found)}"],
        )

    def backward(self) -> str:
        known = self._leaves({("grad", 0): "dh", ("grad", 1): "dc", **self._units()})
        known |= {
            node: f"(factors[{k}] != 0)" if node.is_mask else f"factors[{k}]"
            for k, node in enumerate(self.factors)
        }
        lines, names = in_triton([*self.blocks, *self.before], known)
        blocks, before = (
            [_whole(node, names[node], "dh", self.ranks) for node in nodes]
            for nodes in (self.blocks, self.before)
        )
        returned = ", ".join([_tuple(blocks), *[*before, "dc"][:2]])
        return _function(
            "own_backward(factors, dh, dc, v, PTX: tl.constexpr)", [*lines, f"return {returned}"]
        )

    def whole(self) -> str:
        return (self.forward() + self.factors_of() + self.backward()).rstrip() + "\n"


def _compiled(text: str) -> dict[str, Any]:
    """The functions of a text.

    Triton reads the text of a function again, by way of `linecache`: there it is a file that is
    named by what is in it. So are the keys of Triton's cache on disk.
    """
    name = f"<a user's cell {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace = {
        "__name__": __name__,
        "triton": triton,
        "tl": tl,
        **{name: getattr(functions, name) for name in ("sigmoid", "tanh", "exp", "expm1", "log1p")},
    }
    exec(compile(text, name, "exec"), namespace)
    return namespace


@functools.cache
def kernel_cell(cell: OwnCell | RegularizedCell) -> KernelCell:
    """A traced cell as the kernels see it; made once."""
    program = cell.program
    assert program is not None
    text = _Text(program)
    made = _compiled(text.whole())
    return KernelCell(
        made["own_forward"],
        made["own_factors"],
        made["own_backward"],
        inputs=program.gates + program.masks,
        products=program.products,
        saved=len(text.kept),
        width=len(text.blocks),
        carried=len(text.factors),
        starts=program.starts,
        turn=text.turn,
        units=program.unit_weights,
        has_c=program.states == 2,
        masks=program.masks,
    )
