"""One recorded graph as two: a forward one, and a backward one that computes again what is cheap."""

import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node


class Split(NamedTuple):
    """Two graphs made from one: inputs → results and what is kept; inputs, what is kept, cotangents → gradients."""

    forward: GraphModule
    backward: GraphModule


def split(graph: GraphModule, inputs: int, results: int) -> Split:
    """Take a graph (inputs, cotangents) → (results, gradients) apart."""
    nodes = list(graph.graph.nodes)
    places = [node for node in nodes if node.op == "placeholder"]
    (ends,) = nodes[-1].args
    late = set(places[inputs:])
    for node in nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    gradients = ends[results:]
    costly = {node for node in nodes if node not in late and _is_costly(node)}
    needed = _behind(gradients, costly)
    kept = [node for node in nodes if node in costly and node in needed]
    forward = _extracted(graph, places[:inputs], [*ends[:results], *kept])
    return Split(forward, _extracted(graph, [*places[:inputs], *kept, *places[inputs:]], gradients))


def _extracted(graph: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """The part of a graph that leads from some nodes to others."""
    made = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = made.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed = _behind(outputs, set(inputs))
    for node in graph.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output([copies[node] for node in outputs])
    return GraphModule(graph, made)


def _behind(ends: Iterable[Node], stop: set[Node]) -> set[Node]:
    """All nodes on the way from some nodes back to where to stop, both included."""
    found: set[Node] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend([] if node in stop else node.all_input_nodes)
    return found


def _is_costly(node: Node) -> bool:
    """Whether it is better kept than computed again."""
    if node.target is operator.getitem:
        return _is_costly(node.args[0])  # type: ignore[arg-type]
    return is_draw(node) or getattr(node.target, "_opname", None) in _COSTLY


_COSTLY = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


def is_draw(node: Node) -> bool:
    """Whether it draws from a generator."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
