"""Rules for layers that channels sit on: convolutions and linear layers mint, normalisations pass on."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, fx, nn

from graphcomp.channels.labels import along, compact, unlabelled, varying
from graphcomp.channels.opaque import argument, opaque, operand, pin_value, what
from graphcomp.channels.tracker import Tracker
from graphcomp.ir import bound_arguments, form_of


def conv(tracker: Tracker, node: fx.Node) -> Any:
    """Reads along the channel axis and mints there; a depthwise one passes labels on."""
    module = cast(nn.modules.conv._ConvNd, tracker.program.layer(cast(str, node.target)))
    groups, transposed = module.groups, module.transposed
    labels, shape = operand(tracker, node), tracker.shape(node)
    weight = f"{node.target}.weight"
    axis = len(shape) - (module.weight.ndim - 2) - 1
    beside = is_beside(labels, axis)
    vector = _read_along(tracker, node, labels, axis)
    biases = [(f"{node.target}.bias", 0)] if module.bias is not None else []
    if groups == vector.numel() > 1:
        out = _depthwise(tracker, node, vector, weight, biases, shape[axis], transposed)
        return slide(tracker, node, labels) if beside else along(out, axis, shape)
    read, made = (0, 1) if transposed else (1, 0)
    out = _mint_rows(tracker, weight, made, shape[axis])
    tracker.site(node, "in", [(weight, read)], vector, 1 if transposed else groups)
    if transposed and groups > 1:
        tracker.site(node, "out", [(weight, made)], out, groups)
        tracker.site(node, "norm", biases, out) if biases else None
    else:
        tracker.site(node, "out", [(weight, made), *biases], out)
    if groups > 1:
        tracker.rows += [(node.name, rows.reshape(groups, -1), False) for rows in (vector, out)]
    if beside and _is_as_long(shape, labels):
        tracker.pin(node, out, BESIDE)
        return slide(tracker, node, labels)
    if beside:  # what it slides over stays, and it makes channels of its own
        tracker.pin(node, labels, f"{what(tracker, node)} slides over the channels")
    return along(out, axis, shape)


BESIDE = "works along another axis than that of the channels"


def is_beside(labels: Tensor, axis: int) -> bool:
    """Whether there are channels, but not on the axis that an operator takes for theirs."""
    axes = varying(labels)
    return bool(axes) and axis not in axes


def _read_along(tracker: Tracker, node: fx.Node, labels: Tensor, axis: int) -> Tensor:
    """The labels along the axis that an operator takes for the channels'; if it is not, some that stay."""
    if is_beside(labels, axis):
        return tracker.stand_in(node, labels.size(axis), BESIDE)
    return tracker.vector(node, labels, axis)


def slide(tracker: Tracker, node: fx.Node, labels: Tensor) -> Any:
    """A window that runs over the channels, as ECA's does, sees several of them at once: they stay."""
    shape = tracker.shape(node)
    if not _passes_by(tracker, node, labels):
        tracker.pin(node, labels, f"{what(tracker, node)} slides over the channels")
    if _is_as_long(shape, labels):
        return compact(labels).expand(shape)
    return along(tracker.stand_in(node, 1, f"{what(tracker, node)} slides over the channels"), 0, shape)


def _is_as_long(shape: Sequence[int], labels: Tensor) -> bool:
    return len(shape) == labels.ndim and all(shape[d] == labels.size(d) for d in varying(labels))


def _passes_by(tracker: Tracker, node: fx.Node, labels: Tensor) -> bool:
    """Whether a convolution sees one channel at a time."""
    if not _is_as_long(tracker.shape(node), labels):
        return False
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


def computed_conv(tracker: Tracker, node: fx.Node) -> Any:
    """F.conv2d and its like by a weight that is computed, perhaps for every sample: a product of two.

    Samples lie beside each other among the channels (`x.view(1, b * c, h, w)`, groups=b), of one sample as of
    several. What both have along the contracted axis goes together; else the kernels' own rows go.
    """
    form = form_of(node)
    given = None if form is None else bound_arguments(form, node)
    if given is None or "output_padding" in given:
        return opaque(tracker, node)
    source, weight, groups = (given[name] for name in ("input", "weight", "groups"))
    if weight in tracker.constant or not all(map(tracker.is_tensor, (source, weight))):
        return opaque(tracker, node)  # a layer that is kept as a computation (fold=False)
    if tracker.program.values.get(groups, groups) != 1:
        return opaque(tracker, node)
    labels, kernels, shape = tracker.labels(source), tracker.labels(weight), tracker.shape(node)
    axis = len(shape) - (kernels.ndim - 2) - 1
    if is_beside(labels, axis) or is_beside(kernels, 1) and is_beside(kernels, 0):
        return opaque(tracker, node)
    if isinstance(given["bias"], fx.Node):
        pin_value(tracker, node, given["bias"], f"no rule for the bias of a computed {what(tracker, node)}")
    if 1 in varying(kernels) and axis in varying(labels):
        vector = tracker.vector(node, kernels, 1)
        tracker.couple(node, vector, tracker.vector(node, labels, axis))
        tracker.mixings.append((node, weight, 1, vector, "product", ()))
        return unlabelled(shape)
    tracker.pin(node, labels, f"{what(tracker, node)} by computed weights without these channels")
    if 0 in varying(kernels):
        return along(tracker.vector(node, kernels, 0), axis, shape)
    tracker.pin(node, kernels, f"{what(tracker, node)} of what has no channels by computed weights")
    return unlabelled(shape)


