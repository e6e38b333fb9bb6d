"""What a network makes of sizes alone: held as constants, so that channels are followed through it.

The first state of a recurrence (`torch.zeros(b, hidden, h, w)`) has a channel for every one of those that it
is put together with, and an identity matrix has two axes of them. As functions of sizes they would be opaque;
as buffers they are cut as any other table. Along sizes that follow the batch, height or width the buffer has
one element, and is expanded.
"""

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.ir.concrete import Unknown, Values
from graphcomp.ir.lifting import tensor_at
from graphcomp.ir.operators import function_name
from graphcomp.ir.program import acts_in_place, same_memory

_FILLED = {torch.zeros: 0, torch.ones: 1, "new_zeros": 0, "new_ones": 1, torch.full: None, "new_full": None}
"""What makes tensors of one number -> the number; None if it is an argument."""
_SHAPED = (torch.eye, torch.arange, torch.linspace)


def state_sizes(root: nn.Module, graph: fx.Graph) -> None:
    """Write out sizes of parameters and buffers, in place: they are numbers of the network's own."""
    for node in list(graph.nodes):
        if any(isinstance(a, fx.Node) for a in node.args[1:]) or node.kwargs or not node.args:
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "get_attr" and _asks_for_sizes(node):
            tensor = tensor_at(root, cast(str, source.target))
            found = tensor.shape if node.target is getattr else getattr(tensor, node.target)(*node.args[1:])
        elif node.target in (operator.getitem, len) and isinstance(source, tuple) and _are_numbers(source):
            found = node.target(*node.args)
        else:
            continue
        known = {node: tuple(found) if isinstance(found, torch.Size) else found}
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), partial(_stated, known))
        graph.erase_node(node)


def _stated(known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    return known.get(node, node)


def _are_numbers(sizes: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for n in sizes)


def _asks_for_sizes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and bool(node.args[1] == "shape")


def hold_constants(root: nn.Module, graph: fx.Graph, values: Values) -> None:
    """Put what is made of sizes into buffers, in place.

    Args:
        root: new buffers are put into it.
        graph: what was traced. values: of its nodes.
    """
    writers = [
        n for n in graph.nodes if n.op.startswith("call_") and n.all_input_nodes and acts_in_place(root, n)
    ]
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not (
            node.target in _FILLED or node.target in _SHAPED
        ):
            continue
        found = _constant(values, node)
        if found is None:
            continue
        tensor, sizes = found
        name = _free(root, node.name)
        root.register_buffer(name, tensor)
        with graph.inserting_before(node):
            new = graph.get_attr(name)
            if sizes:
                new = graph.call_method("expand", (new, *sizes))
            if any(_is_written(values, node, writer) for writer in writers):
                new = graph.call_method("clone", (new,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def drop_empty(graph: fx.Graph, values: Values) -> None:
    """Take operands without elements out of concatenations, in place: `q[:, :, :0]`, if no token is special.

    They have no channels that could go, and would have to keep all.
    """
    for node in graph.nodes:
        operands = node.args[0] if node.args else ()
        if function_name(node.target) != "cat" or not isinstance(operands, tuple | list):
            continue
        left = [x for x in operands if not _is_empty(x)]
        with suppress(Unknown):
            if 0 < len(left) < len(operands) and len({values.of(x).dtype for x in operands}) == 1:
                node.args = (left, *node.args[1:])
    for node in reversed(list(graph.nodes)):
        if _is_empty(node) and not node.users:
            graph.erase_node(node)


def _is_empty(node: Any) -> bool:
    """`x[:, :0]`."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return any(isinstance(i, slice) and i.stop == 0 and i.start in (None, 0) for i in items)


def _constant(values: Values, node: fx.Node) -> tuple[Tensor, Sequence[Any]] | None:
    """The buffer, and what it is expanded to where sizes follow those of the inputs; None if it is none."""
    try:
        found = [values.of(node, batch) for batch in (1, 2)]
    except Unknown:
        return None
    with suppress(Unknown):  # a network for one size
        found.append(values.of(node, grown=True))
    first: Tensor = found[0]
    if node.target in _SHAPED:
        same = all(not t.is_meta and torch.equal(t, first) for t in found)
        return (first.clone(), ()) if same else None
    sizes, fill = _arguments(node)
    if sizes is None or len(sizes) != first.ndim or not isinstance(fill, int | float):
        return None
    open_axes = [len({t.size(d) for t in found}) > 1 for d in range(first.ndim)]
    shape = [1 if is_open else n for is_open, n in zip(open_axes, first.shape, strict=True)]
    tensor = torch.full(shape, fill, dtype=first.dtype)
    return tensor, [s if o else -1 for s, o in zip(sizes, open_axes, strict=True)] if any(open_axes) else ()


def _arguments(node: fx.Node) -> tuple[Sequence[Any] | None, Any]:
    """Sizes one by one, and the number; None for sizes that are not."""
    given = list(node.args[1:] if node.op == "call_method" else node.args)
    fill: Any = _FILLED[node.target]
    if fill is None:
        fill = node.kwargs.get("fill_value", given[1] if len(given) > 1 else None)
        given = given[:1]
    if len(given) == 1 and isinstance(given[0], tuple | list):
        given = list(given[0])
    sizes = node.kwargs.get("size", given)
    if not isinstance(sizes, tuple | list) or not all(isinstance(s, int | fx.Node) for s in sizes):
        return None, fill
    return sizes, fill


def _is_written(values: Values, node: fx.Node, writer: fx.Node) -> bool:
    """Whether something writes into what a node yields, perhaps through a view of it."""
    try:
        return same_memory(values.of(writer.all_input_nodes[0]), values.of(node))
    except Unknown:
        return True


def _free(root: nn.Module, name: str) -> str:
    while hasattr(root, name):
        name += "_"
    return name
