"""The ends of a network on labels, and what is no tensor: which channels a number counts."""

from typing import Any, cast

from torch import Tensor, fx

from graphcomp.channels.labels import varying
from graphcomp.channels.opaque import pin_value
from graphcomp.channels.tracker import Count, Tracker, Unread
from graphcomp.ir import op_name


def network_input(tracker: Tracker, node: fx.Node) -> Any:
    """One label for all of all inputs: nothing of them goes."""
    if not isinstance(tracker.program.values[node], Tensor):
        return tracker.program.values[node]
    shape = tracker.shape(node)
    labels = tracker.input_label.reshape([1] * len(shape)).expand(shape)
    tracker.pin(node, labels, "network input")
    return labels


def plain(tracker: Tracker, node: fx.Node, value: Any) -> Any:
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
        counted = list({(id(t), axis): (t, axis) for entry in entries for t, axis in entry}.values())
    elif name in ("numel", "stride") and sources:
        counted += [(x, None) for s in sources if varying(x := cast(Tensor, tracker.values[s]))]
    elif name in ("size", "len") and sources:
        tensor = cast(Tensor, tracker.values[sources[0]])
        index = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axes = varying(tensor)
        counted += [(tensor, a) for a in axes if not isinstance(index, int) or index % tensor.ndim == a]
    elif name == "getitem" and isinstance(index := node.args[1], int) and node.args[0] in tracker.entries:
        counted = tracker.entries[cast(fx.Node, node.args[0])][index]
    elif name == "_assert":
        for count in counted:
            tracker.pin_count(node, count, "the number of channels is asserted")
    elif node.op == "call_module" or sources and name not in QUERIES:
        for source in node.all_input_nodes:
            pin_value(tracker, node, source, f"no rule for {name}")
    tracker.counts[node] = counted
    return value


def _entries(tracker: Tracker, node: fx.Node, value: Any) -> tuple[list[Count], ...] | None:
    """What each number of a shape, of a part of one, or of two put together counts; None for all else."""

    def known(arg: Any) -> tuple[list[Count], ...] | None:
        if isinstance(arg, tuple | list):
            return tuple(list(tracker.counts.get(a, ())) if isinstance(a, fx.Node) else [] for a in arg)
        return tracker.entries.get(arg) if isinstance(arg, fx.Node) else None

    if not isinstance(value, tuple | list) or not node.args:
        return None
    name, first = op_name(tracker.program, node), node.args[0]
    tensor = tracker.values.get(first) if isinstance(first, fx.Node) else None
    if isinstance(tensor, Tensor) and (name == "size" or name == "getattr" and node.args[1] == "shape"):
        return tuple([(tensor, d)] if d in varying(tensor) else [] for d in range(tensor.ndim))
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
