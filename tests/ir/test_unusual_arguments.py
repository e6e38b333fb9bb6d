"""Every row of every table again, with arguments that networks rarely give it.

Numbers that the network computes where the examples have literals, and tensors that never change where they
have activations. What a row does not follow it leaves alone by its own decision: none breaks, none is wrong.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.channels import analyse
from graphcomp.errors import ExportError
from graphcomp.ir import op_name
from graphcomp.ir.coefficients import LAYERS
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure import snapshot
from graphcomp.onnx import export_onnx
from graphcomp.onnx.rows import NoRow
from graphcomp.pipeline.verify import verify_pass
from tests.ir.test_operators import ROWS, SHAPE, branches, network
from tests.onnx.test_writing import assert_same
from tests.removing import ByRows, half, random_scores

COEFFICIENTS = {kind.__name__ for kind in LAYERS.values()}
"""Their weights are inputs of the file before it is finished."""


def with_computed_numbers(program: Program, node: fx.Node) -> bool:
    """Every literal integer becomes a sum with nothing times a size."""
    graph, found = program.graph, []

    def number(value: Any) -> Any:
        if type(value) is not int:
            return value
        found.append(value)
        with graph.inserting_before(node):
            size = graph.call_method("size", (next(iter(graph.nodes)), 0))
            return graph.call_function(operator.add, (graph.call_function(operator.mul, (size, 0)), value))

    node.args = fx.node.map_aggregate(node.args, number)
    node.kwargs = fx.node.map_aggregate(node.kwargs, number)
    return bool(found)


def with_a_constant(program: Program, node: fx.Node, which: int) -> bool:
    """An operand becomes a tensor of the network's own."""
    tensors = [
        i
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op != "get_attr" and isinstance(program.values.get(a), Tensor)
    ]
    if which >= len(tensors):
        return False
    meta = program.values[node.args[tensors[which]]]  # type: ignore[index]
    real = torch.rand(meta.shape) if meta.dtype.is_floating_point else torch.ones(meta.shape)
    name = f"constant_{node.name}"
    program.module.register_buffer(name, real.to(meta.dtype))
    with program.graph.inserting_before(node):
        node.update_arg(tensors[which], program.graph.get_attr(name))
    return True


KINDS: dict[str, Callable[[Program, fx.Node], bool]] = {
    "numbers": with_computed_numbers,
    "first": partial(with_a_constant, which=0),
    "second": partial(with_a_constant, which=1),
}


def changed(row: str, kind: str) -> Iterator[Program]:
    """The examples of a row that torch still takes."""
    for way in branches(row):
        if way.label.endswith("_") and kind != "numbers":  # a network that changes its own tensors
            continue
        program = network([way]).clone()
        nodes = [n for n in program.graph.nodes if n.op.startswith("call_") and op_name(program, n) == row]
        if sum(KINDS[kind](program, n) for n in nodes):
            program.module.recompile()
            if takes(program, SHAPE[0]):
                yield program


def takes(program: Program, batch: int) -> bool:
    """Whether torch itself does: a tensor of one sample does not fit three, nor a number everywhere."""
    try:
        nn.Module.__call__(program.module, torch.randn(batch, *SHAPE[1:]))
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def assert_followed(row: str, program: Program) -> None:
    whole = trace(program.module, torch.zeros(SHAPE), copy_weights=False)
    channels = analyse(whole)
    drop, _ = half(channels).feasible(random_scores(channels))
    if not (row == "conv2d" and not drop.rows):  # nothing reads the input any more
        verify_pass(ByRows(), whole, drop.rows)
    smaller = drop.apply("test")
    assert snapshot(smaller).macs <= snapshot(whole).macs
    if row not in COEFFICIENTS and takes(program, 3):
        with suppress(NoRow):  # torch's exporter writes the file then
            assert_same(smaller)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, kind: str) -> None:
    for program in changed(row, kind):
        assert_followed(row, program)


@pytest.mark.parametrize(("row", "kind"), [("split", "numbers"), ("repeat", "first"), ("add", "second")])
def test_there_is_something_to_follow(row: str, kind: str) -> None:
    assert list(changed(row, kind))


class Modulated(nn.Module):
    """A convolution with weights of its own for every sample, as a grouped one over all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.style = nn.Conv2d(3, 8, 1), nn.Linear(3, 8)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (self.style(x.mean((2, 3)))[:, None, :, None, None] + 1)
        y = self.stem(x).relu()
        n, _, h, w = y.shape
        y = F.conv2d(y.reshape(1, -1, h, w), weight.flatten(0, 1), padding=1, groups=n)
        return cast(Tensor, self.head(y.reshape(n, -1, h, w)))


def test_groups_that_the_network_computes(tmp_path: Path) -> None:
    """Their MACs are a sample's; ONNX fixes groups, so that a file is for one sample and says why."""
    program = trace(Modulated().eval(), torch.randn(SHAPE))
    plane = SHAPE[2] * SHAPE[3]
    assert snapshot(program).macs == plane * (3 * 8 + 8 * 6 * 9 + 6 * 2) + 3 * 8
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    verify_pass(ByRows(), program, drop.rows)
    smaller = drop.apply("test")
    export_onnx(smaller, tmp_path / "x.onnx", batches=(1,), dynamic=())
    with pytest.raises(NoRow, match="group of Conv, which is fixed in a file, from an open size"):
        assert_same(smaller)
    with pytest.raises(ExportError, match="conv2d: the ONNX exporter found"):
        export_onnx(smaller, tmp_path / "y.onnx")
    assert not (tmp_path / "y.onnx").exists()
