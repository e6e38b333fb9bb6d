"""What a program costs: parameters and multiply-accumulates, one function a counter.

`macs` counts `n * c/groups * k * oh * ow` for every call of a convolution or linear layer at batch 1, the
matrices of a recurrent layer once a step of time, and nothing for bias, normalisation, activation and
pooling. Percentages are always new / old of one counter.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, fx, nn

from graphcomp.ir import DctLayer, Program, RecurrentLayer, named_tensors, op_name
from graphcomp.records import LayerRow, Score, Snapshot

if TYPE_CHECKING:
    import networkx as nx


def params_trainable(program: Program) -> int:
    """Elements of all parameters that training would change, tied ones once."""
    return sum(p.numel() for p in program.module.parameters() if p.requires_grad)


def params_state(program: Program) -> int:
    """Elements of all parameters and buffers, tied ones once."""
    return sum(t.numel() for t in {id(t): t for t in named_tensors(program.module).values()}.values())


def params_order(program: Program) -> int:
    """Elements of the orders of coefficient layers: stored as integers, never trained (METHODS 4.6)."""
    layers = {m for m in program.called_modules().values() if isinstance(m, DctLayer)}
    return sum(m.index.numel() for m in layers if m.index is not None)


def macs_of(weight: Sequence[int], plane: Sequence[int] = ()) -> int:
    """Multiply-accumulates of one call: each element of the weight (n, c/groups, *kernel) at each place."""
    return math.prod(weight) * math.prod(plane)


def plane_of(shape: Sequence[int], weight_ndim: int) -> tuple[int, ...]:
    """Sizes of the positions of an activation, batch 1, that share a weight of so many dimensions.

    For a convolution its plane, for a linear layer the tokens of a sample, wherever the axis of samples is: a
    sequence may have its time in front, or both in one axis.
    """
    if weight_ndim > 2:
        return tuple(shape[len(shape) - (weight_ndim - 2) :])
    return tuple(shape[1:-1] if shape[0] == 1 else shape[:-1])


def macs(program: Program) -> int:
    """Multiply-accumulates of convolutions, linear and recurrent layers for one sample."""
    return sum(row.macs for row in layer_rows(program))


def with_macs(program: Program) -> "nx.MultiDiGraph":
    """`program.to_networkx()` with what the counters know of its layers (`layer_rows`).

    Their nodes have `macs`, multiply-accumulates of this call for one sample, and `channels`, those that they
    make, also where they are functions.
    """
    graph = program.to_networkx()
    for node in program.graph.nodes:
        if (row := _any_row(program, node)) is not None:
            graph.add_node(node.name, macs=row.macs, channels=row.out_channels)
    return graph


def layer_rows(program: Program) -> list[LayerRow]:
    """One row a call of a convolution, linear or recurrent layer, in graph order."""
    return [row for node in program.graph.nodes if (row := _any_row(program, node)) is not None]


def _any_row(program: Program, node: fx.Node) -> LayerRow | None:
    return layer_row(program, node) or _recurrent_row(program, node)


def layer_row(program: Program, node: fx.Node) -> LayerRow | None:
    """The row of one node; None if it is no convolution or linear layer with weights of its own."""
    found = _called(program, node)
    if found is None:
        return None
    out, into, measured = found.shape[0], found.shape[1] * found.groups, node
    if found.transposed:  # every *input* position multiplies the whole kernel
        out, into, measured = into, out, cast(fx.Node, node.args[0])
    return LayerRow(
        name=found.name,
        kind=found.kind,
        in_channels=into,
        out_channels=out,
        kernel=found.shape[2:],
        groups=found.groups,
        params=found.params,
        macs=macs_of(found.shape, plane_of(program.shape(measured) or (), len(found.shape))),
    )


def products(program: Program, node: fx.Node) -> list[tuple[Tensor | None, int]]:
    """The weights that a node multiplies by, and the multiply-accumulates with each for one sample.

    Empty if it is no layer of `layer_rows`; None is a weight that the network computes, or that is no tensor
    of its own (of a coefficient layer).
    """
    if (row := layer_row(program, node)) is not None:
        return [(layer_weight(program, node), row.macs)]
    if (module := _recurrent(program, node)) is None:
        return []
    steps = math.prod((program.shape(cast(fx.Node, node.args[0])) or ())[:-1])
    names = [f"{node.target}.{name}{end}" for end in module.ends for name in module.names[:2]]
    return [(weight, macs_of(weight.shape) * steps) for weight in map(program.tensors.__getitem__, names)]


def _recurrent(program: Program, node: fx.Node) -> RecurrentLayer | None:
    module = program.layer(cast(str, node.target)) if node.op == "call_module" else None
    return module if isinstance(module, RecurrentLayer) else None


def _recurrent_row(program: Program, node: fx.Node) -> LayerRow | None:
    module = _recurrent(program, node)
    if module is None:
        return None
    return LayerRow(
        name=cast(str, node.target),
        kind=type(module).__name__,
        in_channels=module.input_size,
        out_channels=module.hidden_size * len(module.ends),
        params=sum(tensor.numel() for tensor in module.parameters()),
        macs=sum(count for _, count in products(program, node)),
    )


class _Called(NamedTuple):
    """A convolution or linear layer as it is called; `shape`: of the weight that it multiplies with."""

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    params: int
    transposed: bool


def _called(program: Program, node: fx.Node) -> _Called | None:
    if node.op == "call_module":
        return _called_module(program, cast(str, node.target))
    name = op_name(program, node)
    if node.op != "call_function" or name not in _FUNCTIONS:
        return None
    weight = cast(fx.Node, node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
    tensor = program.values[weight]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    params = tensor.numel() + (program.values[bias].numel() if isinstance(bias, fx.Node) else 0)
    given = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    groups = int(program.values[given] if isinstance(given, fx.Node) else cast(int, given))
    return _Called(node.name, name, tuple(tensor.shape), groups, params, "transpose" in name)


def _called_module(program: Program, target: str) -> _Called | None:
    """Of a coefficient layer the parameters that are stored, orders included."""
    module = program.layer(target)
    stored: tuple[Tensor | None, ...]
    if isinstance(module, DctLayer):
        shape, stored = tuple(module.weight_shape), (module.coefficients, module.index, module.bias)
    elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        weight = program.tensors[f"{target}.weight"]
        shape, stored = tuple(weight.shape), (weight, module.bias)
    else:
        return None
    params = sum(tensor.numel() for tensor in stored if tensor is not None)
    groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
    return _Called(target, type(module).__name__, shape, groups, params, transposed)


_FUNCTIONS = {"linear", *(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))}


def layer_weight(program: Program, node: fx.Node) -> Tensor | None:
    """The weight of a node that `layer_row` has a row for; None if the network computes it."""
    if node.op == "call_module":
        return program.tensors.get(f"{node.target}.weight")
    weight = cast(fx.Node, node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
    return program.tensors[cast(str, weight.target)] if weight.op == "get_attr" else None


def snapshot(program: Program, score: Score | None = None) -> Snapshot:
    """All counters of a program."""
    rows = layer_rows(program)
    return Snapshot(
        params_trainable=params_trainable(program),
        params_state=params_state(program),
        params_order=params_order(program),
        macs=sum(row.macs for row in rows),
        score=score,
        layers=rows,
    )