def _mint_rows(tracker: Tracker, weight: str, dim: int, count: int) -> Tensor:
    known = tracker.known_rows(weight, dim)
    return tracker.mint(count) if known is None else known


def linear(tracker: Tracker, node: fx.Node) -> Tensor:
    """Reads and mints along the last axis; channels on another axis pass through untouched."""
    module = cast(nn.Linear, tracker.program.layer(cast(str, node.target)))
    labels, shape = operand(tracker, node), tracker.shape(node)
    last = labels.ndim - 1
    weight = f"{node.target}.weight"
    biases = [(f"{node.target}.bias", 0)] if module.bias is not None else []
    out = _mint_rows(tracker, weight, 0, shape[-1])
    beside = is_beside(labels, last)
    vector = _read_along(tracker, node, labels, last)
    tracker.site(node, "in", [(weight, 1)], vector)
    tracker.site(node, "out", [(weight, 0), *biases], out)
    if beside:
        tracker.pin(node, out, BESIDE)
        return compact(labels).expand(shape)
    return along(out, last, shape)


def embedding(tracker: Tracker, node: fx.Node) -> Any:
    """Mints along the last axis: a row of the table for every number."""
    module = cast(nn.Embedding, tracker.program.layer(cast(str, node.target)))
    if module.max_norm is not None:  # a norm over all channels, and the table changes with every call
        return opaque(tracker, node)
    for source in node.all_input_nodes:
        pin_value(tracker, node, source, "numbers that choose rows")
    weight, shape = f"{node.target}.weight", tracker.shape(node)
    out = _mint_rows(tracker, weight, 1, shape[-1])
    tracker.site(node, "out", [(weight, 1)], out)
    return along(out, len(shape) - 1, shape)


def functional_norm(tracker: Tracker, node: fx.Node) -> Any:
    """F.batch_norm with statistics of the network's own; the layers of torch are lifted when it is traced."""
    held = [n for n in node.all_input_nodes if n is not node.args[0]]
    if argument(tracker, node, 5, "training", False) or any(n.op != "get_attr" for n in held):
        return opaque(tracker, node)
    labels = operand(tracker, node)
    beside = is_beside(labels, 1)
    vector = _read_along(tracker, node, labels, 1)
    tracker.site(node, "norm", [(cast(str, n.target), 0) for n in held], vector)
    return labels if beside else along(vector, 1, tracker.shape(node))


def norm_axis(module: nn.Module, ndim: int) -> int:
    """The axis of what arrives, of `ndim` axes, that a normalisation (or PReLU) takes for the channels'."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return ndim - int(type(module).__name__[-2]) - 1
    return min(1, ndim - 1)


def norm(tracker: Tracker, node: fx.Node) -> Any:
    """Per-channel parameters and statistics."""
    module = tracker.program.layer(cast(str, node.target))
    labels, shape = operand(tracker, node), tracker.shape(node)
    axis = norm_axis(module, len(shape))
    names = [*module._parameters.items(), *module._buffers.items()]
    tensors = [(f"{node.target}.{n}", 0) for n, t in names if t is not None and t.numel() > 1 and t.ndim == 1]
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return labels
    if not tensors and isinstance(module, nn.PReLU | nn.modules.batchnorm._BatchNorm) and shape[axis] > 1:
        return opaque(tracker, node)
    beside = is_beside(labels, axis)
    if beside and not isinstance(module, nn.PReLU) and getattr(module, "running_mean", None) is None:
        tracker.pin(node, labels, f"{what(tracker, node)}'s statistics mix the channels")
    vector = _read_along(tracker, node, labels, axis)
    if tensors:
        tracker.site(node, "norm", tensors, vector)
    return labels if beside else along(vector, axis, shape)
