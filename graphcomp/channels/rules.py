"""What every operator does with channel labels: one row an operator, in the tables at the end of this file.

An operator without a row is opaque: what it touches is pinned and named. Data movement needs no rule of its
own: the operator runs on the labels (`MOVES`), here and, on position numbers, in `channels.surgery`.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels.labels import along, canonical, compact, concatenate, varying
from graphcomp.channels.tracker import Tracker, Unread
from graphcomp.ir import CASTS, LAYERS, MODULE_NAMES, Program, is_read_later, op_name

Rule = Callable[[Tracker, fx.Node], Any]


def apply_rule(tracker: Tracker, node: fx.Node) -> Any:
    """Run one node on labels."""
    if node.op == "placeholder":
        return _input(tracker, node)
    if node.op == "get_attr":
        return Unread()
    if node.op == "output":
        for source in node.all_input_nodes:
            _pin_value(tracker, node, source, "network output")
        return None
    value = tracker.program.values[node]
    if not _holds_tensor(value):
        return _plain(tracker, node, value)
    if node in tracker.unfollowed:
        for source in node.all_input_nodes:
            tracker.freeze(source)
        return Unread()
    rule = _find_rule(tracker.program, node)
    if rule is None:
        return _opaque(tracker, node)
    if rule is not _move:
        for source in node.all_input_nodes:
            for labels in tracker.counts.get(source, ()):
                tracker.pin(node, labels, "the number of channels is used as a number")
            if isinstance(tracker.values[source], Tensor):
                tracker.needs_rectangle(node, tracker.values[source])
    return rule(tracker, node)


def _find_rule(program: Program, node: fx.Node) -> Rule | None:
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        if _is_hooked(module):
            return None
        return MODULE_RULES.get(type(module))
    return FUNCTION_RULES.get(op_name(program, node))


def unfollowed(program: Program) -> frozenset[fx.Node]:
    """What is computed from parameters alone and read by nobody who takes labels: weights of functions."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or node.op.startswith("call_") and sources and constant.issuperset(sources):
            constant.add(node)
    followed: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node in constant and any(
            user in followed if user in constant else _find_rule(program, user) is not None
            for user in node.users
            if user.op.startswith("call_")
        ):
            followed.add(node)
    return frozenset(n for n in constant - followed if n.op != "get_attr")


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_move(program: Program, node: fx.Node) -> bool:
    """Whether a node only moves data."""
    return node.op.startswith("call_") and _find_rule(program, node) in (_move, _stack, _pad)


def kind_of(program: Program, node: fx.Node) -> str | None:
    """What a called node does, by the name of its rule: `conv`, `pass`, `move`, …; None if it is opaque."""
    rule = _find_rule(program, node)
    return None if rule is None else rule.__name__.strip("_")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


# ---------------------------------------------------------------------- the ends, and what is not a tensor


def _input(tracker: Tracker, node: fx.Node) -> Any:
    if not isinstance(tracker.program.values[node], Tensor):
        return tracker.program.values[node]
    shape = tracker.shape(node)
    labels = tracker.mint(1).reshape([1] * len(shape)).expand(shape)
    tracker.pin(node, labels, "network input")
    return labels


