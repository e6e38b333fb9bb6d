"""Rules for operators that rearrange planes: windows, samples at computed places, shapes of other tensors."""

from typing import Any, cast

from torch import fx, nn

from graphcomp.channels.labels import along, canonical, compact, varying
from graphcomp.channels.layers import is_beside
from graphcomp.channels.opaque import argument, opaque, operand, pin_value
from graphcomp.channels.tracker import Tracker


def shaped_like(tracker: Tracker, node: fx.Node) -> Any:
    """view_as and reshape_as: what arrives must keep the other tensor's shape."""
    other = node.args[1] if len(node.args) > 1 else node.kwargs["other"]
    labels, like = operand(tracker, node), tracker.labels(cast(fx.Node, other))
    labels = canonical(labels.reshape(like.shape))
    if varying(labels) != varying(like) or not (bool(compact(labels).all()) and bool(compact(like).all())):
        for x in (labels, like):
            tracker.pin(node, x, "takes the shape of a tensor with other channels")
    else:
        tracker.couple(node, labels, like)
    return labels


def glu(tracker: Tracker, node: fx.Node) -> Any:
    """a * sigmoid(b) for the two halves of an axis: position k meets position k + n/2."""
    labels = operand(tracker, node)
    if node.op == "call_module":
        dim = cast(nn.GLU, tracker.program.layer(cast(str, node.target))).dim
    else:
        dim = argument(tracker, node, 1, "dim", -1)
    a, b = labels.chunk(2, dim)
    tracker.couple(node, a, b)
    return a


def sample(tracker: Tracker, node: fx.Node) -> Any:
    """grid_sample: every channel's plane, read at places that others compute."""
    for source in node.all_input_nodes[1:]:
        pin_value(tracker, node, source, "says where grid_sample reads")
    labels = operand(tracker, node)
    if is_beside(labels, 1):
        return opaque(tracker, node)
    return along(tracker.vector(node, labels, 1), 1, tracker.shape(node))


def unfold(tracker: Tracker, node: fx.Node) -> Any:
    """x.unfold(dim, size, step): overlapping windows; F.unfold: a channel's window as channels beside it."""
    labels, shape = operand(tracker, node), tracker.shape(node)
    if node.op == "call_method":
        dim, size, step = (argument(tracker, node, i, n) for i, n in _WINDOW)
        if dim % labels.ndim in varying(labels):
            return opaque(tracker, node)
        return canonical(labels.unfold(dim, size, step))
    if is_beside(labels, 1) or labels.ndim != 4:
        return opaque(tracker, node)
    vector = tracker.vector(node, labels, 1)
    return along(vector.repeat_interleave(shape[1] // vector.numel()), 1, shape)


_WINDOW = ((1, "dimension"), (2, "size"), (3, "step"))


def fold(tracker: Tracker, node: fx.Node) -> Any:
    """F.fold: windows are added up to a plane; those of one channel lie beside each other."""
    labels, shape = operand(tracker, node), tracker.shape(node)
    if is_beside(labels, labels.ndim - 2) or labels.ndim != 3:
        return opaque(tracker, node)
    rows = tracker.vector(node, labels, 1).reshape(shape[1], -1)
    tracker.couple(node, rows[:, :1], rows)
    return along(rows[:, 0], 1, shape)


def unpool(tracker: Tracker, node: fx.Node) -> Any:
    """max_unpool: every channel's plane, at the places where its maxima were found."""
    places = cast(fx.Node, node.args[1] if len(node.args) > 1 else node.kwargs["indices"])
    vectors = []
    for labels in (operand(tracker, node), tracker.labels(places)):
        if is_beside(labels, 1):
            return opaque(tracker, node)
        vectors.append(tracker.vector(node, labels, 1))
    tracker.couple(node, *vectors)
    return along(vectors[0], 1, tracker.shape(node))
