"""The operators of a network that take time, with their widths: layers, and what only moves memory.

What is fused into another operator is no call of its own: normalisations behind convolutions, activations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx

from graphcomp.channels import CONCATENATIONS
from graphcomp.ir import Program, RecurrentLayer, op_name
from graphcomp.measure import layer_row, plane_of
from graphcomp.runtime import ACTIVATIONS, Kernel

Operator = tuple[Kernel, int, int]
"""With its channels in and out."""


@dataclass(frozen=True)
class Call:
    """One operator of a network with its widths."""

    node: fx.Node
    source: fx.Node
    kernel: Kernel
    into: int
    out: int

    @property
    def operator(self) -> Operator:
        """Without its place."""
        return self.kernel, self.into, self.out


LIGHT_OPS = {
    "add": "add",
    "sub": "add",
    "mul": "mul",
    **dict.fromkeys(CONCATENATIONS, "concat"),
    **dict.fromkeys(["index_select", "pad", "channel_shuffle"], "move"),
    **dict.fromkeys(["transpose", "permute"], "shuffle"),
    **dict.fromkeys(["max_pool2d", "adaptive_max_pool2d"], "max_pool"),
    **dict.fromkeys(["avg_pool2d", "adaptive_avg_pool2d", "mean"], "avg_pool"),
    "batch_norm": "norm",
}
"""Operators without multiplications, by the name that `ir.operators` gives them."""
FUSABLE = {"relu", "relu6", "leaky_relu", "sigmoid", "tanh", "hardsigmoid"}
"""Activations that the runtime computes inside the convolution, addition or normalisation in front."""
FREE = {"relu"}
"""Those that its kernels compute before they store a result; the others go over what was stored once more."""


def calls(program: Program) -> list[Call]:
    """Every operator of a network that takes time, in the order of the graph."""
    found = []
    for node in program.graph.nodes:
        call = _layer_call(program, node) or _light_call(program, node)
        if call is not None:
            kernel = replace(call.kernel, activation=_activation(program, node))
            found.append(replace(call, kernel=kernel))
        found += _recurrent_calls(program, node)
    return found


def _recurrent_calls(program: Program, node: fx.Node) -> list[Call]:
    """A product with the inputs of all steps at once, and a recurrence for every direction."""
    layer = program.layer(cast(str, node.target)) if node.op == "call_module" else None
    if not isinstance(layer, RecurrentLayer):
        return []
    source = cast(fx.Node, node.args[0])
    steps, units = (program.shape(source) or ())[:1], layer.hidden_size
    rows = layer.gates * units * len(layer.ends)
    name = op_name(program, node)
    products = Call(node, source, Kernel("linear", steps), layer.input_size, rows)
    return [products, *(Call(node, node, Kernel(name, steps), units, units) for _ in layer.ends)]


def _layer_call(program: Program, node: fx.Node) -> Call | None:
    row = layer_row(program, node)
    if row is None:
        return None
    source = cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])
    before, after = program.shape(source) or (), program.shape(node) or ()
    if not row.kernel:
        return Call(node, source, Kernel("linear", plane_of(before, 2)), row.in_channels, row.out_channels)
    rank = len(row.kernel)
    is_transposed = "transpose" in row.kind.lower()
    if is_transposed:  # the adjoint of a convolution from its output to its input, as much work
        before, after = after, before
    into, out = (row.in_channels, row.out_channels) if not is_transposed else (
        row.out_channels,
        row.in_channels,
    )  # fmt: skip
    module = program.modules.get(str(node.target)) if node.op == "call_module" else None
    depthwise = row.groups > 1 and row.groups == into == out
    kernel = _windowed(
        "depthwise" if depthwise else "conv", before[-rank:], after[-rank:], row.kernel,
        getattr(module, "stride", None), getattr(module, "dilation", None), 1 if depthwise else row.groups,
    )  # fmt: skip
    return Call(node, source, kernel, into, out)


def _windowed(
    op: str,
    before: Sequence[int],
    after: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int] | None,
    dilation: Sequence[int] | None,
    groups: int = 1,
) -> Kernel:
    """Padding follows from the two planes, so that it need not be understood."""
    steps = (
        tuple(stride) if stride else tuple(max(1, round(b / a)) for b, a in zip(before, after, strict=True))
    )
    gaps = tuple(dilation) if dilation else (1,) * len(size)
    total = [
        max(0, (a - 1) * s + d * (k - 1) + 1 - b)
        for b, a, k, s, d in zip(before, after, size, steps, gaps, strict=True)
    ]
    pads = (*(t // 2 for t in total), *(t - t // 2 for t in total))
    return Kernel(op, tuple(before), tuple(size), steps, gaps, pads, groups)


def _light_call(program: Program, node: fx.Node) -> Call | None:
    op, shape = _light_op(program, node), program.shape(node)
    if op is None or shape is None:
        return None
    source = node.all_input_nodes[0]
    before = tuple(program.shape(source) or ())
    if op == "shuffle":  # of an image whose channels were split in two
        op, before = "move", (before[0], math.prod(before[1:3]), *before[3:]) if len(before) == 5 else ()
    if len(before) != 4:  # what is not an image is small
        return None
    plane = tuple(before[2:])
    if op in ("max_pool", "avg_pool"):
        after = tuple(shape[2:]) if len(shape) == 4 else (1, 1)
        return Call(node, source, _pool(program, node, op, plane, after), before[1], before[1])
    if op in ("add", "mul", "concat"):
        operands: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), operands.append)
        images = [s for n in operands if (s := program.shape(n)) is not None and len(s) == 4]
        if len(images) < 2:
            return None
        planes = {s[2:] for s in images}
        plane = max(planes, key=math.prod)
        op = "scale" if op == "mul" and len(planes) > 1 else op
        return Call(node, node, Kernel(op, plane), shape[1], shape[1])
    return Call(node, source, Kernel(op, plane), before[1], before[1])


def _light_op(program: Program, node: fx.Node) -> str | None:
    """Its name, if it is known and not fused into what is in front of it."""
    op = _op(program, node)
    if op is None or not node.all_input_nodes:
        return None
    if (op == "norm" and _is_folded(program, node)) or _is_absorbed(program, node):
        return None
    return op


def _op(program: Program, node: fx.Node) -> str | None:
    """The name that an operator without multiplications has here, if it is known."""
    name = op_name(program, node)
    return LIGHT_OPS.get(name, name if name in ACTIVATIONS else None)


def _activation(program: Program, node: fx.Node) -> str:
    """The activation that is computed as part of `node` and takes time; "" if there is none."""
    after = next(iter(node.users), None)
    if after is None:
        return ""
    op = _op(program, after)
    if op == "norm" and _is_folded(program, after):
        return _activation(program, after)
    return op if op is not None and op not in FREE and _is_absorbed(program, after) else ""


def _is_absorbed(program: Program, node: fx.Node) -> bool:
    """Whether `node` is an activation that is computed as part of what is in front of it."""
    before = next(iter(node.all_input_nodes), None)
    if before is None or _op(program, node) not in FUSABLE:
        return False
    return len(before.users) == 1 and _can_absorb(program, before)


def _is_folded(program: Program, norm: fx.Node) -> bool:
    """Whether a normalisation becomes part of the convolution in front of it."""
    before = norm.all_input_nodes[0]
    return len(before.users) == 1 and layer_row(program, before) is not None


def _can_absorb(program: Program, node: fx.Node) -> bool:
    """Whether an activation behind `node` is computed as part of it."""
    return layer_row(program, node) is not None or _op(program, node) in ("add", "norm")


def _window(program: Program, node: fx.Node) -> tuple[Any, Any]:
    """Size and stride of a pooling in either form; None where it has none."""
    if node.op == "call_module":
        module = program.layer(cast(str, node.target))
        return getattr(module, "kernel_size", None), getattr(module, "stride", None)
    if op_name(program, node) not in ("max_pool2d", "avg_pool2d"):
        return None, None
    given = dict(zip(("kernel_size", "stride"), node.args[1:], strict=False)) | node.kwargs
    given = fx.node.map_arg(given, program.values.__getitem__)
    return given.get("kernel_size"), given.get("stride")


def _pool(program: Program, node: fx.Node, op: str, before: Sequence[int], after: Sequence[int]) -> Kernel:
    size, stride = _window(program, node)
    if size is None:  # adaptive, or a mean: windows that tile the plane
        stride = tuple(max(1, b // a) for b, a in zip(before, after, strict=True))
        size = tuple(b - (a - 1) * s for b, a, s in zip(before, after, stride, strict=True))
    size, stride = ((v, v) if isinstance(v, int) else tuple(v) for v in (size, stride or size))
    return _windowed(op, before, after, size, stride, None)
