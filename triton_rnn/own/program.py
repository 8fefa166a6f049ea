"""A cell's two steps as the backends take them: forward, what it keeps, the derived backward."""

from collections.abc import Sequence
from typing import NamedTuple

from triton_rnn.own.expression import OPERATIONS, Graph, Node, differentiate, reachable


class Program(NamedTuple):
    """What a pointwise step is made of. A product is a gate's part of ``weight_hh @ h``.

    Attributes:
        gates, products, states, unit_weights: G and how many there are of each other.
        masks: inputs behind those of the gates that have no gradient.
        leaves: the nodes of kind "input", "hidden", "state", "unit" by (kind, number), those that
            the step uses; "grad" are the gradients of the next states.
        starts: for each product the gate whose input's part it is added to before the step sees
            it, or -1: then the step has both apart.
        results: the next states.
        kept: what forward keeps for the backward, besides the first state (the C loops'; the Triton
            kernels keep masks too, see `to_keep`).
        grads: the different gradients of preactivations.
        input_slots, hidden_slots: which of `grads` belongs to a gate's input, and to a product.
        grad_states, grad_units: gradients of the states before, and of a row's share of the unit
            weights; None for zero.
    """

    gates: int
    products: int
    states: int
    unit_weights: int
    masks: int
    leaves: dict[tuple[str, int], Node]
    starts: tuple[int, ...]
    results: tuple[Node, ...]
    kept: tuple[Node, ...]
    grads: tuple[Node, ...]
    input_slots: tuple[int, ...]
    hidden_slots: tuple[int, ...]
    grad_states: tuple[Node | None, ...]
    grad_units: tuple[Node | None, ...]


def _fold(
    graph: Graph, results: Sequence[Node], products: int
) -> tuple[Graph, list[Node], tuple[int, ...]]:
    """The graph in which every product that only occurs as input + hidden stands for that sum.

    So the sum is made where the product is, and both have one gradient.
    """
    nodes = reachable(results)
    users: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for arg in node.args:
            users[arg].append(node)
    starts = [-1] * products
    sums: dict[Node, int] = {}
    for node in nodes:
        kinds = {arg.value[0]: arg for arg in node.args if arg.op == "leaf"}
        if node.op == "add" and kinds.keys() == {"input", "hidden"}:
            both = [kinds["input"], kinds["hidden"]]
            if all(users[leaf] == [node] and leaf not in results for leaf in both):
                product = kinds["hidden"].value[1]
                starts[product] = kinds["input"].value[1]
                sums[node] = product
    folded = Graph()
    made: dict[Node, Node] = {}
    for node in reachable(results, sums):
        if node in sums:
            made[node] = folded.leaf("hidden", sums[node])
        elif node.op == "leaf":
            made[node] = folded.leaf(*node.value)
        elif node.op == "constant":
            made[node] = folded.constant(node.value)
        else:
            made[node] = folded.apply(node.op, *(made[arg] for arg in node.args))
    return folded, [made[node] for node in results], tuple(starts)


def to_keep(
    results: Sequence[Node], roots: Sequence[Node], masks: bool = False
) -> tuple[Node, ...]:
    """What a backward that computes `roots` reads of the forward: leaves, and results of functions.

    Sums and products are made again from these. The first state is there anyway, for the gradient
    of weight_hh, and so are the unit weights.

    Args:
        masks: keep what was true rather than what it was made of: where numbers are rounded when
            they are kept, it may not be true of the rounded ones.
    """
    forward = set(reachable(results))
    changes: set[Node] = set()
    of_grads: set[Node] = set()
    for node in reachable((*results, *roots)):
        kind = node.value[0] if node.op == "leaf" else ""
        if kind == "grad" or any(arg in of_grads for arg in node.args):
            of_grads.add(node)
        elif kind not in ("", "unit") or any(arg in changes for arg in node.args):
            changes.add(node)
    keepable = {
        node
        for node in changes
        if (node.op == "leaf" and node.value != ("state", 0))
        or (node.op in OPERATIONS and OPERATIONS[node.op].costly and node in forward)
        or (masks and node.is_mask)
    }
    return tuple(node for node in reachable(roots, keepable) if node in keepable)


def derive(
    graph: Graph,
    results: Sequence[Node],
    gates: int,
    products: int,
    states: int,
    unit_weights: int,
    masks: int = 0,
) -> Program:
    """The program of traced expressions (`trace.trace`), whose last inputs may be masks."""
    graph, results, starts = _fold(graph, results, products)
    grads_of_results = [graph.leaf("grad", number) for number in range(states)]
    found = differentiate(graph, results, grads_of_results)

    def grad_of(kind: str, number: int) -> Node | None:
        return found.get(graph.leaf(kind, number))

    zero = graph.constant(0)
    slots: dict[Node, int] = {}

    def slot_of(kind: str, number: int) -> int:
        grad = grad_of(kind, number)
        return slots.setdefault(zero if grad is None else grad, len(slots))

    folded = {gate: product for product, gate in enumerate(starts) if gate >= 0}
    input_slots = tuple(
        slot_of("hidden", folded[gate]) if gate in folded else slot_of("input", gate)
        for gate in range(gates)
    )
    hidden_slots = tuple(slot_of("hidden", product) for product in range(products))
    grad_states = tuple(grad_of("state", number) for number in range(states))
    grad_units = tuple(grad_of("unit", number) for number in range(unit_weights))
    roots = [*slots, *(g for g in (*grad_states, *grad_units) if g is not None)]
    leaves = {node.value: node for node in reachable((*results, *roots)) if node.op == "leaf"}
    return Program(
        gates,
        products,
        states,
        unit_weights,
        masks,
        leaves,
        starts,
        tuple(results),
        to_keep(results, roots),
        tuple(slots),
        input_slots,
        hidden_slots,
        grad_states,
        grad_units,
    )
