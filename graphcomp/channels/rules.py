"""What every operator does with channel labels: one row an operator, in the tables at the end of this file.

An operator without a row is opaque: what it touches is pinned and named. Data movement needs no rule of its
own: the operator runs on the labels (`MOVES`), here and, on position numbers, in `channels.layouts`.
"""

import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.labels import along, canonical, compact, concatenate, unlabelled, varying
from graphcomp.channels.layers import (
    computed_conv,
    conv,
    embedding,
    functional_norm,
    is_beside,
    linear,
    norm,
    slide,
)
from graphcomp.channels.mixing import group_norm, layer_norm, reduce, softmax
from graphcomp.channels.moves import MOVES, NotMovable, holds_tensor, move, padding_of
from graphcomp.channels.numbers import network_input, plain
from graphcomp.channels.opaque import (
    COEFFICIENTS,
    Rule,
    argument,
    computed,
    opaque,
    operand,
    pin_value,
    what,
    why_opaque,
)
from graphcomp.channels.planes import fold, glu, sample, shaped_like, unfold, unpool
from graphcomp.channels.products import along_second, attention, carry, einsum, matmul
from graphcomp.channels.recurrent import recurrent
from graphcomp.channels.tracker import Tracker, Unread
from graphcomp.ir import (
    LAYERS,
    MASKS,
    MODULE_NAMES,
    Program,
    acts_in_place,
    is_hooked,
    is_read_later,
    op_name,
)


def apply_rule(tracker: Tracker, node: fx.Node) -> Any:
    """Run one node on labels."""
    if node.op == "placeholder":
        return network_input(tracker, node)
    if node.op == "get_attr":
        return Unread()
    if node.op == "output":
        for source in node.all_input_nodes:
            pin_value(tracker, node, source, "network output")
        return None
    value = tracker.program.values[node]
    if not holds_tensor(value):
        carry(tracker, node, "plain")
        return plain(tracker, node, value)
    if node in tracker.unfollowed:
        for source in node.all_input_nodes:
            tracker.freeze(source)
        return Unread()
    rule = _find_rule(tracker.program, node)
    if rule is None:
        return opaque(tracker, node)
    if rule is not _move:
        for source in node.all_input_nodes:
            for count in tracker.counts.get(source, ()):
                tracker.pin_count(node, count, "the number of channels is used as a number")
            if isinstance(tracker.values[source], Tensor):
                tracker.needs_rectangle(node, tracker.values[source])
    found = rule(tracker, node)
    if rule not in (matmul, einsum):
        carry(tracker, node, rule.__name__.strip("_"))
    return found


def _find_rule(program: Program, node: fx.Node) -> Rule | None:
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        if is_hooked(module):
            return None
        return MODULE_RULES.get(type(module))
    if node.target in MASKS:
        return _mask
    return FUNCTION_RULES.get(op_name(program, node))


def constants_in(program: Program) -> frozenset[fx.Node]:
    """What is computed from parameters alone."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or node.op.startswith("call_") and sources and constant.issuperset(sources):
            constant.add(node)
    return frozenset(constant)


def unfollowed(program: Program, constant: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Those of `constants_in` that are neither read by who takes labels nor written into what is: weights."""
    followed: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        readers = [user for user in node.users if user.op.startswith("call_")]
        if node in constant and (
            any(
                user in followed
                if user in constant
                else _find_rule(program, user) not in (None, computed_conv)
                for user in readers
            )
            or (acts_in_place(program.module, node) and is_read_later(program, node))
        ):
            followed.add(node)
    return frozenset(n for n in constant - followed if n.op != "get_attr")


def is_move(program: Program, node: fx.Node) -> bool:
    """Whether a node only moves data."""
    return node.op.startswith("call_") and _find_rule(program, node) in (_move, _stack, _pad)


def kind_of(program: Program, node: fx.Node) -> str | None:
    """What a called node does, by the name of its rule: `conv`, `pass`, `move`, …; None if it is opaque."""
    rule = _find_rule(program, node)
    return None if rule is None else rule.__name__.strip("_")


