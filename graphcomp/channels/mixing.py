"""Rules for what computes with all channels of an axis at once: normalisations, means, sums, softmax.

Such an operator is a reader: what it computes is computed of the channels that stay. A removal is simulated
by what is put in front of it (`Mixing`): a sum reads zeros, a mean is divided by the number of channels that
stay, a maximum reads the lowest of numbers, and a normalisation has the statistics of what stays.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.labels import along, unlabelled, varying
from graphcomp.channels.layers import norm
from graphcomp.channels.model import How
from graphcomp.channels.opaque import argument, dims_of, operand, what
from graphcomp.channels.tracker import Tracker
from graphcomp.ir import op_name


def mix(
    tracker: Tracker, node: fx.Node, labels: Tensor, axis: int, how: How, args: tuple[Any, ...] = ()
) -> Tensor:
    """The channels along one axis of the only operand are read together; returns their labels."""
    vector = tracker.vector(node, labels, axis)
    tracker.mixings.append((node, node.all_input_nodes[0], axis, vector, how, args))
    return vector


def layer_norm(tracker: Tracker, node: fx.Node) -> Tensor:
    """Normalises over the last axes; RMSNorm does without the mean."""
    labels = operand(tracker, node)
    if node.op != "call_module":
        normalized = argument(tracker, node, 1, "normalized_shape")
        if set(varying(labels)) & set(range(labels.ndim - len(normalized), labels.ndim)):
            tracker.pin(
                node, labels, f"{what(tracker, node)} of computed weights or sizes mixes the channels"
            )
        return labels
    module = cast(nn.LayerNorm, tracker.program.layer(cast(str, node.target)))
    lead = labels.ndim - len(module.normalized_shape)
    mixed = [d for d in varying(labels) if d >= lead]
    if not mixed:
        return labels
    if module.eps == 0:
        tracker.pin(node, labels, f"{what(tracker, node)} without eps mixes the channels")
        return labels
    axis = max(mixed, key=labels.size)
    dims = tuple(range(lead - labels.ndim, 0))
    centred = isinstance(module, nn.LayerNorm)
    vector = mix(tracker, node, labels, axis, "norm", (dims, module.eps, centred, 0))
    _parameters(tracker, node, module, vector, axis - lead)
    return along(vector, axis, labels.shape)


def group_norm(tracker: Tracker, node: fx.Node) -> Any:
    """Normalises over the channels of a group: equally many of every group stay, or all or none of it."""
    labels = operand(tracker, node)
    module = cast(nn.GroupNorm, tracker.program.layer(cast(str, node.target)))
    if module.num_groups == module.num_channels:
        return norm(tracker, node)
    if not varying(labels):
        return labels
    if 1 not in varying(labels) or module.eps == 0:
        tracker.pin(node, labels, f"{what(tracker, node)}'s statistics mix the channels of a group")
        return labels
    dims = tuple(range(1 - labels.ndim, 0))
    vector = mix(tracker, node, labels, 1, "norm", (dims, module.eps, True, module.num_groups))
    _parameters(tracker, node, module, vector, 0)
    rows = vector.reshape(module.num_groups, -1)
    if tracker.granularity == "group":
        tracker.couple(node, rows[:, :1], rows)
    else:
        tracker.rows.append((node.name, rows, True))
    return along(vector, 1, labels.shape)


def _parameters(tracker: Tracker, node: fx.Node, module: nn.Module, vector: Tensor, dim: int) -> None:
    """Weight and bias of a normalisation; one without any has the same width at all of its calls."""
    names = [f"{node.target}.{n}" for n, p in module.named_parameters(recurse=False)]
    if names:
        tracker.site(node, "norm", [(name, dim) for name in names], vector)
        return
    for other, *_, channels, _, _ in tracker.mixings:
        if other.op == "call_module" and tracker.program.layer(cast(str, other.target)) is module:
            tracker.couple(node, channels, vector)


def softmax(tracker: Tracker, node: fx.Node) -> Tensor:
    """Keeps the shape and mixes along an axis."""
    labels = operand(tracker, node)
    return _mix(tracker, node, labels, mixed_dims(tracker, node, labels.ndim))[0]


def mixed_dims(tracker: Tracker, node: fx.Node, ndim: int) -> tuple[int, ...]:
    """The axes that softmax and its like mix along."""
    if node.op == "call_module":
        module = tracker.program.layer(cast(str, node.target))
        dim = -3 if isinstance(module, nn.Softmax2d) else getattr(module, "dim", None)
    else:
        at = 2 if op_name(tracker.program, node) == "normalize" else 1
        dim = argument(tracker, node, at, "dim", 1)
    return dims_of(dim, ndim)


def _mix(tracker: Tracker, node: fx.Node, labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, bool]:
    """Values along `dims` depend on each other: the labels behind that, and whether `dims` has all channels.

    If it has not, what is mixed is coupled; if it has, and nothing can stand for what goes, they are pinned.
    """
    axes = varying(labels)
    mixed = [d for d in axes if d in dims]
    if mixed and len(mixed) == len(axes):
        found = stand_in(tracker, node, labels.ndim, dims)
        if found is None:
            tracker.pin(node, labels, f"{what(tracker, node)} mixes the channels")
            return labels, False
        axis = max(mixed, key=labels.size)
        return along(mix(tracker, node, labels, axis, *found), axis, labels.shape), True
    for d in mixed:
        tracker.couple(node, labels.narrow(d, 0, 1), labels)
    return labels, False


def stand_in(
    tracker: Tracker, node: fx.Node, ndim: int, dims: Sequence[int]
) -> tuple[How, tuple[Any, ...]] | None:
    """What stands for channels that an operator mixes; None if nothing does."""
    name, value = op_name(tracker.program, node), tracker.program.values[node]
    if len(node.all_input_nodes) != 1 or tracker.program.values[node.all_input_nodes[0]].dtype == torch.bool:
        return None
    if name in ("norm", "vector_norm", "normalize"):
        order = argument(tracker, node, 1, "p" if name != "vector_norm" else "ord", 2)
        positive = order in ("fro", None) or isinstance(order, int | float) and order > 0
        return ("zeros", ()) if positive else None
    if name in ("max", "min") and isinstance(value, tuple) and not _only_values(node):
        return None
    if name in _SPREADS:
        counted = tuple(d - ndim for d in dims)
        return "spread", (counted, _correction(tracker, node))
    how = _HOW.get(name)
    return None if how is None else (how, ())


_HOW: dict[str, How] = {
    "sum": "zeros",
    "mean": "mean",
    **dict.fromkeys(["amax", "max", "logsumexp", "softmax", "log_softmax"], "lowest"),
    **dict.fromkeys(["amin", "min", "softmin"], "highest"),
}

_SPREADS = ("var", "std", "var_mean", "std_mean")


def _only_values(node: fx.Node) -> bool:
    """Whether nobody asks where the maxima are: numbers of channels, which become others."""
    return all(
        user.op == "call_function" and len(user.args) > 1 and user.args[1] in (0, "values")
        for user in node.users
    )


def _correction(tracker: Tracker, node: fx.Node) -> float:
    """What var, std and their like take off the number of elements."""
    if "correction" in node.kwargs:
        found = argument(tracker, node, len(node.args), "correction")
        return 1.0 if found is None else float(found)
    first = node.args[1] if len(node.args) > 1 else None
    unbiased = first if isinstance(first, bool) else argument(tracker, node, 2, "unbiased", True)
    return float(bool(unbiased))


def reduce(tracker: Tracker, node: fx.Node, couple: Any) -> Any:
    """mean, sum, amax …, and max/min/median along an axis, which yield values and indices.

    Args:
        tracker, node: as any rule has them.
        couple: the rule for max and min of two tensors.
    """
    labels, name = operand(tracker, node), op_name(tracker.program, node)
    if name in ("max", "min") and any(
        map(tracker.is_tensor, [*node.args[1:], node.kwargs.get("other")])  # may be the first operand again
    ):
        return couple(tracker, node)
    dims = _dims(tracker, node, labels.ndim)
    labels, whole = _mix(tracker, node, labels, dims)
    if whole:
        labels = unlabelled(labels.shape)
    value = tracker.program.values[node]
    if isinstance(value, tuple):
        return tuple(_reduced(labels, dims, v.shape) for v in value)
    return _reduced(labels, dims, value.shape)


def reduced_dims(tracker: Tracker, node: fx.Node, ndim: int) -> tuple[int, ...] | None:
    """The axes that mean, sum and their like reduce; None where two tensors are compared."""
    return _dims(tracker, node, ndim) if sum(map(tracker.is_tensor, node.all_input_nodes)) == 1 else None


def _dims(tracker: Tracker, node: fx.Node, ndim: int) -> tuple[int, ...]:
    name = op_name(tracker.program, node)
    dim = argument(tracker, node, 2 if name in ("norm", "vector_norm") else 1, "dim", None)
    return dims_of(None if name in _SPREADS and isinstance(dim, bool) else dim, ndim)


def _reduced(labels: Tensor, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    for d in sorted(dims, reverse=True):
        labels = (
            labels.narrow(d, 0, 1) if len(shape) == labels.ndim and shape[d] == 1 else labels.select(d, 0)
        )
    return labels.expand(tuple(shape))