def _plain(tracker: Tracker, node: fx.Node, value: Any) -> Any:
    """Shapes and numbers: remember which channels a number counts."""
    sources = [s for s in node.all_input_nodes if isinstance(tracker.values[s], Tensor)]
    name = op_name(tracker.program, node)
    counted = [labels for s in node.all_input_nodes for labels in tracker.counts.get(s, ())]
    if name in ("numel", "stride", "size", "len") or name == "getattr" and node.args[1] == "shape":
        for source in node.all_input_nodes:
            if isinstance(tracker.values[source], Unread):
                tracker.freeze(source)
    entries = _entries(tracker, node, value)
    if entries is not None:
        tracker.entries[node] = entries
        counted = list({id(t): t for entry in entries for t in entry}.values())
    elif name in ("numel", "stride") and sources:
        counted += [x for s in sources if varying(x := cast(Tensor, tracker.values[s]))]
    elif name in ("size", "len") and sources:
        tensor = cast(Tensor, tracker.values[sources[0]])
        index = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axes = varying(tensor)
        counted += (
            [tensor] if any(not isinstance(index, int) or index % tensor.ndim == a for a in axes) else []
        )
    elif name == "getitem" and isinstance(index := node.args[1], int) and node.args[0] in tracker.entries:
        counted = tracker.entries[cast(fx.Node, node.args[0])][index]
    elif name == "_assert":
        for labels_ in counted:
            tracker.pin(node, labels_, "the number of channels is asserted")
    elif node.op == "call_module" or sources and name not in QUERIES:
        for source in node.all_input_nodes:
            _pin_value(tracker, node, source, f"no rule for {name}")
    tracker.counts[node] = counted
    return value


def _entries(tracker: Tracker, node: fx.Node, value: Any) -> tuple[list[Tensor], ...] | None:
    """What each number of a shape, of a part of one, or of two put together counts; None for all else."""

    def known(arg: Any) -> tuple[list[Tensor], ...] | None:
        if isinstance(arg, tuple | list):
            return tuple(list(tracker.counts.get(a, ())) if isinstance(a, fx.Node) else [] for a in arg)
        return tracker.entries.get(arg) if isinstance(arg, fx.Node) else None

    if not isinstance(value, tuple | list) or not node.args:
        return None
    name, first = op_name(tracker.program, node), node.args[0]
    tensor = tracker.values.get(first) if isinstance(first, fx.Node) else None
    if isinstance(tensor, Tensor) and (name == "size" or name == "getattr" and node.args[1] == "shape"):
        return tuple([tensor] if d in varying(tensor) else [] for d in range(tensor.ndim))
    whole = known(first)
    if name == "getitem" and whole is not None and isinstance(node.args[1], slice):
        return whole[fx.node.map_arg(node.args[1], lambda n: tracker.program.values[n])]
    if name == "add" and whole is not None and (rest := known(node.args[1])) is not None:
        return (*whole, *rest)
    return None


QUERIES = {
    "getattr",
    "size",
    "len",
    "dim",
    "numel",
    "is_floating_point",
    "stride",
    "type",
    "get_device",
}


def _pin_value(tracker: Tracker, node: fx.Node, source: fx.Node, reason: str) -> None:
    value = tracker.values[source]
    tracker.freeze(source)
    for labels in value if isinstance(value, tuple | list) else (value,):
        if isinstance(labels, Tensor):
            tracker.pin(node, labels, reason)
    for labels in tracker.counts.get(source, ()):
        tracker.pin(node, labels, "the number of channels is used as a number")


def _computed(tracker: Tracker, node: fx.Node) -> Any:
    """Its weight is not there to be cut: pin what goes in and what comes out."""
    return _opaque(tracker, node, COEFFICIENTS)


def _why_opaque(program: Program, node: fx.Node) -> str:
    if node.op != "call_module":
        return f"no rule for {op_name(program, node)}"
    layer = program.layer(cast(str, node.target))
    name = type(layer).__name__
    return f"{name} has forward hooks" if _is_hooked(layer) else f"no rule for {name}"


def opaque_layers(program: Program) -> dict[str, str]:
    """Layers with parameters that no rule follows -> why: their channels are in no group, and stay."""
    found = {}
    for node in program.graph.nodes:
        if node.op == "call_module" and any(True for _ in program.layer(node.target).parameters()):
            rule = _find_rule(program, node)
            if rule is None:
                found[node.target] = _why_opaque(program, node)
            elif rule is _computed:
                found[node.target] = COEFFICIENTS
    return found


COEFFICIENTS = "its weight is stored as coefficients"