def opaque_layers(program: Program) -> dict[str, str]:
    """Layers with parameters that no rule follows -> why: their channels are in no group, and stay."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and any(True for _ in program.layer(node.target).parameters()):
            rule = _find_rule(program, node)
            if rule is None:
                found[node.target] = why_opaque(program, node)
            elif rule is computed:
                found[node.target] = COEFFICIENTS
    return found


# ---------------------------------------------------------------------- rules


def _pass(tracker: Tracker, node: fx.Node) -> Any:
    """Element-wise on one tensor (clamp and its like may take more)."""
    if sum(map(tracker.is_tensor, node.all_input_nodes)) > 1:
        return _couple(tracker, node)
    return operand(tracker, node)


def _spatial(tracker: Tracker, node: fx.Node) -> Any:
    """Works on each channel's plane (pooling, resizing)."""
    labels, value = operand(tracker, node), tracker.program.values[node]
    rank = {"1d": 1, "2d": 2, "3d": 3}.get(what(tracker, node).lower()[-2:], labels.ndim - 2)
    axis = labels.ndim - rank - 1
    if is_beside(labels, axis):
        return opaque(tracker, node) if isinstance(value, tuple) else slide(tracker, node, labels)
    vector = tracker.vector(node, labels, axis)
    if isinstance(value, tuple):  # with the positions that maxima were found at
        return tuple(along(vector, axis, part.shape) for part in value)
    return along(vector, axis, tracker.shape(node))


def _reduce(tracker: Tracker, node: fx.Node) -> Any:
    return reduce(tracker, node, _couple)


def _made(tracker: Tracker, node: fx.Node) -> Tensor:
    """A tensor of a size, in the type of another."""
    return unlabelled(tracker.shape(node))


def _couple(tracker: Tracker, node: fx.Node) -> Any:
    """Element-wise on several tensors: labels that meet live or die together."""
    beside = along_second(tracker, node)
    operands = [tracker.labels(a) for a in node.all_input_nodes if tracker.is_tensor(a) and a not in beside]
    shape = tracker.shape(node)
    if tracker.join == "pad" and op_name(tracker.program, node) == "add":
        joined = _join(tracker, node, shape)
        if joined is not None:
            return joined
    carrying = [x for x in operands if varying(x)]
    if not carrying:
        singles = [x for x in operands if x.numel() and int(compact(x).flatten()[0])]
        for x in singles[1:]:
            tracker.couple(node, compact(singles[0]).flatten()[:1], compact(x).flatten()[:1])
        lead = singles[0] if singles else torch.zeros((), dtype=torch.int64)
        return compact(lead).flatten()[:1].reshape([1] * len(shape)).expand(shape)
    along_axes = {tuple(d - x.ndim for d in varying(x)) for x in carrying}
    if len(along_axes) == 2 and all(len(axes) == 1 for axes in along_axes):
        return _outer(tracker, node, operands, [axis for (axis,) in along_axes])
    lead = min(carrying, key=lambda x: len(varying(x)))
    axes = {d - lead.ndim for d in varying(lead)}
    whole = False
    for x in operands:
        if x is lead:
            continue
        if any(-d <= x.ndim and x.size(d) > 1 for d in axes):
            if bool(compact(x).any()):
                tracker.couple(node, lead, x)
                continue
            tracker.pin(node, lead, LAID_OUT)
            if all(-d <= x.ndim and x.size(d) > 1 for d in axes):
                whole = True
        elif bool(compact(x).any()):
            tracker.pin(node, x, "is broadcast over other channels")
    return unlabelled(shape) if whole else lead.expand(shape)  # none of it is a channel's


LAID_OUT = "meets what was computed of all channels, laid out along them"


