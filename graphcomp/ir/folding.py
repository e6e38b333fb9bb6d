"""Weights that are computed from parameters alone become parameters, so that their layers are plain ones.

Standardised and rescaled weights, kernels repeated for every channel, groups counted from the input: what a
function of weights is called with is worked out once, where it depends neither on samples nor on their size.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.concrete import Unknown, Values
from graphcomp.ir.lifting import Form, bound_arguments, form_of


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
                tensor = None if _is_shared(node, form, given, value) else _constant(values, value)
                if tensor is not None:
                    name = _store(root, value, part, tensor)
                    names.append(name)
                    with graph.inserting_before(node):
                        folded[value] = graph.get_attr(name)
            elif part not in form.tensors and part != "input":
                folded |= {n: values.number(n)[0] for n in _nodes(value) if _is_number(values, n)}
        if folded:
            for old, new in folded.items():
                _replace(node, old, new)
    return names


def _replace(node: fx.Node, old: fx.Node, new: Any) -> None:
    """`new` in the place of an argument: a node or a number."""
    node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new if n is old else n)


def _nodes(value: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return iter(found)


def _is_number(values: Values, node: fx.Node) -> bool:
    try:
        return isinstance(values.number(node)[0], int | str)
    except Unknown:
        return False


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


def _constant(values: Values, node: fx.Node) -> Tensor | None:
    """The tensor that a node yields for all inputs; None if there is none."""
    try:
        found = [values.of(node), values.of(node, batch=2), values.of(node, grown=True)]
    except Unknown:
        return None
    if not all(isinstance(t, Tensor) and not t.is_meta for t in found):
        return None
    first: Tensor = found[0]
    return first if all(torch.equal(first, t) for t in found[1:]) else None


def _store(root: nn.Module, node: fx.Node, part: str, tensor: Tensor) -> str:
    """Put a tensor where the parameter was that it is made of; beside it if others read that one."""
    sources = [n for n in _before(node) if n.op == "get_attr"]
    home = next((s for s in sources if _leaf(s) == part), sources[0] if sources else None)
    owner = "" if home is None else cast(str, home.target).rpartition(".")[0]
    holder = root.get_submodule(owner)
    trained = any(getattr(_tensor(root, s), "requires_grad", False) for s in sources)
    leaf = part
    while leaf != (None if home is None else _leaf(home)) and hasattr(holder, leaf):
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


def _tensor(root: nn.Module, node: fx.Node) -> Any:
    owner, _, leaf = cast(str, node.target).rpartition(".")
    return getattr(root.get_submodule(owner), leaf)
