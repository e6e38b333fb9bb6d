"""Numbers that follow from widths alone, written out where a network calculates with them: widths may change.

`q * q.shape[-1] ** -0.5` and the default scale of attention keep the scale that they had, and what is
asserted of a number of channels holds and goes. Numbers that follow the batch, height or width, and the sizes
of views, which are to follow what is left, stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphcomp.ir.concrete import BATCHES, Unknown, Values
from graphcomp.ir.operators import function_name
from graphcomp.ir.program import Program, eliminate_dead_nodes

_ARITHMETIC = frozenset(
    """add sub mul div pow floordiv rsub remainder fmod maximum minimum clamp clamp_min clamp_max masked_fill
    lerp addcmul addcdiv where lt le gt ge eq ne""".split()
)
"""Operators on tensors for which a number is a value and no size."""


def state_numbers(program: Program) -> None:
    """Write them out, in place."""
    values = Values(program.module, program.example_inputs)
    changed = _state_scales(program, values)
    for node in list(program.graph.nodes):
        if node.target is torch._assert:
            condition = node.args[0]
            if isinstance(condition, fx.Node) and _literal(values, condition) is True and not node.users:
                program.graph.erase_node(node)
                changed = True
        elif _calculates(node) and isinstance(program.values[node], Tensor):
            sources = [n for n in node.all_input_nodes if isinstance(program.values[n], int | float)]
            stated = {n: x for n in sources if (x := _literal(values, n)) is not None}
            if stated:
                node.args, node.kwargs = _with(node, stated)
                changed = True
    if changed:
        eliminate_dead_nodes(program.graph, program.module)
        program.module.recompile()


def _with(node: fx.Node, stated: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg((node.args, node.kwargs), lambda n: stated.get(n, n))


def _calculates(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and function_name(node.target) in _ARITHMETIC


def _literal(values: Values, node: fx.Node) -> Any:
    """The number that a node yields whatever the batch, height and width; None if it is not one number.

    What it is made of must not follow them either: `x.shape[0] < 4` is true for a while.
    """
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        try:
            found = [values.of(source, batch) for batch in BATCHES]
        except Unknown:
            return None
        if isinstance(found[0], Tensor):
            if source is node:
                return None
            continue
        if isinstance(found[0], int | float) and (found != found[:1] * 3 or _grows(values, source)):
            return None
        waiting += source.all_input_nodes
    return values.of(node)


def _grows(values: Values, node: fx.Node) -> bool:
    """Whether a number is another one at other heights and widths."""
    try:
        return bool(values.of(node, grown=True) != values.of(node))
    except Unknown:  # there is no other size that the network takes
        return False


def _state_scales(program: Program, values: Values) -> bool:
    """Attention divides by the root of its width unless it is told otherwise: told, it may be narrowed."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    nodes = [n for n in program.graph.nodes if n.target is F.scaled_dot_product_attention]
    for node in nodes:
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = (given.pop(name) for name in names[:3])
        if given.get("scale") is None and not _follows_size(values, query):
            given["scale"] = program.values[query].shape[-1] ** -0.5
            node.args, node.kwargs = (query, key, value), given
    return bool(nodes)


def _follows_size(values: Values, node: fx.Node) -> bool:
    """Whether the last axis of a node is as long as height and width make it."""
    try:
        return bool(values.of(node, grown=True).shape[-1] != values.of(node).shape[-1])
    except Unknown:
        return False
