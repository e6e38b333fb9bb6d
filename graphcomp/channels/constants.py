"""What a network computes that does not depend on its inputs: channels that are constant, and tensors.

A filter of zeros yields its bias everywhere; the normalisation and the activation behind it make another
constant of that, and the layers that read the channel add W c to what they compute. A removal that lets them
read zero loses that much; moved into their biases it is lossless (`shifts`):

    b' = b + mean over positions of (W * c),   c = what the removed channels hold             (METHODS 9.4)

The mean is what every position gets, unless the reader pads with zeros: then positions at the border get
less, the mean is what is closest to them all, and the shift is not exact.

As labels do (`channels.labels`), values run through the graph with all axes along which they are constant
narrowed to one element: a channel of a plane is one number. What is not certain is unknown, so that a gap
here costs accuracy, as it did, and is never wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels.labels import canonical, compact
from graphcomp.channels.moves import NotMovable, move, padding_of
from graphcomp.channels.pointwise import batch_norm_affine, drops, functional_affine, keeps_constants, rounds
from graphcomp.channels.rules import kind_of
from graphcomp.ir import Program, acts_in_place, is_read_later, op_name, same_memory, with_tensors

SAME = 1e-9
"""Largest relative difference between positions that get the same."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a tensor; both broadcast to its shape, from axes of one element.

    Attributes:
        value: floats in float64; 0 where it is not known.
        sure: bool, where it is.
    """

    value: Tensor
    sure: Tensor


def constants(program: Program) -> dict[fx.Node, Any]:
    """What is known of every node's value: a tuple of several tensors, None of what is no tensor."""
    run = _Run(program)
    for node in program.graph.nodes:
        run.known[node] = run.visit(node)
    return run.known


def _nothing(ndim: int) -> Known:
    return Known(torch.zeros([1] * ndim, dtype=torch.float64), torch.zeros([1] * ndim, dtype=torch.bool))


def _made(value: Tensor, sure: Tensor) -> Known:
    """What is not finite is not known either."""
    value = value.detach()
    if value.is_floating_point():
        sure = sure & value.isfinite()
    return Known(torch.where(sure, value, torch.zeros_like(value)), sure)


