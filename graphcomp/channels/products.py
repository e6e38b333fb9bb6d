"""Rules for products of activations: attention's q k and its weighted sum of v.

A product contracts an axis: position j of both operands live and die together, and zeros on one side are
enough, so a removal is simulated by a mask on the first operand. What the second operand has behind the
contracted axis passes on. Axes in front (batch, heads) keep their length: the widths of all heads stay equal.
"""

from typing import Any, cast

from torch import Tensor, fx

from graphcomp.channels.labels import along, compact, varying
from graphcomp.channels.opaque import opaque, pin_value
from graphcomp.channels.tracker import Tracker, Unread


def matmul(tracker: Tracker, node: fx.Node) -> Any:
    """a @ b of activations: ... x i x k times ... x k x j."""
    a, b = node.args[:2] if len(node.args) > 1 else (node.args[0], node.kwargs.get("mat2"))
    left, right, shape = _activation(tracker, a), _activation(tracker, b), tracker.shape(node)
    if left is None or right is None:
        return opaque(tracker, node)
    rows, columns, contracted = _varies(left, -2), _varies(right, -1), _varies(left, -1)
    # on two of the three, channels would be read by channels
    if contracted != _varies(right, -2) or rows + columns + contracted > 1:
        return opaque(tracker, node)
    if contracted:
        _contract(tracker, node, cast(fx.Node, a), left, right, right.ndim - 2)
    tie_packed(tracker, node)
    if columns:
        return along(tracker.vector(node, right, right.ndim - 1), len(shape) - 1, shape)
    if rows:
        return along(tracker.vector(node, left, left.ndim - 2), len(shape) - 2, shape)
    return _none(left, right, shape)


def attention(tracker: Tracker, node: fx.Node) -> Any:
    """F.scaled_dot_product_attention(q, k, v, mask): the scale is a number of its own since the trace."""
    names = ("query", "key", "value")
    q, k, v = (node.args[i] if len(node.args) > i else node.kwargs[n] for i, n in enumerate(names))
    left, right, moved = (_activation(tracker, x) for x in (q, k, v))
    if left is None or right is None or moved is None or node.kwargs.get("scale") is None:
        return opaque(tracker, node)
    for source in node.all_input_nodes:
        if source not in (q, k, v):
            pin_value(tracker, node, source, "is added to the scores of attention")
    contracted, shape = _varies(left, -1), tracker.shape(node)
    if any(_varies(x, -2) for x in (left, right, moved)) or contracted != _varies(right, -1):
        return opaque(tracker, node)
    if contracted:
        _contract(tracker, node, cast(fx.Node, q), left, right, right.ndim - 1)
    tie_packed(tracker, node)
    if not _varies(moved, -1):
        return _none(moved, moved, shape)
    return along(tracker.vector(node, moved, moved.ndim - 1), len(shape) - 1, shape)


def _activation(tracker: Tracker, source: Any) -> Tensor | None:
    """Labels of an activation with at least two axes; None for others, parameters among them."""
    if not tracker.is_tensor(source) or isinstance(tracker.values[source], Unread):
        return None
    labels = tracker.labels(source)
    return None if labels.ndim < 2 or _in_front_only(labels) else labels


def _in_front_only(labels: Tensor) -> bool:
    """Whether the channels lie along batches or heads, as those that mix the heads' scores make."""
    return bool(varying(labels)) and not set(varying(labels)) & {labels.ndim - 1, labels.ndim - 2}


def _varies(labels: Tensor, axis: int) -> bool:
    return axis % labels.ndim in varying(labels)


def _contract(
    tracker: Tracker, node: fx.Node, source: fx.Node, left: Tensor, right: Tensor, axis: int
) -> None:
    """Couple the last axis of the first operand with the one of the second that it meets."""
    a = tracker.vector(node, left, left.ndim - 1)
    tracker.couple(node, a, tracker.vector(node, right, axis))
    tracker.mixings.append((node, source, left.ndim - 1, a, "product", ()))


def _none(left: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A result without a channel axis: it belongs to what it is made of, if that is one channel each."""
    single = [x for x in (left, right) if not varying(x) and bool(compact(x).any())]
    lead = compact(single[0]).flatten()[:1] if single else compact(left).flatten()[:1] * 0
    return lead.reshape([1] * len(shape)).expand(shape)


def tie_packed(tracker: Tracker, node: fx.Node) -> None:
    """Where q, k and v come out of one reshape their widths are equal: no rearrangement undoes that."""
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        source = waiting.pop()
        labels = tracker.values.get(source)
        parts = [
            x for x in (labels if isinstance(labels, tuple | list) else (labels,)) if isinstance(x, Tensor)
        ]
        if source in seen or not any(len(varying(x)) > 1 for x in parts):
            continue
        seen.add(source)
        for part in parts:
            tracker.needs_rectangle(source, part)
        waiting += source.all_input_nodes[:1]