def _outer(tracker: Tracker, node: fx.Node, operands: list[Tensor], axes: list[int]) -> Tensor:
    """Channels along one axis meet others along another: a table (`channels.products`)."""
    found = []
    for axis in axes:
        own = [x for x in operands if {d - x.ndim for d in varying(x)} == {axis}]
        vectors = [tracker.vector(node, x, x.ndim + axis) for x in own]
        for other in vectors[1:]:
            tracker.couple(node, vectors[0], other)
        if any(len(x.shape) >= -axis and x.size(axis) > 1 for x in operands if not any(x is y for y in own)):
            tracker.pin(node, vectors[0], LAID_OUT)
        found.append((axis, vectors[0]))
    for x in operands:
        if not varying(x) and bool(compact(x).any()):
            tracker.pin(node, x, "is broadcast over other channels")
    shape = tracker.shape(node)
    found.sort(key=lambda f: (tracker.is_held(f[1]), -f[1].numel()))
    (axis, labels), (second, beside) = found
    tracker.second[node] = len(shape) + second, beside
    return along(labels, len(shape) + axis, shape)


def _mask(tracker: Tracker, node: fx.Node) -> Any:
    """What stands in front of a normalisation (`channels.masks`) goes with its channels."""
    return _couple(tracker, node)


def _join(tracker: Tracker, node: fx.Node, shape: tuple[int, ...]) -> Tensor | None:
    """An addition of two activations whose operands may keep channels of their own."""
    if len(node.args) < 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    a, b = (cast(fx.Node, n) for n in node.args[:2])
    if (
        a is b
        or a.op == "get_attr"
        or b.op == "get_attr"
        or not (tracker.is_tensor(a) and tracker.is_tensor(b))
    ):
        return None
    x, y = tracker.labels(a), tracker.labels(b)
    if x.shape != y.shape or varying(x) != varying(y) or len(varying(x)) != 1:
        return None
    inplace = node.target is operator.iadd or (isinstance(node.target, str) and node.target.endswith("_"))
    if inplace and is_read_later(tracker.program, node):
        return None  # the masked copy would not be what others see
    (axis,) = varying(x)
    out = tracker.mint(shape[axis])
    tracker.joins.append((node, axis, compact(x).flatten(), compact(y).flatten(), out))
    return along(out, axis, shape)


def _move(tracker: Tracker, node: fx.Node) -> Any:
    """Run the operator itself on the labels."""
    if node.target is operator.getitem and not tracker.is_tensor(node.args[0]):
        return _item(tracker, node)
    try:
        result = move(tracker.program, node, tracker.labels, lambda n: tracker.program.values[n])
    except NotMovable:
        return opaque(tracker, node)
    if isinstance(result, Tensor):
        return canonical(result)
    return tuple(canonical(r) for r in result)


def _attribute(tracker: Tracker, node: fx.Node) -> Any:
    """`.values` and `.indices` of max, min, median."""
    source, name = cast(fx.Node, node.args[0]), cast(str, node.args[1])
    whole = tracker.program.values[source]
    if isinstance(whole, tuple) and isinstance(tracker.values[source], tuple):
        at = next(i for i, part in enumerate(whole) if part is getattr(whole, name))
        return tracker.values[source][at]
    return opaque(tracker, node)


def _item(tracker: Tracker, node: fx.Node) -> Any:
    source, index = cast(fx.Node, node.args[0]), node.args[1]
    index = fx.node.map_arg(index, lambda n: tracker.program.values[n])
    values = tracker.values[source]
    return values[index] if isinstance(index, int | slice) else opaque(tracker, node)


def _stack(tracker: Tracker, node: fx.Node) -> Any:
    """Operands must keep equal shapes; what is coupled has the labels of the first."""
    if isinstance(node.args[0], fx.Node):  # one tuple of tensors
        operands = list(cast(Iterable[Tensor], tracker.values[node.args[0]]))
    else:
        operands = [tracker.labels(a) for a in cast(Iterable[fx.Node], node.args[0])]
    for x in operands[1:]:
        tracker.couple(node, operands[0], x)
    dim = argument(tracker, node, 1, "dim", 0) % len(tracker.shape(node))
    return canonical(operands[0]).unsqueeze(dim).expand(tracker.shape(node))