class _Run:
    """One run of the graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.known: dict[fx.Node, Any] = {}
        values, writers = program.values, [n for n in program.graph.nodes if n.all_input_nodes]
        written = [
            values[n.all_input_nodes[0]]
            for n in writers
            if acts_in_place(program.module, n) and is_read_later(program, n)
        ]
        self.changing = {n for n in program.graph.nodes if any(same_memory(values[n], w) for w in written)}

    def visit(self, node: fx.Node) -> Any:
        value = self.program.values[node]
        if isinstance(value, tuple | list) and value and all(isinstance(x, Tensor) for x in value):
            found = (
                None if any(x in self.changing for x in (node, *node.all_input_nodes)) else self.attempt(node)
            )
            return found if isinstance(found, tuple) else tuple(_nothing(x.ndim) for x in value)
        if not isinstance(value, Tensor):
            return None
        if node in self.changing:
            return _nothing(value.ndim)
        found = self.attempt(node)
        return found if isinstance(found, Known) and found.value.ndim == value.ndim else _nothing(value.ndim)

    def attempt(self, node: fx.Node) -> Any:
        """What a rule finds; None where there is none, or an operator does not take what is known."""
        if node.op == "get_attr":
            tensor = self.program.tensors[cast(str, node.target)].detach()
            tensor = tensor.double() if tensor.is_floating_point() else tensor
            return Known(tensor, torch.ones([1] * tensor.ndim, dtype=torch.bool))
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        rule = _RULES.get(kind_of(self.program, node) or "")
        try:
            return None if rule is None else rule(self, node)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotMovable):
            return None

    # -------------------------------------------------------------- arguments

    def source(self, node: fx.Node) -> fx.Node:
        return cast(fx.Node, node.args[0])

    def first(self, node: fx.Node) -> Known:
        found = self.known[self.source(node)]
        if not isinstance(found, Known):
            raise NotMovable
        return found

    def layer(self, node: fx.Node) -> nn.Module:
        """The module in float64 and eval mode."""
        layer = self.program.layer(cast(str, node.target))
        return with_tensors(layer, lambda t: t.detach().double() if t.is_floating_point() else t).eval()

    def run(self, node: fx.Node, first: Tensor | None = None) -> Any:
        """What a node yields for the known values, or for `first` as its first operand."""

        def load(source: fx.Node) -> Any:
            found = self.known[source]
            if first is not None and source is node.args[0]:
                return first
            return found.value.clone() if isinstance(found, Known) else self.program.values[source]

        args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
        with torch.no_grad():
            if node.op == "call_module":
                return self.layer(node)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
            return cast(Callable[..., Any], node.target)(*args, **kwargs)

    # -------------------------------------------------------------- rules

    def apply(self, node: fx.Node) -> Known | None:
        """Element by element: known where all operands are, and zero times anything is zero."""
        if drops(self.program, node):
            return None
        operands = [self.known[n] for n in node.all_input_nodes if isinstance(self.known[n], Known)]
        value, sure = self.run(node), operands[0].sure
        for x in operands[1:]:
            sure = sure & x.sure
        if op_name(self.program, node) == "mul":
            zero = [x.sure & (x.value == 0) for x in operands]
            for nothing in zero:
                sure = sure | nothing  # its value is 0 already: what is not known counts as 0
        return _made(value, sure)

    def same(self, node: fx.Node) -> Known:
        """Pooling and resizing: a constant plane stays what it is, or gets a pattern at a padded border."""
        x, shape = self.first(node), self.program.shape(node) or ()
        planes = range(2 if len(shape) > 2 else 1, len(shape))
        if any(t.size(d) > 1 for t in (x.value, x.sure) for d in planes) or len(shape) != x.value.ndim:
            raise NotMovable
        if keeps_constants(self.program, node):
            return x
        source = self.program.shape(self.source(node)) or ()
        plane = x.value.expand([n if d in planes else x.value.size(d) for d, n in enumerate(source)])
        return _made(compact(canonical(self.run(node, plane.contiguous()))), x.sure)

    def move(self, node: fx.Node) -> Any:
        """The operator itself, on values and on where they are known."""
        source = node.args[0]
        if isinstance(source, fx.Node) and isinstance(self.known[source], tuple):
            return self.known[source][cast(int, node.args[1])]
        if isinstance(source, fx.Node) and rounds(self.program, source, node):
            return None

        def whole(part: str) -> Callable[[fx.Node], Tensor]:
            def load(source: fx.Node) -> Tensor:
                found: Tensor = getattr(self.known[source], part)
                return found.expand(self.program.shape(source) or ())

            return load

        values = self.program.values.__getitem__
        value, sure = (move(self.program, node, whole(part), values) for part in ("value", "sure"))
        if isinstance(value, Tensor):
            return Known(compact(canonical(value)), compact(canonical(sure)))
        return tuple(
            Known(compact(canonical(v)), compact(canonical(s))) for v, s in zip(value, sure, strict=True)
        )

    def attribute(self, node: fx.Node) -> Any:
        """`.values` of the two tensors that max and min yield along an axis."""
        whole, name = self.program.values[self.source(node)], cast(str, node.args[1])
        at = next(i for i, part in enumerate(whole) if part is getattr(whole, name))
        return self.known[self.source(node)][at]

    def pad(self, node: fx.Node) -> Known | None:
        """A plane stays constant if it is padded with what it holds, or with its own; channels get more."""
        x, padding = self.first(node), padding_of(self.program, node)
        if padding is None:
            return None
        value, sure = in_one_shape(x)
        filler = float(padding.value or 0.0) if padding.mode == "constant" else None
        for d, (before, after) in padding.amounts(value.ndim).items():
            if value.size(d) == 1:
                sure = sure if filler is None else sure & (value == filler)
            elif filler is None or min(before, after) < 0:
                return None
            else:
                ends = [[*value.shape[:d], n, *value.shape[d + 1 :]] for n in (before, after)]
                value = torch.cat(
                    [value.new_full(ends[0], filler), value, value.new_full(ends[1], filler)], d
                )
                sure = torch.cat([sure.new_ones(ends[0]), sure, sure.new_ones(ends[1])], d)
        return _made(value, sure)

    def conv(self, node: fx.Node) -> Known | None:
        """Known where every weight of what is not known is zero; at a padded border, of all but zeros."""
        layer = cast(nn.Conv2d, self.layer(node))
        x = along_channels(self.first(node), layer, self.program.shape(self.source(node)) or ())
        certain = x.sure if is_uniform(layer) else x.sure & (x.value == 0)
        weight = per_output(layer)
        used, taps = (weight != 0).any(-1), weight.sum(-1)
        groups = layer.groups
        doubtful = (used & ~certain.reshape(groups, 1, -1)).any(-1).flatten()
        sums = (taps * torch.where(certain, x.value, 0.0).reshape(groups, 1, -1)).sum(-1).flatten()
        value = sums if layer.bias is None else sums + layer.bias
        axis = len(self.program.shape(node) or ()) - (layer.weight.ndim - 2) - 1
        return _laid(value, ~doubtful, axis, len(self.program.shape(node) or ()))

    def linear(self, node: fx.Node) -> Known | None:
        """The same along the last axis."""
        layer, x = cast(nn.Linear, self.layer(node)), self.first(node)
        width = layer.weight.shape[1]
        value, sure = (t.expand(*t.shape[:-1], width) for t in in_one_shape(x))
        doubtful = (~sure).to(torch.float64) @ (layer.weight != 0).to(torch.float64).T > 0
        return _made(nn.functional.linear(value, layer.weight, layer.bias), ~doubtful)

    def norm(self, node: fx.Node) -> Known | None:
        """Batch normalisation by its statistics is affine; a scale of zero leaves the shift."""
        layer, x = self.layer(node), self.first(node)
        axis = min(1, x.value.ndim - 1)
        if isinstance(layer, nn.PReLU):
            slope = _view(layer.weight, axis, x.value.ndim)
            value = torch.where(x.value > 0, x.value, slope * x.value)
            return _made(value, x.sure.expand(value.shape))
        if not isinstance(layer, nn.modules.batchnorm._NormBase) or axis != 1:
            return None
        width = (self.program.shape(node) or ())[axis]
        mean, var = layer.running_mean, layer.running_var
        if mean is None and any(x.value.size(d) > 1 for d in range(2, x.value.ndim)):
            return None  # by the statistics of a plane that is not constant
        if mean is None:  # a constant less its own mean
            bias = torch.zeros(width, dtype=torch.float64) if layer.bias is None else layer.bias
            return _made(_view(bias, axis, x.value.ndim), x.sure)
        affine = batch_norm_affine(layer.weight, layer.bias, mean, var, layer.eps)
        return None if affine is None else self.scaled(x, *(_view(t, axis, x.value.ndim) for t in affine))

    def functional_norm(self, node: fx.Node) -> Known | None:
        """`F.batch_norm` of tensors that the network holds."""
        affine = functional_affine(self.program, node)
        x = self.first(node)
        return None if affine is None else self.scaled(x, *(_view(t, 1, x.value.ndim) for t in affine))

    def scaled(self, x: Known, scale: Tensor, shift: Tensor) -> Known:
        value = x.value * scale + shift
        return _made(value, (x.sure | (scale == 0)).expand(value.shape))

    def reduce(self, node: fx.Node) -> Any:
        """The operator itself, where all that it reduces is known."""
        x, shape = self.first(node), self.program.shape(self.source(node)) or ()
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        given = [dims] if isinstance(dims, int) else range(len(shape)) if dims is None else dims
        reduced = {cast(int, d) % len(shape) for d in cast(Sequence[Any], given)}
        value, sure = (
            t.expand([n if d in reduced else t.size(d) for d, n in enumerate(shape)]) for t in in_one_shape(x)
        )
        found = self.run(node, value)
        first = found if isinstance(found, Tensor) else found[0]
        for d in reduced:
            sure = sure.all(d, keepdim=True)
        if first.ndim < len(shape):
            sure = sure.reshape([sure.size(d) for d in range(len(shape)) if d not in reduced])
        return _made(found, sure) if isinstance(found, Tensor) else tuple(_made(t, sure) for t in found)

    def glu(self, node: fx.Node) -> Known:
        """Half of an axis times a gate from the other half; zero where the first is."""
        x, shape = self.first(node), self.program.shape(self.source(node)) or ()
        layer = self.program.modules.get(str(node.target)) if node.op == "call_module" else None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", getattr(layer, "dim", -1))
        axis = cast(int, dim) % len(shape)
        value, sure = (
            t.expand([n if d == axis else t.size(d) for d, n in enumerate(shape)]) for t in in_one_shape(x)
        )
        one, gate = sure.chunk(2, axis)
        return _made(self.run(node, value), one & (gate | (value.chunk(2, axis)[0] == 0)))


_RULES: dict[str, Callable[[_Run, fx.Node], Any]] = {
    "pass": _Run.apply,
    "couple": _Run.apply,
    "spatial": _Run.same,
    "move": _Run.move,
    "stack": _Run.move,
    "pad": _Run.pad,
    "conv": _Run.conv,
    "linear": _Run.linear,
    "norm": _Run.norm,
    "functional_norm": _Run.functional_norm,
    "reduce": _Run.reduce,
    "attribute": _Run.attribute,
    "glu": _Run.glu,
}
"""By what `rules.kind_of` says; all other operators are not followed."""


def in_one_shape(x: Known) -> tuple[Tensor, Tensor]:
    """Value and certainty in one shape."""
    shape = torch.broadcast_shapes(x.value.shape, x.sure.shape)  # type: ignore[no-untyped-call]
    return x.value.expand(shape), x.sure.expand(shape)


def _view(vector: Tensor, axis: int, ndim: int) -> Tensor:
    view = [1] * ndim
    view[axis] = vector.numel()
    return vector.detach().reshape(view)


def _laid(value: Tensor, sure: Tensor, axis: int, ndim: int) -> Known:
    return _made(_view(value, axis, ndim), _view(sure, axis, ndim))


def is_uniform(layer: nn.Conv2d) -> bool:
    """Whether a convolution of constant planes yields constant planes."""
    if getattr(layer, "transposed", False):
        return False
    padding = cast(Any, layer.padding)
    padded = (
        any(padding) if not isinstance(padding, str) else padding == "same" and max(layer.kernel_size) > 1
    )
    return not padded or layer.padding_mode != "zeros"


def per_output(layer: nn.Conv2d) -> Tensor:
    """The weight as (groups, outputs of one, inputs of one, taps)."""
    blocks = layer.weight.detach().reshape(layer.groups, -1, *layer.weight.shape[1:]).flatten(3)
    return blocks.transpose(1, 2) if getattr(layer, "transposed", False) else blocks


def along_channels(x: Known, layer: nn.Module, shape: Sequence[int]) -> Known:
    """What is known of each channel that a layer reads, as vectors; only what holds at all positions."""
    weight = cast(Tensor, layer.weight)
    axis = len(shape) - (weight.ndim - 2) - 1
    value, sure = (
        t.expand([n if d == axis else t.size(d) for d, n in enumerate(shape)]).movedim(axis, 0).flatten(1)
        for t in in_one_shape(x)
    )
    certain = sure.all(1) & (value == value[:, :1]).all(1)
    return Known(torch.where(certain, value[:, 0], 0.0), certain)
