"""Weights that are computed from parameters alone become parameters, so that their layers are plain ones.

Standardised and rescaled weights, kernels repeated for every channel, groups counted from the input: what a
function of weights is called with is worked out once, where it depends neither on samples nor on their size.
"""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.concrete import Unknown, Values
from graphcomp.ir.lifting import Form, bound_arguments, form_of, tensor_at
from graphcomp.ir.program import acts_in_place, same_memory


def fold_weights(root: nn.Module, graph: fx.Graph, values: Values) -> list[str]:
    """Replace computed weights, and computed settings of functions of weights, by their values, in place.

    Args:
        root: new tensors are put into it; a parameter that nothing else reads gets the computed value.
        graph: what was traced.
        values: of its nodes.

    Returns:
        The new parameters, by dotted name: training moves them, and not what they were computed from.
    """
    names: list[str] = []
    for node in list(graph.nodes):
        form = form_of(node)
        given = None if form is None else bound_arguments(form, node)
        if form is None or given is None:
            continue
        folded: dict[fx.Node, Any] = {}
        for part, value in given.items():
            if part in form.tensors and isinstance(value, fx.Node) and value.op != "get_attr":
                tensor = (
                    None if _is_shared(node, form, given, value) else _constant(root, values, value, node)
                )
                if tensor is not None:
                    name = _store(root, value, part, tensor, names)
                    names.append(name)
                    with graph.inserting_before(node):
                        folded[value] = graph.get_attr(name)
            elif part not in form.tensors and part != "input":
                folded |= _numbers(values, value)
        if folded:
            node.args, node.kwargs = _replaced((node.args, node.kwargs), folded)
            made = [n for n, new in folded.items() if isinstance(new, fx.Node)]
            for old in dict.fromkeys(n for m in made for n in (m, *_before(m))):
                _erase_unread(graph, old)
    return names


def _replaced(arguments: Any, new: Mapping[fx.Node, Any]) -> Any:
    """Arguments with nodes or numbers in the place of nodes."""
    return fx.node.map_arg(arguments, lambda n: new.get(n, n))


def _numbers(values: Values, argument: Any) -> dict[fx.Node, Any]:
    """The nodes in an argument that yield one number (or word) for inputs of every size -> that."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(argument, nodes.append)
    found: dict[fx.Node, Any] = {}
    for node in nodes:
        with contextlib.suppress(Unknown):
            number, is_special = values.number(node)
            if isinstance(number, int | str) and not is_special:
                found[node] = number
    return found


def _is_shared(call: fx.Node, form: Form, given: dict[str, Any], weight: fx.Node) -> bool:
    """Whether what a weight is made of is read by other layers, too: a tie is not cut."""
    modules = {n.target for n in call.graph.nodes if n.op == "call_module"}
    made = [n for part in form.tensors if isinstance(n := given[part], fx.Node)]
    inside = {call, *made, *(n for part in made for n in _before(part))}
    return any(
        str(n.target).rpartition(".")[0] in modules or not inside.issuperset(n.users)
        for n in _before(weight)
        if n.op == "get_attr"
    )


def _constant(root: nn.Module, values: Values, node: fx.Node, call: fx.Node) -> Tensor | None:
    """The tensor that a call reads for all inputs; None if there is none.

    What is written in place before the call (`bias[8:16].zero_()`) is in it; who writes into what the network
    itself holds computes something else the next time, and that is none.
    """
    family = {node, *_before(node)}
    nodes = list(call.graph.nodes)
    writers = [n for n in nodes[: nodes.index(call)] if _writes(root, n, family)]
    try:
        if writers:
            values = values.fresh()
            wanted = family.union(writers, *map(_before, writers))
            for part in (n for n in nodes if n in wanted):
                if part in writers and _is_held(root, values.of(part.all_input_nodes[0])):
                    return None
                for batch, grown in _SETTINGS:
                    values.of(part, batch, grown)
        found = [values.of(node, batch, grown) for batch, grown in _SETTINGS]
    except Unknown:
        return None
    if not all(isinstance(t, Tensor) and not t.is_meta for t in found):
        return None
    first: Tensor = found[0]
    return first if all(torch.equal(first, t) for t in found[1:]) else None


_SETTINGS = ((1, False), (2, False), (1, True))
"""Batches, and whether height and width are others, for which a constant must be the same."""


def _writes(root: nn.Module, node: fx.Node, family: set[fx.Node]) -> bool:
    """Whether a node writes in place into something that is made of these."""
    if not (node.all_input_nodes and node.op.startswith("call_") and acts_in_place(root, node)):
        return False
    operand = node.all_input_nodes[0]
    return operand in family or not family.isdisjoint(_before(operand))


def _is_held(root: nn.Module, value: Any) -> bool:
    """Whether a value lies in a parameter or buffer."""
    return any(same_memory(value, t) for t in (*root.parameters(), *root.buffers()))


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Take out what is only read by what is written into it, and by nothing in the end."""
    if node._erased:
        return
    after, waiting = {node: None}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output" or user.target is torch._assert:
                return
            if user not in after:
                after[user] = None
                waiting.append(user)
    if all(n.op in ("call_function", "call_method") for n in after):
        for dead in [n for n in reversed(list(graph.nodes)) if n in after]:
            graph.erase_node(dead)


def _store(root: nn.Module, node: fx.Node, part: str, tensor: Tensor, stored: Collection[str]) -> str:
    """Put a tensor where the parameter was that it is made of, or beside it under a name that is free.

    `stored` are the names given before: one call's weight does not take the place of another's.
    """
    sources = [n for n in _before(node) if n.op == "get_attr"]
    home = next((s for s in sources if _leaf(s) == part), sources[0] if sources else None)
    owner = "" if home is None else cast(str, home.target).rpartition(".")[0]
    holder = root.get_submodule(owner)
    trained = any(tensor_at(root, cast(str, s.target)).requires_grad for s in sources)
    leaf = part
    while hasattr(holder, leaf):
        name = f"{owner}.{leaf}" if owner else leaf
        own = home is not None and leaf == _leaf(home) and name not in stored
        if own or name in stored and torch.equal(tensor_at(root, name), tensor):
            break
        leaf += "_computed"
    value = nn.Parameter(tensor.detach().clone(), requires_grad=trained)
    holder._buffers.pop(leaf, None)
    holder._parameters[leaf] = value
    return f"{owner}.{leaf}" if owner else leaf


def _before(node: fx.Node) -> list[fx.Node]:
    seen, waiting = dict[fx.Node, None](), [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen[source] = None
                waiting.append(source)
    return list(seen)


def _leaf(node: fx.Node) -> str:
    return cast(str, node.target).rpartition(".")[2]