def _pad(tracker: Tracker, node: fx.Node) -> Any:
    """Zeros (or any constant) beside the channels get labels of their own; beside a plane, its channel's."""
    labels = operand(tracker, node)
    padding = padding_of(tracker.program, node)
    if padding is None:
        return opaque(tracker, node)
    for d, (before, after) in padding.amounts(labels.ndim).items():
        if d in varying(labels):
            plain_amounts = padding.mode == "constant" and min(before, after) >= 0 and not padding.computed
            if not plain_amounts:
                return opaque(tracker, node)
            parts = [
                along(tracker.mint(n), d, [*labels.shape[:d], n, *labels.shape[d + 1 :]])
                for n in (before, after)
            ]
            labels = concatenate([parts[0], labels, parts[1]], d)
            tracker.needs_rectangle(node, labels)
        else:
            shape = [*labels.shape[:d], labels.size(d) + before + after, *labels.shape[d + 1 :]]
            labels = labels.narrow(d, 0, 1).expand(shape)
    return labels


# ---------------------------------------------------------------------- the tables

_POOLS = [f"{a}{k}_pool{d}d" for a in ("", "adaptive_") for k in ("avg", "max") for d in (1, 2, 3)]

FUNCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _move),
    "stack": _stack,
    "pad": _pad,
    **dict.fromkeys(["view_as", "reshape_as"], shaped_like),
    **dict.fromkeys(["matmul", "bmm"], matmul),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "grid_sample": sample,
    "unfold": unfold,
    "fold": fold,
    **dict.fromkeys(
        """relu relu6 elu selu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu logsigmoid
        softplus softsign tanhshrink sigmoid tanh exp log log1p expm1 sqrt rsqrt square abs neg clamp
        rrelu clamp_min clamp_max erf sin cos reciprocal sign round floor ceil hardshrink softshrink threshold
        positive dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth
        logical_not bitwise_not nan_to_num zeros_like ones_like""".split(),
        _pass,
    ),
    **dict.fromkeys([f"{name}_with_indices" for name in _POOLS if "max" in name], _spatial),
    **dict.fromkeys([*_POOLS, "interpolate", "lp_pool1d", "lp_pool2d", "lp_pool3d"], _spatial),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], computed_conv),
    **dict.fromkeys([f"max_unpool{d}d" for d in (1, 2, 3)], unpool),
    "batch_norm": functional_norm,
    **dict.fromkeys(["layer_norm", "rms_norm"], layer_norm),
    **dict.fromkeys(["softmax", "log_softmax", "softmin", "cumsum", "cumprod", "normalize"], softmax),
    **dict.fromkeys(
        """mean sum prod amax amin max min median logsumexp norm vector_norm var std var_mean std_mean
        any all""".split(),
        _reduce,
    ),
    "glu": glu,
    "getattr": _attribute,
    **dict.fromkeys(["arange", "new_zeros", "new_ones", "new_full"], _made),
    **dict.fromkeys(
        """add sub mul div pow floordiv maximum minimum fmax fmin where lerp addcmul addcdiv atan2 rsub
        remainder fmod masked_fill expand_as lt le gt ge eq ne logical_and logical_or logical_xor
        bitwise_and bitwise_or bitwise_xor""".split(),
        _couple,
    ),
}

_LAYERS: dict[str, Rule] = {
    **dict.fromkeys([f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)], conv),
    "linear": linear,
    "embedding": embedding,
    **dict.fromkeys(["batch_norm", "instance_norm", "prelu"], norm),
    "group_norm": group_norm,
    **dict.fromkeys(["lstm", "gru"], recurrent),
    "identity": _pass,
}
"""Modules whose parameters channels sit on; all others are a form of the function with their name."""

MODULE_RULES: dict[type[nn.Module], Rule] = {
    **{kind: _LAYERS.get(name) or FUNCTION_RULES[name] for kind, name in MODULE_NAMES.items()},
    **dict.fromkeys(LAYERS.values(), computed),
}