def _opaque(tracker: Tracker, node: fx.Node, reason: str | None = None) -> Any:
    """No rule: pin what goes in and what comes out."""
    reason = reason or _why_opaque(tracker.program, node)
    for source in node.all_input_nodes:
        _pin_value(tracker, node, source, reason)

    def fresh(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return (
                type(value)(map(fresh, value)) if type(value) in (tuple, list) else tuple(map(fresh, value))
            )
        if not isinstance(value, Tensor):
            return value
        labels = tracker.mint(1).reshape([1] * value.ndim).expand(value.shape)
        tracker.pin(node, labels, reason)
        return labels

    return fresh(tracker.program.values[node])


# ---------------------------------------------------------------------- helpers for arguments


def _arg(tracker: Tracker, node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A literal argument, or the number that a node yields."""
    value = node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    def number(a: Any) -> Any:
        return tracker.program.values[a]

    return fx.node.map_arg(value, number)


def _x(tracker: Tracker, node: fx.Node) -> Tensor:
    """Labels of the first operand."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    return tracker.labels(cast(fx.Node, source))


def _dims(value: Any, ndim: int) -> tuple[int, ...]:
    if value is None:
        return tuple(range(ndim))
    return tuple(d % ndim for d in ((value,) if isinstance(value, int) else value))


# ---------------------------------------------------------------------- rules


def _pass(tracker: Tracker, node: fx.Node) -> Any:
    """Element-wise on one tensor (clamp and its like may take more)."""
    if sum(map(tracker.is_tensor, node.all_input_nodes)) > 1:
        return _couple(tracker, node)
    return _x(tracker, node)


def _spatial(tracker: Tracker, node: fx.Node) -> Any:
    """Works on each channel's plane (pooling, resizing)."""
    labels, value = _x(tracker, node), tracker.program.values[node]
    rank = {"1d": 1, "2d": 2, "3d": 3}.get(_what(tracker, node).lower()[-2:], labels.ndim - 2)
    axis = labels.ndim - rank - 1
    if _is_beside(labels, axis):
        return _opaque(tracker, node) if isinstance(value, tuple) else _slide(tracker, node, labels)
    vector = tracker.vector(node, labels, axis)
    if isinstance(value, tuple):  # with the positions that maxima were found at
        return tuple(along(vector, axis, part.shape) for part in value)
    return along(vector, axis, tracker.shape(node))


def _what(tracker: Tracker, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(tracker.program.layer(cast(str, node.target))).__name__
    return op_name(tracker.program, node)


def _conv(tracker: Tracker, node: fx.Node) -> Any:
    module = cast(nn.modules.conv._ConvNd, tracker.program.layer(cast(str, node.target)))
    groups, transposed = module.groups, module.transposed
    labels, shape = _x(tracker, node), tracker.shape(node)
    weight = f"{node.target}.weight"
    axis = len(shape) - (module.weight.ndim - 2) - 1
    beside = _is_beside(labels, axis)
    vector = _read_along(tracker, node, labels, axis)
    biases = [(f"{node.target}.bias", 0)] if module.bias is not None else []
    if groups == vector.numel() > 1:
        out = _depthwise(tracker, node, vector, weight, biases, shape[axis], transposed)
        return _slide(tracker, node, labels) if beside else along(out, axis, shape)
    read, made = (0, 1) if transposed else (1, 0)
    out = _mint_rows(tracker, weight, made, shape[axis])
    tracker.site(node, "in", [(weight, read)], vector, 1 if transposed else groups)
    if transposed and groups > 1:
        tracker.site(node, "out", [(weight, made)], out, groups)
        tracker.site(node, "norm", biases, out) if biases else None
    else:
        tracker.site(node, "out", [(weight, made), *biases], out)
    if groups > 1:
        tracker.rows += [(node.name, vector.reshape(groups, -1)), (node.name, out.reshape(groups, -1))]
    if beside:
        tracker.pin(node, out, BESIDE)
        return _slide(tracker, node, labels)
    return along(out, axis, shape)


BESIDE = "works along another axis than that of the channels"


def _is_beside(labels: Tensor, axis: int) -> bool:
    """Whether there are channels, but not on the axis that an operator takes for theirs."""
    axes = varying(labels)
    return bool(axes) and axis not in axes


def _read_along(tracker: Tracker, node: fx.Node, labels: Tensor, axis: int) -> Tensor:
    """The labels along the axis that an operator takes for the channels'; if it is not, some that stay."""
    if _is_beside(labels, axis):
        return tracker.stand_in(node, labels.size(axis), BESIDE)
    return tracker.vector(node, labels, axis)


def _slide(tracker: Tracker, node: fx.Node, labels: Tensor) -> Any:
    """A window that runs over the channels, as ECA's does, sees several of them at once: they stay."""
    shape, axes = tracker.shape(node), varying(labels)
    kept = len(shape) == labels.ndim and all(shape[d] == labels.size(d) for d in axes)
    if not (kept and _is_pointwise(tracker, node)):
        tracker.pin(node, labels, f"{_what(tracker, node)} slides over the channels")
    if kept:
        return compact(labels).expand(shape)
    return along(tracker.stand_in(node, 1, f"{_what(tracker, node)} slides over the channels"), 0, shape)


def _is_pointwise(tracker: Tracker, node: fx.Node) -> bool:
    """Whether a convolution sees one place at a time."""
    module = tracker.program.layer(cast(str, node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.modules.conv._ConvNd) and set(module.kernel_size) == {1}


def _depthwise(
    tracker: Tracker,
    node: fx.Node,
    vector: Tensor,
    weight: str,
    biases: list[tuple[str, int]],
    width: int,
    transposed: bool,
) -> Tensor:
    """Every output channel is computed from one input channel and shares its label."""
    out = vector.repeat_interleave(width // vector.numel())
    if transposed:
        tracker.site(node, "norm", [(weight, 0)], vector)
        if biases:
            tracker.site(node, "norm", biases, out)
    else:
        tracker.site(node, "norm", [(weight, 0), *biases], out)
    return out


def _mint_rows(tracker: Tracker, weight: str, dim: int, count: int) -> Tensor:
    known = tracker.known_rows(weight, dim)
    return tracker.mint(count) if known is None else known


def _linear(tracker: Tracker, node: fx.Node) -> Tensor:
    """Reads and mints along the last axis; channels on another axis pass through untouched."""
    module = cast(nn.Linear, tracker.program.layer(cast(str, node.target)))
    labels, shape = _x(tracker, node), tracker.shape(node)
    last = labels.ndim - 1
    weight = f"{node.target}.weight"
    biases = [(f"{node.target}.bias", 0)] if module.bias is not None else []
    out = _mint_rows(tracker, weight, 0, shape[-1])
    beside = _is_beside(labels, last)
    vector = _read_along(tracker, node, labels, last)
    tracker.site(node, "in", [(weight, 1)], vector)
    tracker.site(node, "out", [(weight, 0), *biases], out)
    if beside:
        tracker.pin(node, out, BESIDE)
        return compact(labels).expand(shape)
    return along(out, last, shape)


def _functional_norm(tracker: Tracker, node: fx.Node) -> Any:
    """F.batch_norm with statistics of the network's own; the layers of torch are lifted when it is traced."""
    held = [n for n in node.all_input_nodes if n is not node.args[0]]
    if _arg(tracker, node, 5, "training", False) or any(n.op != "get_attr" for n in held):
        return _opaque(tracker, node)
    labels = _x(tracker, node)
    beside = _is_beside(labels, 1)
    vector = _read_along(tracker, node, labels, 1)
    tracker.site(node, "norm", [(cast(str, n.target), 0) for n in held], vector)
    return labels if beside else along(vector, 1, tracker.shape(node))


def norm_axis(module: nn.Module, ndim: int) -> int:
    """The axis of what arrives, of `ndim` axes, that a normalisation (or PReLU) takes for the channels'."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return ndim - int(type(module).__name__[-2]) - 1
    return min(1, ndim - 1)


def _norm(tracker: Tracker, node: fx.Node) -> Any:
    """Per-channel parameters and statistics."""
    module = tracker.program.layer(cast(str, node.target))
    labels, shape = _x(tracker, node), tracker.shape(node)
    axis = norm_axis(module, len(shape))
    names = [*module._parameters.items(), *module._buffers.items()]
    tensors = [(f"{node.target}.{n}", 0) for n, t in names if t is not None and t.numel() > 1 and t.ndim == 1]
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return labels
    if not tensors and isinstance(module, nn.PReLU | nn.modules.batchnorm._BatchNorm) and shape[axis] > 1:
        return _opaque(tracker, node)
    beside = _is_beside(labels, axis)
    if beside and not isinstance(module, nn.PReLU) and getattr(module, "running_mean", None) is None:
        tracker.pin(node, labels, f"{_what(tracker, node)}'s statistics mix the channels")
    vector = _read_along(tracker, node, labels, axis)
    if tensors:
        tracker.site(node, "norm", tensors, vector)
    return labels if beside else along(vector, axis, shape)


def _group_norm(tracker: Tracker, node: fx.Node) -> Any:
    module = cast(nn.GroupNorm, tracker.program.layer(cast(str, node.target)))
    if module.num_groups == module.num_channels:
        return _norm(tracker, node)
    tracker.pin(node, _x(tracker, node), "GroupNorm's statistics mix the channels of a group")
    return _x(tracker, node)


def _layer_norm(tracker: Tracker, node: fx.Node) -> Tensor:
    labels = _x(tracker, node)
    if node.op == "call_module":
        normalized = cast(nn.LayerNorm, tracker.program.layer(cast(str, node.target))).normalized_shape
    else:
        normalized = _arg(tracker, node, 1, "normalized_shape")
    mixed = set(range(labels.ndim - len(normalized), labels.ndim))
    if mixed & set(varying(labels)):
        tracker.pin(node, labels, "LayerNorm's statistics mix the channels")
    return labels


def _softmax(tracker: Tracker, node: fx.Node) -> Tensor:
    """Keeps the shape and mixes along an axis."""
    labels = _x(tracker, node)
    if node.op == "call_module":
        module = tracker.program.layer(cast(str, node.target))
        dim = -3 if isinstance(module, nn.Softmax2d) else getattr(module, "dim", None)
    else:
        dim = _arg(tracker, node, 2 if op_name(tracker.program, node) == "normalize" else 1, "dim", 1)
    return _mix(tracker, node, labels, _dims(dim, labels.ndim))


def _mix(tracker: Tracker, node: fx.Node, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """Values along `dims` depend on each other: couple them, or pin if that is all the channels there are."""
    axes = varying(labels)
    mixed = [d for d in axes if d in dims]
    if mixed and len(mixed) == len(axes):
        tracker.pin(node, labels, f"{_what(tracker, node)} mixes the channels")
        return labels
    for d in mixed:
        tracker.couple(node, labels.narrow(d, 0, 1), labels)
    return labels


def _reduce(tracker: Tracker, node: fx.Node) -> Any:
    """mean, sum, amax …, and max/min/median along an axis, which yield values and indices."""
    labels, name = _x(tracker, node), op_name(tracker.program, node)
    if name in ("max", "min") and any(
        map(tracker.is_tensor, [*node.args[1:], node.kwargs.get("other")])  # may be the first operand again
    ):
        return _couple(tracker, node)
    position = 2 if name in ("norm", "vector_norm") else 1
    dim = _arg(tracker, node, position, "dim", None)
    if name in ("var", "std") and isinstance(dim, bool):
        dim = None
    dims = _dims(dim, labels.ndim)
    labels = _mix(tracker, node, labels, dims)
    value = tracker.program.values[node]
    if isinstance(value, tuple):
        return tuple(_reduced(labels, dims, v.shape) for v in value)
    return _reduced(labels, dims, value.shape)


def _reduced(labels: Tensor, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    for d in sorted(dims, reverse=True):
        labels = (
            labels.narrow(d, 0, 1) if len(shape) == labels.ndim and shape[d] == 1 else labels.select(d, 0)
        )
    return labels.expand(tuple(shape))


def _glu(tracker: Tracker, node: fx.Node) -> Any:
    """a * sigmoid(b) for the two halves of an axis: position k meets position k + n/2."""
    labels = _x(tracker, node)
    if node.op == "call_module":
        dim = cast(nn.GLU, tracker.program.layer(cast(str, node.target))).dim
    else:
        dim = _arg(tracker, node, 1, "dim", -1)
    a, b = labels.chunk(2, dim)
    tracker.couple(node, a, b)
    return a


def _couple(tracker: Tracker, node: fx.Node) -> Any:
    """Element-wise on several tensors: labels that meet live or die together."""
    operands = [tracker.labels(a) for a in node.all_input_nodes if tracker.is_tensor(a)]
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
    lead = min(carrying, key=lambda x: len(varying(x)))
    axes = {d - lead.ndim for d in varying(lead)}
    for x in operands:
        if x is lead:
            continue
        if any(-d <= x.ndim and x.size(d) > 1 for d in axes):
            tracker.couple(node, lead, x)
        elif bool(compact(x).any()):
            tracker.pin(node, x, "is broadcast over other channels")
    return lead.expand(shape)


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
        return _opaque(tracker, node)
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
    return _opaque(tracker, node)


def _item(tracker: Tracker, node: fx.Node) -> Any:
    source, index = cast(fx.Node, node.args[0]), node.args[1]
    index = fx.node.map_arg(index, lambda n: tracker.program.values[n])
    values = tracker.values[source]
    return values[index] if isinstance(index, int | slice) else _opaque(tracker, node)


def _stack(tracker: Tracker, node: fx.Node) -> Any:
    """Operands must keep equal shapes."""
    if isinstance(node.args[0], fx.Node):  # one tuple of tensors
        operands = list(cast(Iterable[Tensor], tracker.values[node.args[0]]))
    else:
        operands = [tracker.labels(a) for a in cast(Iterable[fx.Node], node.args[0])]
    for x in operands[1:]:
        tracker.couple(node, operands[0], x)
    return _move(tracker, node)


def _pad(tracker: Tracker, node: fx.Node) -> Any:
    """Zeros (or any constant) beside the channels get labels of their own; beside a plane, its channel's."""
    labels = _x(tracker, node)
    padding = padding_of(tracker.program, node)
    if padding is None:
        return _opaque(tracker, node)
    for d, (before, after) in padding.amounts(labels.ndim).items():
        if d in varying(labels):
            if padding.mode != "constant" or min(before, after) < 0 or len(varying(labels)) > 1:
                return _opaque(tracker, node)
            parts = [
                along(tracker.mint(n), d, [*labels.shape[:d], n, *labels.shape[d + 1 :]])
                for n in (before, after)
            ]
            labels = concatenate([parts[0], labels, parts[1]], d)
        else:
            shape = [*labels.shape[:d], labels.size(d) + before + after, *labels.shape[d + 1 :]]
            labels = labels.narrow(d, 0, 1).expand(shape)
    return labels


@dataclass(frozen=True)
class Padding:
    """What a padding operator does, in the arguments of F.pad."""

    flat: tuple[int, ...]
    mode: str
    value: float | None

    def amounts(self, ndim: int) -> dict[int, tuple[int, int]]:
        """Axis -> (before, after), of the axes that are padded."""
        pairs = zip(self.flat[::2], self.flat[1::2], strict=True)
        return {ndim - 1 - i: pair for i, pair in enumerate(pairs) if any(pair)}

    def __call__(self, x: Tensor) -> Tensor:
        """Pad numbers of positions; 0 beside them, or what the mode repeats."""
        for d, (before, after) in self.amounts(x.ndim).items():
            numbers = torch.arange(1.0, x.size(d) + 1, dtype=torch.float64).reshape(1, 1, -1)
            index = F.pad(numbers, (before, after), self.mode).long().flatten()
            shape = [len(index) if i == d else 1 for i in range(x.ndim)]
            x = x.index_select(d, (index - 1).clamp(min=0)) * (index > 0).reshape(shape)
        return x


def padding_of(program: Program, node: fx.Node) -> Padding | None:
    """The padding that a node applies; None if its amounts are computed."""
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        mode = next((m for kind, m in _PAD_MODES.items() if isinstance(module, kind)), "constant")
        return Padding(tuple(module.padding), mode, getattr(module, "value", None))  # type: ignore[arg-type]
    given = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    raw = given["pad"]
    flat = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
    if not all(isinstance(a, int) for a in flat):
        return None
    return Padding(cast(tuple[int, ...], flat), given.get("mode", "constant"), given.get("value"))  # type: ignore[arg-type]


_PAD_MODES: dict[type[nn.Module], str] = {
    nn.modules.padding._ReflectionPadNd: "reflect",
    nn.modules.padding._ReplicationPadNd: "replicate",
    nn.modules.padding._CircularPadNd: "circular",
}


# ---------------------------------------------------------------------- data movement


class NotMovable(Exception):  # noqa: N818 - a signal inside this module, not an error
    """The operands of a data movement operator are not of a kind that can be followed."""


def move(
    program: Program, node: fx.Node, tensor: Callable[[fx.Node], Tensor], number: Callable[[fx.Node], Any]
) -> Any:
    """Run a data movement node on tensors of one's own (labels, positions).

    Args:
        program: the program that the node is in; its integer and boolean buffers serve as indices.
        node: a node for which `is_move` is true.
        tensor, number: what its argument nodes yield.
    """

    name = op_name(program, node)

    def load(source: fx.Node) -> Any:
        value = program.values[source]
        if not _holds_tensor(value):
            return number(source)
        if not isinstance(value, Tensor):
            return tensor(source)
        if (
            not value.dtype.is_floating_point
            and source is not node.args[0]
            and op_name(program, node) in INDEXERS
        ):
            if source.op != "get_attr":
                raise NotMovable
            return program.tensors[cast(str, source.target)]
        return tensor(source)

    args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
    if name == "pad":
        padding = padding_of(program, node)
        if padding is None:
            raise NotMovable
        return padding(cast(Tensor, args[0]))
    if node.op == "call_module":
        return MODULE_MOVES[name](program.layer(cast(str, node.target)), *args, **kwargs)
    if any(isinstance(a, torch.dtype) for a in args) and name == "view":
        raise NotMovable
    return MOVES[name](*args, **kwargs)


INDEXERS = {"getitem", "index_select"}


def _concatenate(tensors: Sequence[Tensor], dim: int = 0, axis: int | None = None) -> Tensor:
    return concatenate(list(tensors), dim if axis is None else axis)


def _concatenation(axis: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """hstack and its like: a concatenation along a fixed axis, for tensors that have more axes."""

    def concatenated(tensors: Sequence[Tensor]) -> Tensor:
        if min(t.ndim for t in tensors) <= max(axis, 1):
            raise NotMovable
        return concatenate(list(tensors), axis)

    return concatenated


def concatenated_axis(program: Program, node: fx.Node) -> int | None:
    """The axis that operands are concatenated along; None if the node does something else, or computes it."""
    if node.op != "call_function":
        return None
    name = op_name(program, node)
    if name != "cat":
        return _STACKS.get(name)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return given if isinstance(given, int) else None


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, *rest = x.shape
    return x.reshape(b, groups, c // groups, *rest).transpose(1, 2).reshape(b, c, *rest)


_STACKS = {"hstack": 1, "column_stack": 1, "vstack": 0, "dstack": 2}
CONCATENATIONS = ("cat", *_STACKS)

MOVES: dict[str, Callable[..., Any]] = {
    "view": torch.Tensor.reshape,
    "reshape": torch.Tensor.reshape,
    "flatten": torch.flatten,
    "unflatten": torch.unflatten,
    "permute": torch.Tensor.permute,
    "transpose": torch.transpose,
    "movedim": torch.movedim,
    "t": torch.t,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "expand": torch.Tensor.expand,
    "repeat": torch.Tensor.repeat,
    "tile": torch.tile,
    "roll": torch.roll,
    "flip": lambda x, *dims: torch.flip(x, dims[0] if isinstance(dims[0], tuple | list) else dims),
    "repeat_interleave": torch.repeat_interleave,
    "chunk": torch.chunk,
    "split": torch.split,
    "tensor_split": torch.tensor_split,
    "unbind": torch.unbind,
    "narrow": torch.narrow,
    "select": torch.select,
    "index_select": torch.index_select,
    "getitem": operator.getitem,
    "cat": _concatenate,
    **{name: _concatenation(axis) for name, axis in _STACKS.items()},
    "stack": torch.stack,
    "pixel_shuffle": F.pixel_shuffle,
    "pixel_unshuffle": F.pixel_unshuffle,
    "channel_shuffle": _shuffle,
    **dict.fromkeys([*CASTS, "to", "type", "type_as"], _same),
    **dict.fromkeys(["contiguous", "clone", "detach"], _same),
}

MODULE_MOVES: dict[str, Callable[..., Any]] = {
    "flatten": lambda m, x: torch.flatten(x, m.start_dim, m.end_dim),
    "unflatten": lambda m, x: torch.unflatten(x, m.dim, m.unflattened_size),
    "pixel_shuffle": lambda m, x: F.pixel_shuffle(x, m.upscale_factor),
    "pixel_unshuffle": lambda m, x: F.pixel_unshuffle(x, m.downscale_factor),
    "channel_shuffle": lambda m, x: _shuffle(x, m.groups),
}

# ---------------------------------------------------------------------- the tables

_POOLS = [f"{a}{k}_pool{d}d" for a in ("", "adaptive_") for k in ("avg", "max") for d in (1, 2, 3)]

FUNCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _move),
    "stack": _stack,
    "pad": _pad,
    **dict.fromkeys(
        """relu relu6 elu selu celu gelu silu mish hardswish hardsigmoid hardtanh leaky_relu logsigmoid
        softplus softsign tanhshrink sigmoid tanh exp log log1p expm1 sqrt rsqrt square abs neg clamp
        rrelu clamp_min clamp_max erf sin cos reciprocal sign round floor ceil hardshrink softshrink threshold
        positive dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth
        logical_not bitwise_not nan_to_num zeros_like ones_like""".split(),
        _pass,
    ),
    **dict.fromkeys([*_POOLS, "interpolate", "lp_pool1d", "lp_pool2d", "lp_pool3d"], _spatial),
    "batch_norm": _functional_norm,
    "layer_norm": _layer_norm,
    **dict.fromkeys(["softmax", "log_softmax", "softmin", "cumsum", "cumprod", "normalize"], _softmax),
    **dict.fromkeys(
        "mean sum prod amax amin max min median logsumexp norm vector_norm var std any all".split(), _reduce
    ),
    "glu": _glu,
    "getattr": _attribute,
    **dict.fromkeys(
        """add sub mul div pow floordiv maximum minimum fmax fmin where lerp addcmul addcdiv atan2 rsub
        remainder fmod lt le gt ge eq ne logical_and logical_or logical_xor bitwise_and bitwise_or
        bitwise_xor""".split(),
        _couple,
    ),
}

_LAYERS: dict[str, Rule] = {
    **dict.fromkeys([f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)], _conv),
    "linear": _linear,
    **dict.fromkeys(["batch_norm", "instance_norm", "prelu"], _norm),
    "group_norm": _group_norm,
    "identity": _pass,
}
"""Modules whose parameters channels sit on; all others are a form of the function with their name."""

MODULE_RULES: dict[type[nn.Module], Rule] = {
    **{kind: _LAYERS.get(name) or FUNCTION_RULES[name] for kind, name in MODULE_NAMES.items()},
    **dict.fromkeys(LAYERS.values(), _computed),
}
